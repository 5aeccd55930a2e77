// What stands in front of the pruning: the producer of X, in fp32, on 16 consecutive channels of a row.
//
// One thread owns 16 channels of two rows at a time. `Operands` is what it loads for them from global memory,
// issued well before use; `produce` turns them into 8 words of X.
#pragma once

#include "activations.cuh"
#include "element.cuh"

namespace lynx {

enum Producer { kIdentity = 0, kAct = 1, kActMul = 2, kLayerNorm = 3, kRmsNorm = 4, kCat = 5 };

// How a per-channel vector is stored: not at all, as the element type, or as fp32.
enum Storage { kAbsent = 0, kElement = 1, kFloat = 2 };

__device__ __forceinline__ uint4 load16(const void* address) { return *static_cast<const uint4*>(address); }

// 16 consecutive channels of a row of elements.
struct Words {
    u32 w[8];

    __device__ __forceinline__ void load(const char* address) {
        const uint4 a = load16(address), b = load16(address + 16);
        w[0] = a.x, w[1] = a.y, w[2] = a.z, w[3] = a.w, w[4] = b.x, w[5] = b.y, w[6] = b.z, w[7] = b.w;
    }
};

template <typename Element> __device__ __forceinline__ void unpack(const u32 (&w)[8], float (&v)[16]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) v[2 * i] = Element::low(w[i]), v[2 * i + 1] = Element::high(w[i]);
}

template <typename Element> __device__ __forceinline__ void pack(const float (&v)[16], u32 (&w)[8]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) w[i] = Element::pack(v[2 * i], v[2 * i + 1]);
}

// 16 consecutive channels of a per-channel vector, stored as `kStorage` says.
template <typename Element, int kStorage> struct Channels {
    __device__ __forceinline__ void load(const char*, int) {}
    __device__ __forceinline__ float operator[](int) const { return 0.f; }
};

template <typename Element> struct Channels<Element, kElement> {
    Words words;

    __device__ __forceinline__ void load(const char* vector, int channel) { words.load(vector + channel * 2); }
    __device__ __forceinline__ float operator[](int i) const {
        return i % 2 ? Element::high(words.w[i / 2]) : Element::low(words.w[i / 2]);
    }
};

template <typename Element> struct Channels<Element, kFloat> {
    u32 w[16];

    __device__ __forceinline__ void load(const char* vector, int channel) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const uint4 v = load16(vector + channel * 4 + i * 16);
            w[4 * i] = v.x, w[4 * i + 1] = v.y, w[4 * i + 2] = v.z, w[4 * i + 3] = v.w;
        }
    }
    __device__ __forceinline__ float operator[](int i) const { return __uint_as_float(w[i]); }
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
