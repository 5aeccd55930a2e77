// What a block adds up over the chunks of its rows: Σz², Σz̃² and t = z·Aᵀ on tensor cores, and how these sums meet,
// first those of a block's warps, then those of a cluster's blocks, in a fixed order.
#pragma once

#include "sparsify_tile.cuh"

namespace lynx {

// Sums of squares of 16 rows: products z·zᵀ of rows 0–7 and of rows 8–15, of which the diagonals count. A NaN
// makes its row's sum NaN.
struct Squares {
    float low[4] = {}, high[4] = {};

    // One k16 step of z, as A fragment and as the two rows' words.
    __device__ __forceinline__ void add(const u32 (&a)[4], u32 low0, u32 low1, u32 high0, u32 high1) {
        Element::mma(low, a, low0, low1);
        Element::mma(high, a, high0, high1);
    }
    // Of row g, g + 8, in the lane of the quad that has column g of the diagonal: q = g / 2.
    __device__ __forceinline__ float row(int h, int g) const {
        return h ? (g % 2 ? high[3] : high[2]) : (g % 2 ? low[1] : low[0]);
    }
};

// t (16 × kSumRank) += z · Aᵀ over one chunk, a the fragments of z; `fragment` is this warp's part of the stage plus
// the lane's offset.
__device__ __forceinline__ void multiply_lora(float (&t)[kTiles][4], const u32 (&a)[4][4], u32 fragment) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
        const uint4 low = load_shared(fragment + n * 8 * kRowBytes);
        const uint4 high = load_shared((fragment ^ 16) + n * 8 * kRowBytes);
        Element::mma(t[n], a[0], low.x, low.y);
        Element::mma(t[n], a[1], low.z, low.w);
        Element::mma(t[n], a[2], high.x, high.y);
        Element::mma(t[n], a[3], high.z, high.w);
    }
}

__device__ __forceinline__ void add_to(float4& sum, const float4& v) {
    sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
}

// 8 neighbouring columns of a row of t in fp32.
struct Columns {
    float4 low = {}, high = {};

    __device__ __forceinline__ void add(const float* from) {
        const float4* const words = reinterpret_cast<const float4*>(from);
        add_to(low, words[0]), add_to(high, words[1]);
    }
    __device__ __forceinline__ uint4 rounded() const {
        return make_uint4(Element::pack(low.x, low.y), Element::pack(low.z, low.w),
                          Element::pack(high.x, high.y), Element::pack(high.z, high.w));
    }
};

// The sums of one block's rows over its part of K: those of its warps, in shared memory.
struct BlockSums {
    const float2* squares;  // [kColumnWarps][kRowTile] of Σz², Σz̃²
    const float* t;         // [kColumnWarps][kRowTile][kPartialStride]

    __device__ __forceinline__ float2 squares_of(int row) const {
        float2 sum = {};
#pragma unroll
        for (int w = 0; w < kColumnWarps; ++w) {
            const float2 part = squares[w * kRowTile + row];
            sum.x += part.x, sum.y += part.y;
        }
        return sum;
    }
    __device__ __forceinline__ Columns columns_of(int row, int column) const {
        Columns sum;
#pragma unroll
        for (int w = 0; w < kSumSets; ++w) sum.add(t + (w * kRowTile + row) * kPartialStride + column);
        return sum;
    }
};

__device__ __forceinline__ void store_scale(const SparsifyParams& p, const Position& at, int row, float2 sum) {
    if (p.values != nullptr && at.first_row + row < p.m) {
        p.scale[at.first_row + row] = p.native ? 1.f : sqrtf(sum.x / (sum.y + p.scale_eps));
    }
}

__device__ __forceinline__ void store_columns(const SparsifyParams& p, const Position& at, int row, int column,
                                              const Columns& sum) {
    if (at.first_row + row < p.m && column < p.rank) {
        *reinterpret_cast<uint4*>(p.t + (at.first_row + row) * p.t_stride + column * 2) = sum.rounded();
    }
}

#if LYNX_SM90

// Where the blocks of a cluster send each other their sums: each stores those of kOwnRows rows.
struct Exchange {
    float2 squares[kSplits][kOwnRows];
    alignas(16) float t[kSplits][kOwnRows][kSumRank ? kSumRank : 4];
};

// All threads of the block. Sends each row's sums to the block that stores it, and stores its own rows.
__device__ __forceinline__ void meet(const SparsifyParams& p, const Position& at, const BlockSums& sums, u32 barrier,
                                     const Exchange& exchange) {
    const int own_rows = min(kOwnRows, max(kRowTile - at.rank * kOwnRows, 0));
    for (int row = threadIdx.x; row < kRowTile; row += kThreads) {
        const int owner = row / kOwnRows;
        send(cluster_address(shared_address(&exchange.squares[at.rank][row % kOwnRows]), owner), sums.squares_of(row),
             cluster_address(barrier, owner));
    }
    if constexpr (kSumRank > 0) {
        for (int item = threadIdx.x; item < kRowTile * kTiles; item += kThreads) {
            const int row = item / kTiles, column = item % kTiles * 8, owner = row / kOwnRows;
            const Columns sum = sums.columns_of(row, column);
            const u32 to = cluster_address(shared_address(&exchange.t[at.rank][row % kOwnRows][column]), owner);
            const u32 remote_barrier = cluster_address(barrier, owner);
            send(to, sum.low, remote_barrier);
            send(to + 16, sum.high, remote_barrier);
        }
    }
    receive(barrier);
    for (int row = threadIdx.x; row < own_rows; row += kThreads) {
        float2 sum = {};
#pragma unroll
        for (int r = 0; r < kSplits; ++r) sum.x += exchange.squares[r][row].x, sum.y += exchange.squares[r][row].y;
        store_scale(p, at, at.rank * kOwnRows + row, sum);
    }
    if constexpr (kSumRank > 0) {
        for (int item = threadIdx.x; item < own_rows * kTiles; item += kThreads) {
            const int row = item / kTiles, column = item % kTiles * 8;
            Columns sum;
#pragma unroll
            for (int r = 0; r < kSplits; ++r) sum.add(&exchange.t[r][row][column]);
            store_columns(p, at, at.rank * kOwnRows + row, column, sum);
        }
    }
}

// Bytes a block receives in `meet`.
__device__ __forceinline__ u32 bytes_to_meet(const Position& at) {
    return kSplits * min(kOwnRows, max(kRowTile - at.rank * kOwnRows, 0)) * (kSumRank * 4 + 8);
}

#endif

// All threads of a block that has its rows for itself.
__device__ __forceinline__ void store_sums(const SparsifyParams& p, const Position& at, const BlockSums& sums) {
    for (int row = threadIdx.x; row < kRowTile; row += kThreads) store_scale(p, at, row, sums.squares_of(row));
    if constexpr (kSumRank > 0) {
        for (int item = threadIdx.x; item < kRowTile * kTiles; item += kThreads) {
            const int row = item / kTiles, column = item % kTiles * 8;
            store_columns(p, at, row, column, sums.columns_of(row, column));
        }
    }
}

}  // namespace lynx
