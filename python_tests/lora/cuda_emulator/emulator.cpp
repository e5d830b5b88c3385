// Threads are fibers with stacks of their own. A fiber runs until it waits (for its warp, block or cluster) or ends;
// the order in which ready fibers run is drawn anew each pass, and so is the order of blocks: what was only right by
// luck of the schedule shows. Shared memory is poison before each block and ends at a page that must not be touched,
// asynchronous copies land as late as their wait allows and poison their target until then, and a fault, a barrier
// that not all reach, or one reached from two places, fails the launch with a message.
#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "cuda_runtime.h"
#include "s3t.h"

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {
namespace {

constexpr size_t kStack = 256 << 10, kShared = 228 << 10, kMaxFibers = 16 * 1024;

struct Copy {
    void* to;
    const void* from;
    int bytes, group;
};

struct Fiber {
    jmp_buf where;
    bool started, done;
    Wait waits;
    int line;
    dim3 thread, block_index;
    unsigned warp, block;  // within the cluster
    int lane, exchanges, groups;
    std::vector<Copy> copies;
};

struct Barrier {
    unsigned first, last;  // fibers
    unsigned alive, arrived;
    int line;
};

struct Warp {
    char records[2][kLanes * kRecord];
};

std::vector<Fiber> fibers;
std::vector<Warp> warps;
std::vector<Barrier> warp_barriers, block_barriers;
Barrier cluster_barrier;
Fiber* current;
jmp_buf scheduler;
sigjmp_buf failure;
char message[512] = "";
char *stacks, *arenas;
size_t shared_size;
unsigned cluster_blocks;
const std::function<void()>* body;
std::mt19937 random_{1};
int capability = 9, multiprocessors = 132;

long page() {
    return sysconf(_SC_PAGESIZE);
}

char* shared_base(unsigned block) {  // the arena of a block ends at a page without rights
    const size_t size = (shared_size + 15) / 16 * 16;
    return arenas + block * (kShared + page()) + kShared - size;
}

Barrier& barrier_of(const Fiber& fiber, Wait what) {
    if (what == Wait::warp) return warp_barriers[fiber.warp];
    return what == Wait::block ? block_barriers[fiber.block] : cluster_barrier;
}

void release_if_full(const Fiber& arrived, Wait what) {
    Barrier& barrier = barrier_of(arrived, what);
    if (barrier.arrived == 0 || barrier.arrived < barrier.alive) return;
    barrier.arrived = 0;
    for (unsigned i = barrier.first; i < barrier.last; ++i) {
        if (fibers[i].waits == what) fibers[i].waits = Wait::none;
    }
}

[[noreturn]] void back_to_scheduler() {
    _longjmp(scheduler, 1);
}

void begin() {
    (*body)();
    Fiber& fiber = *current;
    fiber.done = true;
    if (!fiber.copies.empty()) fail("a thread ended with asynchronous copies under way");
    for (const Wait what : {Wait::warp, Wait::block, Wait::cluster}) {
        --barrier_of(fiber, what).alive;
        release_if_full(fiber, what);
    }
    back_to_scheduler();
}

void run(Fiber& fiber) {
    if (_setjmp(scheduler) != 0) return;
    current = &fiber;
    threadIdx = fiber.thread;
    blockIdx = fiber.block_index;
    if (fiber.started) _longjmp(fiber.where, 1);
    fiber.started = true;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = stacks + (&fiber - fibers.data()) * kStack;
    context.uc_stack.ss_size = kStack;
    context.uc_link = nullptr;
    makecontext(&context, begin, 0);
    setcontext(&context);
}

void on_fault(int, siginfo_t* info, void*) {
    const auto address = reinterpret_cast<uintptr_t>(info->si_addr);
    const auto start = reinterpret_cast<uintptr_t>(arenas);
    const bool shared = address >= start && address < start + 16 * (kShared + page());
    fail("thread %u of block (%u, %u): access outside %s memory", threadIdx.x, blockIdx.x, blockIdx.y,
         shared ? "shared" : "global");
}

void prepare(dim3 grid, dim3 block, uint64_t first) {
    const unsigned threads = block.x * block.y * block.z, per_block = (threads + kLanes - 1) / kLanes;
    fibers.assign(threads * cluster_blocks, Fiber{});
    warps.resize(per_block * cluster_blocks);
    warp_barriers.assign(warps.size(), Barrier{});
    block_barriers.assign(cluster_blocks, Barrier{});
    cluster_barrier = {};
    for (unsigned i = 0; i < fibers.size(); ++i) {
        Fiber& fiber = fibers[i];
        const unsigned thread = i % threads;
        fiber.block = i / threads;
        fiber.lane = static_cast<int>(thread % kLanes);
        fiber.warp = fiber.block * per_block + thread / kLanes;
        fiber.thread = dim3(thread % block.x, thread / block.x % block.y, thread / (block.x * block.y));
        const uint64_t index = first + fiber.block;
        fiber.block_index = dim3(static_cast<unsigned>(index % grid.x), static_cast<unsigned>(index / grid.x % grid.y),
                                 static_cast<unsigned>(index / (uint64_t{grid.x} * grid.y)));
        for (const Wait what : {Wait::warp, Wait::block, Wait::cluster}) {
            Barrier& barrier = barrier_of(fiber, what);
            if (barrier.alive++ == 0) barrier.first = i;
            barrier.last = i + 1;
        }
    }
    for (unsigned b = 0; b < cluster_blocks; ++b) std::memset(shared_base(b), 0xff, (shared_size + 15) / 16 * 16);
}

const char* name_of(Wait what) {
    return what == Wait::warp ? "warp" : what == Wait::block ? "block" : "cluster";
}

bool can_run(const Fiber& fiber) {
    return !fiber.done && fiber.waits == Wait::none;
}

// Threads go on in shuffled order, from barrier to barrier; one block of the cluster runs ahead of the others as far as
// it can, so that a barrier missing between them is found.
void run_cluster() {
    std::vector<unsigned> order(fibers.size());
    for (unsigned i = 0; i < order.size(); ++i) order[i] = i;
    unsigned ahead = random_() % cluster_blocks;
    for (bool all_done = false; !all_done;) {
        std::shuffle(order.begin(), order.end(), random_);
        if (random_() % 16 == 0) ahead = random_() % cluster_blocks;
        const auto leads = [&](const Fiber& fiber) { return fiber.block == ahead && can_run(fiber); };
        const bool lead = std::any_of(fibers.begin(), fibers.end(), leads);
        bool ran = false;
        all_done = true;
        for (const unsigned i : order) {
            if (can_run(fibers[i]) && (!lead || fibers[i].block == ahead)) {
                run(fibers[i]);
                ran = true;
            }
            all_done = all_done && fibers[i].done;
        }
        if (ran || all_done) continue;
        for (const Fiber& fiber : fibers) {
            if (!fiber.done) {
                fail("block (%u, %u): thread %u waits for its %s at line %d, and others do not", fiber.block_index.x,
                     fiber.block_index.y, fiber.thread.x, name_of(fiber.waits), fiber.line);
            }
        }
    }
}

void allocate() {
    if (stacks != nullptr) return;
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    stacks = static_cast<char*>(mmap(nullptr, kMaxFibers * kStack, PROT_READ | PROT_WRITE, flags, -1, 0));
    arenas = static_cast<char*>(mmap(nullptr, 16 * (kShared + page()), PROT_READ | PROT_WRITE, flags, -1, 0));
    for (int i = 0; i < 16; ++i) mprotect(arenas + i * (kShared + page()) + kShared, page(), PROT_NONE);
}

}  // namespace

void fail(const char* format, ...) {
    va_list values;
    va_start(values, format);
    std::vsnprintf(message, sizeof message, format, values);
    va_end(values);
    siglongjmp(failure, 1);
}

cudaError_t launch(dim3 grid, dim3 block, unsigned cluster, size_t shared, const std::function<void()>& kernel) {
    allocate();
    const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
    const size_t threads = size_t{block.x} * block.y * block.z;
    if (blocks == 0 || grid.y > 65535 || grid.z > 65535 || threads == 0 || threads > 1024 || cluster > 8 ||
        grid.x % cluster != 0 || shared > (227 << 10) || (cluster > 1 && capability < 9)) {
        std::snprintf(message, sizeof message, "invalid launch");
        return cudaErrorInvalidValue;
    }
    gridDim = grid, blockDim = block;
    cluster_blocks = cluster, shared_size = shared, body = &kernel;
    std::vector<uint64_t> order(blocks / cluster);
    for (uint64_t i = 0; i < order.size(); ++i) order[i] = i * cluster;
    std::shuffle(order.begin(), order.end(), random_);

    struct sigaction action{}, before_segv, before_bus;
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_NODEFER;
    sigaction(SIGSEGV, &action, &before_segv);
    sigaction(SIGBUS, &action, &before_bus);
    volatile bool failed = true;
    if (sigsetjmp(failure, 1) == 0) {
        for (const uint64_t first : order) {
            prepare(grid, block, first);
            run_cluster();
        }
        failed = false;
    }
    sigaction(SIGSEGV, &before_segv, nullptr);
    sigaction(SIGBUS, &before_bus, nullptr);
    return failed ? cudaErrorLaunchFailure : cudaSuccess;
}

void wait(Wait what, int line) {
    Fiber& fiber = *current;
    Barrier& barrier = barrier_of(fiber, what);
    if (barrier.arrived == 0) barrier.line = line;
    if (barrier.line != line) {
        fail("threads of one %s wait at line %d and at line %d", name_of(what), barrier.line, line);
    }
    ++barrier.arrived;
    fiber.waits = what;
    fiber.line = line;
    release_if_full(fiber, what);
    if (_setjmp(fiber.where) == 0) back_to_scheduler();
}

char* shared_memory() {
    return shared_base(current->block);
}

void* shared_of(void* own, unsigned rank) {
    return static_cast<char*>(own) - shared_base(current->block) + shared_base(rank);
}

unsigned cluster_rank() {
    return current->block;
}

unsigned cluster_size() {
    return cluster_blocks;
}

int lane() {
    return current->lane;
}

// Two sets of records take turns: a lane can write again only when all have come to the next exchange, having read.
const char* exchange(const void* mine, size_t bytes, int line) {
    Fiber& fiber = *current;
    char* records = warps[fiber.warp].records[fiber.exchanges++ % 2];
    if (warp_barriers[fiber.warp].alive != kLanes) fail("line %d: lanes of the warp have ended", line);
    std::memcpy(records + fiber.lane * kRecord, mine, bytes);
    wait(Wait::warp, line);
    return records;
}

void copy_async(void* to, const void* from, int bytes) {
    if (reinterpret_cast<uintptr_t>(to) % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0) {
        fail("an asynchronous copy is not aligned to 16 bytes");
    }
    std::memset(to, 0xff, 16);
    current->copies.push_back({to, from, bytes, current->groups});
}

void commit_copies() {
    ++current->groups;
    if (_setjmp(current->where) == 0) back_to_scheduler();  // others see what is under way
}

void wait_copies(int pending) {
    auto& copies = current->copies;
    size_t kept = 0;
    for (const Copy& copy : copies) {
        if (copy.group >= current->groups - pending) {
            copies[kept++] = copy;
            continue;
        }
        char bytes[16] = {};
        std::memcpy(bytes, copy.from, copy.bytes);
        std::memcpy(copy.to, bytes, 16);
    }
    copies.resize(kept);
}

}  // namespace emulator

cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}
cudaError_t cudaSetDevice(int) {
    return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    *value = attribute == cudaDevAttrMultiProcessorCount ? emulator::multiprocessors : emulator::capability;
    return cudaSuccess;
}
const char* cudaGetErrorString(cudaError_t) {
    return emulator::message;
}

// What tests set: the order of everything, and the device that launchers see.
extern "C" __attribute__((visibility("default"))) void emulator_settings(unsigned seed, int capability,
                                                                         int multiprocessors) {
    emulator::random_.seed(seed);
    emulator::capability = capability;
    emulator::multiprocessors = multiprocessors;
}

// The CPU's kernels are not part of this build.
#define S3T_NO_CPU(name, ...)   \
    int32_t name(__VA_ARGS__) { \
        return S3T_BAD_CPU;     \
    }
S3T_NO_CPU(s3t_shrink, const s3t_shrink_args*, int32_t)
S3T_NO_CPU(s3t_expand, const s3t_expand_args*, int32_t)
S3T_NO_CPU(s3t_linear, const s3t_linear_args*, int32_t)
S3T_NO_CPU(s3t_layer, const s3t_shrink_args*, const s3t_linear_args*, int32_t)
S3T_NO_CPU(s3t_outer, const s3t_outer_args*, int32_t)
S3T_NO_CPU(s3t_pack, const s3t_pack_args*, int32_t)
S3T_NO_CPU(s3t_attention, const s3t_attention_args*, bool, int32_t)
const char* s3t_cpu() {
    return "";
}
const char* s3t_cpus() {
    return "";
}
const char* s3t_threads() {
    return "";
}
