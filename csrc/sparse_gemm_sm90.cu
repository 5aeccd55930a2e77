// y = [residual +] [gate ·] act(s · (z̃ · Wᵀ) + t · Bᵀ + b), z̃ compressed 2:4, on Hopper's sparse tensor cores.
//
// One producer warp fills a ring of shared-memory slots through the copy engine; the consumer warpgroups each
// multiply their rows of the tile with the whole width of it. Three kinds of step use the same ring, in order:
//
//     sparse     64 columns of K: compressed values, metadata, weight     wgmma.sp, k = 32, twice
//     LoRA       32 columns of the rank: t, B                             wgmma, k = 16, twice
//     residual   128 columns of the output, 64 rows a warpgroup           added in the epilogue
//
// so the epilogue of a tile overlaps the loads of the next one, and the accumulators never leave registers.
// Blocks of a cluster share the tiles they have in common by multicast; or, where tiles are few, each computes a part
// of K of one tile. One launch multiplies X with the weights of up to kLayers layers, each with its own N, bias, LoRA
// branch and y.
//
// Macros (runtime/gemm_sm90.py): BF16, CONSUMERS, BLOCKS, TILE_N, STAGES, CLUSTER_M, CLUSTER_N, SPLIT, ACTIVATION,
// TAIL: 0 for none, 1 for a gate or a residual, 2 where samples may also meet in the rows of a warpgroup.
// ALL_RELEASE, which only tests/gpu/sanitize.py sets: every thread tells by itself that it has done with a slot.

#include "epilogue.cuh"
#include "ptx.cuh"
#include "wgmma.cuh"

#ifndef ALL_RELEASE
#define ALL_RELEASE 0
#endif

using ptx::u32;
using ptx::u64;

constexpr bool kBf16 = BF16;
constexpr int kConsumers = CONSUMERS;  // warpgroups that multiply
constexpr int kBlocks = BLOCKS;        // 64-row blocks of each of them
constexpr int kTileM = 64 * kBlocks * kConsumers;
constexpr int kTileN = TILE_N;
constexpr int kStages = STAGES;
constexpr int kClusterM = CLUSTER_M;
constexpr int kClusterN = CLUSTER_N;
constexpr int kSplit = SPLIT;  // parts of K, one for each block of a cluster
constexpr int kCluster = kClusterM * kClusterN * kSplit;
constexpr int kMates = kClusterM + kClusterN - 1;  // blocks whose producers write into a block's slots

constexpr int kStepK = 64;     // dense columns of a sparse step: 128 bytes of a weight row, 64 of a value row
constexpr int kLoraStep = 32;  // rank of a LoRA step: 64 bytes of a row of t and of B
constexpr int kWords = 128;    // metadata words of a 64 × 64 block

constexpr int kWeightBytes = kTileN * 128;
constexpr int kValueBytes = kTileM * 64;
constexpr int kMetadataBytes = kTileM / 64 * kWords * 4;
constexpr int kSlotBytes = (kWeightBytes + kValueBytes + kMetadataBytes + 1023) / 1024 * 1024;
constexpr int kLayers = 4;  // of one launch, at most

constexpr int kBoxBytes = 64 * 64 * 2;  // of the residual: 64 rows, 64 columns
constexpr int kBoxes = kTileN % 128 == 0 && kConsumers * 2 * kBoxBytes <= kWeightBytes + kValueBytes ? 2 : 1;  // a step
constexpr bool kRingResidual = TAIL && kSplit == 1;  // otherwise the epilogue loads it
constexpr int kVectors = TAIL ? 2 : 1;    // staged per column: the bias, and the gate
constexpr int kVectorBytes = 2 * kConsumers * kVectors * kTileN * 4;
constexpr int kSharedBytes = kStages * kSlotBytes + kVectorBytes + 2 * kStages * 8;

constexpr int kThreads = 128 * (kConsumers + 1);
constexpr int kProducerRegisters = kConsumers == 2 ? 24 : 80;
constexpr int kConsumerRegisters = kConsumers == 2 ? 240 : 144;

