// Threads without a pool and without linking OpenMP: a second pool would fight torch's for the cores, because the
// workers of an OpenMP team spin for a while after each region. torch's own team is joined through GOMP_parallel, which
// every OpenMP runtime it ships with exports (libgomp, libiomp5, libomp).
#include "threads.h"

#include <dlfcn.h>
#include <link.h>
#include <pthread.h>
#include <time.h>

#include <algorithm>
#include <atomic>
#include <cstring>

namespace s3t {
namespace {

// About 20 us of work for one AVX-512 thread, fp32. Joining a team that is awake was measured at 4-5 us, clocks and
// cold caches included, one that sleeps at 33-50 us: only the first call of a row pays that, a team stays awake for ms.
constexpr int64_t kGrain = int64_t{2} << 20;

using GompParallel = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);

struct Team {
    GompParallel run = nullptr;
    const char* path = "";
};

int find_torch(dl_phdr_info* library, size_t, void* path) {
    const char* name = std::strrchr(library->dlpi_name, '/');
    if (name == nullptr || std::strcmp(name, "/libtorch_cpu.so") != 0) return 0;
    *static_cast<const char**>(path) = library->dlpi_name;
    return 1;
}

// The team belongs to the thread that calls, and does not survive a fork: the one thread of the child would wait for it
// for ever. That thread works alone from then on; threads that the child starts get teams of their own.
thread_local bool forked = false;

Team find_team() {
    pthread_atfork(nullptr, nullptr, [] { forked = true; });
    const char* path = nullptr;
    dl_iterate_phdr(find_torch, &path);
    void* torch = path == nullptr ? nullptr : dlopen(path, RTLD_LAZY | RTLD_NOLOAD);
    if (torch == nullptr) return {};
    // As torch's own calls are bound, for a process may hold several OpenMP runtimes: what was preloaded comes first,
    // then what torch is linked to.
    void* symbol = dlsym(RTLD_DEFAULT, "GOMP_parallel");
    if (symbol == nullptr) symbol = dlsym(torch, "GOMP_parallel");
    Dl_info info;
    if (symbol == nullptr || dladdr(symbol, &info) == 0) return {};
    return {reinterpret_cast<GompParallel>(symbol), info.dli_fname};
}

const Team& team() {
    static const Team found = find_team();
    return found;
}

int64_t nanoseconds(clockid_t clock) {
    timespec t{};
    clock_gettime(clock, &t);
    return int64_t{t.tv_sec} * 1000000000 + t.tv_nsec;
}

struct Region {
    Task task;
    const void* args;
    int64_t count;
    std::atomic<int64_t> next{0};
    std::atomic<int64_t> busy{0};  // processor time of all members, ns: what one thread alone would take
};

void work_off(void* data) {
    auto& region = *static_cast<Region*>(data);
    int64_t i = region.next.fetch_add(1, std::memory_order_relaxed);
    if (i >= region.count) return;
    const int64_t start = nanoseconds(CLOCK_THREAD_CPUTIME_ID);
    for (; i < region.count; i = region.next.fetch_add(1, std::memory_order_relaxed)) region.task(region.args, i);
    region.busy.fetch_add(nanoseconds(CLOCK_THREAD_CPUTIME_ID) - start, std::memory_order_relaxed);
}

// A region ends when its last member has come, and one whose core another program holds comes 4-24 ms late. So a team
// that cost more time than it saved is left alone until working alone has cost as much: in the worst case that doubles
// the loss, while a team that is late every time (then twice as long, up to 8 times) costs no more than a few per cent.
struct Trust {
    int64_t debt = 0;  // ns
    int64_t patience = 1;
};
thread_local Trust trust;

void join(Task task, const void* args, int64_t count, int32_t threads) {
    Region region{task, args, count};
    const int64_t start = nanoseconds(CLOCK_MONOTONIC);
    team().run(work_off, &region, static_cast<unsigned>(threads), 0);
    const int64_t loss = nanoseconds(CLOCK_MONOTONIC) - start - region.busy.load(std::memory_order_relaxed);
    trust.debt = loss * trust.patience;
    trust.patience = loss > 0 ? std::min<int64_t>(2 * trust.patience, 8) : 1;
}

void work_alone(Task task, const void* args, int64_t count) {
    for (int64_t i = 0; i < count; ++i) task(args, i);
}

}  // namespace

void parallel(Task task, const void* args, int64_t count, int64_t work, int32_t threads) {
    if (threads < 2 || count < 2 || work < kGrain || forked || team().run == nullptr) {
        work_alone(task, args, count);
    } else if (trust.debt > 0) {
        const int64_t start = nanoseconds(CLOCK_MONOTONIC);
        work_alone(task, args, count);
        trust.debt -= (nanoseconds(CLOCK_MONOTONIC) - start) * (threads - 1) / threads;
    } else {
        join(task, args, count, threads);  // the whole team: one of another size makes the runtime rebuild its pool
    }
}

}  // namespace s3t

const char* s3t_threads(void) {
    return s3t::team().path;
}
