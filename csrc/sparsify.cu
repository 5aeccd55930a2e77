// sparsify: producer → 16-bit X → z = X − μ → top-2 of 4 → values, metadata, row scale, t = z·Aᵀ, in one pass.
//
// A warp works on 16 rows × 64 columns at a time ("chunk"). Lane l = 4·g + q owns rows g and g + 8 and the 16
// columns from 16·q: what metadata word l of the chunk describes, so that pruning needs no exchange between
// lanes, values leave as 16 bytes a row and metadata as one coalesced word. The same registers are A fragments of
// m16n8k16 when the reduction index is permuted: step j takes columns 16·q + 4·j … +3 of lane q as its k = 2q,
// 2q+1, 2q+8, 2q+9. Matrix B (the LoRA down-projection) then is 4 consecutive elements of a row as well, and with
// z itself as B the diagonal of z·zᵀ is Σz².
//
// A block covers 16·ROW_WARPS rows; its COLUMN_WARPS interleave the chunks of a row. A cluster of SPLITS blocks
// shares the rows and splits K between them. Partial sums meet in shared memory and are added in a fixed order, so
// results are the same bits every time. Each warp keeps STAGES − 1 chunks on their way from global to shared
// memory; a norm leaves x there between its two passes. With LoRA one more warp copies the weight, and warps of
// one column share it: they wait for each other only when one is STAGES rounds ahead. With DEFLATE z loses t·A before
// it is pruned, with the t of a launch before, which wrote nothing else.
//
// Macros (see runtime/sparsify_kernel.py): FLOAT16, PRODUCER, ACTIVATION, RANK (padded; 0 without LoRA), DEFLATE,
// storage of WEIGHT, BIAS, MULT, ADD, SHIFT, SCORE, and the geometry ROW_WARPS, COLUMN_WARPS, SPLITS, STAGES,
// MIN_BLOCKS, HELPERS.

#include "deflate.cuh"
#include "norm.cuh"
#include "prune.cuh"
#include "sums.cuh"
#include "vectors.cuh"
#if WARPGROUP
#include "warpgroup.cuh"
#endif

namespace lynx {

// z of both rows of this thread in a chunk, rounded to 16 bits. slot, vectors: where the lane's x and the vectors
// of the chunk lie.
__device__ __forceinline__ void produce(const SparsifyParams& p, const Position& at, const Statistics& stats,
                                        const SampleRows& samples, bool same_sample, int chunk, u32 slot,
                                        u32 vectors, u32 (&z)[2][8]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) read_slot(slot, h, z[h]);
    if constexpr (kProducer == kIdentity && SHIFT == kAbsent) return;
    const bool active = kProducer != kCat || chunk * kChunk >= p.first_columns;
    if (kProducer == kCat && SHIFT == kAbsent && !active) return;
#pragma unroll
    for (int piece = 0; piece < 2; ++piece) {  // of 8 channels
        Vectors vector;
        vector.load(p, vectors, at.q * 16 + piece * 8);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            float v[8];
            unpack<Element>(z[h] + 4 * piece, v);
            if constexpr (kPerSample) {
                if (!same_sample) {
                    vector.load_sample(p, samples, at.row_in_tile + 8 * h, chunk * kChunk + at.q * 16 + piece * 8);
                }
            }
            if constexpr (kProducer == kAct || kProducer == kCat) {
                if (SHIFT == kAbsent || active) activate_all<ACTIVATION>(v);
            }
            if constexpr (kTwoInputs) {
                const uint4 words = load_shared((piece ? slot ^ 16 : slot) + kSecondAt + h * 8 * kRowBytes);
                const u32 w[4] = {words.x, words.y, words.z, words.w};
                float up[8];
                unpack<Element>(w, up);
                activate_all<ACTIVATION>(v);
#pragma unroll
                for (int i = 0; i < 8; ++i) v[i] *= up[i];
            }
            if constexpr (kNorm) {
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    v[i] = (v[i] - stats.mean[h]) * stats.inverse[h];
                    if constexpr (WEIGHT != kAbsent) v[i] *= vector.weight[i];
                    if constexpr (BIAS != kAbsent) v[i] += vector.bias[i];
                    if constexpr (MULT != kAbsent) v[i] *= vector.factor[i];
                    if constexpr (ADD != kAbsent) v[i] += vector.add[i];
                }
            }
            pack<Element>(v, z[h] + 4 * piece);
            if constexpr (SHIFT != kAbsent) {  // X is rounded before the shift
                unpack<Element>(z[h] + 4 * piece, v);
#pragma unroll
                for (int i = 0; i < 8; ++i) v[i] -= vector.shift[i];
                pack<Element>(v, z[h] + 4 * piece);
            }
        }
    }
}