// What a block gets at its launch; who asks for more waits for ever.
constexpr int kRegisters = 65536 / kThreads / 8 * 8 * (kConsumers + 1);
static_assert(kConsumers * kConsumerRegisters + kProducerRegisters <= kRegisters, "too many registers asked for");
static_assert(kConsumers * kBoxBytes <= kWeightBytes + kValueBytes, "a residual step must fit into a slot");
static_assert(kSharedBytes <= 227 * 1024, "the ring must fit into shared memory: fewer stages or a smaller tile");
static_assert(kTileM % (64 * kClusterN) == 0 && kTileN % (8 * kClusterM) == 0, "each block loads whole swizzle atoms");
static_assert(!kRingResidual || kTileN % 64 == 0, "a box of the residual is 64 columns wide");
static_assert(kSplit == 1 || kClusterM * kClusterN == 1, "a cluster shares operands or splits K");
static_assert(kTileN / kSplit % 32 == 0, "each block of a split stores whole groups of columns");
static_assert(kSplit == 1 || (kSplit - 1) * kTileM * kTileN / kSplit * 4 <= kStages * kSlotBytes,
              "partial sums must fit into the ring");
static_assert(kTileM <= 256 && kTileN <= 256, "a box of the copy engine has at most 256 rows");

struct Params {
    ptx::TensorMap values;            // (M, K/2), box 32 × kTileM / kClusterN, swizzle 64 B
    ptx::TensorMap residual;          // (M, N), box 64 × 64, swizzle 128 B; only for a single layer
    ptx::TensorMap weight[kLayers];   // (N, K), box 64 × kTileN / kClusterM, swizzle 128 B
    ptx::TensorMap t[kLayers];        // (M, R), box 32 × kTileM / kClusterN, swizzle 64 B
    ptx::TensorMap lora_up[kLayers];  // (N, R), box 32 × kTileN / kClusterM, swizzle 64 B
    const u32* metadata;              // (⌈M/64⌉, K/64, 128)
    const float* scale;               // (M)
    const unsigned short* gate;       // (samples, N) or null; only for a single layer
    const unsigned short* residual_at;  // (M, N) or null: the same as `residual`
    const unsigned short* bias[kLayers];  // (samples, N) or null
    unsigned short* y[kLayers];           // (M, N), rows y_stride elements apart
    int n[kLayers], y_stride[kLayers], lora_steps[kLayers];
    int bias_rows[kLayers];           // M / samples; unless TAIL is 2, all rows of a warpgroup are in one
    int first[kLayers];               // column of clusters where the layer begins; of absent ones past the last
    int columns;                      // of clusters, of all layers
    int m, k_steps, gate_rows;
    int raster;                       // cluster rows that are walked together before the next columns
};

// ---- which tile, which slot --------------------------------------------------------------------------------

// Tiles in clusters: column by column within a group of `raster` rows, so that the tiles in flight at one time
// share few rows of X and few of W. It keeps one number and recomputes the rest: registers are scarce.
// A split has a cluster for every tile, because partial sums use the ring: no step of another tile may be in it.
struct Schedule {
    int next = blockIdx.x / kCluster;
    int layer, row, column;  // of this block's tile: its layer, its first row and column

    // On to the next tile; false when there is none.
    __device__ __forceinline__ bool advance(const Params& p, int rank) {
        if (kSplit > 1) rank = 0;
        const int rows = (p.m + kTileM * kClusterM - 1) / (kTileM * kClusterM);
        if (next >= rows * p.columns) return false;
        const int group = next / (p.raster * p.columns), rest = next - group * p.raster * p.columns;
        const int height = min(p.raster, rows - group * p.raster);
        const int cluster_column = rest / height, cluster_row = group * p.raster + rest - cluster_column * height;
        layer = 0;
#pragma unroll
        for (int i = 1; i < kLayers; ++i) layer += cluster_column >= p.first[i];
        row = (cluster_row * kClusterM + rank % kClusterM) * kTileM;
        column = ((cluster_column - p.first[layer]) * kClusterN + rank / kClusterM) * kTileN;
        next += gridDim.x / kCluster;
        return true;
    }
};

// Sparse steps and LoRA steps of a block: all, or those of its part of K and every kSplit-th.
struct Steps {
    int first, count;

    __device__ __forceinline__ Steps(const Params& p, int rank)
        : first(kSplit == 1 ? 0 : rank * p.k_steps / kSplit),
          count(kSplit == 1 ? p.k_steps : (rank + 1) * p.k_steps / kSplit - first) {}
};

__device__ __forceinline__ int first_lora_step(int rank) { return kSplit == 1 ? 0 : rank; }

struct Ring {
    u32 slots, full, empty;  // shared-memory addresses
    int stage = 0;
    u32 phase = 0;

