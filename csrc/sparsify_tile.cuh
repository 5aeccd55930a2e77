// The tile of X a thread block of sparsify.cu works on: compile-time geometry, parameters, who is where, and the
// copies to shared memory that run ahead of the work.
#pragma once

#include "element.cuh"
#include "portable.cuh"
#include "producers.cuh"

namespace lynx {

using Element = ElementOf<FLOAT16>::Type;

constexpr int kProducer = PRODUCER;
constexpr int kRank = RANK;
constexpr int kTiles = kRank ? kRank / 8 : 1;  // of 8 columns of t
constexpr int kRowWarps = ROW_WARPS, kColumnWarps = COLUMN_WARPS;
constexpr int kThreads = 32 * kRowWarps * kColumnWarps;
constexpr int kRowTile = 16 * kRowWarps;
constexpr int kSplits = SPLITS;  // blocks in a cluster
constexpr int kChunk = 64;       // columns
constexpr int kRowBytes = 128;   // of one chunk
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
    long long x_stride, second_stride, mult_stride, add_stride, shift_stride, lora_stride, t_stride;
    int m, k;
    int first_columns;           // of the first input of cat
    int mult_rows, add_rows, shift_rows;  // rows of X that share one row of mult, of add, of shift
    int rank;                    // rows of lora_down; the rest up to kRank counts as zeros
    int held_rounds;             // rounds of x that stay in shared memory between the passes of a norm
    int native;                  // scale is 1
    float eps, mult_offset;      // of the norm, of mult
    float scale_eps;
};

// Where the vectors that each sample has its own of begin, for this thread's two rows of X.
struct SampleRows {
    const char *mult[2], *add[2], *shift[2];
};

// The per-channel vectors of 16 channels.
struct Vectors {
    Channels<Element, WEIGHT> weight;
    Channels<Element, BIAS> bias;
    Channels<Element, MULT> mult;
    Channels<Element, ADD> add;
    Channels<Element, SHIFT> shift;
    Channels<Element, SCORE> score;

    __device__ __forceinline__ void load(const SparsifyParams& p, const SampleRows& rows, int channel) {
        weight.load(p.weight, channel);
        bias.load(p.bias, channel);
        mult.load(rows.mult[0], channel);
        add.load(rows.add[0], channel);
        shift.load(rows.shift[0], channel);
        score.load(p.score, channel);
    }

    // Rows 8 apart may belong to two samples: the second half's vectors. `load` brings the first half's back.
    __device__ __forceinline__ void load_second(const SampleRows& rows, int channel) {
        if (MULT != kAbsent && rows.mult[1] != rows.mult[0]) mult.load(rows.mult[1], channel);
        if (ADD != kAbsent && rows.add[1] != rows.add[0]) add.load(rows.add[1], channel);
        if (SHIFT != kAbsent && rows.shift[1] != rows.shift[0]) shift.load(rows.shift[1], channel);
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
    SampleRows samples;
    u32 fragment;  // offset of this lane's first 16 bytes in a tile of 128-byte rows

    __device__ __forceinline__ explicit Position(const SparsifyParams& p)
        : lane(threadIdx.x % 32), g(lane / 4), q(lane % 4), row_warp(threadIdx.x / 32 % kRowWarps),
          column_warp(threadIdx.x / 32 / kRowWarps), rank(blockIdx.x % kSplits),
          first_row(blockIdx.x / kSplits * kRowTile), row_in_tile(16 * row_warp + g), slice(p, rank),
          fragment(g * kRowBytes + (2 * q ^ g & 1) * 16) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int row = min(first_row + row_in_tile + 8 * h, p.m - 1);
            if constexpr (MULT != kAbsent) samples.mult[h] = p.mult + row / p.mult_rows * p.mult_stride;
            if constexpr (ADD != kAbsent) samples.add[h] = p.add + row / p.add_rows * p.add_stride;
            if constexpr (SHIFT != kAbsent) samples.shift[h] = p.shift + row / p.shift_rows * p.shift_stride;
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

}  // namespace lynx
