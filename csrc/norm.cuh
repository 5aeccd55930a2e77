// The first pass of a norm: mean and 1/σ of each row, over all warps and blocks that share it.
#pragma once

#include "sparsify_tile.cuh"

namespace lynx {

// Mean and sum of squared deviations of each row over a block's part of K, [kSplits][kRowTile].
using RowMoments = float2[kSplits][kRowTile];

// The first `held_rounds` chunks stay in their slots, the others take turns in the ring. `barrier` and `all` are
// what the blocks of a cluster send each other's moments to.
__device__ __forceinline__ Statistics row_statistics(const SparsifyParams& p, const Position& at, u32 slots,
                                                     u32 barrier, RowMoments& all) {
    __shared__ float2 warp_moments[kColumnWarps][kRowTile];
    const int rounds = at.slice.rounds(at.column_warp);
    Moments moments[2] = {};
    InputCopy copy(p, at, slots, 0);
    Slots slot(slots + at.fragment, p.held_rounds);
#pragma unroll 1
    for (int s = 0; s < kStages - 1; ++s) {
        copy.next(p, at, at.chunk(s));
        copy_async_commit();
    }
#pragma unroll 1
    for (int round = 0; round < rounds; ++round) {
        copy_async_wait<kStages - 2>();
        __syncwarp();
        copy.next(p, at, at.chunk(round + kStages - 1));
        copy_async_commit();
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            u32 words[8];
            float v[16];
            read_slot(slot.at, h, words);
            unpack<Element>(words, v);
            const Moments part = moments_of<kProducer == kLayerNorm>(v);
            moments[h].merge(part.count, part.mean, part.m2);
        }
        slot.next();
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int lanes = 1; lanes < 4; lanes *= 2) {  // equal counts: symmetric, so the quad agrees on the bits
            const float mean = __shfl_xor_sync(~0u, moments[h].mean, lanes);
            const float m2 = __shfl_xor_sync(~0u, moments[h].m2, lanes);
            const float delta = mean - moments[h].mean;
            moments[h].m2 = fmaf(delta * delta, 0.5f * moments[h].count, moments[h].m2 + m2);
            moments[h].mean = 0.5f * (moments[h].mean + mean);
            moments[h].count *= 2.f;
        }
        if (at.q == 0) {
            warp_moments[at.column_warp][at.row_in_tile + 8 * h] = make_float2(moments[h].mean, moments[h].m2);
        }
    }
    partial_barrier<kWorkers>();
    for (int row = threadIdx.x; row < kRowTile; row += kWorkers) {
        Moments sum{};
        for (int w = 0; w < kColumnWarps; ++w) {
            sum.merge(kChunk * at.slice.rounds(w), warp_moments[w][row].x, warp_moments[w][row].y);
        }
        const float2 of_block = make_float2(sum.mean, sum.m2);
#if LYNX_SM90
        if constexpr (kSplits > 1) {
            const u32 to = shared_address(&all[at.rank][row]);
#pragma unroll
            for (int r = 0; r < kSplits; ++r) send(cluster_address(to, r), of_block, cluster_address(barrier, r));
            continue;
        }
#endif
        all[0][row] = of_block;
    }
#if LYNX_SM90
    if constexpr (kSplits > 1) receive(barrier);
    else partial_barrier<kWorkers>();
#else
    partial_barrier<kWorkers>();
#endif
    Statistics stats;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        Moments sum{};
#pragma unroll
        for (int r = 0; r < kSplits; ++r) {
            const Slice other(p, r);
            const float2 part = all[r][at.row_in_tile + 8 * h];
            sum.merge(kChunk * (other.end - other.begin), part.x, part.y);
        }
        stats.mean[h] = sum.mean;
        stats.inverse[h] = 1.f / sqrtf(sum.m2 / p.k + p.eps);
    }
    return stats;
}

// For a launch that deflates, and there.
__device__ __forceinline__ void keep_statistics(const SparsifyParams& p, const Position& at, const Statistics& stats) {
    if (at.q != 0 || at.column_warp != 0 || at.rank != 0) return;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const int row = at.first_row + at.row_in_tile + 8 * h;
        if (row < p.m) p.statistics[row] = make_float2(stats.mean[h], stats.inverse[h]);
    }
}

__device__ __forceinline__ Statistics kept_statistics(const SparsifyParams& p, const Position& at) {
    Statistics stats;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const float2 kept = p.statistics[min(at.first_row + at.row_in_tile + 8 * h, p.m - 1)];
        stats.mean[h] = kept.x, stats.inverse[h] = kept.y;
    }
    return stats;
}

}  // namespace lynx
