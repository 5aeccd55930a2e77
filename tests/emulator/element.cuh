// csrc/element.cuh without its instructions, bf16 only.
#pragma once

#include "emulator.h"

namespace lynx {

struct BFloat16 {
    static float low(unsigned word) { return value(word << 16); }
    static float high(unsigned word) { return value(word & 0xffff0000u); }
    static unsigned pack(float low, float high) { return rounded(low) | rounded(high) << 16; }

   private:
    static float value(unsigned word) {
        float result;
        std::memcpy(&result, &word, 4);
        return result;
    }
    static unsigned rounded(float x) {  // to nearest even
        unsigned word;
        std::memcpy(&word, &x, 4);
        return x != x ? 0x7fff : (word + 0x7fff + (word >> 16 & 1)) >> 16;
    }
};

template <bool kFloat16>
struct ElementOf {
    using Type = BFloat16;
};

}  // namespace lynx
