// csrc/portable.cuh on the fibers of `fibers.cpp`.
#pragma once

#include "element.cuh"

#include <vector>

namespace lynx {

alignas(1024) static char shared_memory[232448];

inline char* dynamic_memory() { return shared_memory; }
inline u32 shared_address(const void* pointer) { return to_shared(pointer); }

inline void copy_async(u32 shared, const void* global, bool valid = true) { copy_start(shared, global, valid); }
inline void copy_async_commit() { copy_commit(); }
template <int kPending> inline void copy_async_wait() { copy_wait(kPending); }
inline uint4 load_shared(u32 address) {
    if (address % 16) fail("a load of 16 bytes from an address that is no multiple");
    uint4 words;
    std::memcpy(&words, from_shared(address), 16);
    return words;
}
inline uint4 load_transposed(u32 row) {
    if (row % 16) fail("a row of a matrix at an address that is no multiple of 16");
    struct Lane {
        u32 row;
        unsigned short words[4][2];
    } lane{row};
    warp_meet(&lane, [](void** slots) {
        for (int i = 0; i < 128; ++i) {
            const int matrix = i / 32, l = i % 32;
            for (int k = 0; k < 2; ++k) {
                const u32 from = static_cast<Lane*>(slots[8 * matrix + l % 4 * 2 + k])->row + l / 4 * 2;
                std::memcpy(&static_cast<Lane*>(slots[l])->words[matrix][k], from_shared(from), 2);
            }
        }
    });
    uint4 words;
    std::memcpy(&words, lane.words, 16);
    return words;
}
inline void store_shared(u32 address, u32 a, u32 b, u32 c, u32 d) {
    if (address % 16) fail("a store of 16 bytes to an address that is no multiple");
    const uint4 words{a, b, c, d};
    std::memcpy(from_shared(address), &words, 16);
}
inline void prefetch_l2(const void*) {}

template <int kCount> inline void partial_barrier() { block_barrier(1, kCount); }
template <int kName, int kCount> inline void named_wait() { block_barrier(kName, kCount); }
template <int kName, int kCount> inline void named_arrive() { block_arrive(kName, kCount); }
inline void fence_async() {}
inline void barrier_init(u32 barrier, u32 count) { mbarrier_init(barrier, count); }
inline void barrier_arrive(u32 barrier) { mbarrier_arrive(barrier); }
inline void barrier_arrive_after_copies(u32 barrier) { copy_arrive(barrier); }
inline void barrier_wait(u32 barrier, u32 parity) { mbarrier_wait(barrier, parity); }

inline void dependency_wait() {}
inline void dependency_release() {}

inline void cluster_arrive() { cluster_barrier(false); }
inline void cluster_wait() { cluster_barrier(true); }
inline u32 cluster_address(u32 shared, int rank) { return (shared & (1u << 28) - 1) | static_cast<u32>(rank) << 28; }
template <typename Vector> inline void send(u32 to, Vector values, u32 barrier) {
    std::memcpy(from_shared(to), &values, sizeof(values));
    mbarrier_complete(barrier, sizeof(values));
}
inline void copy_bulk(u32 shared, const void* global, u32 bytes, u32 barrier) {
    std::vector<unsigned> to;
    std::vector<const void*> from;
    for (unsigned i = 0; i < bytes; i += 16) to.push_back(shared + i), from.push_back(static_cast<const char*>(global) + i);
    copies_complete(to.data(), from.data(), static_cast<int>(to.size()), barrier);
}
inline void barrier_expect(u32 barrier, u32 bytes) { mbarrier_expect(barrier, bytes); }
inline void receive(u32 barrier) { mbarrier_wait(barrier, 0); }

}  // namespace lynx
