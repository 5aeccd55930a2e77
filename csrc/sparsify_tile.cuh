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
constexpr bool kDeflate = DEFLATE;              // takes t·A off z, with the t that another launch has left
constexpr int kSumRank = kDeflate ? 0 : kRank;  // columns of t that this one computes
constexpr int kTiles = kSumRank ? kSumRank / 8 : 1;  // of 8 columns of t
constexpr int kRowWarps = ROW_WARPS, kColumnWarps = COLUMN_WARPS;
constexpr int kWorkers = 32 * kRowWarps * kColumnWarps;  // threads that work on X
#define WARPGROUP (HELPERS == 4 && !DEFLATE)  // multiplies z by the LoRA weight; other helpers only copy it
#define BULK (LYNX_SM90 && DEFLATE)  // what z is multiplied by comes in one copy a chunk
// The helpers come behind, a warpgroup at a multiple of four warps; warps between them are idle.
constexpr int kFirstHelper = WARPGROUP ? (kWorkers + 127) / 128 * 128 : kWorkers;
constexpr int kThreads = kFirstHelper + 32 * HELPERS;
constexpr bool kWarpgroup = WARPGROUP;
constexpr int kRing = 6;                   // chunks of the LoRA weight the warpgroup keeps
constexpr int kBlocks = (kRowWarps + 3) / 4;  // of 64 rows
constexpr int kSumSets = kWarpgroup ? 1 : kColumnWarps;
constexpr int kRowTile = 16 * kRowWarps;
constexpr int kSplits = SPLITS;  // blocks in a cluster
constexpr int kChunk = 64;       // columns
constexpr int kRowBytes = 128;   // of one chunk
constexpr int kStages = STAGES;  // chunks of a warp in flight, this one included
constexpr int kInputs = PRODUCER == kActMul ? 2 : 1;
constexpr int kSlotBytes = 16 * kRowBytes;  // one chunk of one input of a warp
constexpr int kSlots = kWorkers / 32 * kInputs;
constexpr int kAhead = kWarpgroup ? kStages - 2 : kStages - 1;  // chunks of x a warp copies ahead
constexpr int kSecondAt = kWorkers / 32 * kSlotBytes;            // from a chunk to that of the second input
constexpr int kLoraBytes = kColumnWarps * kRank * kRowBytes;  // of one stage
constexpr int kLoraMemory = kWarpgroup ? kRing * kRank * kRowBytes : kStages * kLoraBytes;
constexpr int kPartialStride = kSumRank + 8;  // floats; + 8 keeps the rows of a store in different banks
constexpr int kOwnRows = (kRowTile + kSplits - 1) / kSplits;  // rows of a tile whose sums one block of a cluster stores
constexpr bool kNorm = kProducer == kLayerNorm || kProducer == kRmsNorm;
constexpr bool kTwoPasses = kNorm && !kDeflate;  // a launch that deflates is given the rows' statistics
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
    char* t;             // read where this launch deflates
    char* directions;    // the rows of lora_down that deflate, as `Deflation` wants them; null: nobody deflates
    float2* statistics;  // mean and 1/σ of a norm's rows for the launch that deflates, or null
    long long x_stride, second_stride, mult_stride, add_stride, shift_stride, lora_stride, t_stride;
    int m, k;
    int first_columns;                    // of the first input of cat
    int mult_rows, add_rows, shift_rows;  // rows of X that share one row of mult, of add, of shift
    int rank;                             // rows of lora_down; the rest up to kRank counts as zeros
    int held_rounds;                      // rounds of x that stay in shared memory between the passes of a norm
    int native;                           // scale is 1
    float eps, mult_offset;               // of the norm, of mult
    float scale_eps;
    int slot_rounds;                      // rounds of slots
    int deflated, direction_rows;         // rows of lora_down that deflate; with zeros, as many as `directions` has
};

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

