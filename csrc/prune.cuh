// Top-2 of each 4 neighbours, their metadata nibble and the kept pair.
#pragma once

#include "element.cuh"

namespace lynx {

// A selection in one word: the metadata nibble (first kept index | second << 2) in the top 4 bits, and in the low
// 16 the byte selector by which `prmt` picks the kept pair out of the group's two words.
constexpr u32 kKeep01 = 0x40003210u;
constexpr u32 kKeep02 = 0x80005410u;
constexpr u32 kKeep23 = 0xE0007654u;
constexpr u32 kFirstIsOdd = 0x10000022u;    // 1 in place of 0
constexpr u32 kSecondIsOdd = 0x40002200u;   // 3 in place of 2

// Selection by the scores of a group, none of them NaN. Ties go to the lower index.
__device__ __forceinline__ u32 select_two(float q0, float q1, float q2, float q3) {
    const float high01 = fmaxf(q0, q1), low01 = fminf(q0, q1);
    const float high23 = fmaxf(q2, q3), low23 = fminf(q2, q3);
    u32 selection = kKeep02;
    if (q1 > q0) selection += kFirstIsOdd;
    if (q3 > q2) selection += kSecondIsOdd;
    if (low01 >= high23) selection = kKeep01;
    if (low23 > high01) selection = kKeep23;
    return selection;
}

// The kept pair of the group in words (a, b).
__device__ __forceinline__ u32 kept_pair(u32 a, u32 b, u32 selection) {
    u32 pair;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(pair) : "r"(a), "r"(b), "r"(selection));
    return pair;
}

// Puts a selection's nibble below those already in `metadata`: groups are pushed last to first.
__device__ __forceinline__ u32 push_nibble(u32 metadata, u32 selection) {
    return __funnelshift_l(selection, metadata, 4);
}

}  // namespace lynx