    __device__ Ring(u32 slots, u32 barriers) : slots(slots), full(barriers), empty(barriers + 8 * kStages) {}
    __device__ u32 slot() const { return slots + stage * kSlotBytes; }
    __device__ u32 full_barrier() const { return full + 8 * stage; }
    __device__ u32 empty_barrier() const { return empty + 8 * stage; }
    __device__ void advance() {
        if (++stage == kStages) stage = 0, phase ^= 1;
    }
};

// ---- producer ----------------------------------------------------------------------------------------------

// Blocks of the cluster in the same row share rows of X, blocks in the same column rows of W.
__device__ __forceinline__ unsigned short row_mates(int rank) {
    unsigned short mask = 0;
    for (int i = 0; i < kClusterN; ++i) mask |= 1 << (rank % kClusterM + i * kClusterM);
    return mask;
}

__device__ __forceinline__ unsigned short column_mates(int rank) {
    return ((1 << kClusterM) - 1) << (rank / kClusterM * kClusterM);
}

// Run by one warp. Lane 0 loads rows of W, lane 1 rows of X, each lane after them the metadata of one block.
__device__ void produce(const Params& p, Ring ring, int rank, int lane) {
    constexpr int kPartM = kTileM / kClusterN, kPartN = kTileN / kClusterM, kPartBlocks = kPartM / 64;
    const int part_m = kSplit == 1 ? rank / kClusterM : 0, part_n = rank % kClusterM;
    const Steps steps(p, rank);
    const unsigned short along_n = row_mates(rank), along_m = column_mates(rank);
    Schedule tile;
    for (bool back = false; tile.advance(p, rank); back = !back) {
        const int row = tile.row + part_m * kPartM, column = tile.column + part_n * kPartN;
        const ptx::TensorMap *w = &p.weight[tile.layer], *b = &p.lora_up[tile.layer], *x_down = &p.t[tile.layer];
        // Rows past M are zeros; they take the metadata of the last block so that it is always valid.
        const int block = min(row / 64 + lane - 2, (p.m - 1) / 64);
        // Every second tile walks K backwards: it begins with what the tile before has just read.
        for (int i = 0; i < steps.count; ++i, ring.advance()) {
            const int k = steps.first + (back ? steps.count - 1 - i : i);
            ptx::barrier_wait(ring.empty_barrier(), ring.phase ^ 1);
            const u32 full = ring.full_barrier(), weight = ring.slot(), values = weight + kWeightBytes;
            if (lane == 0) {
                ptx::barrier_expect(full, kWeightBytes + kValueBytes + kMetadataBytes);
                ptx::load_box<(kClusterM > 1)>(weight + part_n * kPartN * 128, w, full, k * kStepK, column,
                                               along_m);
            } else if (lane == 1) {
                ptx::load_box<(kClusterN > 1)>(values + part_m * kPartM * 64, &p.values, full, k * kStepK / 2, row,
                                               along_n);
            } else if (lane < 2 + kPartBlocks) {
                const u32 to = values + kValueBytes + (part_m * kPartBlocks + lane - 2) * kWords * 4;
                ptx::load_bytes<(kClusterN > 1)>(to, p.metadata + (u64(block) * p.k_steps + k) * kWords, kWords * 4,
                                                 full, along_n);
            }
        }
        for (int r = first_lora_step(rank); r < p.lora_steps[tile.layer]; r += kSplit, ring.advance()) {
            ptx::barrier_wait(ring.empty_barrier(), ring.phase ^ 1);
            const u32 full = ring.full_barrier(), up = ring.slot(), t = up + kWeightBytes;
            if (lane == 0) {
                ptx::barrier_expect(full, (kTileM + kTileN) * kLoraStep * 2);
                ptx::load_box<(kClusterM > 1)>(up + part_n * kPartN * kLoraStep * 2, b, full, r * kLoraStep,
                                               column, along_m);
            } else if (lane == 1) {
                ptx::load_box<(kClusterN > 1)>(t + part_m * kPartM * kLoraStep * 2, x_down, full, r * kLoraStep, row,
                                               along_n);
            }
        }
        if (kRingResidual && p.residual_at != nullptr) {
            const int warpgroup = lane / kBoxes, box = lane % kBoxes;
            for (int block = 0; block < kBlocks; ++block)
                for (int c = 0; c < kTileN; c += 64 * kBoxes, ring.advance()) {
                    ptx::barrier_wait(ring.empty_barrier(), ring.phase ^ 1);
                    const u32 full = ring.full_barrier();
                    if (lane == 0) ptx::barrier_expect(full, kConsumers * kBoxes * kBoxBytes);
                    if (warpgroup < kConsumers)
                        ptx::load_box<false>(ring.slot() + lane * kBoxBytes, &p.residual, full,
                                             tile.column + c + 64 * box,
                                             tile.row + (warpgroup * kBlocks + block) * 64, 0);
                }
        }
    }
    ptx::let_successor_launch();
}

