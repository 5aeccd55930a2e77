// z −= t·A on tensor cores: takes the leading directions out of a chunk of z before it is pruned.
#pragma once

#include "sparsify_tile.cuh"

namespace lynx {

// In the products rows of A are the reduction index and column 8·g + j of the chunk is column g of the j-th of eight
// n8 tiles, so that lane 4·g + q has its own 16 columns as results. A lane finds its part of A in 16-byte pieces of
// two rows below each other, which `permute` interleaves.
struct Deflation {
    u32 t[kRank ? kRank / 16 : 1][4];  // of the warp's rows, as A fragments, negated

    __device__ __forceinline__ void load(const SparsifyParams& p, const Position& at) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const char* row = p.t + min(at.first_row + at.row_in_tile + 8 * h, p.m - 1) * p.t_stride;
#pragma unroll
            for (int i = 0; i < kRank / 8; ++i) {
                const int column = 8 * i + 2 * at.q;
                u32 pair = 0;
                if (column < p.rank) pair = *reinterpret_cast<const u32*>(row + column * 2) ^ 0x80008000u;
                if (column + 1 == p.rank) pair &= 0xffffu;
                t[i / 2][i % 2 * 2 + h] = pair;
            }
        }
    }

    // weight: where the chunk of A lies in shared memory.
    __device__ __forceinline__ void take_off(u32 (&z)[2][8], u32 weight, const Position& at) const {
        float left[8][4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {  // row half i / 2, columns from 8·(i % 2)
            float v[8];
            unpack<Element>(z[i / 2] + i % 2 * 4, v);
#pragma unroll
            for (int j = 0; j < 8; ++j) left[j][i] = v[j];
        }
        const u32 even = weight + piece_offset(2 * at.q, at.g), odd = (even ^ 16) + kRowBytes;
#pragma unroll
        for (int step = 0; step < kRank / 16; ++step) {
            u32 b[2][8];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const uint4 first = load_shared(even + (16 * step + 8 * i) * kRowBytes);
                const uint4 second = load_shared(odd + (16 * step + 8 * i) * kRowBytes);
                const u32 of_first[4] = {first.x, first.y, first.z, first.w};
                const u32 of_second[4] = {second.x, second.y, second.z, second.w};
#pragma unroll
                for (int j = 0; j < 8; ++j) b[i][j] = permute(of_first[j / 2], of_second[j / 2], j % 2 ? 0x7632 : 0x5410);
            }
#pragma unroll
            for (int j = 0; j < 8; ++j) Element::mma(left[j], t[step], b[0][j], b[1][j]);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float v[8];
#pragma unroll
            for (int j = 0; j < 8; ++j) v[j] = left[j][i];
            pack<Element>(v, z[i / 2] + i % 2 * 4);
        }
    }
};

}  // namespace lynx
