// Preloaded into a test's process: of the calls that change a file, the n-th fails (or all from it on), or kills.
// What was called, on which file, can be read afterwards.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/types.h>
#include <unistd.h>

enum { CALLS = 4096, LINE = 256 };
static int armed, made, fatal, error_, lasting, fired;
static char calls[CALLS][LINE];

void faults_arm(int nth, int error, int last) {
    armed = 1, made = 0, fired = 0, fatal = nth, error_ = error, lasting = last;
}
int faults_disarm(void) {
    armed = 0;
    return fired;
}
int faults_made(void) {
    return made;
}
const char* faults_call(int nth) {  // "name path", nth from 1
    return nth <= CALLS ? calls[nth - 1] : "";
}

static int fails(const char* name, int fd, const char* path) {
    if (!armed) return 0;
    if (made < CALLS) {
        char link[32], target[LINE / 2] = "";
        if (fd >= 0) {
            snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
            if (readlink(link, target, sizeof target - 1) >= 0) path = target;
        }
        snprintf(calls[made], LINE, "%s %.200s", name, path ? path : "");
    }
    if (!(++made == fatal || (lasting && made > fatal))) return 0;
    if (!error_) kill(getpid(), SIGKILL);
    ++fired;
    errno = error_;
    return 1;
}

#define GUARD(type, name, fd, path, parameters, arguments)             \
    type name parameters {                                             \
        static type(*real) parameters;                                 \
        if (!real) real = (type(*) parameters)dlsym(RTLD_NEXT, #name); \
        return fails(#name, fd, path) ? (type) - 1 : real arguments;   \
    }
#define GUARD_OPEN(name)                                                           \
    int name(const char* path, int flags, ...) {                                   \
        static int (*real)(const char*, int, ...);                                 \
        if (!real) real = (int (*)(const char*, int, ...))dlsym(RTLD_NEXT, #name); \
        va_list rest;                                                              \
        va_start(rest, flags);                                                     \
        int mode = flags & O_CREAT ? va_arg(rest, int) : 0;                        \
        va_end(rest);                                                              \
        return fails(#name, -1, path) ? -1 : real(path, flags, mode);              \
    }
// Memory that is no file's is not the disk's.
#define GUARD_MAP(name, offset)                                                                       \
    void* name(void* at, size_t size, int access, int flags, int fd, offset from) {                   \
        static void* (*real)(void*, size_t, int, int, int, offset);                                   \
        if (!real) real = (void* (*)(void*, size_t, int, int, int, offset))dlsym(RTLD_NEXT, #name);   \
        return fd >= 0 && fails(#name, fd, 0) ? MAP_FAILED : real(at, size, access, flags, fd, from); \
    }

GUARD_OPEN(open)
GUARD_OPEN(open64)
GUARD(ssize_t, write, fd, 0, (int fd, const void* data, size_t size), (fd, data, size))
GUARD(ssize_t, pwrite, fd, 0, (int fd, const void* data, size_t size, off_t at), (fd, data, size, at))
GUARD(ssize_t, pwrite64, fd, 0, (int fd, const void* data, size_t size, off64_t at), (fd, data, size, at))
GUARD(int, fsync, fd, 0, (int fd), (fd))
GUARD(int, fdatasync, fd, 0, (int fd), (fd))
GUARD(int, msync, -1, 0, (void* at, size_t size, int flags), (at, size, flags))
GUARD(int, rename, -1, to, (const char* from, const char* to), (from, to))
GUARD(int, link, -1, to, (const char* from, const char* to), (from, to))
GUARD(int, unlink, -1, path, (const char* path), (path))
GUARD(int, mkdir, -1, path, (const char* path, mode_t mode), (path, mode))
GUARD(int, ftruncate, fd, 0, (int fd, off_t size), (fd, size))
GUARD(int, ftruncate64, fd, 0, (int fd, off64_t size), (fd, size))
GUARD_MAP(mmap, off_t)
GUARD_MAP(mmap64, off64_t)
