// The 16-bit element types: packing, unpacking, comparing and the warp-level matrix instruction; and arithmetic that
// C++ has no word for.
#pragma once

// PORTABLE leaves out what sm_90 added, to try on any GPU what older ones run.
#define LYNX_SM90 (__CUDA_ARCH__ >= 900 && !defined(PORTABLE))

namespace lynx {

using u32 = unsigned int;
using u64 = unsigned long long;

__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float reciprocal_approx(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Byte i is that of (a, b) which nibble i of the selector names.
__device__ __forceinline__ u32 permute(u32 a, u32 b, u32 selector) {
    u32 bytes;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(a), "r"(b), "r"(selector));
    return bytes;
}

struct BFloat16 {
    static __device__ __forceinline__ float low(u32 word) { return __uint_as_float(word << 16); }
    static __device__ __forceinline__ float high(u32 word) { return __uint_as_float(word & 0xffff0000u); }

    // Rounds to nearest even; `low` is the element at the lower address.
    static __device__ __forceinline__ u32 pack(float low, float high) {
        u32 word;
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
        return word;
    }

    // Both elements, a NaN replaced by +Inf.
    static __device__ __forceinline__ u32 nan_to_infinity(u32 word) {
        asm("min.bf16x2 %0, %0, %1;" : "+r"(word) : "r"(0x7f807f80u));
        return word;
    }

    // Of both elements; none of them is NaN.
    static __device__ __forceinline__ u32 magnitude(u32 word) {
        u32 result;
        asm("abs.bf16x2 %0, %1;" : "=r"(result) : "r"(word));
        return result;
    }
    static __device__ __forceinline__ u32 maximum(u32 a, u32 b) {
        u32 result;
        asm("max.bf16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
        return result;
    }
    static __device__ __forceinline__ u32 minimum(u32 a, u32 b) {
        u32 result;
        asm("min.bf16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
        return result;
    }
#if LYNX_SM90  // 0xffff where true, else 0
    static __device__ __forceinline__ u32 greater(u32 a, u32 b) {
        u32 mask;
        asm("set.gt.u32.bf16x2 %0, %1, %2;" : "=r"(mask) : "r"(a), "r"(b));
        return mask;
    }
    static __device__ __forceinline__ u32 greater_equal(u32 a, u32 b) {
        u32 mask;
        asm("set.ge.u32.bf16x2 %0, %1, %2;" : "=r"(mask) : "r"(a), "r"(b));
        return mask;
    }
#endif

    // d (16 × 8, fp32) += a (16 × 16) · b (16 × 8)
    static __device__ __forceinline__ void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
};

struct Float16 {
    static __device__ __forceinline__ float low(u32 word) {
        float value;
        asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l;}" : "=f"(value) : "r"(word));
        return value;
    }

    static __device__ __forceinline__ float high(u32 word) {
        float value;
        asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, h;}" : "=f"(value) : "r"(word));
        return value;
    }

    static __device__ __forceinline__ u32 pack(float low, float high) {
        u32 word;
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
        return word;
    }

    static __device__ __forceinline__ u32 nan_to_infinity(u32 word) {
        asm("min.f16x2 %0, %0, %1;" : "+r"(word) : "r"(0x7c007c00u));
        return word;
    }

    // Of both elements; none of them is NaN.
    static __device__ __forceinline__ u32 magnitude(u32 word) {
        u32 result;
        asm("abs.f16x2 %0, %1;" : "=r"(result) : "r"(word));
        return result;
    }
    static __device__ __forceinline__ u32 maximum(u32 a, u32 b) {
        u32 result;
        asm("max.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
        return result;
    }
    static __device__ __forceinline__ u32 minimum(u32 a, u32 b) {
        u32 result;
        asm("min.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
        return result;
    }
#if LYNX_SM90  // 0xffff where true, else 0
    static __device__ __forceinline__ u32 greater(u32 a, u32 b) {
        u32 mask;
        asm("set.gt.u32.f16x2 %0, %1, %2;" : "=r"(mask) : "r"(a), "r"(b));
        return mask;
    }
    static __device__ __forceinline__ u32 greater_equal(u32 a, u32 b) {
        u32 mask;
        asm("set.ge.u32.f16x2 %0, %1, %2;" : "=r"(mask) : "r"(a), "r"(b));
        return mask;
    }
#endif

    static __device__ __forceinline__ void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
};

template <bool kFloat16> struct ElementOf { using Type = BFloat16; };
template <> struct ElementOf<true> { using Type = Float16; };

}  // namespace lynx
