// csrc/wgmma.cuh: the dense products of a warpgroup on tiles whose rows are 128 bytes, in the order of that swizzle.
#pragma once

#include "portable.cuh"

namespace wgmma {

using lynx::u32;
using lynx::u64;

enum class Swizzle : u32 { k128 = 1 };

inline u32 descriptor_start(u32 address) { return address >> 4; }
template <Swizzle> inline u64 descriptor(u32 start) { return start; }
inline void fence() {}
inline void commit() {}
template <int> inline void wait() {}
template <int kCount> inline void settle(float (&)[kCount]) {}

template <int kN> struct Tile {
    static void dense_bf16(float (&d)[kN / 2], u64 a, u64 b) { dense<lynx::BFloat16>(d, a, b); }
    static void dense_f16(float (&d)[kN / 2], u64 a, u64 b) { dense<lynx::Float16>(d, a, b); }

  private:
    template <typename Element> static float at(u64 tile, int row, int column) {
        u32 address = static_cast<u32>(tile << 4) + row * 128 + column * 2;
        address ^= (address >> 7 & 7) << 4;
        unsigned short bits;
        std::memcpy(&bits, from_shared(address), 2);
        return Element::low(bits);
    }
    template <typename Element> static void dense(float (&d)[kN / 2], u64 a, u64 b) {
        struct Lane {
            float* d;
            u64 a, b;
        } lane{d, a, b};
        warpgroup_meet(&lane, [](void** slots) {
            const Lane* const any = static_cast<const Lane*>(slots[0]);
            float left[64][16], right[kN][16];
            for (int k = 0; k < 16; ++k) {
                for (int row = 0; row < 64; ++row) left[row][k] = at<Element>(any->a, row, k);
                for (int row = 0; row < kN; ++row) right[row][k] = at<Element>(any->b, row, k);
            }
            for (int thread = 0; thread < 128; ++thread) {
                float* const to = static_cast<Lane*>(slots[thread])->d;
                for (int i = 0; i < kN / 2; ++i) {
                    const int row = thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8;
                    const int column = i / 4 * 8 + thread % 4 * 2 + i % 2;
                    for (int k = 0; k < 16; ++k) to[i] += left[row][k] * right[column][k];
                }
            }
        });
    }
};

}  // namespace wgmma
