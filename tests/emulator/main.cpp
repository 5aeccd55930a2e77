// One launch of the kernel in KERNEL, whose blocks all run at once: a small persistent grid.
#include "emulator.h"

#include KERNEL

using namespace emulator;

static const Params* params;
static std::string fault;

static void thread_main() {
    try {
        sparse_gemm(*params);
    } catch (const std::exception& error) {
        fault = std::string(error.what()) + ", thread " + std::to_string(now->thread);
    }
    now->done = true;
    ++progress;
    swapcontext(&now->context, &scheduler);
}

// A random two thirds of the warps, or all, in random order; then some of the copies. False: nothing can move.
static bool round(std::vector<Fiber*>& live) {
    const u64 before = progress;
    const bool all = emulator::random() % 4 == 0;
    std::vector<size_t> warps;
    for (size_t i = 0; i < live.size(); i += 32)
        if (all || emulator::random() % 3) warps.push_back(i);
    std::shuffle(warps.begin(), warps.end(), emulator::random);
    for (size_t first : warps)
        for (size_t i = first; i < std::min(first + 32, live.size()) && fault.empty(); ++i) {
            now = live[i];
            if (!now->done) swapcontext(&scheduler, &now->context);
        }
    const bool copying = !copies.empty();
    for (size_t left = copies.size(); left > 0; --left) {
        const Work work = copies.front();
        copies.pop_front();
        if (emulator::random() % 2)
            work();
        else
            copies.push_back(work);
    }
    live.erase(std::remove_if(live.begin(), live.end(), [](Fiber* f) { return f->done; }), live.end());
    return !all || copying || progress != before;
}

extern "C" int params_bytes() { return sizeof(Params); }

// Returns null, or what went wrong.
extern "C" const char* launch(const void* packed, int grid, int threads, int cluster, int shared_bytes, unsigned seed) {
    alignas(64) static unsigned char copy_of_params[sizeof(Params)];
    std::memcpy(copy_of_params, packed, sizeof(Params));
    params = reinterpret_cast<const Params*>(copy_of_params);
    threads_of_block = threads, blocks_of_grid = grid, progress = 0;
    fault.clear(), copies.clear(), emulator::random.seed(seed);
    if (threads != kThreads || cluster != kCluster || grid % cluster || shared_bytes < kSharedBytes)
        return "the launch does not fit the kernel";

    std::vector<Block> blocks(grid);
    std::vector<Cluster> clusters(grid / cluster);
    std::vector<Fiber> fibers(size_t(grid) * threads);
    std::vector<Fiber*> live;
    for (size_t i = 0; i < fibers.size(); ++i) {
        Fiber& f = fibers[i];
        const u32 index = i / threads;
        f.thread = i % threads, f.rank = index % cluster;
        f.block = &blocks[index], f.cluster = &clusters[index / cluster];
        if (f.thread == 0) {
            f.block->memory.assign(shared_bytes + 2048, 0xA5);
            f.block->shared = f.block->memory.data() + (1024 - uintptr_t(f.block->memory.data()) % 1024) % 1024;
            f.block->size = shared_bytes, f.block->index = index;
            f.cluster->blocks.push_back(f.block);
        }
        f.stack.resize(48 << 10);
        getcontext(&f.context);
        f.context.uc_stack.ss_sp = f.stack.data(), f.context.uc_stack.ss_size = f.stack.size();
        f.context.uc_link = nullptr;
        makecontext(&f.context, thread_main, 0);
        live.push_back(&f);
    }
    try {
        while (!live.empty() && fault.empty())
            if (!round(live)) fault = "a deadlock of " + std::to_string(live.size()) + " threads";
    } catch (const std::exception& error) {
        fault = error.what();
    }
    for (auto& block : blocks)
        for (auto& barrier : block.barriers)
            if (fault.empty() && barrier.second.bytes != 0) fault = "copied bytes that nobody expected";
    return fault.empty() ? nullptr : fault.c_str();
}