// z of both row halves with NaN replaced by +Inf, as the A fragments of four m16n8k16 steps. Scores are taken from
// these, too: a NaN counts as +Inf.
__device__ __forceinline__ void clean_fragments(const u32 (&z)[2][8], u32 (&a)[4][4]) {
#pragma unroll
    for (int i = 0; i < 16; ++i) a[i / 4][i % 4] = Element::nan_to_infinity(z[i % 2][i / 2]);
}

// What to keep of 4 groups in both rows, by the magnitudes in a, weighted by the scores among the chunk's vectors.
__device__ __forceinline__ void select(const u32 (&a)[4][4], u32 vectors, int q, u32 (&selection)[4]) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#if LYNX_SM90 && SCORE == 0
        const u32 q0 = Element::magnitude(permute(a[j][0], a[j][1], 0x5410));
        const u32 q1 = Element::magnitude(permute(a[j][0], a[j][1], 0x7632));
        const u32 q2 = Element::magnitude(permute(a[j][2], a[j][3], 0x5410));
        const u32 q3 = Element::magnitude(permute(a[j][2], a[j][3], 0x7632));
        selection[j] = select_two_rows<Element>(q0, q1, q2, q3);
#else
        Channels<Element, SCORE> score;
        score.load_shared(vectors + kScoreAt + (q * 16 + j / 2 * 8) * score.kBytes);
        u32 of_row[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            float v[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const u32 word = a[j][i / 2 * 2 + h];
                v[i] = fabsf(i % 2 ? Element::high(word) : Element::low(word));
                if constexpr (SCORE != kAbsent) {  // Inf · 0 counts as +Inf, too
                    v[i] = fminf(v[i] * score[j % 2 * 4 + i], __int_as_float(0x7f800000));
                }
            }
            of_row[h] = select_two(v[0], v[1], v[2], v[3]);
        }
        selection[j] = permute(of_row[0], of_row[1], 0x5410);
#endif
    }
}

extern "C" __global__ void __launch_bounds__(kThreads, MIN_BLOCKS)
sparsify(const __grid_constant__ SparsifyParams p) {
    char* const dynamic = dynamic_memory();
    __shared__ float2 squares[kColumnWarps][kRowTile];
    __shared__ StageBarriers lora_barriers;
    __shared__ u64 sums_ready;

    const Position at(p);
    const int chunks = p.k / kChunk;
    const int held_rounds = kTwoPasses ? p.held_rounds : 0;

#if LYNX_SM90
    __shared__ u64 cluster_barriers[2];  // of the moments, of the sums
    const u32 moments_barrier = shared_address(cluster_barriers), sums_barrier = moments_barrier + 8;
#else
    const u32 moments_barrier = 0;
#endif
    __shared__ RowMoments moments;
    __shared__ SampleRows samples;
    if constexpr (kPerSample) samples.fill(p, at);
    if (threadIdx.x == 0) {
        if constexpr (kRank > 0) lora_barriers.init();
        if constexpr (kSumRank > 0) barrier_init(shared_address(&sums_ready), kThreads);
#if LYNX_SM90
        if constexpr (kSplits > 1) {
            barrier_init(moments_barrier, 1), barrier_init(sums_barrier, 1);
            barrier_expect(moments_barrier, kSplits * kRowTile * 8), barrier_expect(sums_barrier, bytes_to_meet(at));
        }
#endif
    }
#if LYNX_SM90
    if constexpr (kSplits > 1) cluster_arrive();
#endif
    if constexpr (kSumRank > 0) {  // from device memory to L2, where any writer's data meets it; reading waits
        for (int i = blockIdx.x * kThreads + threadIdx.x; i < p.rank * chunks; i += gridDim.x * kThreads) {
            prefetch_l2(p.lora_down + i / chunks * p.lora_stride + i % chunks * kRowBytes);
        }
    }
    dependency_wait();
    dependency_release();
#if LYNX_SM90
    if constexpr (kSplits > 1) cluster_wait();
#endif
    if constexpr (kPerSample || kRank > 0) __syncthreads();

    const u32 memory = shared_address(dynamic);
    const u32 slot_rounds = kTwoPasses ? p.slot_rounds : kStages;
    const u32 stages = memory + (kWarpgroup ? slot_rounds * kSlots * kSlotBytes : 0);
    const u32 all_slots = kWarpgroup ? memory : stages + kLoraMemory + kStages * kWorkers / 32 * kVectorBytes;
    float* const partial = reinterpret_cast<float*>(dynamic);
    const bool worker = kRank == 0 || threadIdx.x < kWorkers;
#if WARPGROUP
    if (threadIdx.x >= kFirstHelper) {
        float t[kBlocks][kRank / 2] = {};
        multiply_all(p, at, all_slots, stages, lora_barriers, held_rounds, t);
        named_wait<3, kWorkers + 128>();  // everybody has done with slots: the sums take their place
        const int warp = (threadIdx.x - kFirstHelper) / 32;
#pragma unroll
        for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const int row = block * 64 + warp * 16 + at.g + 8 * h;
                if (row >= kRowTile) continue;
#pragma unroll
                for (int n = 0; n < kTiles; ++n) {
                    *reinterpret_cast<float2*>(partial + row * kPartialStride + 8 * n + 2 * at.q) =
                        make_float2(t[block][4 * n + 2 * h], t[block][4 * n + 2 * h + 1]);
                }
            }
        }
    }
