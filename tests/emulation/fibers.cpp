// Runs the threads of a cluster as fibers, in random order, and plays their barriers and asynchronous copies.
//
// Each block of a cluster is its own copy of the kernel's library, so that static variables are its shared memory.
// With `late` copies land at the last moment at which the kernel may rely on them, and what they will overwrite is
// destroyed at once; without it they land immediately.

#include "cuda.h"

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <ucontext.h>
#include <unordered_map>
#include <vector>

namespace {

constexpr std::size_t kStack = 1 << 17;
constexpr unsigned long kPatience = 20000;  // rounds of the scheduler in which nothing happens

struct Copy {
    char* to;
    const char* from;
    bool valid;
};
using Copies = std::vector<Copy>;

struct Fiber {
    Thread thread{};
    ucontext_t context{};
    std::unique_ptr<char[]> stack{new char[kStack]};
    bool done = false;
    std::vector<Copies> groups{{}};  // of copies not yet landed; the last is not committed
    unsigned long cluster_phase = 0;
};

struct Meeting {
    int present = 0;
    unsigned long phase = 0;
    void* slots[128];
};

struct MBarrier {
    unsigned count;
    int missing;
    long bytes = 0;
    unsigned phase = 0;
};

std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<Meeting> warps, warpgroups;
std::vector<std::vector<Meeting>> barriers;  // of each block, by number
Meeting cluster;
std::unordered_map<char*, MBarrier> mbarriers;
struct Arrival {
    Copies copies;
    unsigned barrier, bytes;  // bytes: that complete; else a thread arrives
};
std::vector<Arrival> arrivals;  // what mbarriers wait for
char* bases[16];
Fiber* running;
ucontext_t scheduler;
std::mt19937 generator;
char failure[200];
unsigned long events;  // grows whenever something happens that may let a thread go on
bool late;
const void* parameters;
void (*entries[16])(const void*);

void yield() { swapcontext(&running->context, &scheduler); }

void land(const Copies& copies) {
    for (const Copy& copy : copies) {
        if (copy.valid) std::memcpy(copy.to, copy.from, 16);
        else std::memset(copy.to, 0, 16);
    }
    ++events;
}

Copy checked(char* to, const char* from, bool valid) {
    if (reinterpret_cast<std::size_t>(to) % 16 || reinterpret_cast<std::size_t>(from) % 16) {
        fail("a copy of 16 bytes that is not aligned");
    }
    return {to, from, valid};
}

// Arrives; true for the last, which opens the barrier.
bool arrive(Meeting& meeting, int count) {
    if (++meeting.present < count) return false;
    meeting.present = 0, ++meeting.phase, ++events;
    return true;
}

MBarrier& at(unsigned barrier) {
    const auto found = mbarriers.find(from_shared(barrier));
    if (found == mbarriers.end()) fail("a barrier that nobody has initialized");
    return found->second;
}

void settle(MBarrier& barrier) {
    if (barrier.missing < 0) fail("more arrivals than a barrier expects");
    if (barrier.missing == 0 && barrier.bytes == 0) barrier.phase ^= 1, barrier.missing = barrier.count;
    ++events;
}

void body() {
    entries[running->thread.rank](parameters);
    running->done = true, ++events;
    yield();
}

}  // namespace