// ---- consumers ---------------------------------------------------------------------------------------------

using Tile = wgmma::Tile<kTileN>;
using Element = lynx::ElementOf<!kBf16>::Type;
using Vectors = epilogue::Vectors<Element, kTileN, TAIL>;
using Rows = epilogue::Rows<Element, ACTIVATION, TAIL, kTileN>;
constexpr int kPart = kTileN / kSplit;  // columns a block stores

template <int kSelector>
__device__ __forceinline__ void multiply_sparse(float (&d)[Tile::kCount], u64 a, u64 b, u32 metadata, int accumulate) {
    if constexpr (kBf16)
        Tile::sparse_bf16<kSelector>(d, a, b, metadata, accumulate);
    else
        Tile::sparse_f16<kSelector>(d, a, b, metadata, accumulate);
}

__device__ __forceinline__ void multiply_dense(float (&d)[Tile::kCount], u64 a, u64 b) {
    if constexpr (kBf16)
        Tile::dense_bf16(d, a, b);
    else
        Tile::dense_f16(d, a, b);
}

// The blocks whose producers write into this block's slots, one for each of a warpgroup's first threads: those in
// its row and in its column of the cluster.
__device__ __forceinline__ int mate(int rank, int thread) {
    const int m = rank % kClusterM, n = rank / kClusterM;
    if (thread < kClusterM) return n * kClusterM + thread;
    if (thread < kMates) return m + (n + 1 + thread - kClusterM) % kClusterN * kClusterM;
    return -1;
}

struct Consumer {
    const Params& p;
    Ring ring;
    int group, warp, lane;  // warpgroup among the consumers, warp in it, lane
    int release_rank;       // block of the cluster that this thread releases slots to; −1: none
    u32 words;              // where this lane finds its metadata, relative to a slot
    float acc[kBlocks][Tile::kCount];

    // The warpgroup is done with a slot: tell every block whose producer writes to it here. One warp speaks for
    // all four, because a wgmma completes for the whole warpgroup.
    __device__ __forceinline__ void release(int stage) {
        if constexpr (ALL_RELEASE) {
            const int rank = kCluster == 1 ? 0 : ptx::cluster_rank();
            for (int i = 0; i < kMates; ++i) ptx::barrier_arrive_remote(ring.empty + 8 * stage, mate(rank, i));
        } else if (release_rank >= 0) {
            ptx::barrier_arrive_remote(ring.empty + 8 * stage, release_rank);
        }
    }

    __device__ __forceinline__ void release_previous() { release(ring.stage == 0 ? kStages - 1 : ring.stage - 1); }

    // Where the rows of X or t of this warpgroup start in a slot, in units of 16 bytes.
    __device__ __forceinline__ u32 own_rows() const { return (kWeightBytes + group * kBlocks * 64 * 64) >> 4; }

