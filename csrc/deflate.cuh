// z −= t·A on tensor cores: takes the leading directions out of a chunk of z before it is pruned.
#pragma once

#include "sparsify_tile.cuh"

namespace lynx {

// The rows of A that deflate, in the order in which `Deflation` wants them: for each chunk all rows, and of a row's 32
// words (pairs of columns) word 8·q + j as word q of piece j, at the place of piece_offset. Launches before the one
// that deflates write it; `first`, `count`: of the threads that do.
__device__ __forceinline__ void write_directions(const SparsifyParams& p, int first, int count) {
    const int pieces = p.k / kChunk * p.direction_rows * 8;
#pragma unroll 1
    for (int i = first; i < pieces; i += count) {
        const int row = i / 8 % p.direction_rows, chunk = i / 8 / p.direction_rows;
        uint4 words = {};
        if (row < p.deflated) {
            const char* from = p.lora_down + row * p.lora_stride + (long long)chunk * kRowBytes + (i % 8 ^ row % 8) * 4;
            const u32* const word = reinterpret_cast<const u32*>(from);
            words = make_uint4(word[0], word[8], word[16], word[24]);
        }
        *reinterpret_cast<uint4*>(p.directions + i * 16ll) = words;
    }
}

// In the products rows of A are the reduction index, and piece j is the j-th of eight n8 tiles, of which lane 4·g + q
// gets two columns as results: in all tiles together its own 16.
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
                if (column < p.deflated) pair = *reinterpret_cast<const u32*>(row + column * 2) ^ 0x80008000u;
                if (column + 1 == p.deflated) pair &= 0xffffu;
                t[i / 2][i % 2 * 2 + h] = pair;
            }
        }
    }

    // weight: where the chunk of A lies in shared memory.
    __device__ __forceinline__ void take_off(u32 (&z)[2][8], u32 weight, const Position& at) const {
        float left[8][4];  // of a tile: columns 0 and 1 of row g, of row g + 8
#pragma unroll
        for (int h = 0; h < 2; ++h) {
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                left[j][2 * h] = Element::low(z[h][j]), left[j][2 * h + 1] = Element::high(z[h][j]);
            }
        }
        // Four matrices: rows 0 – 7 and 8 – 15 of a step for one tile, and for the next.
        const u32 first = weight + piece_offset(at.lane % 16, at.lane / 16);
#pragma unroll
        for (int step = 0; step < kRank / 16; ++step) {
#pragma unroll
            for (int j = 0; j < 8; j += 2) {
                const uint4 b = load_transposed((first ^ j * 16) + step * 16 * kRowBytes);
                Element::mma(left[j], t[step], b.x, b.y);
                Element::mma(left[j + 1], t[step], b.z, b.w);
            }
        }
#pragma unroll
        for (int h = 0; h < 2; ++h) {
#pragma unroll
            for (int j = 0; j < 8; ++j) z[h][j] = Element::pack(left[j][2 * h], left[j][2 * h + 1]);
        }
    }
};

}  // namespace lynx
