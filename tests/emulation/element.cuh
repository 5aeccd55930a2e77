// csrc/element.cuh without PTX. A matrix instruction is done by the last lane that comes to it, for all 32.
#pragma once

#include "cuda.h"

#define LYNX_SM90 (!defined(PORTABLE))

namespace lynx {

using u32 = unsigned int;
using u64 = unsigned long long;

inline float exp2_approx(float x) { return std::exp2(x); }
inline float reciprocal_approx(float x) { return 1.f / x; }

inline u32 permute(u32 a, u32 b, u32 selector) {
    const u64 both = static_cast<u64>(b) << 32 | a;
    u32 bytes = 0;
    for (int i = 0; i < 4; ++i) bytes |= static_cast<u32>(both >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
    return bytes;
}

// What both types do alike, given `one`, `low` and kInfinity.
template <typename Element> struct Packed {
    static float high(u32 word) { return Element::low(word >> 16); }
    static u32 pack(float low, float high) { return Element::one(low) | Element::one(high) << 16; }
    static u32 magnitude(u32 word) { return word & 0x7fff7fffu; }

    template <typename Function> static u32 both(u32 a, u32 b, Function function) {
        return function(a & 0xffffu, b & 0xffffu) | function(a >> 16, b >> 16) << 16;
    }
    static u32 nan_to_infinity(u32 word) {
        return both(word, 0, [](u32 x, u32) { return std::isnan(Element::low(x)) ? Element::kInfinity : x; });
    }
    static u32 maximum(u32 a, u32 b) {
        return both(a, b, [](u32 x, u32 y) { return Element::low(x) > Element::low(y) ? x : y; });
    }
    static u32 minimum(u32 a, u32 b) {
        return both(a, b, [](u32 x, u32 y) { return Element::low(x) < Element::low(y) ? x : y; });
    }
    static u32 greater(u32 a, u32 b) {
        return both(a, b, [](u32 x, u32 y) { return Element::low(x) > Element::low(y) ? 0xffffu : 0u; });
    }
    static u32 greater_equal(u32 a, u32 b) {
        return both(a, b, [](u32 x, u32 y) { return Element::low(x) >= Element::low(y) ? 0xffffu : 0u; });
    }

    static void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
        struct Lane {
            float* d;
            const u32* a;
            u32 b[2];
        } lane{d, a, {b0, b1}};
        warp_meet(&lane, [](void** slots) {
            float left[16][16], right[16][8];
            for (int l = 0; l < 32; ++l) {
                const Lane* const from = static_cast<const Lane*>(slots[l]);
                for (int i = 0; i < 4; ++i) {
                    const int row = l / 4 + i % 2 * 8, k = l % 4 * 2 + i / 2 * 8;
                    left[row][k] = Element::low(from->a[i]), left[row][k + 1] = high(from->a[i]);
                }
                for (int i = 0; i < 2; ++i) {
                    const int k = l % 4 * 2 + i * 8;
                    right[k][l / 4] = Element::low(from->b[i]), right[k + 1][l / 4] = high(from->b[i]);
                }
            }
            for (int l = 0; l < 32; ++l) {
                for (int i = 0; i < 4; ++i) {
                    float sum = 0.f;
                    for (int k = 0; k < 16; ++k) sum += left[l / 4 + i / 2 * 8][k] * right[k][l % 4 * 2 + i % 2];
                    static_cast<Lane*>(slots[l])->d[i] += sum;
                }
            }
        });
    }
};

struct BFloat16 : Packed<BFloat16> {
    static constexpr u32 kInfinity = 0x7f80u;
    static float low(u32 word) { return __uint_as_float(word << 16); }
    static u32 one(float value) {
        u32 bits;
        std::memcpy(&bits, &value, 4);
        return std::isnan(value) ? 0x7fffu : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    }
};

struct Float16 : Packed<Float16> {
    static constexpr u32 kInfinity = 0x7c00u;
    static float low(u32 word) {
        const unsigned short bits = static_cast<unsigned short>(word);
        _Float16 value;
        std::memcpy(&value, &bits, 2);
        return value;
    }
    static u32 one(float value) {
        const _Float16 rounded = static_cast<_Float16>(value);
        unsigned short bits;
        std::memcpy(&bits, &rounded, 2);
        return bits;
    }
};

template <bool kFloat16> struct ElementOf { using Type = BFloat16; };
template <> struct ElementOf<true> { using Type = Float16; };

}  // namespace lynx
