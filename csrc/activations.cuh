// Activation functions in fp32.
//
// Each costs one ex2 and one reciprocal, and its relative error stays below 3e-6 also where the textbook form
// cancels (the left tail of gelu), so that rounding to 16 bits gives the exact result but for rare ties.
#pragma once

#include "element.cuh"

namespace lynx {

enum Activation { kNone = 0, kGelu = 1, kGeluTanh = 2, kSilu = 3, kRelu = 4 };

constexpr float kLog2E = 1.4426950408889634f;

// x / (1 + exp(-x·slope)), the slope given in units of log2(e)
__device__ __forceinline__ float sigmoid_gated(float x, float minus_slope_log2e) {
    return x * reciprocal_approx(1.f + exp2_approx(minus_slope_log2e));
}

// x·Φ(x) = max(x, 0) − |x|/2 · erfc(|x|/√2), and erfc(a) = exp(−a²) · P(1 / (1 + 0.52 a)): no term cancels.
// −P/2 is a minimax fit of degree 7 without a constant term, relative error 1.2e-6 for a in [0, 13].
__device__ __forceinline__ float gelu(float x) {
    const float m = x * 0.8493218002880191f;                                     // m² = x²/2 · log2(e)
    const float t = reciprocal_approx(fmaf(fabsf(m), 0.43292839780200293f, 1.f));  // 1 / (1 + 0.52 |x|/√2)
    float p = -0.048317015171051025f;
    p = fmaf(p, t, 0.17359477281570435f);
    p = fmaf(p, t, -0.1554885357618332f);
    p = fmaf(p, t, -0.040658097714185715f);
    p = fmaf(p, t, -0.1367959976196289f);
    p = fmaf(p, t, -0.14559891819953918f);
    p = fmaf(p, t, -0.1467367708683014f);
    return fmaf(fabsf(x), p * t * exp2_approx(-m * m), fmaxf(x, 0.f));
}

// x/2 · (1 + tanh(u)) = x / (1 + exp(−2u)), u = √(2/π) · (x + 0.044715 x³)
__device__ __forceinline__ float gelu_tanh(float x) {
    const float slope = fmaf(x * x, -2.f * kLog2E * 0.7978845608f * 0.044715f, -2.f * kLog2E * 0.7978845608f);
    return sigmoid_gated(x, x * slope);
}

template <int kActivation> __device__ __forceinline__ float activate(float x) {
    if constexpr (kActivation == kGelu) return gelu(x);
    else if constexpr (kActivation == kGeluTanh) return gelu_tanh(x);
    else if constexpr (kActivation == kSilu) return sigmoid_gated(x, x * -kLog2E);
    else if constexpr (kActivation == kRelu) return x != x ? x : fmaxf(x, 0.f);  // NaN stays NaN
    else return x;
}

template <int kActivation, int kCount> __device__ __forceinline__ void activate_all(float (&v)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) v[i] = activate<kActivation>(v[i]);
}

}  // namespace lynx