// The offset of the 16-byte `piece` in a row of 128 bytes, where each row has its pieces in another order: 8 lanes
// that read 2 rows × 4 pieces, and 8 that write a row, touch all banks.
__device__ __forceinline__ u32 piece_offset(int row, int piece) { return row * kRowBytes + (piece ^ row % 8) * 16; }

// Which thread this is, and the part of X it works on.
struct Position {
    int lane, g, q, row_warp, column_warp, rank, first_row, row_in_tile;
    Slice slice;
    u32 fragment;  // offset of this lane's first 16 bytes in a tile of 128-byte rows; ^ 16 leads to the second

    __device__ __forceinline__ explicit Position(const SparsifyParams& p)
        : lane(threadIdx.x % 32), g(lane / 4), q(lane % 4), row_warp(threadIdx.x / 32 % kRowWarps),
          column_warp(threadIdx.x / 32 / kRowWarps), rank(blockIdx.x % kSplits),
          first_row(row_tile() * kRowTile), row_in_tile(16 * row_warp + g), slice(p, rank),
          fragment(piece_offset(g, 2 * q)) {}

    // The last rows first where this launch reads x again: they are what L2 still holds.
    static __device__ __forceinline__ int row_tile() {
        return kDeflate ? (gridDim.x - 1 - blockIdx.x) / kSplits : blockIdx.x / kSplits;
    }
    __device__ __forceinline__ int chunk(int round) const { return slice.begin + round * kColumnWarps + column_warp; }
};

// A walk through slots of shared memory: `linear` of them once, then a ring of kStages for ever.
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

// This warp's copies of x to shared memory, chunk after chunk. Lane l copies piece l % 8 of rows l / 8, + 4, + 8,
// + 12. Rows past M are copies of the last.
struct InputCopy {
    const char *x, *second;  // for cat x leads on into the second input
    Slots slot;
    u32 rows_below;  // rows of X after this lane's first

    __device__ __forceinline__ InputCopy(const SparsifyParams& p, const Position& at, u32 slots, int first_round)
        : slot(slots + piece_offset(at.lane / 8, at.lane % 8), kTwoPasses ? p.held_rounds : 0) {
        const int chunk = at.chunk(first_round);
        const long long row = first_row(p, at);
        const long long column = (long long)chunk * kRowBytes + at.lane % 8 * 16;
        x = p.x + row * p.x_stride + column;
        if constexpr (kTwoInputs) second = p.second + row * p.second_stride + column;
        if (kProducer == kCat && chunk * kChunk >= p.first_columns) x = in_second(p, at, chunk);
        slot.skip(first_round);
        rows_below = p.m - 1 - static_cast<int>(row);
    }

    // chunk: the one to copy, of which there may be none.
    __device__ __forceinline__ void next(const SparsifyParams& p, const Position& at, int chunk) {
        if (chunk < at.slice.end) {
            u32 stride = p.x_stride;
            if (kProducer == kCat && chunk * kChunk >= p.first_columns) {
                if ((chunk - kColumnWarps) * kChunk < p.first_columns) x = in_second(p, at, chunk);
                stride = p.second_stride;
            }
            copy_rows(slot.at, x, stride);
            if constexpr (kTwoInputs) copy_rows(slot.at + kSecondAt, second, p.second_stride);
        }
        x += kColumnWarps * kRowBytes;
        if constexpr (kTwoInputs) second += kColumnWarps * kRowBytes;
        slot.next();
    }

  private:
    static __device__ __forceinline__ int first_row(const SparsifyParams& p, const Position& at) {
        return min(at.first_row + 16 * at.row_warp + at.lane / 8, p.m - 1);
    }
    static __device__ __forceinline__ const char* in_second(const SparsifyParams& p, const Position& at, int chunk) {
        return p.second + first_row(p, at) * p.second_stride + (long long)chunk * kRowBytes - p.first_columns * 2ll +
               at.lane % 8 * 16;
    }
    __device__ __forceinline__ void copy_rows(u32 to, const char* from, u32 stride) const {
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {  // 32 × 32 bits: one instruction each; rows 4 apart differ in bit 2 of the piece
            const u32 at = (i % 2 ? to ^ 64 : to) + i * 4 * kRowBytes;
            copy_async(at, from + static_cast<u64>(min(4 * i, rows_below)) * stride);
        }
    }
};

