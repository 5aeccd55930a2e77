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

#include "element.cuh"
#include "portable.cuh"
#include "producers.cuh"
#include "prune.cuh"

namespace lynx {

using Element = ElementOf<FLOAT16>::Type;

constexpr int kProducer = PRODUCER;
constexpr int kRank = RANK;
constexpr int kTiles = kRank ? kRank / 8 : 1;  // of 8 columns of t
constexpr int kRowWarps = ROW_WARPS, kColumnWarps = COLUMN_WARPS;
constexpr int kThreads = 32 * kRowWarps * kColumnWarps;
constexpr int kRowTile = 16 * kRowWarps;
constexpr int kSplits = SPLITS;  // blocks in a cluster
constexpr int kChunk = 64;      // columns
constexpr int kRowBytes = 128;  // of one chunk
constexpr int kStages = STAGES;  // chunks of a warp in flight, this one included
constexpr int kInputs = PRODUCER == kActMul ? 2 : 1;
constexpr int kSlotBytes = 16 * kRowBytes;  // one chunk of one input of a warp
constexpr int kSlots = kThreads / 32 * kInputs;
constexpr int kLoraBytes = kColumnWarps * kRank * kRowBytes;  // of one stage
constexpr int kPartialStride = kRank + 8;  // floats; + 8 keeps the rows of a store in different banks
constexpr bool kNorm = kProducer == kLayerNorm || kProducer == kRmsNorm;
constexpr bool kTwoInputs = kProducer == kActMul;

static_assert(kRank % 16 == 0, "the rank is padded to whole 16-column tiles of t");

// Mirrored by SparsifyParams in runtime/sparsify_kernel.py. Strides are in bytes.
struct SparsifyParams {
    const char *x, *second;
    const char *weight, *bias, *mult, *add, *shift, *score;
    const char* lora_down;
    char* values;  // null: only t is wanted
    u32* metadata;
    float* scale;
    char* t;
    long long x_stride, second_stride, mult_stride, add_stride, lora_stride, t_stride;
    int m, k;
    int first_columns;           // of the first input of cat
    int mult_rows, add_rows;     // rows of X that share one row of mult, of add
    int rank;                    // rows of lora_down; the rest up to kRank counts as zeros
    int held_rounds;             // rounds of x that stay in shared memory between the passes of a norm
    int native;                  // scale is 1
    float eps, mult_offset;      // of the norm, of mult
    float scale_eps;
    int padding;
};

// The per-channel vectors of 16 channels.
struct Vectors {
    Channels<Element, WEIGHT> weight;
    Channels<Element, BIAS> bias;
    Channels<Element, MULT> mult;
    Channels<Element, ADD> add;
    Channels<Element, SHIFT> shift;
    Channels<Element, SCORE> score;

    __device__ __forceinline__ void load(const SparsifyParams& p, const char* mult_row, const char* add_row, int channel) {
        weight.load(p.weight, channel);
        bias.load(p.bias, channel);
        mult.load(mult_row, channel);
        add.load(add_row, channel);
        shift.load(p.shift, channel);
        score.load(p.score, channel);
    }
};

// Words a thread needs to load them a round ahead; beyond this many it loads them when it needs them.
constexpr int kVectorWords = 8 * (WEIGHT + BIAS + MULT + ADD + SHIFT + SCORE);
constexpr bool kVectorsAhead = kVectorWords <= (kRank ? 8 : 32);


// Mean and 1/σ of this thread's two rows.
struct Statistics {
    float mean[2], inverse[2];
};

// The part of K one block of a cluster works on, in chunks.
struct Slice {
    int begin, end;

    __device__ __forceinline__ Slice(const SparsifyParams& p, int rank) {
        const int chunks = p.k / kChunk;
        begin = chunks * rank / kSplits, end = chunks * (rank + 1) / kSplits;
    }
    __device__ __forceinline__ int rounds(int column_warp) const {  // that this warp takes part in
        return (end - begin - column_warp + kColumnWarps - 1) / kColumnWarps;
    }
};

// Which thread this is, and the part of X it works on.
struct Position {
    int lane, g, q, row_warp, column_warp, rank, first_row, row_in_tile;
    Slice slice;
    const char *mult[2], *add[2];  // rows of this thread's two rows of X
    u32 fragment;                  // offset of this lane's first 16 bytes in a tile of 128-byte rows

    __device__ __forceinline__ explicit Position(const SparsifyParams& p)
        : lane(threadIdx.x % 32), g(lane / 4), q(lane % 4), row_warp(threadIdx.x / 32 % kRowWarps),
          column_warp(threadIdx.x / 32 / kRowWarps), rank(blockIdx.x % kSplits),
          first_row(blockIdx.x / kSplits * kRowTile), row_in_tile(16 * row_warp + g), slice(p, rank),
          fragment(g * kRowBytes + (2 * q ^ g & 1) * 16) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int row = min(first_row + row_in_tile + 8 * h, p.m - 1);
            if constexpr (MULT != kAbsent) mult[h] = p.mult + row / p.mult_rows * p.mult_stride;
            if constexpr (ADD != kAbsent) add[h] = p.add + row / p.add_rows * p.add_stride;
        }
    }

    __device__ __forceinline__ int chunk(int round) const { return slice.begin + round * kColumnWarps + column_warp; }
};

// A walk through slots or stages of shared memory: `linear` of them once, then a ring of kStages for ever.
template <int kBytes> struct Ring {
    u32 at, first, end;

    __device__ __forceinline__ Ring(u32 start, int linear)
        : at(start), first(start + linear * kBytes), end(first + kStages * kBytes) {}
    __device__ __forceinline__ void skip(int count) { at += count * kBytes; }
    __device__ __forceinline__ void next() {
        at += kBytes;
        if (at == end) at = first;
    }
};

