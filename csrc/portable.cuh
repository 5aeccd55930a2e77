// Instructions that exist from sm_80 on, and clusters and programmatic launch where they do: on architectures
// before sm_90 a cluster is one block and a dependent launch is an ordinary one.
#pragma once

#include "element.cuh"

namespace lynx {

__device__ __forceinline__ u32 shared_address(const void* pointer) {
    return static_cast<u32>(__cvta_generic_to_shared(pointer));
}

// 16 bytes from global to shared memory without a register, or zeros where `valid` is false.
__device__ __forceinline__ void copy_async(u32 shared, const void* global, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(valid ? 16 : 0)
                 : "memory");
}

__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int kPending> __device__ __forceinline__ void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

__device__ __forceinline__ uint4 load_shared(u32 address) {
    uint4 v;
    asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address));
    return v;
}

__device__ __forceinline__ void prefetch_l2(const void* global) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(global));
}

// Waits until the kernels before this one on the stream are complete and their writes visible.
__device__ __forceinline__ void dependency_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel on the stream start. Only after dependency_wait: a kernel that was let in early may then
// take for granted that everything before its predecessor is complete.
__device__ __forceinline__ void dependency_release() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Barrier over all blocks of a cluster, ordering their shared memory.
template <int kBlocks> __device__ __forceinline__ void cluster_barrier() {
#if __CUDA_ARCH__ >= 900
    if constexpr (kBlocks > 1) {
        asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
    } else {
        __syncthreads();
    }
#else
    static_assert(kBlocks == 1, "clusters exist from sm_90 on");
    __syncthreads();
#endif
}

// As cluster_barrier, without ordering any memory: for blocks that only must not leave yet.
template <int kBlocks> __device__ __forceinline__ void cluster_rendezvous() {
#if __CUDA_ARCH__ >= 900
    if constexpr (kBlocks > 1) {
        asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
    }
#endif
}

// The address of `pointer`, a variable in this block's shared memory, in block `rank` of the cluster.
__device__ __forceinline__ u32 cluster_address(const void* pointer, int rank) {
    u32 address = shared_address(pointer);
#if __CUDA_ARCH__ >= 900
    asm("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(address) : "r"(rank));
#endif
    return address;
}

__device__ __forceinline__ float2 load_cluster2(u32 address) {
    float2 v;
#if __CUDA_ARCH__ >= 900
    asm volatile("ld.shared::cluster.v2.f32 {%0,%1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(address));
#else
    asm volatile("ld.shared.v2.f32 {%0,%1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(address));
#endif
    return v;
}

__device__ __forceinline__ float4 load_cluster4(u32 address) {
    float4 v;
#if __CUDA_ARCH__ >= 900
    asm volatile("ld.shared::cluster.v4.f32 {%0,%1,%2,%3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(address));
#else
    asm volatile("ld.shared.v4.f32 {%0,%1,%2,%3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(address));
#endif
    return v;
}

}  // namespace lynx
