// t = z·Aᵀ by a warpgroup of its own, with z and the LoRA weight in shared memory.
#pragma once

#include "sparsify_tile.cuh"
#include "wgmma.cuh"

namespace lynx {

// The warpgroup's copies of the LoRA weight, chunk after chunk, into a ring of kRing.
struct WeightCopy {
    const char* source;
    u32 to;
    int chunk, end, slot;

    __device__ __forceinline__ WeightCopy(const SparsifyParams& p, const Position& at, u32 ring)
        : chunk(at.slice.begin), end(at.slice.end), slot(0) {
        const int thread = threadIdx.x - kFirstHelper;
        source = p.lora_down + thread / 8 * p.lora_stride + thread % 8 * 16 + (long long)chunk * kRowBytes;
        to = ring + piece_offset(thread / 8, thread % 8);
    }
    __device__ __forceinline__ void next(const SparsifyParams& p) {
        if (chunk < end) {
#pragma unroll
            for (int i = 0; i < kRank / 16; ++i) {
                copy_async(to + slot * kRank * kRowBytes + i * 16 * kRowBytes, source + i * 16 * p.lora_stride,
                           16 * i < p.rank);
            }
        }
        copy_async_commit();
        ++chunk, source += kRowBytes;
        if (++slot == kRing) slot = 0;
    }
};

// t += z·Aᵀ over all chunks of this block, in the order in which workers finish them. A chunk's slot is released two
// chunks later, when all four warps have seen its products complete.
__device__ __forceinline__ void multiply_all(const SparsifyParams& p, const Position& at, u32 slots, u32 ring,
                                             const StageBarriers& barriers, int held_rounds,
                                             float (&t)[kBlocks][kRank / 2]) {
    WeightCopy copy(p, at, ring);
#pragma unroll 1
    for (int i = 0; i < kRing - 2; ++i) copy.next(p);
    const int count = at.slice.end - at.slice.begin;
    int column = 0, turn = 0, slot = 0, round = 0, weight = 0;
    int done_column[2] = {}, done_turn[2] = {};
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
        copy_async_wait<kRing - 3>();
        fence_async();
        named_wait<2, 128>();  // the weight has landed for all, and all have done with the chunk before last
        if (i >= 2 && threadIdx.x == kFirstHelper) barrier_arrive(barriers.empty(done_turn[1], done_column[1]));
        copy.next(p);
        const int stage = turn < kStages ? turn : turn - kStages;
        barrier_wait(barriers.full(stage, column), turn >= kStages);
        __syncwarp();
        const u32 z = wgmma::descriptor_start(slots + slot * kSlots * kSlotBytes + column * kRowWarps * kSlotBytes);
        const u32 a = wgmma::descriptor_start(ring + weight * kRank * kRowBytes);
        wgmma::fence();
#pragma unroll
        for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                const u64 left = wgmma::descriptor<wgmma::Swizzle::k128>(z + block * 512 + 2 * k);
                const u64 right = wgmma::descriptor<wgmma::Swizzle::k128>(a + 2 * k);
                if constexpr (FLOAT16) wgmma::Tile<kRank>::dense_f16(t[block], left, right);
                else wgmma::Tile<kRank>::dense_bf16(t[block], left, right);
            }
        }
        wgmma::commit();
        wgmma::wait<1>();
        done_turn[1] = done_turn[0], done_column[1] = done_column[0];
        done_turn[0] = stage, done_column[0] = column;
        if (++weight == kRing) weight = 0;
        if (++column == kColumnWarps) {
            column = 0;
            ++round;
            if (++turn == 2 * kStages) turn = 0;
            ++slot;
            if (!kTwoPasses) { if (slot == kStages) slot = 0; }
            else if (slot == held_rounds + kStages) slot = held_rounds;
        }
    }
    wgmma::wait<0>();
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) wgmma::settle(t[block]);
}

}  // namespace lynx