using Slots = Ring<kSlots * kSlotBytes>;
using Stages = Ring<kLoraBytes>;

// This warp's copies of x to shared memory, chunk after chunk. Lane l copies piece l % 8 of rows l / 8, + 4, + 8,
// + 12. Rows past M become zeros. Odd rows have the 16-byte pieces of each pair swapped, here and in the LoRA
// stages, which spreads the 2 rows × 4 pieces that 8 lanes read over all banks.
struct InputCopy {
    const char *x, *second;
    Slots slot;
    int chunk, end, rows_left;

    __device__ __forceinline__ InputCopy(const SparsifyParams& p, const Position& at, u32 slots, int first_round)
        : slot(slots + at.lane / 8 * kRowBytes + (at.lane % 8 ^ at.lane / 8 & 1) * 16, kNorm ? p.held_rounds : 0),
          chunk(at.chunk(first_round)), end(at.slice.end) {
        const long long row = at.first_row + 16 * at.row_warp + at.lane / 8;
        const long long column = (long long)chunk * kRowBytes + at.lane % 8 * 16;
        x = p.x + row * p.x_stride + column;
        if constexpr (kTwoInputs) second = p.second + row * p.second_stride + column;
        if constexpr (kProducer == kCat) second = p.second + row * p.second_stride + column - p.first_columns * 2ll;
        slot.skip(first_round);
        rows_left = p.m - static_cast<int>(row);
    }

    __device__ __forceinline__ void next(const SparsifyParams& p) {
        if (chunk < end) {
            const bool in_second = kProducer == kCat && chunk * kChunk >= p.first_columns;
            const char* const from = in_second ? second : x;
            const long long stride = in_second ? p.second_stride : p.x_stride;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                copy_async(slot.at + i * 4 * kRowBytes, from + i * 4 * stride, 4 * i < rows_left);
                if constexpr (kTwoInputs) {
                    copy_async(slot.at + kSlotBytes + i * 4 * kRowBytes, second + i * 4 * p.second_stride,
                               4 * i < rows_left);
                }
            }
        }
        chunk += kColumnWarps;
        x += kColumnWarps * kRowBytes;
        if constexpr (kTwoInputs || kProducer == kCat) second += kColumnWarps * kRowBytes;
        slot.next();
    }
};

// The block's copies of the LoRA weight, stage after stage: kColumnWarps chunks of each of its rows.
struct LoraCopy {
    static constexpr int kPieces = kRank * kColumnWarps * 8, kRows = kThreads / (8 * kColumnWarps);  // rows a step
    const char* source;
    Stages stage;
    int row, chunk, end;

    __device__ __forceinline__ LoraCopy(const SparsifyParams& p, const Position& at, u32 stages)
        : stage(stages, 0), row(threadIdx.x / (8 * kColumnWarps)), end(at.slice.end) {
        const int piece = threadIdx.x % 8, column_warp = threadIdx.x / 8 % kColumnWarps;
        chunk = at.slice.begin + column_warp;
        source = p.lora_down + row * p.lora_stride + (long long)chunk * kRowBytes + piece * 16;
        const u32 offset = (column_warp * kRank + row) * kRowBytes + (piece ^ row & 1) * 16;
        stage.at += offset, stage.first += offset, stage.end += offset;
    }

    __device__ __forceinline__ void next(const SparsifyParams& p) {
        if (chunk < end) {
#pragma unroll
            for (int i = 0; i < (kPieces + kThreads - 1) / kThreads; ++i) {
                if (kPieces % kThreads && row + i * kRows >= kRank) break;
                // Rows past the rank become zeros. The rank is a multiple of 16, so a step of at most 16 rows is
                // inside or outside as a whole.
                const bool valid = (16 % kRows ? row + i * kRows : i * kRows) < p.rank;
                copy_async(stage.at + i * kRows * kRowBytes, source + i * kRows * p.lora_stride, valid);
            }
        }
        chunk += kColumnWarps;
        source += kColumnWarps * kRowBytes;
        stage.next();
    }
};

// This thread's 16 channels of row half h of a slot; `fragment` is the slot plus the lane's offset.
__device__ __forceinline__ void read_slot(u32 fragment, int h, u32 (&w)[8]) {
    const uint4 a = load_shared(fragment + h * 8 * kRowBytes), b = load_shared((fragment ^ 16) + h * 8 * kRowBytes);
    w[0] = a.x, w[1] = a.y, w[2] = a.z, w[3] = a.w, w[4] = b.x, w[5] = b.y, w[6] = b.z, w[7] = b.w;
}

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
    if constexpr (kNorm) {
        if (h == 1) {  // rows 8 apart may belong to two samples; the vectors are loaded anew for the next chunk
            if (MULT != kAbsent && at.mult[1] != at.mult[0]) vectors.mult.load(at.mult[1], chunk * kChunk + at.q * 16);
            if (ADD != kAbsent && at.add[1] != at.add[0]) vectors.add.load(at.add[1], chunk * kChunk + at.q * 16);
        }
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
__device__ __forceinline__ void prune(const u32 (&z)[8], const u32 (&clean)[4][4], int h, const Channels<Element, SCORE>& score,
                                      u32 (&kept)[4], u32& metadata, float& all_squares, float& kept_squares) {
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

// t (16 × kRank) += z · Aᵀ over one chunk, a the fragments of z; `fragment` is this warp's part of the stage plus the lane's offset.
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
    const auto load_vectors = [&] { vectors.load(p, at.mult[0], at.add[0], chunk * kChunk + at.q * 16); };
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
