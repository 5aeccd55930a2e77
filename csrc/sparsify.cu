// sparsify: producer → 16-bit X → z = X − μ → top-2 of 4 → values, metadata, row scale, t = z·Aᵀ, in one pass.
//
// A warp works on 16 rows × 64 columns at a time ("chunk"). Lane l = 4·g + q owns rows g and g + 8 and the 16
// columns from 16·q: what metadata word l of the chunk describes, so that pruning needs no exchange between
// lanes, values leave as 16 bytes a row and metadata as one coalesced word. The same registers are A fragments of
// m16n8k16 when the reduction index is permuted: step j takes columns 16·q + 4·j … +3 of lane q as its k = 2q,
// 2q+1, 2q+8, 2q+9. Matrix B (the LoRA down-projection) then is 4 consecutive elements of a row as well.
//
// A block covers 16·ROW_WARPS rows; its COLUMN_WARPS interleave the chunks of a row. A cluster of SPLITS blocks
// shares the rows and splits K between them. Partial sums meet in shared memory and are added in a fixed order, so
// results are the same bits every time. Each warp keeps STAGES − 1 chunks on their way from global to shared
// memory; a norm leaves x there between its two passes.
//
// Macros (see runtime/sparsify_kernel.py): FLOAT16, PRODUCER, ACTIVATION, RANK (padded; 0 without LoRA), storage
// of WEIGHT, BIAS, MULT, ADD, SHIFT, SCORE, and the geometry ROW_WARPS, COLUMN_WARPS, SPLITS, STAGES, MIN_BLOCKS.

#include "prune.cuh"
#include "sparsify_tile.cuh"

