// The CUDA language as far as the kernels use it, for a C++ compiler: threads are fibers of `fibers.cpp`.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

using std::max;
using std::min;

struct Dimension {
    unsigned x, y, z;
};

// The thread that runs. `warp` counts over the blocks of the cluster, `rank` is its block's.
struct Thread {
    Dimension thread, block, grid;
    int rank, lane, warp, block_threads;
};

extern "C" {
extern Thread* current;
[[noreturn]] void fail(const char* what);  // ends the launch
// Waits for the other lanes of the warp; the last to come calls meet(slots), the lanes' arguments in order.
void warp_meet(void* slot, void (*meet)(void** slots));
// As warp_meet for the 128 threads of a warpgroup.
void warpgroup_meet(void* slot, void (*meet)(void** slots));
void block_barrier(int id, int count);
void block_arrive(int id, int count);
void cluster_barrier(bool wait);                // arrives, or waits for what it arrived at
unsigned to_shared(const void* pointer);        // addresses of shared memory: the block's rank and an offset
char* from_shared(unsigned address);
void shared_begins(int rank, char* base);       // for the block of this rank
void copy_start(unsigned to, const void* from, bool valid);
void copy_commit();
void copy_wait(int pending);
void copy_arrive(unsigned barrier);
// Pieces of 16 bytes from `from`, null for zeros; their bytes complete on the barrier together.
void copies_complete(const unsigned* to, const void* const* from, int count, unsigned barrier);
void mbarrier_init(unsigned barrier, unsigned count);
void mbarrier_arrive(unsigned barrier);
void mbarrier_expect(unsigned barrier, unsigned bytes);
void mbarrier_complete(unsigned barrier, unsigned bytes);
void mbarrier_wait(unsigned barrier, unsigned parity);
}

#define threadIdx (current->thread)
#define blockIdx (current->block)
#define gridDim (current->grid)
#define __device__
#define __global__
#define __forceinline__ inline
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)
#define __cluster_dims__(...)

// Address of a block's first byte of dynamic shared memory.
inline unsigned shared_base(int rank) { return static_cast<unsigned>(rank) << 28 | 1u << 27; }

struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

inline float __uint_as_float(unsigned bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
inline float __int_as_float(int bits) { return __uint_as_float(static_cast<unsigned>(bits)); }

inline void __syncthreads() { block_barrier(0, current->block_threads); }
inline void __syncwarp() {
    warp_meet(nullptr, [](void**) {});
}

template <typename T> T __shfl_xor_sync(unsigned, T value, int mask) {
    struct Lane {
        T in, out;
        int mask;
    } lane{value, {}, mask};
    warp_meet(&lane, [](void** slots) {
        for (int i = 0; i < 32; ++i) {
            Lane* const to = static_cast<Lane*>(slots[i]);
            to->out = static_cast<Lane*>(slots[i ^ to->mask])->in;
        }
    });
    return lane.out;
}
