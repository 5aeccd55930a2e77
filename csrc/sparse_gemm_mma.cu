// y = residual + gate · act(s · (z̃ · Wᵀ) + t · Bᵀ + b) on the warp-level instructions of sm_80 and later.
//
// One block computes kTileM × kTileN of y. Compressed values, metadata and weights stream through a cp.async
// pipeline; eight warps each own 64 × 32 and issue mma.sp. A metadata word is laid out for wgmma.sp, and that is
// also what mma.sp wants: m64 is four times m16, one for each warp of a warpgroup, so word 32·w + l belongs to
// lane l of the w-th 16 rows. Selector 0 takes dense columns 0…31 of a block from lanes l % 4 < 2, selector 1
// columns 32…63 from the others.
//
// Macros: FLOAT16 (0: bf16, 1: fp16), ACTIVATION (enum Activation).
#include "activations.cuh"
#include "element.cuh"
#include "portable.cuh"

namespace lynx {

using Element = ElementOf<FLOAT16>::Type;

constexpr int kTileM = 128, kTileN = 128;
constexpr int kTileK = 64;                                // dense columns of a stage: one metadata block
constexpr int kStages = 3;
constexpr int kThreads = 256;
constexpr int kWarpM = 64, kWarpN = 32;
constexpr int kWarpsN = kTileN / kWarpN;
constexpr int kChunk = 16;                                // bytes of one cp.async
constexpr int kValueRow = kTileK / 2 * 2;                 // bytes: half of the columns, two bytes each
constexpr int kWeightRow = kTileK * 2;
constexpr int kMetadataBytes = 512;                       // of 64 rows × 64 dense columns
constexpr int kValuesBytes = kTileM * kValueRow;
constexpr int kWeightBytes = kTileN * kWeightRow;
constexpr int kStageBytes = kValuesBytes + kWeightBytes + kTileM / 64 * kMetadataBytes;
constexpr int kRasterRows = 8;                            // tile rows that share weight tiles in L2
// A100 and Hopper have shared memory for two blocks a multiprocessor; elsewhere one gets all the registers.
constexpr int kBlocks = __CUDA_ARCH__ == 800 || __CUDA_ARCH__ == 900 ? 2 : 1;
static_assert(kTileM / kWarpM * kWarpsN * 32 == kThreads, "one warp for each 64 × 32 of the tile");

struct Arguments {
    const char* values;      // (M, K / 2)
    const char* metadata;    // (⌈M / 64⌉, K / 64, 128) words
    const float* scale;      // (M)
    const char* weight;      // (N, K)
    const char* t;           // (M, R), rows t_stride elements apart
    const char* lora_up;     // (N, R)
    const char* bias;        // (samples, N) or null
    const char* gate;        // (samples, N) or null
    const char* residual;    // (M, N) or null
    char* y;                 // (M, N), rows y_stride elements apart
    int m, n, k, rank, t_stride, y_stride;
    int bias_rows, gate_rows;  // rows of a sample
};

// Swizzles: eight rows read by one ldmatrix phase fall into eight different 16-byte columns of the banks.
__device__ __forceinline__ u32 value_offset(int row, int chunk) {
    return row * kValueRow + ((chunk ^ (row >> 1 & 3)) * kChunk);
}

__device__ __forceinline__ u32 weight_offset(int row, int chunk) {
    return row * kWeightRow + ((chunk ^ (row & 7)) * kChunk);
}

__device__ __forceinline__ void load_matrices(u32 (&to)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
}

// d (16 × 8, fp32) += a (16 × 32, 2:4) · b (32 × 8)
template <int kSelector>
__device__ __forceinline__ void mma_sparse(float (&d)[4], const u32 (&a)[4], const u32 (&b)[4], u32 metadata) {
#if FLOAT16
#define LYNX_TYPES "f32.f16.f16.f32"
#else
#define LYNX_TYPES "f32.bf16.bf16.f32"
#endif
    asm("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col." LYNX_TYPES
        " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9,%10,%11}, {%0,%1,%2,%3}, %12, %13;"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(metadata),
          "n"(kSelector));
#undef LYNX_TYPES
}

// Where this thread's 16-byte pieces of a stage come from, in pieces from the start of each tensor. Rows past M
// and N repeat the last one: their results are never stored, and no row of y depends on another.
struct Sources {
    static constexpr int kValues = kValuesBytes / kChunk / kThreads, kWeights = kWeightBytes / kChunk / kThreads;
    static constexpr int kValuePieces = kValueRow / kChunk, kWeightPieces = kWeightRow / kChunk;
    static constexpr int kMetadataPieces = kMetadataBytes / kChunk;
    u32 values[kValues], weights[kWeights], metadata;

