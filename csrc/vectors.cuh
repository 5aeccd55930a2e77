// The vectors per channel that a producer, the shift and the score need: a warp's copies of them to shared memory,
// which run ahead with those of x, and 8 channels at a time in registers.
//
// What has a row a sample is copied for the sample of the warp's first row; a warp whose 16 rows belong to several
// samples reads it from global memory instead.
#pragma once

#include "sparsify_tile.cuh"

namespace lynx {

template <int kStorage> constexpr int kChannelBytes = Channels<Element, kStorage>::kBytes;

// Where each lies among the vectors of one chunk, bytes; none takes room when absent.
constexpr int kWeightAt = 0;
constexpr int kBiasAt = kWeightAt + kChunk * kChannelBytes<WEIGHT>;
constexpr int kMultAt = kBiasAt + kChunk * kChannelBytes<BIAS>;
constexpr int kAddAt = kMultAt + kChunk * kChannelBytes<MULT>;
constexpr int kShiftAt = kAddAt + kChunk * kChannelBytes<ADD>;
constexpr int kScoreAt = kShiftAt + kChunk * kChannelBytes<SHIFT>;
constexpr int kVectorBytes = kScoreAt + kChunk * kChannelBytes<SCORE>;  // of a warp and a stage
constexpr int kVectorCopies = (kVectorBytes + 511) / 512;                // of 16 bytes a lane
constexpr bool kPerSample = MULT != kAbsent || ADD != kAbsent || SHIFT != kAbsent;

using VectorSlots = Ring<kWorkers / 32 * kVectorBytes>;

// For each row of the tile, where its sample's row of mult, add and shift begins.
struct SampleRows {
    const char* of[3][kRowTile];

    // All threads of the block; complete after a barrier.
    __device__ __forceinline__ void fill(const SparsifyParams& p, const Position& at) {
        for (int i = threadIdx.x; i < kRowTile; i += kThreads) {
            const int row = min(at.first_row + i, p.m - 1);
            if constexpr (MULT != kAbsent) of[0][i] = p.mult + row / p.mult_rows * p.mult_stride;
            if constexpr (ADD != kAbsent) of[1][i] = p.add + row / p.add_rows * p.add_stride;
            if constexpr (SHIFT != kAbsent) of[2][i] = p.shift + row / p.shift_rows * p.shift_stride;
        }
    }
    // Whether the 16 rows of a warp belong to one sample.
    __device__ __forceinline__ bool same(int row_warp) const {
        const int first = 16 * row_warp, last = first + 15;
        bool same = true;
        if constexpr (MULT != kAbsent) same = same && of[0][first] == of[0][last];
        if constexpr (ADD != kAbsent) same = same && of[1][first] == of[1][last];
        if constexpr (SHIFT != kAbsent) same = same && of[2][first] == of[2][last];
        return same;
    }
};

// A warp's copies of the vectors, chunk after chunk.
struct VectorCopy {
    const char* from[kVectorCopies ? kVectorCopies : 1];
    int step[kVectorCopies ? kVectorCopies : 1];
    VectorSlots slot;

    __device__ __forceinline__ VectorCopy(const SparsifyParams& p, const Position& at, const SampleRows& samples,
                                          u32 slots)
        : slot(slots + at.lane * 16, 0) {
        const int row = 16 * at.row_warp;
#pragma unroll
        for (int i = 0; i < kVectorCopies; ++i) {
            int offset = i * 512 + at.lane * 16, bytes = kChannelBytes<WEIGHT>;
            const char* vector = p.weight;
            if (offset >= kBiasAt) vector = p.bias, bytes = kChannelBytes<BIAS>;
            if (MULT != kAbsent && offset >= kMultAt) vector = samples.of[0][row], bytes = kChannelBytes<MULT>;
            if (ADD != kAbsent && offset >= kAddAt) vector = samples.of[1][row], bytes = kChannelBytes<ADD>;
            if (SHIFT != kAbsent && offset >= kShiftAt) vector = samples.of[2][row], bytes = kChannelBytes<SHIFT>;
            if (offset >= kScoreAt) vector = p.score, bytes = kChannelBytes<SCORE>;
            const int begin = offset >= kScoreAt   ? kScoreAt
                              : offset >= kShiftAt ? kShiftAt
                              : offset >= kAddAt   ? kAddAt
                              : offset >= kMultAt  ? kMultAt
                              : offset >= kBiasAt  ? kBiasAt
                                                   : kWeightAt;
            from[i] = vector + (long long)at.chunk(0) * kChunk * bytes + (offset - begin);
            step[i] = offset < kVectorBytes ? kColumnWarps * kChunk * bytes : 0;
        }
    }

    __device__ __forceinline__ void next(const Position& at, int chunk) {
        if (chunk < at.slice.end) {
#pragma unroll
            for (int i = 0; i < kVectorCopies; ++i) {
                if (step[i]) copy_async(slot.at + i * 512, from[i]);
                from[i] += step[i];
            }
        }
        slot.next();
    }
};

// 8 channels of what stands between x and z.
struct Vectors {
    Channels<Element, WEIGHT> weight;
    Channels<Element, BIAS> bias;
    float factor[8], add[8], shift[8];  // mult + its offset; what may change from row to row, unpacked once

    // channel: of the chunk.
    __device__ __forceinline__ void load(const SparsifyParams& p, u32 slot, int channel) {
        weight.load_shared(slot + kWeightAt + channel * weight.kBytes);
        bias.load_shared(slot + kBiasAt + channel * bias.kBytes);
        Channels<Element, MULT> mult_words;
        Channels<Element, ADD> add_words;
        Channels<Element, SHIFT> shift_words;
        mult_words.load_shared(slot + kMultAt + channel * mult_words.kBytes);
        add_words.load_shared(slot + kAddAt + channel * add_words.kBytes);
        shift_words.load_shared(slot + kShiftAt + channel * shift_words.kBytes);
        unpack(p, mult_words, add_words, shift_words);
    }

    // What has a row a sample, of the sample that a row of the tile belongs to. channel: of X.
    __device__ __forceinline__ void load_sample(const SparsifyParams& p, const SampleRows& samples, int row,
                                                int channel) {
        Channels<Element, MULT> mult_words;
        Channels<Element, ADD> add_words;
        Channels<Element, SHIFT> shift_words;
        mult_words.load(samples.of[0][row] + channel * mult_words.kBytes);
        add_words.load(samples.of[1][row] + channel * add_words.kBytes);
        shift_words.load(samples.of[2][row] + channel * shift_words.kBytes);
        unpack(p, mult_words, add_words, shift_words);
    }

  private:
    template <typename Mult, typename Add, typename Shift>
    __device__ __forceinline__ void unpack(const SparsifyParams& p, const Mult& m, const Add& a, const Shift& s) {
#pragma unroll
        for (int i = 0; i < 8; ++i) factor[i] = m[i] + p.mult_offset, add[i] = a[i], shift[i] = s[i];
    }
};

}  // namespace lynx