namespace lynx {

// z of row half h of a chunk, rounded to 16 bits.
__device__ __forceinline__ void produce(const SparsifyParams& p, const Position& at, const Statistics& stats,
                                        Vectors& vectors, int chunk, u32 fragment, int h, u32 (&z)[8]) {
    read_slot(fragment, h, z);
    if constexpr (kProducer == kIdentity && SHIFT == kAbsent) return;
    float v[16];
    unpack<Element>(z, v);
    if constexpr (kProducer == kAct) activate_all<ACTIVATION>(v);
    if constexpr (kProducer == kCat) {
        if (chunk * kChunk >= p.first_columns) activate_all<ACTIVATION>(v);
    }
    if constexpr (kTwoInputs) {
        u32 words[8];
        float up[16];
        read_slot(fragment + kSlotBytes, h, words);
        unpack<Element>(words, up);
        activate_all<ACTIVATION>(v);
#pragma unroll
        for (int i = 0; i < 16; ++i) v[i] *= up[i];
    }
    if (h == 1) vectors.load_second(at.samples, chunk * kChunk + at.q * 16);
    if constexpr (kNorm) {
#pragma unroll
        for (int i = 0; i < 16; ++i) {
            v[i] = (v[i] - stats.mean[h]) * stats.inverse[h];
            if constexpr (WEIGHT != kAbsent) v[i] *= vectors.weight[i];
            if constexpr (BIAS != kAbsent) v[i] += vectors.bias[i];
            if constexpr (MULT != kAbsent) v[i] *= vectors.mult[i] + p.mult_offset;
            if constexpr (ADD != kAbsent) v[i] += vectors.add[i];
        }
    }
    pack<Element>(v, z);
    if constexpr (SHIFT != kAbsent) {  // X is rounded before the shift
        unpack<Element>(z, v);
#pragma unroll
        for (int i = 0; i < 16; ++i) v[i] -= vectors.shift[i];
        pack<Element>(v, z);
    }
}

// z of both row halves with NaN replaced by +Inf, as the A fragments of four m16n8k16 steps. Scores and norms are
// taken from these, too: a NaN counts as +Inf, and the row's scale becomes Inf / Inf.
__device__ __forceinline__ void clean_fragments(const u32 (&z)[2][8], u32 (&a)[4][4]) {
#pragma unroll
    for (int i = 0; i < 16; ++i) a[i / 4][i % 4] = Element::nan_to_infinity(z[i % 2][i / 2]);
}

// Prunes 16 channels of z: the kept values, their nibbles pushed on `metadata`, and Σz², Σz̃² added up.
__device__ __forceinline__ void prune(const u32 (&z)[8], const u32 (&clean)[4][4], int h,
                                      const Channels<Element, SCORE>& score, u32 (&kept)[4], u32& metadata,
                                      float& all_squares, float& kept_squares) {
#pragma unroll
    for (int j = 3; j >= 0; --j) {
        float q[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const u32 word = clean[j][i / 2 * 2 + h];
            const float value = i % 2 ? Element::high(word) : Element::low(word);
            all_squares = fmaf(value, value, all_squares);
            q[i] = fabsf(value);
            if constexpr (SCORE != kAbsent) {  // Inf · 0 counts as +Inf, too
                q[i] = fminf(q[i] * score[4 * j + i], __int_as_float(0x7f800000));
            }
        }
        const u32 selection = select_two(q[0], q[1], q[2], q[3]);
        kept[j] = kept_pair(z[2 * j], z[2 * j + 1], selection);
        metadata = push_nibble(metadata, selection);
        const float first = Element::low(kept[j]), second = Element::high(kept[j]);
        kept_squares = fmaf(second, second, fmaf(first, first, kept_squares));
    }
}

// t (16 × kRank) += z · Aᵀ over one chunk, a the fragments of z; `fragment` is this warp's part of the stage plus
// the lane's offset.
__device__ __forceinline__ void multiply_lora(float (&t)[kTiles][4], const u32 (&a)[4][4], u32 fragment) {
#pragma unroll
    for (int n = 0; n < kRank / 8; ++n) {
        const uint4 low = load_shared(fragment + n * 8 * kRowBytes);
        const uint4 high = load_shared((fragment ^ 16) + n * 8 * kRowBytes);
        Element::mma(t[n], a[0], low.x, low.y);
        Element::mma(t[n], a[1], low.z, low.w);
        Element::mma(t[n], a[2], high.x, high.y);
        Element::mma(t[n], a[3], high.z, high.w);
    }
}

// First pass of a norm: the moments of each row, over all warps and blocks that share it. The first `held_rounds`
// chunks stay in their slots, the others take turns in the ring.
__device__ __forceinline__ Statistics row_statistics(const SparsifyParams& p, const Position& at, u32 slots) {
    __shared__ float2 warp_moments[kColumnWarps][kRowTile];
    __shared__ float2 block_moments[kRowTile];
    const int rounds = at.slice.rounds(at.column_warp);
    Moments moments[2] = {};
    InputCopy copy(p, at, slots, 0);
    Slots slot(slots + at.fragment, p.held_rounds);
#pragma unroll 1
    for (int s = 0; s < kStages - 1; ++s) {
        copy.next(p);
        copy_async_commit();
    }
#pragma unroll 1
    for (int round = 0; round < rounds; ++round) {
        copy_async_wait<kStages - 2>();
        __syncwarp();
        copy.next(p);
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
    __syncthreads();
    for (int row = threadIdx.x; row < kRowTile; row += kThreads) {
        Moments sum{};
        for (int w = 0; w < kColumnWarps; ++w) {
            sum.merge(kChunk * at.slice.rounds(w), warp_moments[w][row].x, warp_moments[w][row].y);
        }
        block_moments[row] = make_float2(sum.mean, sum.m2);
    }
    cluster_barrier<kSplits>();
    Statistics stats;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        Moments sum{};
#pragma unroll
        for (int r = 0; r < kSplits; ++r) {
            const Slice other(p, r);
            const float2 part = load_cluster2(cluster_address(&block_moments[at.row_in_tile + 8 * h], r));
            sum.merge(kChunk * (other.end - other.begin), part.x, part.y);
        }
        stats.mean[h] = sum.mean;
        stats.inverse[h] = 1.f / sqrtf(sum.m2 / p.k + p.eps);
    }
    return stats;
}

// Adds up the row sums over the column warps and the blocks of the cluster, and stores the scale.
__device__ __forceinline__ void store_scale(const SparsifyParams& p, const Position& at, const float2* squares) {
    for (int row = at.rank + kSplits * threadIdx.x; row < kRowTile; row += kSplits * kThreads) {
        float all = 0.f, kept = 0.f;
#pragma unroll
        for (int r = 0; r < kSplits; ++r) {
#pragma unroll
            for (int w = 0; w < kColumnWarps; ++w) {
                const float2 part = load_cluster2(cluster_address(&squares[w * kRowTile + row], r));
                all += part.x, kept += part.y;
            }
        }
        if (at.first_row + row < p.m) p.scale[at.first_row + row] = p.native ? 1.f : sqrtf(all / (kept + p.scale_eps));
    }
}

// Adds up t over the column warps and the blocks of the cluster, rounds it and stores it.
__device__ __forceinline__ void store_t(const SparsifyParams& p, const Position& at, const float* partial) {
    for (int item = at.rank * kThreads + threadIdx.x; item < kRowTile * kTiles; item += kSplits * kThreads) {
        const int row = item / kTiles, column = item % kTiles * 8;
        float4 a = {}, b = {};
#pragma unroll
        for (int r = 0; r < kSplits; ++r) {
#pragma unroll
            for (int w = 0; w < kColumnWarps; ++w) {
                const u32 from = cluster_address(partial + (w * kRowTile + row) * kPartialStride + column, r);
                const float4 c = load_cluster4(from), d = load_cluster4(from + 16);
                a.x += c.x, a.y += c.y, a.z += c.z, a.w += c.w;
                b.x += d.x, b.y += d.y, b.z += d.z, b.w += d.w;
            }
        }
        if (at.first_row + row < p.m && column < p.rank) {
            *reinterpret_cast<uint4*>(p.t + (at.first_row + row) * p.t_stride + column * 2) =
                make_uint4(Element::pack(a.x, a.y), Element::pack(a.z, a.w),
                           Element::pack(b.x, b.y), Element::pack(b.z, b.w));
        }
    }
}

extern "C" __global__ void __launch_bounds__(kThreads, MIN_BLOCKS)
sparsify(const __grid_constant__ SparsifyParams p) {
    extern __shared__ __align__(128) char dynamic[];
    __shared__ float2 squares[kColumnWarps][kRowTile];  // Σz², Σz̃²

    const Position at(p);
    const int chunks = p.k / kChunk;
    const int own_rounds = at.slice.rounds(at.column_warp);
    const int rounds = kRank ? at.slice.rounds(0) : own_rounds;  // LoRA stages are shared by all warps
    const int held_rounds = kNorm ? p.held_rounds : 0;

    if constexpr (kRank > 0) {  // from device memory to L2, where any writer's data meets it; reading waits
        for (int i = blockIdx.x * kThreads + threadIdx.x; i < p.rank * chunks; i += gridDim.x * kThreads) {
            prefetch_l2(p.lora_down + i / chunks * p.lora_stride + i % chunks * kRowBytes);
        }
    }
    dependency_wait();
    dependency_release();

    const u32 stages = shared_address(dynamic);
    const u32 slots = stages + kStages * kLoraBytes + threadIdx.x / 32 * kInputs * kSlotBytes;
    LoraCopy lora_copy(p, at, stages);
    Statistics stats;
    if constexpr (kNorm) {
        if constexpr (kRank > 0) {
#pragma unroll 1
            for (int s = 0; s < kStages - 1; ++s) lora_copy.next(p);
        }
        stats = row_statistics(p, at, slots);
    }
    InputCopy input_copy(p, at, slots, held_rounds);
#pragma unroll 1
    for (int s = 0; s < kStages - 1; ++s) {
        if constexpr (kRank > 0 && !kNorm) lora_copy.next(p);
        if (s >= held_rounds) input_copy.next(p);
        copy_async_commit();
    }

    float t[kTiles][4] = {};
    float all_squares[2] = {}, kept_squares[2] = {};
    Vectors vectors;
    int chunk = at.chunk(0);
    const auto load_vectors = [&] { vectors.load(p, at.samples, chunk * kChunk + at.q * 16); };
    if (kVectorsAhead && own_rounds > 0) load_vectors();

    const int row_group = at.first_row / 16 + at.row_warp;
    const bool in_row_blocks = row_group < (p.m + 63) / 64 * 4;  // a tile of 128 rows may reach beyond the last 64
    const int rows_left = p.m - at.first_row - at.row_in_tile;
    u32* metadata_at = p.metadata + ((long long)(row_group / 4) * chunks + chunk) * 128 + row_group % 4 * 32 + at.lane;
    char* values_at = p.values + (long long)(at.first_row + at.row_in_tile) * p.k + chunk * 64 + at.q * 16;
    Slots slot(slots + at.fragment, held_rounds);
    Stages stage(stages + at.column_warp * kRank * kRowBytes + at.fragment, 0);

#pragma unroll 1
    for (int round = 0; round < rounds; ++round) {
        copy_async_wait<kStages - 2>();
        if (kRank) __syncthreads();  // what was copied has landed for all, and all are done with the last round
        else __syncwarp();
        if constexpr (kRank > 0) lora_copy.next(p);
        if (!kNorm || round + kStages - 1 >= held_rounds) input_copy.next(p);
        copy_async_commit();
        if (round < own_rounds) {
            if (!kVectorsAhead) load_vectors();
            u32 z[2][8];
#pragma unroll
            for (int h = 0; h < 2; ++h) produce(p, at, stats, vectors, chunk, slot.at, h, z[h]);
            u32 clean[4][4];
            clean_fragments(z, clean);
            if (p.values != nullptr) {
                u32 metadata = 0;
#pragma unroll
                for (int h = 1; h >= 0; --h) {
                    u32 kept[4];
                    prune(z[h], clean, h, vectors.score, kept, metadata, all_squares[h], kept_squares[h]);
                    if (8 * h < rows_left) {
                        *reinterpret_cast<uint4*>(values_at + 8ll * h * p.k) =
                            make_uint4(kept[0], kept[1], kept[2], kept[3]);
                    }
                }
                if (rows_left <= 8) metadata = metadata & 0xffffu | 0x44440000u;
                if (rows_left <= 0) metadata = 0x44444444u;
                if (in_row_blocks) *metadata_at = metadata;
            }
            chunk += kColumnWarps;
            if (kVectorsAhead && round + 1 < own_rounds) load_vectors();
            if constexpr (kRank > 0) multiply_lora(t, clean, stage.at);
        }
        metadata_at += kColumnWarps * 128;
        values_at += kColumnWarps * 64;
        slot.next();
        stage.next();
    }

#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int lanes = 1; lanes < 4; lanes *= 2) {
            all_squares[h] += __shfl_xor_sync(~0u, all_squares[h], lanes);
            kept_squares[h] += __shfl_xor_sync(~0u, kept_squares[h], lanes);
        }
        if (at.q == 0) squares[at.column_warp][at.row_in_tile + 8 * h] = make_float2(all_squares[h], kept_squares[h]);
    }
    float* const partial = reinterpret_cast<float*>(dynamic);
    if constexpr (kRank > 0) {
        copy_async_wait<0>();
        __syncthreads();  // the partial sums take the place of stages and slots
#pragma unroll
        for (int n = 0; n < kRank / 8; ++n) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const int row = at.column_warp * kRowTile + at.row_in_tile + 8 * h;
                *reinterpret_cast<float2*>(partial + row * kPartialStride + 8 * n + 2 * at.q) =
                    make_float2(t[n][2 * h], t[n][2 * h + 1]);
            }
        }
    }
    cluster_barrier<kSplits>();
    if (p.values != nullptr) store_scale(p, at, squares[0]);
    if constexpr (kRank > 0) store_t(p, at, partial);
    cluster_rendezvous<kSplits>();  // no block leaves while another reads its shared memory
}

}  // namespace lynx
