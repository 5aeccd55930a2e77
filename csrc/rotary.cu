// rotary: RMS norm over the channels of each attention head and rotation of neighbouring channels, in one pass.
//
//     n = x · rsqrt(mean(x²) + eps) · weight
//     y[2i] = n[2i]·cos[i, 0] − n[2i + 1]·sin[i, 0],   y[2i + 1] = n[2i + 1]·cos[i, 1] + n[2i]·sin[i, 1]
//
// A lane owns 8 channels, 16 bytes of x; LANES lanes a head. A warp takes one token and walks some of its heads, so
// that the token's angles, times the weight, stay in registers; AHEAD loads are on their way at a time.
//
// Macros (see runtime/rotary_kernel.py): FLOAT16, LANES (channels / 8), NORM, WEIGHT (0 absent, 1 of x's type,
// 2 fp32), PAIR (1: the two channels of a pair have one angle, 2: each its own), WARPS, AHEAD, MIN_BLOCKS.

#include "portable.cuh"

namespace lynx {

using Element = ElementOf<FLOAT16>::Type;

constexpr int kHeads = 32 / LANES;  // that a warp works on side by side

// Strides in elements; of a table: between samples, tokens, pairs and, with PAIR 2, the channels of a pair.
struct Table {
    const float* data;
    long long sample, token, pair, channel;
};

struct Params {
    const unsigned short* x;
    long long x_sample, x_token, x_head;
    const void* weight;
    Table cos, sin;
    unsigned short* y;  // heads of a token one behind the other, tokens of a sample one behind the other
    long long y_sample;
    int samples, tokens, heads, heads_each;  // heads_each: of one warp
    float eps;
};

__device__ __forceinline__ void unpack(uint4 words, float (&v)[8]) {
    const u32 w[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) v[2 * i] = Element::low(w[i]), v[2 * i + 1] = Element::high(w[i]);
}

__device__ __forceinline__ void load_angles(const Table& table, int sample, int token, int group, float (&to)[8]) {
    const float* from = table.data + sample * table.sample + token * table.token + group * 4 * table.pair;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        to[2 * i] = from[i * table.pair];
        to[2 * i + 1] = PAIR == 2 ? from[i * table.pair + table.channel] : to[2 * i];
    }
}

}  // namespace lynx

extern "C" __global__ void __launch_bounds__(32 * WARPS, MIN_BLOCKS) rotary(const __grid_constant__ lynx::Params p) {
    using namespace lynx;
    dependency_wait();
    const int lane = threadIdx.x % 32, group = lane % LANES;
    const long long row = static_cast<long long>(blockIdx.x) * WARPS + threadIdx.x / 32;
    const int sample = static_cast<int>(row / p.tokens), token = static_cast<int>(row - 1LL * sample * p.tokens);
    if (sample >= p.samples) return;

    // y[c] = x[c] · along[c] + x[c ^ 1] · across[c], up to the norm
    float along[8], across[8];
    load_angles(p.cos, sample, token, group, along);
    load_angles(p.sin, sample, token, group, across);
#pragma unroll
    for (int c = 0; c < 8; c += 2) across[c] = -across[c];
    if constexpr (WEIGHT != 0) {
        float weight[8];
        if constexpr (WEIGHT == 1) unpack(static_cast<const uint4*>(p.weight)[group], weight);
#pragma unroll
        for (int c = 0; c < 8; ++c) {
            if constexpr (WEIGHT == 2) weight[c] = static_cast<const float*>(p.weight)[group * 8 + c];
        }
#pragma unroll
        for (int c = 0; c < 8; ++c) along[c] *= weight[c], across[c] *= weight[c ^ 1];
    }

    const unsigned short* x = p.x + sample * p.x_sample + token * p.x_token + group * 8;
    unsigned short* y = p.y + sample * p.y_sample + (1LL * token * p.heads * LANES + group) * 8;
    const int end = min(p.heads, static_cast<int>(blockIdx.y + 1) * p.heads_each);
    for (int first = blockIdx.y * p.heads_each; first < end; first += AHEAD * kHeads) {
        uint4 words[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            const int head = first + i * kHeads + lane / LANES;
            if (head < end) words[i] = *reinterpret_cast<const uint4*>(x + head * p.x_head);
        }
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            const int head = first + i * kHeads + lane / LANES;
            float v[8], inverse = 1.0f;
            unpack(words[i], v);
            if constexpr (NORM) {
                float squares = 0.0f;
#pragma unroll
                for (int c = 0; c < 8; ++c) squares += v[c] * v[c];
#pragma unroll
                for (int step = LANES / 2; step > 0; step /= 2)
                    squares += __shfl_xor_sync(0xffffffffu, squares, step);
                inverse = rsqrtf(squares / (8 * LANES) + p.eps);
            }
            u32 out[4];
#pragma unroll
            for (int c = 0; c < 8; c += 2)
                out[c / 2] = Element::pack((v[c] * along[c] + v[c + 1] * across[c]) * inverse,
                                           (v[c + 1] * along[c + 1] + v[c] * across[c + 1]) * inverse);
            if (head < end)
                *reinterpret_cast<uint4*>(y + 1LL * head * LANES * 8) = make_uint4(out[0], out[1], out[2], out[3]);
        }
    }
    dependency_release();
}
