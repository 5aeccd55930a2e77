// What stands in front of the pruning: the producer of X, in fp32.
//
// One thread owns 16 consecutive channels of two rows at a time and works on 8 of them at once.
#pragma once

#include "activations.cuh"
#include "element.cuh"
#include "portable.cuh"

namespace lynx {

enum Producer { kIdentity = 0, kAct = 1, kActMul = 2, kLayerNorm = 3, kRmsNorm = 4, kCat = 5 };

// How a per-channel vector is stored: not at all, as the element type, or as fp32.
enum Storage { kAbsent = 0, kElement = 1, kFloat = 2 };

__device__ __forceinline__ uint4 load16(const void* address) { return *static_cast<const uint4*>(address); }

template <typename Element, int kCount>
__device__ __forceinline__ void unpack(const u32* w, float (&v)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) v[2 * i] = Element::low(w[i]), v[2 * i + 1] = Element::high(w[i]);
}

template <typename Element, int kCount>
__device__ __forceinline__ void pack(const float (&v)[kCount], u32* w) {
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) w[i] = Element::pack(v[2 * i], v[2 * i + 1]);
}

// 8 consecutive channels of a per-channel vector, stored as `kStorage` says.
template <typename Element, int kStorage> struct Channels {
    static constexpr int kBytes = 0;  // of one channel

    __device__ __forceinline__ void load(const char*) {}
    __device__ __forceinline__ void load_shared(u32) {}
    __device__ __forceinline__ float operator[](int) const { return 0.f; }
};

template <typename Element> struct Channels<Element, kElement> {
    static constexpr int kBytes = 2;
    uint4 words;

    __device__ __forceinline__ void load(const char* address) { words = load16(address); }
    __device__ __forceinline__ void load_shared(u32 address) { words = lynx::load_shared(address); }
    __device__ __forceinline__ float operator[](int i) const {
        const u32 word = i / 2 == 0 ? words.x : i / 2 == 1 ? words.y : i / 2 == 2 ? words.z : words.w;
        return i % 2 ? Element::high(word) : Element::low(word);
    }
};

template <typename Element> struct Channels<Element, kFloat> {
    static constexpr int kBytes = 4;
    uint4 low, high;

    __device__ __forceinline__ void load(const char* address) { low = load16(address), high = load16(address + 16); }
    __device__ __forceinline__ void load_shared(u32 address) {
        low = lynx::load_shared(address), high = lynx::load_shared(address + 16);
    }
    __device__ __forceinline__ float operator[](int i) const {
        const uint4& words = i < 4 ? low : high;
        return __uint_as_float(i % 4 == 0 ? words.x : i % 4 == 1 ? words.y : i % 4 == 2 ? words.z : words.w);
    }
};

// Number, mean and sum of squared deviations of a set of values; two sets merge without cancellation
// (Chan, Golub, LeVeque 1979). For RMS-norm the mean stays 0, which makes m2 the sum of squares.
struct Moments {
    float count, mean, m2;

    __device__ __forceinline__ void merge(float other_count, float other_mean, float other_m2) {
        const float total = count + other_count;
        if (other_count == 0.f) return;
        const float delta = other_mean - mean, share = other_count * reciprocal_approx(total);
        mean = fmaf(delta, share, mean);
        m2 += fmaf(delta * delta, count * share, other_m2);
        count = total;
    }
};

// The moments of 16 values; about zero rather than the mean when not `kCentred`.
template <bool kCentred> __device__ __forceinline__ Moments moments_of(const float (&v)[16]) {
    Moments m{16.f, 0.f, 0.f};
    if constexpr (kCentred) {
        float sum = 0.f;
#pragma unroll
        for (int i = 0; i < 16; ++i) sum += v[i];
        m.mean = sum * (1.f / 16.f);
    }
#pragma unroll
    for (int i = 0; i < 16; ++i) m.m2 = fmaf(v[i] - m.mean, v[i] - m.mean, m.m2);
    return m;
}

}  // namespace lynx
