// Warpgroup matrix instructions (csrc/wgmma.cuh) on the emulator, bf16 only: fp16 differs in its conversions alone.
#pragma once

#include "ptx.cuh"

namespace wgmma {

using emulator::now;
using emulator::u32;
using emulator::u64;

enum class Swizzle : u32 { k128 = 1, k64 = 2, k32 = 3 };

template <Swizzle kSwizzle>
u64 descriptor(u32 start) {
    constexpr u32 kRowBytes = kSwizzle == Swizzle::k128 ? 128 : kSwizzle == Swizzle::k64 ? 64 : 32;
    constexpr u32 kHigh = 8 * kRowBytes >> 4 | u32(kSwizzle) << 30;
    return u64(kHigh) << 32 | start;
}

inline u32 descriptor_start(u32 address) { return 1u << 16 | address >> 4; }

inline float from_bf16(unsigned short value) {
    const u32 word = u32(value) << 16;
    float result;
    std::memcpy(&result, &word, 4);
    return result;
}

// Element `k` of row `row` of a K-major tile.
inline float element(emulator::Block& block, u64 descriptor, int row, int k) {
    const u32 start = u32(descriptor & 0x3FFF) << 4, stride = u32(descriptor >> 32 & 0x3FFF) << 4;
    const u32 row_bytes = 256u >> (descriptor >> 62);
    const u32 address = ptx::swizzled(start + row / 8 * stride + row % 8 * row_bytes + 2 * k, row_bytes);
    return from_bf16(*reinterpret_cast<unsigned short*>(block.at(address, 2)));
}

template <class Function>
void meet_warpgroup(void* party, Function&& work) {
    emulator::meet(now->block->warpgroups[now->thread / 128], 128, now->thread % 128, party, work);
}

inline emulator::Matrices& own() { return now->block->matrices[now->thread / 128]; }

inline void fence() {}

inline void commit() {
    meet_warpgroup(nullptr, [](auto&) {
        own().committed.push_back(std::move(own().issued));
        own().issued.clear();
    });
}

template <int kPending>
void wait() {
    meet_warpgroup(nullptr, [](auto&) {
        auto& groups = own().committed;
        for (; groups.size() > kPending; groups.pop_front())
            for (auto& work : groups.front()) work();
    });
}

template <int kCount>
void settle(float (&)[kCount]) {}

template <int kN>
struct Tile {
    static constexpr int kCount = kN / 2;

    struct Operands {
        float* d;
        u64 a, b;
        u32 metadata;
        bool accumulate;
    };

    // A row by row: 16 dense columns, or 32 of which the metadata of this half say where the 16 values belong.
    template <bool kSparse, int kSelector>
    static std::vector<float> rows_of_a(emulator::Block& block, const std::vector<Operands>& threads) {
        constexpr int kK = kSparse ? 32 : 16;
        std::vector<float> a(64 * kK);
        for (int r = 0; r < 64; ++r)
            for (int k = 0; k < 16; ++k) {
                int to = k;
                if (kSparse) {
                    const int group = k / 2, lane = r % 8 * 4 + 2 * kSelector + group / 4;
                    const u32 half = threads[r / 16 * 32 + lane].metadata >> (r % 16 / 8 * 16);
                    const u32 first = half >> (group % 4 * 4) & 3, second = half >> (group % 4 * 4 + 2) & 3;
                    if (first >= second) throw std::runtime_error("metadata that name no two columns");
                    to = 4 * group + (k % 2 ? second : first);
                }
                a[r * kK + to] = element(block, threads[0].a, r, k);
            }
        return a;
    }

    template <bool kSparse, int kSelector>
    static void issue(Operands own_operands) {
        meet_warpgroup(&own_operands, [](auto& parties) {
            std::vector<Operands> threads;
            for (void* party : parties) threads.push_back(*static_cast<Operands*>(party));
            for (const auto& t : threads)
                if (t.a != threads[0].a || t.b != threads[0].b || t.accumulate != threads[0].accumulate)
                    throw std::runtime_error("threads of a warpgroup that disagree about an instruction");
            emulator::Block* block = now->block;
            own().issued.push_back([threads, block] {
                constexpr int kK = kSparse ? 32 : 16;
                const auto a = rows_of_a<kSparse, kSelector>(*block, threads);
                std::vector<float> b(kN * kK);
                for (int i = 0; i < kN * kK; ++i) b[i] = element(*block, threads[0].b, i / kK, i % kK);
                for (int t = 0; t < 128; ++t)
                    for (int i = 0; i < kCount; ++i) {
                        const int row = t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + t % 4 * 2 + i % 2;
                        float& d = threads[t].d[i];
                        float sum = threads[t].accumulate ? d : 0.0f;
                        for (int k = 0; k < kK; ++k) sum += a[row * kK + k] * b[column * kK + k];
                        d = sum;
                    }
            });
        });
    }

    static void dense_bf16(float (&d)[kCount], u64 a, u64 b) { issue<false, 0>({d, a, b, 0, true}); }
    static void dense_f16(float (&)[kCount], u64, u64) { throw std::runtime_error("fp16 is not emulated"); }
    template <int kSelector>
    static void sparse_bf16(float (&d)[kCount], u64 a, u64 b, u32 metadata, int accumulate) {
        issue<true, kSelector>({d, a, b, metadata, accumulate != 0});
    }
    template <int kSelector>
    static void sparse_f16(float (&)[kCount], u64, u64, u32, int) {
        throw std::runtime_error("fp16 is not emulated");
    }
};

}  // namespace wgmma
