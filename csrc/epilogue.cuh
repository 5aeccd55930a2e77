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

// The 16 rows of a warp in a 64-row block, from one column on. A wgmma accumulator tile gives each lane, for each
// 8 columns, two neighbours in row lane / 4 and two in row lane / 4 + 8: `half` 0 and 1 below.
// kTail: a gate or a residual may follow the activation; which of them do is told at run time.
template <class Element, int kActivation, bool kTail>
struct Rows {
    unsigned short* y;           // the first element of the warp
    u32 stored;                  // from there to the first element this lane stores: row lane / 4 % 4
    const unsigned short* gates;
    u32 gate[2];                 // offsets of the first columns this lane computes
    int valid;                   // rows from the one y points to up to the end of the matrix
    int columns;                 // columns up to the end of the matrix
    int n, lane;

    __device__ __forceinline__ Rows(unsigned short* to, const unsigned short* gates, int m, int n, int rows_per_sample,
                                    int row, int column, int lane)
        : gates(gates), valid(m - row - lane / 4 % 4), columns(n - column), n(n), lane(lane) {
        y = to + (u64(row) * n + column);
        stored = lane / 4 % 4 * n + stored_column();
        if (kTail && gates != nullptr)
            for (int half = 0; half < 2; ++half)
                gate[half] = min(row + lane / 4 + 8 * half, m - 1) / rows_per_sample * n + column + 2 * (lane % 4);
    }

    // Of the eight 16-byte pieces of 64 columns, the one this lane stores.
    __device__ __forceinline__ int stored_column() const { return 8 * (lane % 4) + 32 * (lane / 16); }

    // Columns `from` … + 63, accumulators d[0 … 31]. bias: fp32, of these columns. residual: this warp's 16 rows of
    // these columns in 128-byte swizzle; 0 without one. Both are addresses in shared memory.
    __device__ __forceinline__ void store(const float* d, int from, u32 bias, u32 residual) const {
        const bool lower = lane >= 16, inside = from + stored_column() < columns;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            u32 left[4], right[4];
            finish(d, half, from, bias, residual, 0, left);
            finish(d + 16, half, from + 32, bias + 32 * 4, residual, 4, right);
            // Lanes l and l + 16 have 16 bytes of the left and of the right 32 columns, of rows four apart. They
            // exchange, so that each instruction stores four whole lines of 128 bytes.
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const u32 other = __shfl_xor_sync(0xFFFFFFFFu, lower ? left[i] : right[i], 16);
                left[i] = lower ? other : left[i];
                right[i] = lower ? right[i] : other;
            }
            if (inside && valid > 8 * half) ptx::store_global(y + 8 * half * n + from + stored, left);
            if (inside && valid > 8 * half + 4) ptx::store_global(y + (8 * half + 4) * n + from + stored, right);
        }
    }

    // One half of 32 columns to 16-bit: afterwards this lane has columns 8·(lane % 4) … + 7 of its row. chunk: the
    // 16-byte piece of the residual's 64 columns where these start.
    __device__ __forceinline__ void finish(const float* d, int half, int from, u32 bias, u32 residual,
                                           int chunk, u32 (&out)[4]) const {
        u32 added[4];
        if (kTail && residual != 0)
            ptx::load_matrices(added, residual + (lane % 8 + 8 * half) * 128 + (chunk + lane / 8 ^ lane % 8) * 16);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const float2 b = ptx::load_shared_pair(bias + (8 * j + 2 * (lane % 4)) * 4);
            float v[2] = {d[4 * j + 2 * half] + b.x, d[4 * j + 2 * half + 1] + b.y};
            lynx::activate_all<kActivation>(v);
            if (kTail && gates != nullptr) {
                const u32 g = from + 8 * j < columns ? ptx::load_global(gates + (gate[half] + from + 8 * j)) : 0;
                v[0] *= Element::low(g), v[1] *= Element::high(g);
            }
            if (kTail && residual != 0) v[0] += Element::low(added[j]), v[1] += Element::high(added[j]);
            out[j] = Element::pack(v[0], v[1]);
        }
        transpose_in_quad(out, lane);
    }
};

}  // namespace epilogue