    // One sparse step. The step before it is still running; its slot is free once it is done. Metadata registers
    // must not be written while a step reads them, so consecutive steps are different code with different ones.
    __device__ __forceinline__ void sparse_step(int k) {
        ptx::barrier_wait(ring.full_barrier(), ring.phase);
        u32 metadata[kBlocks];
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) metadata[b] = ptx::load_shared(ring.slot() + words + b * kWords * 4);
        const u32 w = wgmma::descriptor_start(ring.slot()), x = w + own_rows();
        wgmma::fence();
#pragma unroll
        for (int step = 0; step < 2; ++step)
#pragma unroll
            for (int b = 0; b < kBlocks; ++b) {
                const u64 from_x = wgmma::descriptor<wgmma::Swizzle::k64>(x + b * 256 + step * 2);
                const u64 from_w = wgmma::descriptor<wgmma::Swizzle::k128>(w + step * 4);
                if (step == 0)
                    multiply_sparse<0>(acc[b], from_x, from_w, metadata[b], k);
                else
                    multiply_sparse<1>(acc[b], from_x, from_w, metadata[b], 1);
            }
        wgmma::commit();
        wgmma::wait<1>();
        if (k > 0) release_previous();
        ring.advance();
    }

    __device__ __forceinline__ void finish_steps() {
        wgmma::wait<0>();
        release_previous();
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) wgmma::settle(acc[b]);
    }

    __device__ __forceinline__ void lora_step(int r) {
        ptx::barrier_wait(ring.full_barrier(), ring.phase);
        const u32 up = wgmma::descriptor_start(ring.slot()), t = up + own_rows();
        wgmma::fence();
#pragma unroll
        for (int step = 0; step < 2; ++step)
#pragma unroll
            for (int b = 0; b < kBlocks; ++b)
                multiply_dense(acc[b], wgmma::descriptor<wgmma::Swizzle::k64>(t + b * 256 + step * 2),
                               wgmma::descriptor<wgmma::Swizzle::k64>(up + step * 2));
        wgmma::commit();
        wgmma::wait<1>();
        if (r > 0) release_previous();
        ring.advance();
    }

    // Where a thread keeps the partial sums of block `from`: pieces of 16 bytes, thread beside thread.
    __device__ __forceinline__ u32 partial(int from, int b, int piece) const {
        const int at = (from * kBlocks + b) * (kPart / 8) + piece;
        return ring.slots + ((at * kConsumers + group) * 128 + warp * 32 + lane) * 16;
    }

    // Gives each other block of the cluster what this one has of that one's columns, and adds what they have of its
    // own: block i ends with all of columns i · kPart … of the tile. The sum's order is that of the blocks.
    __device__ __forceinline__ void exchange(int rank) {
        ptx::cluster_sync();  // nothing is left in any ring
#pragma unroll
        for (int to = 0; to < kSplit; ++to)
            if (to != rank)
#pragma unroll
                for (int b = 0; b < kBlocks; ++b)
#pragma unroll
                    for (int i = 0; i < kPart / 8; ++i)
                        ptx::store_remote(partial(rank - (rank > to), b, i), to, acc[b] + to * kPart / 2 + 4 * i);
        ptx::cluster_sync();
#pragma unroll
        for (int own = 0; own < kSplit; ++own)
            if (own == rank)
#pragma unroll
                for (int from = 0; from < kSplit - 1; ++from)
#pragma unroll
                    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
                        for (int i = 0; i < kPart / 8; ++i) {
                            float other[4];
                            ptx::load_shared(other, partial(from, b, i));
#pragma unroll
                            for (int j = 0; j < 4; ++j) acc[b][own * kPart / 2 + 4 * i + j] += other[j];
                        }
    }

    // Columns from, from + 32, … + kPart − 1 of the tile.
    template <int kFrom>
    __device__ __forceinline__ void store_columns(const Schedule& tile, int first_row, const Vectors& vectors,
                                                  const float* staged) {
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) {
            const Rows rows(p.y[tile.layer], p.y_stride[tile.layer], vectors, staged, p.m,
                            first_row + b * 64 + warp * 16, tile.column, lane);
#pragma unroll
            for (int c = kFrom; c < kFrom + kPart; c += 32) {
                if constexpr (kRingResidual) {
                    u32 residual = 0;
                    if (p.residual_at != nullptr) {
                        if (c % (64 * kBoxes) == 0) ptx::barrier_wait(ring.full_barrier(), ring.phase);
                        residual = ring.slot() + (group * kBoxes + c / 64 % kBoxes) * kBoxBytes + warp * 16 * 128;
                    }
                    rows.store(acc[b] + c / 2, c, epilogue::Boxes{residual, c % 64 / 8});
                    if (p.residual_at != nullptr && c % (64 * kBoxes) == 64 * kBoxes - 32) {
                        ptx::named_sync(1 + group, 128);  // all four warps have read it
                        release(ring.stage);
                        ring.advance();
                    }
                } else {
                    rows.store(acc[b] + c / 2, c, epilogue::Global{TAIL ? p.residual_at : nullptr});
                }
            }
        }
    }

    __device__ __forceinline__ void run(int rank, float* vector_buffers) {
        const int thread = warp * 32 + lane, steps = Steps(p, rank).count;
        Schedule tile;
        for (int parity = 0; tile.advance(p, rank); parity ^= 1) {
            const int first_row = tile.row + group * kBlocks * 64;
            float scale[kBlocks][2];
#pragma unroll
            for (int b = 0; b < kBlocks; ++b)
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const int at = first_row + b * 64 + warp * 16 + lane / 4 + 8 * i;
                    scale[b][i] = at < p.m ? p.scale[at] : 0.0f;
                }
            Vectors vectors{p.bias[tile.layer], p.gate, p.bias_rows[tile.layer], p.gate_rows, p.n[tile.layer]};
            vectors.load(min(first_row, p.m - 1), min(first_row + kBlocks * 64, p.m) - 1, tile.column, thread);

            int k = 0;
            for (; k + 2 <= steps; k += 2) {
                sparse_step(k);
                sparse_step(k + 1);
            }
            if (k < steps) sparse_step(k);
            finish_steps();
#pragma unroll
            for (int b = 0; b < kBlocks; ++b)
#pragma unroll
                for (int i = 0; i < Tile::kCount; ++i) acc[b][i] *= scale[b][i / 2 % 2];
            const int lora_steps = (p.lora_steps[tile.layer] - first_lora_step(rank) + kSplit - 1) / kSplit;
            if (lora_steps > 0) {
                for (int r = 0; r < lora_steps; ++r) lora_step(r);
                finish_steps();
            }
            float* staged = vector_buffers + (parity * kConsumers + group) * kVectors * kTileN;
            vectors.stage(staged, thread);
            ptx::named_sync(1 + group, 128);  // the vectors are staged; the buffer of the tile before is free
            if constexpr (kSplit == 1) {
                store_columns<0>(tile, first_row, vectors, staged);
            } else {
                exchange(rank);
                if (rank == 0) store_columns<0>(tile, first_row, vectors, staged);
                if (rank == 1) store_columns<kPart>(tile, first_row, vectors, staged);
                if (kSplit > 2 && rank == 2) store_columns<2 % kSplit * kPart>(tile, first_row, vectors, staged);
                if (kSplit > 3 && rank == 3) store_columns<3 % kSplit * kPart>(tile, first_row, vectors, staged);
                break;  // there is no other tile: said so that the sums do not look as if a next one started from them
            }
        }
    }
};

