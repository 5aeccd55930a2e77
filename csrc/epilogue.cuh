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
// sample they are staged in shared memory as fp32 (`staged`, of the tile's first column: the bias, then, `width`
// floats on, the gate). Otherwise `staged` is null and each lane reads those of its own two rows.
struct Columns {
    const float* staged;
    const unsigned short *bias, *gate;  // (samples, N) or null
    int bias_rows, gate_rows;           // rows of a sample
};

// The 16 rows of a warp in a 64-row block, from one column on. A wgmma accumulator tile gives each lane, for each
// 8 columns, two neighbours in row lane / 4 and two in row lane / 4 + 8: `half` 0 and 1 below.
// kTail: a gate, a residual or samples that meet inside a warpgroup; which of them is told at run time.
template <class Element, int kActivation, bool kTail, int kWidth>
struct Rows {
    const Columns& vectors;
    unsigned short* y;             // row lane / 4, first column this lane stores
    u32 bias_at[2], gate_at[2];    // offsets of the first column this lane computes; only where nothing is staged
    int valid;                     // rows from row lane / 4 to the end of the matrix
    int columns;                   // columns to the end of the matrix
    int n, lane;

    __device__ __forceinline__ Rows(unsigned short* to, const Columns& vectors, int m, int n, int row, int column,
                                    int lane)
        : vectors(vectors), valid(m - row - lane / 4), columns(n - column), n(n), lane(lane) {
        const int at = row + lane / 4, quad = lane % 4;
        y = to + (u64(at) * n + column + 8 * quad);
        if (kTail && vectors.staged == nullptr)
            for (int half = 0; half < 2; ++half) {
                const int own = min(at + 8 * half, m - 1);
                bias_at[half] = own / vectors.bias_rows * n + column + 2 * quad;
                gate_at[half] = own / vectors.gate_rows * n + column + 2 * quad;
            }
    }

    // Two neighbouring elements of a vector in global memory; `absent` where there is none.
    __device__ __forceinline__ float2 pair(const unsigned short* vector, u32 at, bool inside, float absent) const {
        if (vector == nullptr || !inside) return {absent, absent};
        const u32 word = ptx::load_global(vector + at);
        return {Element::low(word), Element::high(word)};
    }

    // Columns `from` … + 31, accumulators d[0 … 15]. residual: shared memory with this warp's 16 rows of 64 columns
    // in 128-byte swizzle, of which the four 16-byte chunks from `chunk` on are these columns; 0 without one.
    __device__ __forceinline__ void store(const float* d, int from, u32 residual, int chunk) const {
        const int quad = lane % 4;
        u32 out[2][4], added[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int column = from + 8 * j;
            float2 bias[2], gate[2];
            if (!kTail || vectors.staged != nullptr) {
                const float* staged = vectors.staged + column + 2 * quad;
                bias[0] = bias[1] = ptx::load_shared_pair(staged);
                if (kTail) gate[0] = gate[1] = ptx::load_shared_pair(staged + kWidth);
            } else {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    bias[half] = pair(vectors.bias, bias_at[half] + column, column < columns, 0.0f);
                    gate[half] = pair(vectors.gate, gate_at[half] + column, column < columns, 1.0f);
                }
            }
            if (kTail && j % 2 == 0 && residual != 0)
                ptx::load_matrices(added, residual + lane % 16 * 128 + (chunk + j + lane / 16 ^ lane % 8) * 16);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float v[2] = {d[4 * j + 2 * half] + bias[half].x, d[4 * j + 2 * half + 1] + bias[half].y};
                lynx::activate_all<kActivation>(v);
                if (kTail) v[0] *= gate[half].x, v[1] *= gate[half].y;
                if (kTail && residual != 0) {
                    const u32 r = added[j % 2 * 2 + half];
                    v[0] += Element::low(r), v[1] += Element::high(r);
                }
                out[half][j] = Element::pack(v[0], v[1]);
            }
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            transpose_in_quad(out[half], lane);
            if (valid > 8 * half && from + 8 * quad < columns) ptx::store_global(y + 8 * half * n + from, out[half]);
        }
    }
};

}  // namespace epilogue
