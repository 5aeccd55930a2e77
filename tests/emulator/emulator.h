// Runs a Hopper kernel's source on the CPU: threads are fibers, and what PTX does across threads is done by hand.
//
// Whatever the hardware leaves open is decided by a random generator: which warps run next, when a copy lands.
// Matrix instructions run as late as they may, when somebody waits for them, so that a slot given up too early is
// overwritten before it is read. Anything the hardware would hang on or corrupt silently stops the run.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

using std::max;
using std::min;

#define __device__
#define __forceinline__ inline
#define __grid_constant__
#define __cluster_dims__(...)
#define __launch_bounds__(...)

struct float2 {
    float x, y;
};

namespace emulator {

using u32 = unsigned int;
using u64 = unsigned long long;

constexpr u32 kBase = 1024;  // address where shared memory begins: null is not in it

struct Barrier {
    int count, pending;  // arrivals of a phase, those it still waits for
    long bytes;          // that it still waits for
    u32 phase;

    void settle() {
        if (pending == 0 && bytes == 0) phase ^= 1, pending = count;
    }
};

// Where a fixed number of threads meet.
struct Rendezvous {
    int arrived = 0;
    u64 generation = 0;
    std::vector<void*> parties;
};

using Work = std::function<void()>;

// Matrix instructions of a warpgroup: issued, and committed in groups.
struct Matrices {
    std::vector<Work> issued;
    std::deque<std::vector<Work>> committed;
};

struct Block {
    std::vector<unsigned char> memory;
    unsigned char* shared;
    u32 size, index;
    std::map<u32, Barrier> barriers;
    std::map<u32, Rendezvous> named, warps, warpgroups;
    std::map<u32, Matrices> matrices;
    Rendezvous all;

    unsigned char* at(u32 address, u32 bytes) {
        if (address < kBase || address + bytes > kBase + size) throw std::runtime_error("outside shared memory");
        return shared + (address - kBase);
    }
    Barrier& barrier(u32 address) {
        const auto found = barriers.find(address);
        if (found == barriers.end()) throw std::runtime_error("a barrier that was not initialised");
        return found->second;
    }
    void arrive(u32 address) {
        Barrier& b = barrier(address);
        if (b.pending == 0) throw std::runtime_error("an arrival too many");
        --b.pending;
        b.settle();
    }
};

struct Cluster {
    std::vector<Block*> blocks;
    Rendezvous all;
};

struct Fiber {
    ucontext_t context;
    std::vector<char> stack;
    Block* block;
    Cluster* cluster;
    u32 thread, rank;
    bool done = false;
};

inline Fiber* now;
inline ucontext_t scheduler;
inline u64 progress;
inline u32 threads_of_block, blocks_of_grid;
inline std::mt19937 random;
inline std::deque<Work> copies;  // on their way

template <class Condition>
void wait_until(Condition&& ready) {
    while (!ready()) swapcontext(&now->context, &scheduler);
    ++progress;
}

// `count` threads call it, each with a place among them; the last one to come runs `work` for all.
template <class Function>
void meet(Rendezvous& at, int count, int place, void* party, Function&& work) {
    at.parties.resize(count);
    at.parties[place] = party;
    const u64 generation = at.generation;
    if (++at.arrived == count) {
        work(at.parties);
        at.arrived = 0;
        ++at.generation, ++progress;
    } else {
        wait_until([&] { return at.generation != generation; });
    }
}

template <class Function>
void meet_warp(void* party, Function&& work) {
    meet(now->block->warps[now->thread / 32], 32, now->thread % 32, party, work);
}

// A copy lands at once or later.
inline void copy(Work work) {
    if (random() % 2)
        work();
    else
        copies.push_back(std::move(work));
}

inline unsigned char* shared_memory() { return now->block->shared; }

}  // namespace emulator

struct Index {
    unsigned x;
};
#define threadIdx (Index{emulator::now->thread})
#define blockIdx (Index{emulator::now->block->index})
#define gridDim (Index{emulator::blocks_of_grid})

inline void __syncwarp() {
    emulator::meet_warp(nullptr, [](auto&) {});
}

inline void __syncthreads() {
    emulator::meet(emulator::now->block->all, emulator::threads_of_block, emulator::now->thread, nullptr, [](auto&) {});
}

inline unsigned __shfl_xor_sync(unsigned, unsigned value, int mask) {
    struct Lane {
        unsigned in, out;
        int mask;
    } lane{value, 0, mask};
    emulator::meet_warp(&lane, [](auto& lanes) {
        for (int i = 0; i < 32; ++i) {
            Lane& to = *static_cast<Lane*>(lanes[i]);
            to.out = static_cast<Lane*>(lanes[i ^ to.mask])->in;
        }
    });
    return lane.out;
}