    __device__ __forceinline__ Sources(const Arguments& p, int row, int column) {
        const int thread = threadIdx.x;
#pragma unroll
        for (int i = 0; i < kValues; ++i) {
            const u32 r = min(row + (i * kThreads + thread) / kValuePieces, p.m - 1);
            values[i] = r * (p.k / kTileK * kValuePieces) + thread % kValuePieces;
        }
#pragma unroll
        for (int i = 0; i < kWeights; ++i) {
            const u32 r = min(column + (i * kThreads + thread) / kWeightPieces, p.n - 1);
            weights[i] = r * (p.k / kTileK * kWeightPieces) + thread % kWeightPieces;
        }
        const u32 block = min(row / 64 + thread / kMetadataPieces, (p.m - 1) / 64);
        metadata = block * (p.k / kTileK * kMetadataPieces) + thread % kMetadataPieces;
    }

    // Starts the copies of one stage and moves on to the next.
    __device__ __forceinline__ void load(const Arguments& p, u32 stage) {
        const int thread = threadIdx.x;
#pragma unroll
        for (int i = 0; i < kValues; ++i) {
            const u32 to = value_offset((i * kThreads + thread) / kValuePieces, thread % kValuePieces);
            copy_async(stage + to, p.values + static_cast<u64>(values[i]) * kChunk, true);
            values[i] += kValuePieces;
        }
#pragma unroll
        for (int i = 0; i < kWeights; ++i) {
            const u32 to = weight_offset((i * kThreads + thread) / kWeightPieces, thread % kWeightPieces);
            copy_async(stage + kValuesBytes + to, p.weight + static_cast<u64>(weights[i]) * kChunk, true);
            weights[i] += kWeightPieces;
        }
        if (thread < kTileM / 64 * kMetadataPieces)
            copy_async(stage + kValuesBytes + kWeightBytes + thread * kChunk,
                       p.metadata + static_cast<u64>(metadata) * kChunk, true);
        metadata += kMetadataPieces;
    }
};

template <int kStep>
__device__ __forceinline__ void multiply_step(float (&sums)[4][4][4], const u32 (&words)[4], u32 values, u32 weight,
                                              int warp_row, int warp_column, int lane) {
    u32 b[4][4];
#pragma unroll
    for (int j = 0; j < 4; ++j)
        load_matrices(b[j], weight + weight_offset(warp_column + 8 * j + lane % 8, 4 * kStep + lane / 8));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        u32 a[4];
        load_matrices(a, values + value_offset(warp_row + 16 * i + lane % 16, 2 * kStep + lane / 16));
#pragma unroll
        for (int j = 0; j < 4; ++j) mma_sparse<kStep>(sums[i][j], a, b[j], words[i]);
    }
}

__device__ __forceinline__ u32 load_pair(const char* matrix, int row, int rows, int column, int stride) {
    if (row >= rows) return 0;
    return *reinterpret_cast<const u32*>(matrix + 2 * (static_cast<long long>(row) * stride + column));
}

// sums += t · Bᵀ, the operands straight from L2: their share of the bytes is R / K.
__device__ __forceinline__ void add_lora(float (&sums)[4][4][4], const Arguments& p, int row, int column, int lane) {
    for (int r = 2 * (lane % 4); r < p.rank; r += 16) {
        u32 b[4][2];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            b[j][0] = load_pair(p.lora_up, column + 8 * j + lane / 4, p.n, r, p.rank);
            b[j][1] = load_pair(p.lora_up, column + 8 * j + lane / 4, p.n, r + 8, p.rank);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int top = row + 16 * i + lane / 4;
            const u32 a[4] = {
                load_pair(p.t, top, p.m, r, p.t_stride), load_pair(p.t, top + 8, p.m, r, p.t_stride),
                load_pair(p.t, top, p.m, r + 8, p.t_stride), load_pair(p.t, top + 8, p.m, r + 8, p.t_stride)};
#pragma unroll
            for (int j = 0; j < 4; ++j) Element::mma(sums[i][j], a, b[j][0], b[j][1]);
        }
    }
}