// Which stages of the LoRA weight are full and which are empty, for each column of warps.
struct StageBarriers {
    static constexpr u32 kToEmpty = 8 * kStages * kColumnWarps;  // bytes from a full barrier to its empty one
    u64 of[2][kStages][kColumnWarps];

    __device__ __forceinline__ void init() const {
#if BULK
        constexpr int kArrivals = 1;
#else
        constexpr int kArrivals = kWarpgroup ? 32 * kRowWarps : 32;
#endif
#pragma unroll 1
        for (int i = 0; i < kStages * kColumnWarps; ++i) {
            barrier_init(full(0, 0) + 8 * i, kArrivals);
            barrier_init(empty(0, 0) + 8 * i, kWarpgroup ? 1 : 32 * kRowWarps);
        }
    }
    __device__ __forceinline__ u32 full(int stage, int column_warp) const {
        return shared_address(of) + 8 * (stage * kColumnWarps + column_warp);
    }
    __device__ __forceinline__ u32 empty(int stage, int column_warp) const {
        return full(stage, column_warp) + kToEmpty;
    }
};

// What the warp that copies the LoRA weight, or the directions, does: kStages rounds ahead of the slowest warp of each
// column.
__device__ __forceinline__ void copy_lora(const SparsifyParams& p, const Position& at, u32 stages,
                                          const StageBarriers& barriers) {
    constexpr int kBytes = kRank * kRowBytes;
    constexpr int kStep = kDeflate ? kBytes : kRowBytes;  // from a chunk to the next
    const char* source = kDeflate ? p.directions + at.lane * 16
                                  : p.lora_down + at.lane / 8 * p.lora_stride + at.lane % 8 * 16;
    source += at.slice.begin * kStep;
    const u32 offset = kDeflate ? at.lane * 16 : piece_offset(at.lane / 8, at.lane % 8);
    int stage = 0, chunk = at.slice.begin;
    u32 parity = 1;  // of the phase before the first: the stages begin empty
#pragma unroll 1
    while (chunk < at.slice.end) {
#pragma unroll 1
        for (int w = 0; w < kColumnWarps && chunk < at.slice.end; ++w, ++chunk, source += kStep) {
            barrier_wait(barriers.empty(stage, w), parity);
            const u32 to = stages + (stage * kColumnWarps + w) * kBytes + offset;
#if BULK
            if (at.lane == 0) {
                barrier_expect(barriers.full(stage, w), kBytes);
                copy_bulk(to, source, kBytes, barriers.full(stage, w));
            }
#else
#pragma unroll
            for (int i = 0; i < kRank; i += 4) {  // rows past the rank become zeros
                if constexpr (kDeflate) copy_async(to + i * kRowBytes, source + i * kRowBytes);
                else copy_async((to ^ i % 8 * 16) + i * kRowBytes, source + i * p.lora_stride, i < p.rank);
            }
            barrier_arrive_after_copies(barriers.full(stage, w));
#endif
        }
        if (++stage == kStages) stage = 0, parity ^= 1;
    }
}

// This thread's 16 channels of row half h of a slot; `fragment` is the slot plus the lane's offset.
__device__ __forceinline__ void read_slot(u32 fragment, int h, u32 (&w)[8]) {
    const uint4 a = load_shared(fragment + h * 8 * kRowBytes), b = load_shared((fragment ^ 16) + h * 8 * kRowBytes);
    w[0] = a.x, w[1] = a.y, w[2] = a.z, w[3] = a.w, w[4] = b.x, w[5] = b.y, w[6] = b.z, w[7] = b.w;
}

}  // namespace lynx