#else
    float t[kTiles][4] = {};
    if (!worker) copy_lora(p, at, stages, lora_barriers);
#endif
    if (worker) {
        const int warp = threadIdx.x / 32;
        const u32 vector_slots = stages + kLoraMemory + warp * kVectorBytes;
        const u32 slots = all_slots + warp * kSlotBytes;
        VectorCopy vector_copy(p, at, samples, vector_slots);
        Statistics stats;
        if constexpr (kTwoPasses) {
            stats = row_statistics(p, at, slots, moments_barrier, moments);
            if (p.statistics != nullptr) keep_statistics(p, at, stats);
        } else if constexpr (kNorm) {
            stats = kept_statistics(p, at);
        }
        InputCopy input_copy(p, at, slots, held_rounds);
#pragma unroll 1
        for (int s = 0; s < kAhead; ++s) {
            if (s >= held_rounds) input_copy.next(p, at, at.chunk(s));
            vector_copy.next(at, at.chunk(s));
            copy_async_commit();
        }
        Deflation deflation;
        if constexpr (kDeflate) deflation.load(p, at);
        else if (kRank > 0 && p.directions != nullptr) {  // while the first chunks are on their way
            write_directions(p, blockIdx.x * kWorkers + threadIdx.x, gridDim.x * kWorkers);
        }

        Squares all, kept_part;
        int chunk = at.chunk(0);
        const bool same_sample = kPerSample ? samples.same(at.row_warp) : true;
        const int row_group = at.first_row / 16 + at.row_warp;
        const bool in_row_blocks = row_group < (p.m + 63) / 64 * 4;  // tiles may reach beyond the last 64 rows
        const int rows_left = p.m - at.first_row - at.row_in_tile;
        u32* metadata_at =
            p.metadata + ((long long)(row_group / 4) * chunks + chunk) * 128 + row_group % 4 * 32 + at.lane;
        char* values_at = p.values + (long long)(at.first_row + at.row_in_tile) * p.k + chunk * 64 + at.q * 16;
        Slots slot(slots + at.fragment, held_rounds);
        VectorSlots vector_slot(vector_slots, 0);
        int turn = 0;  // stage of the LoRA weight, + kStages in every other turn

#pragma unroll 1
        for (; chunk < at.slice.end; chunk += kColumnWarps) {
            copy_async_wait<kAhead - 1>();
            __syncwarp();
            const int ahead = chunk + kAhead * kColumnWarps;
#if WARPGROUP
            if (chunk >= at.chunk(2)) {  // the warpgroup has done with the chunk two rounds ago
                const int before = turn < 2 ? turn + 2 * kStages - 2 : turn - 2;
                const int stage = before < kStages ? before : before - kStages;
                barrier_wait(lora_barriers.empty(stage, at.column_warp), before >= kStages);
            }
#endif
            if (!kTwoPasses || ahead >= at.chunk(held_rounds)) input_copy.next(p, at, ahead);
            vector_copy.next(at, ahead);
            copy_async_commit();
            u32 z[2][8], a[4][4];
            produce(p, at, stats, samples, same_sample, chunk, slot.at, vector_slot.at, z);
#if WARPGROUP
            if constexpr (kProducer != kIdentity || SHIFT != kAbsent) {
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    store_shared(slot.at + h * 8 * kRowBytes, z[h][0], z[h][1], z[h][2], z[h][3]);
                    store_shared((slot.at ^ 16) + h * 8 * kRowBytes, z[h][4], z[h][5], z[h][6], z[h][7]);
                }
            }
            fence_async();
            barrier_arrive(lora_barriers.full(turn < kStages ? turn : turn - kStages, at.column_warp));
            if (++turn == 2 * kStages) turn = 0;
#endif
            if constexpr (kDeflate) {
                const int stage = turn < kStages ? turn : turn - kStages;
                barrier_wait(lora_barriers.full(stage, at.column_warp), turn >= kStages);
                deflation.take_off(z, stages + (stage * kColumnWarps + at.column_warp) * kRank * kRowBytes, at);
                barrier_arrive(lora_barriers.empty(stage, at.column_warp));
                if (++turn == 2 * kStages) turn = 0;
            }
            clean_fragments(z, a);
            if (kDeflate || p.values != nullptr) {
                u32 selection[4], kept[2][4];
                select(a, vector_slot.at, at.q, selection);
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    kept[0][j] = kept_pair(z[0][2 * j], z[0][2 * j + 1], selection[j], 0);
                    kept[1][j] = kept_pair(z[1][2 * j], z[1][2 * j + 1], selection[j], 1);
                    all.add(a[j], z[0][2 * j], z[0][2 * j + 1], z[1][2 * j], z[1][2 * j + 1]);
                }
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    if (8 * h < rows_left) {
                        *reinterpret_cast<uint4*>(values_at + 8ll * h * p.k) =
                            make_uint4(kept[h][0], kept[h][1], kept[h][2], kept[h][3]);
                    }
                }
