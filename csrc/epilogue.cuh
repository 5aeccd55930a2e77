// From accumulators to memory: bias, activation, gate, residual, rounding, store.
#pragma once

#include "activations.cuh"
#include "element.cuh"
#include "ptx.cuh"

namespace epilogue {

using ptx::u32;
using ptx::u64;

// Transposes a 4 × 4 matrix of words whose column c lane c of a quad holds: afterwards word i of lane c is what
// was word c of lane i. Turns four 4-byte pieces of a row into one of 16 bytes.
__device__ __forceinline__ void transpose_in_quad(u32 (&x)[4], int lane) {
    const bool odd = lane & 1, upper = lane & 2;
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
        const u32 other = __shfl_xor_sync(0xFFFFFFFFu, odd ? x[i] : x[i + 1], 1);
        x[i] = odd ? other : x[i];
        x[i + 1] = odd ? x[i + 1] : other;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const u32 other = __shfl_xor_sync(0xFFFFFFFFu, upper ? x[i] : x[i + 2], 2);
        x[i] = upper ? other : x[i];
        x[i + 2] = upper ? x[i + 2] : other;
    }
}

// What the epilogue takes per column, one row a sample: bias and gate. Where all rows of a warpgroup belong to one
// sample they are staged in shared memory as fp32: the bias, then the gate, `kWidth` floats each. Otherwise each
// lane reads those of its own two rows from global memory. kTail: 0 for no gate, 2 if samples may meet.
template <class Element, int kWidth, int kTail>
struct Vectors {
    static constexpr int kOwn = (kWidth + 127) / 128;  // of each vector, held by one thread of the warpgroup
    const unsigned short *bias, *gate;                 // (samples, N) or null
    int bias_rows, gate_rows;                          // rows of a sample
    int n;
    bool together;  // all rows in one sample
    u32 own_bias[kOwn], own_gate[kOwn];  // as loaded: nothing may wait for them before `stage`

    // Starts the loads of columns `column` … for rows `top` … `bottom`. They stay in registers until `stage`.
    __device__ __forceinline__ void load(int top, int bottom, int column, int thread) {
        const int bias_sample = top / bias_rows, gate_sample = kTail ? top / gate_rows : 0;
        together = kTail < 2 || (bottom / bias_rows == bias_sample && bottom / gate_rows == gate_sample);
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
            const int at = column + thread + 128 * i;
            const bool inside = at < n && thread + 128 * i < kWidth;
            own_bias[i] = 0, own_gate[i] = 0;
            if (bias != nullptr && inside) own_bias[i] = bias[u64(bias_sample) * n + at];
            if (kTail && gate != nullptr && inside) own_gate[i] = gate[u64(gate_sample) * n + at];
        }
    }

    __device__ __forceinline__ void stage(float* to, int thread) const {
#pragma unroll
        for (int i = 0; i < kOwn; ++i)
            if (thread + 128 * i < kWidth) {
                to[thread + 128 * i] = Element::low(own_bias[i]);
                if (kTail) to[kWidth + thread + 128 * i] = Element::low(own_gate[i]);
            }
    }
};

// Where 32 columns of the residual are. In shared memory: this warp's 16 rows of 64 columns in 128-byte swizzle, of
// which the four 16-byte chunks from `chunk` on are these; `at` is 0 without a residual.
struct Boxes {
    u32 at;
    int chunk;
};

// In global memory: the whole matrix; null without a residual.
struct Global {
    const unsigned short* residual;
};

// The 16 rows of a warp in a 64-row block. A wgmma accumulator tile gives each lane, for each 8 columns, two
// neighbours in row lane / 4 and two in row lane / 4 + 8: `half` 0 and 1 below.
// kTail: 1 for a gate, a residual or both; 2 if samples may meet, too. Which of them is told at run time.
template <class Element, int kActivation, int kTail, int kWidth>
struct Rows {
    const Vectors<Element, kWidth, kTail>& vectors;
    const float* staged;  // where the vectors are, from the first column this lane computes
    unsigned short* y;    // first row and column this lane stores
    int stride;           // elements from row to row of y
    u32 bias_at[2], gate_at[2];  // where this lane's two rows find their first elements, if nothing is staged
    int row, column;      // of y, the first ones this lane stores
    int valid, columns;   // rows and columns from this lane's first ones on that are in the matrix
    int lane;

