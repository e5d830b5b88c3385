// Preloaded into a test's process: of the calls that change a file, the n-th fails (or all from it on), or kills.
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

static int armed, made, fatal, error_, lasting, fired;

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

static int fails(void) {
    if (!armed || !(++made == fatal || (lasting && made > fatal))) return 0;
    if (!error_) kill(getpid(), SIGKILL);
    ++fired;
    errno = error_;
    return 1;
}

#define GUARD(type, name, parameters, arguments)                       \
    type name parameters {                                             \
        static type(*real) parameters;                                 \
        if (!real) real = (type(*) parameters)dlsym(RTLD_NEXT, #name); \
        return fails() ? (type) - 1 : real arguments;                  \
    }
#define GUARD_OPEN(name)                                                           \
    int name(const char* path, int flags, ...) {                                   \
        static int (*real)(const char*, int, ...);                                 \
        if (!real) real = (int (*)(const char*, int, ...))dlsym(RTLD_NEXT, #name); \
        va_list rest;                                                              \
        va_start(rest, flags);                                                     \
        int mode = flags & O_CREAT ? va_arg(rest, int) : 0;                        \
        va_end(rest);                                                              \
        return fails() ? -1 : real(path, flags, mode);                             \
    }

GUARD_OPEN(open)
GUARD_OPEN(open64)
GUARD(ssize_t, write, (int fd, const void* data, size_t size), (fd, data, size))
GUARD(ssize_t, pwrite, (int fd, const void* data, size_t size, off_t at), (fd, data, size, at))
GUARD(ssize_t, pwrite64, (int fd, const void* data, size_t size, off64_t at), (fd, data, size, at))
GUARD(int, fsync, (int fd), (fd))
GUARD(int, fdatasync, (int fd), (fd))
GUARD(int, msync, (void* at, size_t size, int flags), (at, size, flags))
GUARD(int, rename, (const char* from, const char* to), (from, to))
GUARD(int, ftruncate, (int fd, off_t size), (fd, size))
GUARD(int, ftruncate64, (int fd, off64_t size), (fd, size))