extern "C" __global__ void __cluster_dims__(kCluster, 1, 1) __launch_bounds__(kThreads, 1)
    sparse_gemm(const __grid_constant__ Params p) {
    extern __shared__ __align__(1024) unsigned char shared[];
    float* vectors = reinterpret_cast<float*>(shared + kStages * kSlotBytes);
    const u32 base = ptx::shared_address(shared);
    Ring ring(base, base + kStages * kSlotBytes + kVectorBytes);
    const int warp = ptx::uniform(threadIdx.x / 32), warpgroup = warp / 4, lane = threadIdx.x % 32;
    const int rank = kCluster == 1 ? 0 : ptx::cluster_rank();

    if (threadIdx.x == 0) {
        for (int i = 0; i < kStages; ++i) {
            ptx::barrier_init(ring.full + 8 * i, 1);
            ptx::barrier_init(ring.empty + 8 * i, kConsumers * kMates * (ALL_RELEASE ? 128 : 1));
        }
        ptx::fence_barrier_init();
        ptx::prefetch_map(&p.values);
        ptx::prefetch_map(&p.weight[0]);
    }
    if constexpr (kCluster > 1)
        ptx::cluster_sync();
    else
        __syncthreads();
    ptx::wait_for_predecessor();

    if (warpgroup == kConsumers) {
        ptx::shrink_registers<kProducerRegisters>();
        if (warp == 4 * kConsumers) produce(p, ring, rank, lane);
        __syncwarp();
        if constexpr (kSplit > 1) ptx::cluster_sync(), ptx::cluster_sync();  // both of `exchange`
    } else {
        ptx::grow_registers<kConsumerRegisters>();
        const u32 words = kWeightBytes + kValueBytes + (warpgroup * kBlocks * kWords + threadIdx.x % 128) * 4;
        Consumer{p, ring, warpgroup, warp % 4, lane, mate(rank, threadIdx.x % 128), ptx::keep(words)}.run(rank, vectors);
    }
    // A block may not leave while another one still writes to its memory or arrives on its barriers.
    if constexpr (kCluster > 1 && kSplit == 1) ptx::cluster_sync();
}