    __device__ __forceinline__ Rows(unsigned short* y, int stride, const Vectors<Element, kWidth, kTail>& vectors,
                                    const float* staged, int m, int first_row, int column, int lane)
        : vectors(vectors), staged(staged + 2 * (lane % 4)), stride(stride), row(first_row + lane / 4),
          column(column + 8 * (lane % 4)), valid(m - row), columns(vectors.n - this->column), lane(lane) {
        this->y = y + (u64(row) * stride + this->column);
        if (kTail == 2 && !vectors.together)
            for (int half = 0; half < 2; ++half) {
                const int own = min(row + 8 * half, m - 1), at = column + 2 * (lane % 4);
                bias_at[half] = own / vectors.bias_rows * vectors.n + at;
                gate_at[half] = own / vectors.gate_rows * vectors.n + at;
            }
    }

    // Two elements of a vector in global memory; `absent` where there are none.
    __device__ __forceinline__ float2 pair(const unsigned short* vector, u32 at, bool inside, float absent) const {
        if (vector == nullptr || !inside) return {absent, absent};
        const u32 word = ptx::load_global(vector + at);
        return {Element::low(word), Element::high(word)};
    }

    // The residual of rows 8 · half … + 7 as the accumulators have it.
    __device__ __forceinline__ bool residual(u32 (&to)[4], Boxes boxes, int, int half) const {
        if (boxes.at == 0) return false;
        ptx::load_matrices(to, boxes.at + (8 * half + lane % 8) * 128 + (boxes.chunk + lane / 8 ^ lane % 8) * 16);
        return true;
    }

    __device__ __forceinline__ bool residual(u32 (&to)[4], Global global, int from, int half) const {
        if (global.residual == nullptr) return false;
        to[0] = to[1] = to[2] = to[3] = 0;
        if (valid > 8 * half && from < columns)
            ptx::load_global(to, global.residual + u64(row + 8 * half) * vectors.n + column + from);
        transpose_in_quad(to, lane);
        return true;
    }

    // Columns `from` … + 31, accumulators d[0 … 15]. Residual: Boxes or Global.
    template <class Residual>
    __device__ __forceinline__ void store(const float* d, int from, Residual where) const {
#pragma unroll
        for (int half = 0; half < 2; ++half) {  // one after the other: registers are scarce
            u32 out[4], added[4];
            const bool adds = kTail && residual(added, where, from, half);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int at = from + 8 * j;
                float2 bias, gate;
                if (kTail < 2 || vectors.together) {
                    bias = ptx::load_shared_pair(staged + at);
                    gate = {1.0f, 1.0f};
                    if (kTail && vectors.gate != nullptr) gate = ptx::load_shared_pair(staged + kWidth + at);
                } else {
                    const bool inside = at < columns + 8 * (lane % 4);
                    bias = pair(vectors.bias, bias_at[half] + at, inside, 0.0f);
                    gate = pair(vectors.gate, gate_at[half] + at, inside, 1.0f);
                }
                float v[2] = {d[4 * j + 2 * half] + bias.x, d[4 * j + 2 * half + 1] + bias.y};
                lynx::activate_all<kActivation>(v);
                if (kTail) v[0] *= gate.x, v[1] *= gate.y;
                if (adds) v[0] += Element::low(added[j]), v[1] += Element::high(added[j]);
                out[j] = Element::pack(v[0], v[1]);
            }
            transpose_in_quad(out, lane);
            if (valid > 8 * half && from < columns) ptx::store_global(y + 8 * half * stride + from, out);
        }
    }
};

}  // namespace epilogue
