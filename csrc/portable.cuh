// Instructions that exist from sm_80 on, and clusters and programmatic launch where they do: on architectures
// before sm_90 a cluster is one block and a dependent launch is an ordinary one.
#pragma once

#include "element.cuh"

namespace lynx {

__device__ __forceinline__ u32 shared_address(const void* pointer) {
    return static_cast<u32>(__cvta_generic_to_shared(pointer));
}

// The dynamic shared memory of the block.
__device__ __forceinline__ char* dynamic_memory() {
    extern __shared__ __align__(1024) char memory[];
    return memory;
}

// ---- copies ------------------------------------------------------------------------------------------------

// 16 bytes from global to shared memory without a register, or zeros where `valid` is false.
__device__ __forceinline__ void copy_async(u32 shared, const void* global, bool valid = true) {
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

__device__ __forceinline__ void store_shared(u32 address, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}

// Four 8 × 8 matrices of 16 bits, transposed: lane 4·g + q gets of matrix i rows 2q and 2q + 1 of column g, in word i.
// Row r of matrix i lies where lane 8·i + r says.
__device__ __forceinline__ uint4 load_transposed(u32 row) {
    uint4 v;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(row)
                 : "memory");
    return v;
}

__device__ __forceinline__ void prefetch_l2(const void* global) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(global));
}

// ---- barriers ----------------------------------------------------------------------------------------------

// Barrier over the first `kCount` threads of the block.
template <int kCount> __device__ __forceinline__ void partial_barrier() {
    asm volatile("bar.sync 1, %0;" ::"n"(kCount) : "memory");
}

// Named barriers: threads that wait, and threads that only say they have come. All in all `kCount`.
template <int kName, int kCount> __device__ __forceinline__ void named_wait() {
    asm volatile("bar.sync %0, %1;" ::"n"(kName), "n"(kCount) : "memory");
}
template <int kName, int kCount> __device__ __forceinline__ void named_arrive() {
    asm volatile("bar.arrive %0, %1;" ::"n"(kName), "n"(kCount) : "memory");
}

// What this thread has written to shared memory is there for matrix instructions that read it.
__device__ __forceinline__ void fence_async() {
#if LYNX_SM90
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

__device__ __forceinline__ void barrier_init(u32 barrier, u32 count) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

__device__ __forceinline__ void barrier_arrive(u32 barrier) {
    asm volatile("{.reg .b64 state; mbarrier.arrive.shared.b64 state, [%0];}" ::"r"(barrier) : "memory");
}

// Arrives once all copies this thread has issued so far have landed.
__device__ __forceinline__ void barrier_arrive_after_copies(u32 barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
#if LYNX_SM90
#define LYNX_TRY_WAIT "mbarrier.try_wait.parity.shared.b64"  // sleeps a while by itself
#else
#define LYNX_TRY_WAIT "mbarrier.test_wait.parity.shared.b64"
#endif
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n" LYNX_TRY_WAIT " done, [%0], %1;\n"
        "@!done bra again;\n"
        "}\n" ::"r"(barrier),
        "r"(parity)
        : "memory");
#undef LYNX_TRY_WAIT
}

// ---- programmatic launch -----------------------------------------------------------------------------------

// Waits until the kernels before this one on the stream are complete and their writes visible.
__device__ __forceinline__ void dependency_wait() {
#if LYNX_SM90
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel on the stream start. Only after dependency_wait: a kernel that was let in early may then
// take for granted that everything before its predecessor is complete.
__device__ __forceinline__ void dependency_release() {
#if LYNX_SM90
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// ---- clusters: blocks send each other data, which arrives together with its bytes on a barrier ----------------

#if LYNX_SM90

// The barriers this thread has initialized are so for the whole cluster once it has met.
__device__ __forceinline__ void cluster_arrive() {
    asm volatile("fence.mbarrier_init.release.cluster;\nbarrier.cluster.arrive.aligned;" ::: "memory");
}

__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.aligned;" ::: "memory"); }

// The address of `shared`, an address in this block's shared memory, in block `rank` of the cluster.
__device__ __forceinline__ u32 cluster_address(u32 shared, int rank) {
    u32 address;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared), "r"(rank));
    return address;
}

__device__ __forceinline__ void send(u32 to, float4 v, u32 barrier) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1,%2,%3,%4}, [%5];" ::"r"(to),
                 "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w), "r"(barrier)
                 : "memory");
}

__device__ __forceinline__ void send(u32 to, float2 v, u32 barrier) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1,%2}, [%3];" ::"r"(to),
                 "f"(v.x), "f"(v.y), "r"(barrier)
                 : "memory");
}

// The one arrival of a barrier on which `bytes` sent by the blocks of the cluster complete.
__device__ __forceinline__ void barrier_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// `bytes` from global to shared memory, which complete on a barrier that expects them; a multiple of 16.
__device__ __forceinline__ void copy_bulk(u32 shared, const void* global, u32 bytes, u32 barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared),
                 "l"(global), "r"(bytes), "r"(barrier)
                 : "memory");
}

// Waits for the first phase of a barrier on which data from other blocks arrives.
__device__ __forceinline__ void receive(u32 barrier) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], 0;\n"
        "@!done bra again;\n"
        "}\n" ::"r"(barrier)
        : "memory");
}

#endif

}  // namespace lynx
