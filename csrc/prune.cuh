// Top-2 of each 4 neighbours, in two rows at once: byte selectors for the kept pairs, and their metadata.
#pragma once

#include "element.cuh"

namespace lynx {

// The selection of one group in two rows, one in each half of a word: the byte selector by which `prmt` picks the
// kept pair out of the group's two words. Its nibbles are 2a, 2a + 1, 2b, 2b + 1 for kept indices a < b.
constexpr u32 kKeep01 = 0x32103210u;
constexpr u32 kKeep02 = 0x54105410u;
constexpr u32 kKeep23 = 0x76547654u;
constexpr u32 kFirstIsOdd = 0x00220022u;   // 1 in place of 0
constexpr u32 kSecondIsOdd = 0x22002200u;  // 3 in place of 2

// `chosen` where mask is 1, `other` where it is 0.
__device__ __forceinline__ u32 blend(u32 mask, u32 chosen, u32 other) { return mask & chosen | ~mask & other; }

// Selection by the scores of one group in one row, none of them NaN. Ties go to the lower index.
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

// The same for two rows, whose magnitudes lie in the two halves of each word.
template <typename Element> __device__ __forceinline__ u32 select_two_rows(u32 q0, u32 q1, u32 q2, u32 q3) {
    const u32 high01 = Element::maximum(q0, q1), low01 = Element::minimum(q0, q1);
    const u32 high23 = Element::maximum(q2, q3), low23 = Element::minimum(q2, q3);
    u32 selection = Element::greater(q1, q0) & kFirstIsOdd | kKeep02;
    selection |= Element::greater(q3, q2) & kSecondIsOdd;
    selection = blend(Element::greater_equal(low01, high23), kKeep01, selection);
    return blend(Element::greater(low23, high01), kKeep23, selection);
}

// The kept pair of the group in words (a, b) of row half h.
__device__ __forceinline__ u32 kept_pair(u32 a, u32 b, u32 selection, int h) {
    return permute(a, b, h ? selection >> 16 : selection);
}

// The metadata word of four groups in two rows: nibble a | b << 2 of each group, in the row's half.
__device__ __forceinline__ u32 metadata_word(const u32 (&selection)[4]) {
    // nibbles 2a₀, 2a₁ + 1, 2b₀, 2b₁ + 1
    const u32 first = blend(0x0f0f0f0fu, selection[0], selection[1]);
    const u32 last = blend(0x0f0f0f0fu, selection[2], selection[3]);
    return first >> 1 & 0x00330033u | first >> 7 & 0x00cc00ccu | last << 7 & 0x33003300u | last << 1 & 0xcc00cc00u;
}

}  // namespace lynx