#pragma unroll
                for (int j = 0; j < 4; j += 2) {
                    const u32 step[4] = {kept[0][j], kept[1][j], kept[0][j + 1], kept[1][j + 1]};
                    kept_part.add(step, kept[0][j], kept[0][j + 1], kept[1][j], kept[1][j + 1]);
                }
                u32 metadata = metadata_word(selection);
                if (rows_left <= 8) metadata = metadata & 0xffffu | 0x44440000u;
                if (rows_left <= 0) metadata = 0x44444444u;
                if (in_row_blocks) *metadata_at = metadata;
            }
            if constexpr (kSumRank > 0 && !kWarpgroup) {
                const int stage = turn < kStages ? turn : turn - kStages;
                barrier_wait(lora_barriers.full(stage, at.column_warp), turn >= kStages);
#if !WARPGROUP && !DEFLATE
                multiply_lora(t, a, stages + (stage * kColumnWarps + at.column_warp) * kRank * kRowBytes + at.fragment);
#endif
                barrier_arrive(lora_barriers.empty(stage, at.column_warp));
                if (++turn == 2 * kStages) turn = 0;
            }
            metadata_at += kColumnWarps * 128;
            values_at += kColumnWarps * 64;
            slot.next();
            vector_slot.next();
        }

        if (at.q == at.g / 2) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                squares[at.column_warp][at.row_in_tile + 8 * h] = make_float2(all.row(h, at.g), kept_part.row(h, at.g));
            }
        }
    }
#if WARPGROUP
    copy_async_wait<0>();
    if (worker) named_arrive<3, kWorkers + 128>();
#else
    copy_async_wait<0>();
    if constexpr (kSumRank > 0) {
        __syncthreads();  // everybody has done with stages and slots: the partial sums take their place
        if (worker) {
#pragma unroll
            for (int n = 0; n < kTiles; ++n) {
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const int row = at.column_warp * kRowTile + at.row_in_tile + 8 * h;
                    *reinterpret_cast<float2*>(partial + row * kPartialStride + 8 * n + 2 * at.q) =
                        make_float2(t[n][2 * h], t[n][2 * h + 1]);
                }
            }
        }
    }
#endif
    if constexpr (kSumRank > 0) {  // not __syncthreads: racecheck overlooks it where a part of the block has met before
        barrier_arrive(shared_address(&sums_ready));
        barrier_wait(shared_address(&sums_ready), 0);
    } else {
        __syncthreads();
    }
    const BlockSums sums{squares[0], partial};
#if LYNX_SM90
    if constexpr (kSplits > 1) {
        __shared__ Exchange exchange;
        meet(p, at, sums, sums_barrier, exchange);
        return;
    }
#endif
    store_sums(p, at, sums);
}

}  // namespace lynx
