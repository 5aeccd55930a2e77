// csrc/wgmma.cuh on the fibers of `fibers.cpp`: instructions of a warpgroup run as late as they may, when somebody
// waits for them, so that shared memory given up too early is overwritten before it is read.
#pragma once

#include "element.cuh"

#include <deque>
#include <functional>
#include <vector>

namespace wgmma {

using lynx::u32;
using lynx::u64;

enum class Swizzle : u32 { k128 = 1, k64 = 2, k32 = 3 };

template <Swizzle kSwizzle> u64 descriptor(u32 start) {
    constexpr u32 kRowBytes = kSwizzle == Swizzle::k128 ? 128 : kSwizzle == Swizzle::k64 ? 64 : 32;
    return static_cast<u64>(8 * kRowBytes >> 4 | static_cast<u32>(kSwizzle) << 30) << 32 | start;
}
inline u32 descriptor_start(u32 address) { return 1u << 16 | (address >> 4 & 0x3fff); }

// Element `k` of row `row` of a K-major tile. A descriptor holds the low 18 bits of an address.
template <typename Element> float element(u64 descriptor, int row, int k) {
    const u32 start = static_cast<u32>(descriptor & 0x3fff) << 4, stride = static_cast<u32>(descriptor >> 32 & 0x3fff) << 4;
    const u32 row_bytes = 256u >> (descriptor >> 62);
    const u32 offset = start + row / 8 * stride + row % 8 * row_bytes + 2 * k;
    unsigned short bits;
    std::memcpy(&bits, from_shared(shared_base(current->rank) + (offset ^ (offset >> 3 & row_bytes - 16))), 2);
    return Element::low(bits);
}

using Work = std::function<void()>;
struct Queue {
    std::vector<Work> issued;
    std::deque<std::vector<Work>> committed;
};
inline Queue& own() {
    static Queue queues[8];
    return queues[threadIdx.x / 128];
}

inline void fence() {}
inline void commit() {
    warpgroup_meet(nullptr, [](void**) {
        own().committed.push_back(std::move(own().issued));
        own().issued.clear();
    });
}
template <int kPending> void wait() {
    warpgroup_meet(nullptr, [](void**) {
        auto& groups = own().committed;
        for (; groups.size() > kPending; groups.pop_front())
            for (const Work& work : groups.front()) work();
    });
}
template <int kCount> void settle(float (&)[kCount]) {}

template <int kN> struct Tile {
    static constexpr int kCount = kN / 2;

    static void dense_bf16(float (&d)[kCount], u64 a, u64 b) { issue<lynx::BFloat16, false, 0>({d, a, b, 0, true}); }
    static void dense_f16(float (&d)[kCount], u64 a, u64 b) { issue<lynx::Float16, false, 0>({d, a, b, 0, true}); }
    template <int kSelector>
    static void sparse_bf16(float (&d)[kCount], u64 a, u64 b, u32 metadata, int accumulate) {
        issue<lynx::BFloat16, true, kSelector>({d, a, b, metadata, accumulate != 0});
    }
    template <int kSelector>
    static void sparse_f16(float (&d)[kCount], u64 a, u64 b, u32 metadata, int accumulate) {
        issue<lynx::Float16, true, kSelector>({d, a, b, metadata, accumulate != 0});
    }

  private:
    struct Operands {
        float* d;
        u64 a, b;
        u32 metadata;
        bool accumulate;
    };
    using Threads = std::vector<Operands>;

    // Where the k-th of 16 values of a row belongs among 32 columns, as the metadata of this half say.
    template <int kSelector> static int column(const Threads& threads, int row, int k) {
        const int group = k / 2, lane = row % 8 * 4 + 2 * kSelector + group / 4;
        const u32 half = threads[row / 16 * 32 + lane].metadata >> (row % 16 / 8 * 16);
        const u32 first = half >> (group % 4 * 4) & 3, second = half >> (group % 4 * 4 + 2) & 3;
        if (first >= second) fail("metadata that name no two columns");
        return 4 * group + (k % 2 ? second : first);
    }

    template <typename Element, bool kSparse, int kSelector> static void multiply(const Threads& threads) {
        constexpr int kK = kSparse ? 32 : 16;
        std::vector<float> left(64 * kK), right(kN * kK);
        for (int i = 0; i < 64 * 16; ++i) {
            const int row = i / 16, k = i % 16, to = kSparse ? column<kSelector>(threads, row, k) : k;
            left[row * kK + to] = element<Element>(threads[0].a, row, k);
        }
        for (int i = 0; i < kN * kK; ++i) right[i] = element<Element>(threads[0].b, i / kK, i % kK);
        for (int thread = 0; thread < 128; ++thread) {
            for (int i = 0; i < kCount; ++i) {
                const int row = thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8;
                const int column = i / 4 * 8 + thread % 4 * 2 + i % 2;
                float sum = threads[thread].accumulate ? threads[thread].d[i] : 0.f;
                for (int k = 0; k < kK; ++k) sum += left[row * kK + k] * right[column * kK + k];
                threads[thread].d[i] = sum;
            }
        }
    }

    template <typename Element, bool kSparse, int kSelector> static void issue(Operands operands) {
        warpgroup_meet(&operands, [](void** slots) {
            Threads threads;
            for (int i = 0; i < 128; ++i) threads.push_back(*static_cast<Operands*>(slots[i]));
            for (const Operands& t : threads) {
                if (t.a != threads[0].a || t.b != threads[0].b || t.accumulate != threads[0].accumulate) {
                    fail("threads of a warpgroup that disagree about an instruction");
                }
            }
            own().issued.push_back([threads] { multiply<Element, kSparse, kSelector>(threads); });
        });
    }
};

}  // namespace wgmma
