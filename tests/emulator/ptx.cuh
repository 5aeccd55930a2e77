// The instructions of csrc/ptx.cuh on the emulator.
#pragma once

#include "emulator.h"

namespace ptx {

using emulator::Block;
using emulator::now;
using emulator::u32;
using emulator::u64;

// What the test packs in place of the driver's opaque bits.
struct alignas(64) TensorMap {
    u64 pointer, columns, rows, stride;  // stride: bytes from row to row
    u32 box_columns, box_rows, swizzle, valid;
    u64 unused[10];

    const TensorMap& checked() const {
        if (!valid) throw std::runtime_error("a blank tensor map is used");
        return *this;
    }
};
static_assert(sizeof(TensorMap) == 128, "as large as the driver's");

inline u32 shared_address(const void* pointer) {
    return u32(static_cast<const unsigned char*>(pointer) - now->block->shared) + emulator::kBase;
}

// ---- mbarrier ----------------------------------------------------------------------------------------------

inline void barrier_init(u32 barrier, u32 count) {
    now->block->barriers[barrier] = {int(count), int(count), 0, 0};
}
inline void fence_barrier_init() {}
inline void barrier_expect(u32 barrier, u32 bytes) {
    now->block->barrier(barrier).bytes += bytes;
    now->block->arrive(barrier);
}
inline void barrier_arrive_remote(u32 barrier, u32 rank) { now->cluster->blocks.at(rank)->arrive(barrier); }
inline void barrier_wait(u32 barrier, u32 parity) {
    const emulator::Barrier& b = now->block->barrier(barrier);
    emulator::wait_until([&] { return b.phase != parity; });
}

// ---- copy engine -------------------------------------------------------------------------------------------

inline u32 swizzled(u32 address, u32 row_bytes) { return address ^ (address >> 3 & (row_bytes - 16)); }

inline std::vector<Block*> targets(bool multicast, unsigned short mask) {
    if (!multicast) return {now->block};
    std::vector<Block*> found;
    for (u32 rank = 0; rank < 16; ++rank)
        if (mask >> rank & 1) found.push_back(now->cluster->blocks.at(rank));
    return found;
}

inline void landed(Block& block, u32 barrier, u32 bytes) {
    block.barrier(barrier).bytes -= bytes;
    block.barrier(barrier).settle();
    ++emulator::progress;
}

inline void prefetch_map(const TensorMap* map) { map->checked(); }

template <bool kMulticast>
void load_box(u32 to, const TensorMap* pointer, u32 barrier, int x, int y, unsigned short mask) {
    const TensorMap map = pointer->checked();
    if (to % (8 * map.swizzle)) throw std::runtime_error("a box that does not start at a swizzle atom");
    const auto blocks = targets(kMulticast, mask);
    emulator::copy([=] {
        for (Block* block : blocks) {
            for (u32 r = 0; r < map.box_rows; ++r)
                for (u32 c = 0; c < map.box_columns; ++c) {
                    const u64 row = y + r, column = x + c;
                    const bool inside = row < map.rows && column < map.columns;
                    const auto* from = reinterpret_cast<const unsigned short*>(map.pointer + row * map.stride) + column;
                    const u32 address = swizzled(to + (r * map.box_columns + c) * 2, map.swizzle);
                    *reinterpret_cast<unsigned short*>(block->at(address, 2)) = inside ? *from : 0;
                }
            landed(*block, barrier, map.box_rows * map.box_columns * 2);
        }
    });
}

template <bool kMulticast>
void load_bytes(u32 to, const void* from, u32 bytes, u32 barrier, unsigned short mask) {
    const auto blocks = targets(kMulticast, mask);
    emulator::copy([=] {
        for (Block* block : blocks) {
            std::memcpy(block->at(to, bytes), from, bytes);
            landed(*block, barrier, bytes);
        }
    });
}

// ---- blocks, clusters, dependent launches, registers -------------------------------------------------------

inline u32 cluster_rank() { return now->rank; }
inline void cluster_sync() {
    const int threads = emulator::threads_of_block;
    emulator::meet(now->cluster->all, threads * int(now->cluster->blocks.size()), now->rank * threads + now->thread,
                   nullptr, [](auto&) {});
}
inline void named_sync(u32 name, u32 threads) {
    auto& at = now->block->named[name];
    emulator::meet(at, threads, at.arrived, nullptr, [](auto&) {});
}
inline void wait_for_predecessor() {}
inline void let_successor_launch() {}
template <int kRegisters>
void grow_registers() {}
template <int kRegisters>
void shrink_registers() {}
inline int uniform(int value) { return value; }
inline u32 keep(u32 value) { return value; }

// ---- memory ------------------------------------------------------------------------------------------------

inline u32 load_shared(u32 address) { return *reinterpret_cast<u32*>(now->block->at(address, 4)); }
inline void load_shared(float (&to)[4], u32 address) { std::memcpy(to, now->block->at(address, 16), 16); }
inline void store_remote(u32 address, u32 rank, const float* from) {
    if (address % 16) throw std::runtime_error("a store that is not aligned");
    std::memcpy(now->cluster->blocks.at(rank)->at(address, 16), from, 16);
}
inline float2 load_shared_pair(const float* from) {
    return *reinterpret_cast<const float2*>(now->block->at(shared_address(from), 8));
}
inline void load_matrices(u32 (&to)[4], u32 address) {
    struct Lane {
        u32* to;
        u32 address;
    } lane{to, address};
    emulator::meet_warp(&lane, [](auto& lanes) {
        for (int l = 0; l < 32; ++l)
            for (int i = 0; i < 4; ++i) {
                const u32 row = static_cast<Lane*>(lanes[8 * i + l / 4])->address;
                static_cast<Lane*>(lanes[l])->to[i] = load_shared(row + 4 * (l % 4));
            }
    });
}
inline void store_global(void* to, const u32 (&value)[4]) {
    if (reinterpret_cast<u64>(to) % 16) throw std::runtime_error("a store that is not aligned");
    std::memcpy(to, value, 16);
}
inline void load_global(u32 (&to)[4], const void* from) {
    if (reinterpret_cast<u64>(from) % 16) throw std::runtime_error("a load that is not aligned");
    std::memcpy(to, from, 16);
}
inline u32 load_global(const void* from) { return *static_cast<const u32*>(from); }

}  // namespace ptx