extern "C" {

Thread* current;

// The fiber ends here, and the launch with it: `emulate` returns what went wrong.
void fail(const char* what) {
    std::snprintf(failure, sizeof failure, "%s (block %u, thread %u)", what, blockIdx.x, threadIdx.x);
    for (;;) yield();
}

void warp_meet(void* slot, void (*meet)(void**)) {
    Meeting& warp = warps[current->warp];
    warp.slots[current->lane] = slot;
    const unsigned long phase = warp.phase;
    if (warp.present == 31) meet(warp.slots);
    if (!arrive(warp, 32)) {
        while (warp.phase == phase) yield();
    }
}

void warpgroup_meet(void* slot, void (*meet)(void**)) {
    Meeting& group = warpgroups[current->warp - threadIdx.x % 128 / 32];
    group.slots[threadIdx.x % 128] = slot;
    const unsigned long phase = group.phase;
    if (group.present == 127) meet(group.slots);
    if (!arrive(group, 128)) {
        while (group.phase == phase) yield();
    }
}

void block_arrive(int id, int count) { arrive(barriers[current->rank][id], count); }

void block_barrier(int id, int count) {
    Meeting& barrier = barriers[current->rank][id];
    const unsigned long phase = barrier.phase;
    if (!arrive(barrier, count)) {
        while (barrier.phase == phase) yield();
    }
}

void cluster_barrier(bool wait) {
    if (!wait) {
        running->cluster_phase = cluster.phase;
        arrive(cluster, static_cast<int>(fibers.size()));
    } else {
        while (cluster.phase == running->cluster_phase) yield();
    }
}

unsigned to_shared(const void* pointer) {
    const long offset = static_cast<const char*>(pointer) - bases[current->rank];
    if (offset < 0 || offset >> 28) fail("an address that is not in shared memory");
    return static_cast<unsigned>(current->rank) << 28 | static_cast<unsigned>(offset);
}

char* from_shared(unsigned address) { return bases[address >> 28] + (address & (1u << 28) - 1); }

// Half of the window lies before the anchor, half behind.
void shared_begins(int rank, char* anchor) { bases[rank] = anchor - (1l << 27); }

void copy_start(unsigned to, const void* from, bool valid) {
    const Copy copy = checked(from_shared(to), static_cast<const char*>(from), valid);
    if (!late) return land({copy});
    std::memset(copy.to, 0xff, 16);
    running->groups.back().push_back(copy);
}

void copies_complete(const unsigned* to, const void* const* from, int count, unsigned barrier) {
    Copies copies;
    for (int i = 0; i < count; ++i) {
        copies.push_back(checked(from_shared(to[i]), static_cast<const char*>(from[i]), from[i] != nullptr));
        if (late) std::memset(copies.back().to, 0xff, 16);
    }
    if (late) return arrivals.push_back({copies, barrier, 16u * count}), void();
    land(copies);
    mbarrier_complete(barrier, 16 * count);
}

void copy_commit() { running->groups.emplace_back(); }

void copy_wait(int pending) {
    while (static_cast<int>(running->groups.size()) > pending + 1) {
        land(running->groups.front());
        running->groups.erase(running->groups.begin());
    }
}

void copy_arrive(unsigned barrier) {
    Copies all;
    for (const Copies& group : running->groups) all.insert(all.end(), group.begin(), group.end());
    running->groups.assign(1, {});
    if (late) return arrivals.push_back({all, barrier, 0}), void();
    mbarrier_arrive(barrier);
}

void mbarrier_init(unsigned barrier, unsigned count) {
    mbarriers[from_shared(barrier)] = MBarrier{count, static_cast<int>(count)};
}

void mbarrier_arrive(unsigned barrier) {
    MBarrier& found = at(barrier);
    --found.missing;
    settle(found);
}

void mbarrier_expect(unsigned barrier, unsigned bytes) {
    MBarrier& found = at(barrier);
    found.bytes += bytes, --found.missing;
    settle(found);
}

void mbarrier_complete(unsigned barrier, unsigned bytes) {
    MBarrier& found = at(barrier);
    found.bytes -= bytes;
    settle(found);
}

void mbarrier_wait(unsigned barrier, unsigned parity) {
    const MBarrier& found = at(barrier);
    while (found.phase == parity) yield();
}

// Runs a grid, one cluster after another. Returns null, or what went wrong.
const char* emulate(void (**blocks)(const void*), const void* given, unsigned grid, int threads, int size, int seed, int lazy) {
    parameters = given, late = lazy, failure[0] = 0, generator.seed(seed);
    std::copy(blocks, blocks + size, entries);
    const int warps_of_block = (threads + 31) / 32;
    for (unsigned first = 0; first < grid; first += size) {
        fibers.clear(), mbarriers.clear(), arrivals.clear();
        warps.assign(size * warps_of_block, {}), warpgroups = warps, barriers.assign(size, std::vector<Meeting>(16)), cluster = {};
        for (int i = 0; i < size * threads; ++i) {
            const int rank = i / threads, thread = i % threads;
            fibers.push_back(std::make_unique<Fiber>());
            Fiber& fiber = *fibers.back();
            fiber.thread = {{unsigned(thread), 0, 0}, {first + rank, 0, 0}, {grid, 1, 1}, rank, thread % 32,
                            rank * warps_of_block + thread / 32, threads};
            getcontext(&fiber.context);
            fiber.context.uc_stack.ss_sp = fiber.stack.get();
            fiber.context.uc_stack.ss_size = kStack;
            makecontext(&fiber.context, body, 0);
        }
        std::vector<Fiber*> left;
        for (const auto& fiber : fibers) left.push_back(fiber.get());
        unsigned long seen = events, idle = 0;
        while (!left.empty()) {
            const std::size_t start = generator() % left.size(), count = 1 + generator() % 64;
            for (std::size_t i = 0; i < count && !left.empty(); ++i) {
                const std::size_t chosen = (start + i) % left.size();
                running = left[chosen], current = &running->thread;
                swapcontext(&scheduler, &running->context);
                if (failure[0]) return failure;
                if (running->done) left.erase(left.begin() + chosen);
            }
            if (!arrivals.empty() && generator() % 3 == 0) {
                const auto chosen = arrivals.begin() + generator() % arrivals.size();
                const auto [copies, barrier, bytes] = *chosen;
                arrivals.erase(chosen);
                land(copies);
                if (bytes) mbarrier_complete(barrier, bytes);
                else mbarrier_arrive(barrier);
                if (failure[0]) return failure;
            }
            idle = events == seen ? idle + 1 : 0, seen = events;
            if (idle > kPatience) return "a deadlock";
        }
        for (const auto& [address, barrier] : mbarriers) {
            if (barrier.bytes < 0) return "copied bytes that nobody expected";
        }
    }
    return nullptr;
}
}
