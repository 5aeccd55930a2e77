// csrc/ptx.cuh on the fibers of `fibers.cpp`.
#pragma once

#include "element.cuh"

#include <vector>

namespace ptx {

using lynx::u32;
using lynx::u64;

// What a test packs in place of the driver's opaque bits.
struct alignas(64) TensorMap {
    u64 pointer, columns, rows, stride;  // stride: bytes from row to row
    u32 box_columns, box_rows, swizzle, valid;
    u64 unused[10];
};
static_assert(sizeof(TensorMap) == 128, "as large as the driver's");

alignas(1024) static unsigned char shared_memory[SHARED_BYTES];

inline u32 shared_address(const void* pointer) { return to_shared(pointer); }

// Shared memory of whatever block an address names.
inline char* at(u32 address, u32 bytes) {
    if (address % bytes) fail("an address that is not aligned");
    if ((address & (1u << 27) - 1) + bytes > SHARED_BYTES) fail("outside shared memory");
    return from_shared(address);
}
inline u32 in_block(u32 address, u32 rank) { return (address & (1u << 28) - 1) | rank << 28; }

// ---- mbarrier ----------------------------------------------------------------------------------------------

inline void barrier_init(u32 barrier, u32 count) { mbarrier_init(barrier, count); }
inline void fence_barrier_init() {}
inline void barrier_expect(u32 barrier, u32 bytes) { mbarrier_expect(barrier, bytes); }
inline void barrier_arrive_remote(u32 barrier, u32 rank) { mbarrier_arrive(in_block(barrier, rank)); }
inline void barrier_wait(u32 barrier, u32 parity) { mbarrier_wait(barrier, parity); }

// ---- copy engine -------------------------------------------------------------------------------------------

inline void prefetch_map(const TensorMap* map) {
    if (!map->valid) fail("a blank tensor map is used");
}

// For every block that gets a copy.
template <bool kMulticast, class Function> void each_target(unsigned short mask, Function function) {
    for (u32 rank = 0; rank < 16; ++rank)
        if (kMulticast ? mask >> rank & 1 : rank == static_cast<u32>(current->rank)) function(rank);
}

inline void copy_to(const std::vector<u32>& targets, const std::vector<const void*>& sources, u32 barrier) {
    for (u32 target : targets) at(target, 16);
    copies_complete(targets.data(), sources.data(), static_cast<int>(targets.size()), barrier);
}

template <bool kMulticast>
void load_box(u32 to, const TensorMap* map, u32 barrier, int x, int y, unsigned short mask) {
    prefetch_map(map);
    if (to % (8 * map->swizzle)) fail("a box that does not start at a swizzle atom");
    const u32 row_bytes = map->box_columns * 2, bytes = map->box_rows * row_bytes;
    each_target<kMulticast>(mask, [&](u32 rank) {
        std::vector<u32> targets;
        std::vector<const void*> sources;
        for (u32 i = 0; i < bytes; i += 16) {
            const u64 row = y + i / row_bytes, column = x + i % row_bytes / 2, from = map->pointer + row * map->stride + column * 2;
            targets.push_back(in_block(to + i ^ (to + i >> 3 & map->swizzle - 16), rank));
            sources.push_back(row < map->rows && column < map->columns ? reinterpret_cast<const void*>(from) : nullptr);
        }
        copy_to(targets, sources, in_block(barrier, rank));
    });
}

template <bool kMulticast>
void load_bytes(u32 to, const void* from, u32 bytes, u32 barrier, unsigned short mask) {
    each_target<kMulticast>(mask, [&](u32 rank) {
        std::vector<u32> targets;
        std::vector<const void*> sources;
        for (u32 i = 0; i < bytes; i += 16) {
            targets.push_back(in_block(to + i, rank));
            sources.push_back(static_cast<const char*>(from) + i);
        }
        copy_to(targets, sources, in_block(barrier, rank));
    });
}

// ---- blocks, clusters, dependent launches, registers -------------------------------------------------------

inline u32 cluster_rank() { return current->rank; }
inline void cluster_sync() { cluster_barrier(false), cluster_barrier(true); }
inline void named_sync(u32 name, u32 threads) { block_barrier(name, threads); }
inline void wait_for_predecessor() {}
inline void let_successor_launch() {}
template <int> void grow_registers() {}
template <int> void shrink_registers() {}
inline int uniform(int value) { return value; }
inline u32 keep(u32 value) { return value; }

// ---- memory ------------------------------------------------------------------------------------------------

template <typename T> T read(const void* from) {
    if (reinterpret_cast<u64>(from) % sizeof(T)) fail("a load that is not aligned");
    T value;
    std::memcpy(&value, from, sizeof(T));
    return value;
}
inline u32 load_shared(u32 address) { return read<u32>(at(address, 4)); }
inline void load_shared(float (&to)[4], u32 address) { std::memcpy(to, at(address, 16), 16); }
inline void store_remote(u32 address, u32 rank, const float* from) {
    std::memcpy(at(in_block(address, rank), 16), from, 16);
}
inline float2 load_shared_pair(const float* from) { return read<float2>(at(shared_address(from), 8)); }
inline void load_matrices(u32 (&to)[4], u32 address) {
    struct Lane {
        u32* to;
        u32 address;
    } lane{to, address};
    warp_meet(&lane, [](void** slots) {
        for (int i = 0; i < 128; ++i) {
            const u32 row = static_cast<Lane*>(slots[8 * (i / 32) + i % 32 / 4])->address;
            static_cast<Lane*>(slots[i % 32])->to[i / 32] = load_shared(row + 4 * (i % 4));
        }
    });
}
inline void store_global(void* to, const u32 (&value)[4]) {
    if (reinterpret_cast<u64>(to) % 16) fail("a store that is not aligned");
    std::memcpy(to, value, 16);
}
inline void load_global(u32 (&to)[4], const void* from) {
    read<uint4>(from);
    std::memcpy(to, from, 16);
}
inline u32 load_global(const void* from) { return read<u32>(from); }

}  // namespace ptx