__device__ __forceinline__ void store_pair(const Arguments& p, int row, int column, float low, float high) {
    if (p.bias) {
        const long long sample = row / p.bias_rows;
        const u32 pair = *reinterpret_cast<const u32*>(p.bias + 2 * (sample * p.n + column));
        low += Element::low(pair), high += Element::high(pair);
    }
    low = activate<ACTIVATION>(low), high = activate<ACTIVATION>(high);
    if (p.gate) {
        const long long sample = row / p.gate_rows;
        const u32 pair = *reinterpret_cast<const u32*>(p.gate + 2 * (sample * p.n + column));
        low *= Element::low(pair), high *= Element::high(pair);
    }
    if (p.residual) {
        const long long at = 2 * (static_cast<long long>(row) * p.n + column);
        const u32 pair = *reinterpret_cast<const u32*>(p.residual + at);
        low += Element::low(pair), high += Element::high(pair);
    }
    const long long to = 2 * (static_cast<long long>(row) * p.y_stride + column);
    *reinterpret_cast<u32*>(p.y + to) = Element::pack(low, high);
}

// Tiles in an order that walks kRasterRows tile rows before the next tile column.
__device__ __forceinline__ void tile_origin(const Arguments& p, int tile, int& row, int& column) {
    const int rows = (p.m + kTileM - 1) / kTileM, columns = (p.n + kTileN - 1) / kTileN;
    const int band = tile / (kRasterRows * columns), within = tile % (kRasterRows * columns);
    const int height = min(kRasterRows, rows - band * kRasterRows);
    row = (band * kRasterRows + within % height) * kTileM;
    column = within / height * kTileN;
}

}  // namespace lynx

extern "C" __global__ void __launch_bounds__(lynx::kThreads, lynx::kBlocks) sparse_gemm_mma(const lynx::Arguments p) {
    using namespace lynx;
    extern __shared__ __align__(128) char shared[];
    const u32 memory = shared_address(shared);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int warp_row = warp / kWarpsN * kWarpM, warp_column = warp % kWarpsN * kWarpN;
    const int k_blocks = p.k / kTileK;
    int row, column;
    tile_origin(p, blockIdx.x, row, column);

    Sources sources(p, row, column);
    dependency_wait();
    dependency_release();
#pragma unroll
    for (int stage = 0; stage < kStages - 1; ++stage) {
        if (stage < k_blocks) sources.load(p, memory + stage * kStageBytes);
        copy_async_commit();
    }

    float sums[4][4][4] = {};
    int stage = 0;
    for (int k_block = 0; k_block < k_blocks; ++k_block) {
        copy_async_wait<kStages - 2>();
        __syncthreads();  // the stage is full, and everyone is done with the one that is refilled now
        const int ahead = k_block + kStages - 1, refilled = stage == 0 ? kStages - 1 : stage - 1;
        if (ahead < k_blocks) sources.load(p, memory + refilled * kStageBytes);
        copy_async_commit();

        const u32 values = memory + stage * kStageBytes, weight = values + kValuesBytes;
        const char* metadata = shared + stage * kStageBytes + kValuesBytes + kWeightBytes;
        u32 words[4];
#pragma unroll
        for (int i = 0; i < 4; ++i)
            words[i] = reinterpret_cast<const u32*>(metadata + warp_row / 64 * kMetadataBytes)[32 * i + lane];
        multiply_step<0>(sums, words, values, weight, warp_row, warp_column, lane);
        multiply_step<1>(sums, words, values, weight, warp_row, warp_column, lane);
        stage = stage == kStages - 1 ? 0 : stage + 1;
    }

    row += warp_row, column += warp_column;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int top = row + 16 * i + lane / 4;
        const float above = top < p.m ? p.scale[top] : 0.f, below = top + 8 < p.m ? p.scale[top + 8] : 0.f;
#pragma unroll
        for (int j = 0; j < 4; ++j)
            sums[i][j][0] *= above, sums[i][j][1] *= above, sums[i][j][2] *= below, sums[i][j][3] *= below;
    }
    if (p.rank) add_lora(sums, p, row, column, lane);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int top = row + 16 * i + lane / 4, left = column + 8 * j + 2 * (lane % 4);
            if (left >= p.n) continue;
            if (top < p.m) store_pair(p, top, left, sums[i][j][0], sums[i][j][1]);
            if (top + 8 < p.m) store_pair(p, top + 8, left, sums[i][j][2], sums[i][j][3]);
        }
    }
}
