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
    unsigned short* y;           // row lane / 4, first column this lane stores
    const unsigned short* gates;
    u32 gate[2];                 // offsets of the first column this lane computes
    int valid;                   // rows from row lane / 4 to the end of the matrix
    int columns;                 // columns to the end of the matrix
    int n, lane;

    __device__ __forceinline__ Rows(unsigned short* to, const unsigned short* gates, int m, int n, int rows_per_sample,
                                    int row, int column, int lane)
        : gates(gates), valid(m - row - lane / 4), columns(n - column), n(n), lane(lane) {
        const int at = row + lane / 4, quad = lane % 4;
        y = to + (u64(at) * n + column + 8 * quad);
        if (kTail && gates != nullptr)
            for (int half = 0; half < 2; ++half)
                gate[half] = min(at + 8 * half, m - 1) / rows_per_sample * n + column + 2 * quad;
    }

    // Columns `from` … + 31, accumulators d[0 … 15]. bias: fp32, of the first of these columns. residual: shared
    // memory with this warp's 16 rows of 64 columns in 128-byte swizzle, of which the four 16-byte chunks from
    // `chunk` on are these columns; 0 without one.
    __device__ __forceinline__ void store(const float* d, int from, const float* bias, u32 residual, int chunk) const {
        const int quad = lane % 4;
        u32 out[2][4], added[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const float2 b = ptx::load_shared_pair(bias + 8 * j + 2 * quad);
            if (kTail && j % 2 == 0 && residual != 0)
                ptx::load_matrices(added, residual + lane % 16 * 128 + (chunk + j + lane / 16 ^ lane % 8) * 16);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float v[2] = {d[4 * j + 2 * half] + b.x, d[4 * j + 2 * half + 1] + b.y};
                lynx::activate_all<kActivation>(v);
                if (kTail && gates != nullptr) {
                    const u32 g = from + 8 * j < columns ? ptx::load_global(gates + (gate[half] + from + 8 * j)) : 0;
                    v[0] *= Element::low(g), v[1] *= Element::high(g);
                }
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
