// residual_norm: RMS norm of each row, weighted and gated, onto a residual, in one pass over both.
//
//     y = residual + x · rsqrt(mean(x²) + eps) · weight · (mult + offset)
//
// A block takes one row, a thread 8 of its columns, 16 bytes, in each step. All of x and of the residual is on its
// way before the sum of squares waits for it.
//
// Macros (see runtime/residual_norm_kernel.py): FLOAT16, COLUMNS (a multiple of 8), WEIGHT and MULT (0 absent, 1 of
// x's type, 2 fp32), WARPS, MIN_BLOCKS.

#include "portable.cuh"

namespace lynx {

using Element = ElementOf<FLOAT16>::Type;

constexpr int kThreads = 32 * WARPS, kSteps = (COLUMNS / 8 + kThreads - 1) / kThreads;

// Strides in elements. rows_each: of one sample, all of which take one row of mult.
struct Params {
    const unsigned short* x;
    long long x_row;
    const void* weight;
    const void* mult;
    long long mult_sample;
    const unsigned short* residual;
    long long residual_row;
    unsigned short* y;
    int rows_each;
    float eps, offset;
};

__device__ __forceinline__ void unpack(uint4 words, float (&v)[8]) {
    const u32 w[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) v[2 * i] = Element::low(w[i]), v[2 * i + 1] = Element::high(w[i]);
}

// 8 elements from `column` on of a vector whose kind is as WEIGHT says.
template <int kKind> __device__ __forceinline__ void load(const void* vector, long long column, float (&v)[8]) {
    if constexpr (kKind == 1) {
        unpack(__ldg(reinterpret_cast<const uint4*>(static_cast<const unsigned short*>(vector) + column)), v);
    } else {
        const float4* from = reinterpret_cast<const float4*>(static_cast<const float*>(vector) + column);
        const float4 low = __ldg(from), high = __ldg(from + 1);
        v[0] = low.x, v[1] = low.y, v[2] = low.z, v[3] = low.w;
        v[4] = high.x, v[5] = high.y, v[6] = high.z, v[7] = high.w;
    }
}

}  // namespace lynx

extern "C" __global__ void __launch_bounds__(32 * WARPS, MIN_BLOCKS)
    residual_norm(const __grid_constant__ lynx::Params p) {
    using namespace lynx;
    __shared__ float sums[WARPS];
    dependency_wait();
    const int row = static_cast<int>(blockIdx.x);
    const unsigned short* x = p.x + row * p.x_row;
    const unsigned short* residual = p.residual + row * p.residual_row;
    uint4 words[kSteps], onto[kSteps];
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
        const int column = (i * kThreads + static_cast<int>(threadIdx.x)) * 8;
        words[i] = onto[i] = make_uint4(0, 0, 0, 0);
        if (column < COLUMNS) words[i] = *reinterpret_cast<const uint4*>(x + column);
        if (column < COLUMNS) onto[i] = *reinterpret_cast<const uint4*>(residual + column);
    }

    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
        float v[8];
        unpack(words[i], v);
#pragma unroll
        for (int c = 0; c < 8; ++c) squares += v[c] * v[c];
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) squares += __shfl_xor_sync(0xffffffffu, squares, step);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = squares;
    __syncthreads();
    squares = 0.0f;
#pragma unroll
    for (int warp = 0; warp < WARPS; ++warp) squares += sums[warp];
    const float inverse = rsqrtf(squares / COLUMNS + p.eps);

    unsigned short* y = p.y + 1LL * row * COLUMNS;
    const long long of_sample = MULT ? row / p.rows_each * p.mult_sample : 0;
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
        const int column = (i * kThreads + static_cast<int>(threadIdx.x)) * 8;
        if (column >= COLUMNS) break;
        float v[8], r[8];
        unpack(words[i], v);
        unpack(onto[i], r);
#pragma unroll
        for (int c = 0; c < 8; ++c) v[c] *= inverse;
        if constexpr (WEIGHT != 0) {
            float weight[8];
            load<WEIGHT>(p.weight, column, weight);
#pragma unroll
            for (int c = 0; c < 8; ++c) v[c] *= weight[c];
        }
        if constexpr (MULT != 0) {
            float mult[8];
            load<MULT>(p.mult, of_sample + column, mult);
#pragma unroll
            for (int c = 0; c < 8; ++c) v[c] *= mult[c] + p.offset;
        }
        u32 out[4];
#pragma unroll
        for (int c = 0; c < 8; c += 2) out[c / 2] = Element::pack(r[c] + v[c], r[c + 1] + v[c + 1]);
        *reinterpret_cast<uint4*>(y + column) = make_uint4(out[0], out[1], out[2], out[3]);
    }
    dependency_release();
}
