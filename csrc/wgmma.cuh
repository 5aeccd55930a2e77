// Warpgroup matrix instructions: D (64 × N, fp32 registers) += A · Bᵀ, both operands in shared memory, K-major.
#pragma once

#include "ptx.cuh"

namespace wgmma {

using ptx::u32;
using ptx::u64;

enum class Swizzle : u32 { k128 = 1, k64 = 2, k32 = 3 };

// Matrix descriptor of a K-major tile whose rows are as wide as the swizzle: its start, the distance between groups
// of eight rows and the swizzle. The start, in units of 16 bytes, is the low word: a step along K inside the
// swizzled rows, another block of rows or another slot of a ring adds to it.
template <Swizzle kSwizzle>
__device__ __forceinline__ u64 descriptor(u32 start) {
    constexpr u32 kRowBytes = kSwizzle == Swizzle::k128 ? 128 : kSwizzle == Swizzle::k64 ? 64 : 32;
    constexpr u32 kHigh = 8 * kRowBytes >> 4 | u32(kSwizzle) << 30;
    return u64(kHigh) << 32 | start;
}

__device__ __forceinline__ u32 descriptor_start(u32 address) { return 1u << 16 | address >> 4; }

__device__ __forceinline__ void fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most `kPending` committed groups of this warp are unfinished.
template <int kPending>
__device__ __forceinline__ void wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// The compiler does not know that a wait completes the accumulators: keep their readers behind it.
template <int kCount>
__device__ __forceinline__ void settle(float (&d)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

#define LYNX_OUT8(i) \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
        "+f"(d[i + 7])
#define LYNX_OUT16(i) LYNX_OUT8(i), LYNX_OUT8(i + 8)
#define LYNX_OUT32 LYNX_OUT16(0), LYNX_OUT16(16)
#define LYNX_OUT48 LYNX_OUT32, LYNX_OUT16(32)
#define LYNX_OUT64 LYNX_OUT48, LYNX_OUT16(48)
#define LYNX_OUT80 LYNX_OUT64, LYNX_OUT16(64)
#define LYNX_OUT96 LYNX_OUT80, LYNX_OUT16(80)
#define LYNX_OUT112 LYNX_OUT96, LYNX_OUT16(96)
#define LYNX_OUT128 LYNX_OUT112, LYNX_OUT16(112)

// Operand lists of the instructions: %0 … are the accumulators.
#define LYNX_REGS16 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define LYNX_REGS32 LYNX_REGS16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define LYNX_REGS48 LYNX_REGS32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define LYNX_REGS64 LYNX_REGS48 ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define LYNX_REGS80 LYNX_REGS64 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79"
#define LYNX_REGS96 LYNX_REGS80 ",%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define LYNX_REGS112 LYNX_REGS96 ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111"
#define LYNX_REGS128 LYNX_REGS112 ",%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"

// One specialisation for each tile width: N, number of accumulators, and the numbers of the operands behind them.
#define LYNX_TILE(N, COUNT, A, B, C, D, E)                                                                            \
    template <>                                                                                                       \
    struct Tile<N> {                                                                                                  \
        static constexpr int kCount = COUNT;                                                                          \
        LYNX_DENSE(N, COUNT, bf16, A, B, C)                                                                           \
        LYNX_DENSE(N, COUNT, f16, A, B, C)                                                                            \
        LYNX_SPARSE(N, COUNT, bf16, A, B, C, D, E)                                                                    \
        LYNX_SPARSE(N, COUNT, f16, A, B, C, D, E)                                                                     \
    };

#define LYNX_DENSE(N, COUNT, TYPE, A, B, C)                                                                           \
    static __device__ __forceinline__ void dense_##TYPE(float (&d)[COUNT], u64 a, u64 b) {                            \
        asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." #TYPE "." #TYPE " {" LYNX_REGS##COUNT "}, %" #A \
                     ", %" #B ", 1, 1, 1, 0, 0;"                                                                      \
                     : LYNX_OUT##COUNT                                                                                \
                     : "l"(a), "l"(b));                                                                               \
    }

// `accumulate` 0 replaces D. `kSelector` tells which half of the metadata words describes this step.
#define LYNX_SPARSE(N, COUNT, TYPE, A, B, C, D, E)                                                                    \
    template <int kSelector>                                                                                          \
    static __device__ __forceinline__ void sparse_##TYPE(float (&d)[COUNT], u64 a, u64 b, u32 metadata,               \
                                                         int accumulate) {                                            \
        asm volatile(                                                                                                 \
            "{\n.reg .pred p;\nsetp.ne.b32 p, %" #D ", 0;\n"                                                          \
            "wgmma.mma_async.sp.sync.aligned.m64n" #N "k32.f32." #TYPE "." #TYPE " {" LYNX_REGS##COUNT "}, %" #A      \
            ", %" #B ", %" #C ", %" #E ", p, 1, 1, 0, 0;\n}\n"                                                        \
            : LYNX_OUT##COUNT                                                                                         \
            : "l"(a), "l"(b), "r"(metadata), "r"(accumulate), "n"(kSelector));                                        \
    }

template <int kN>
struct Tile;

LYNX_TILE(64, 32, 32, 33, 34, 35, 36)
LYNX_TILE(96, 48, 48, 49, 50, 51, 52)
LYNX_TILE(128, 64, 64, 65, 66, 67, 68)
LYNX_TILE(160, 80, 80, 81, 82, 83, 84)
LYNX_TILE(192, 96, 96, 97, 98, 99, 100)
LYNX_TILE(224, 112, 112, 113, 114, 115, 116)
LYNX_TILE(256, 128, 128, 129, 130, 131, 132)

#undef LYNX_TILE
#undef LYNX_DENSE
#undef LYNX_SPARSE

}  // namespace wgmma
