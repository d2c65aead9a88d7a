/* The operating system of the simulation: clocks, random numbers and the disk, between a program and its C library.

   Loaded by LD_PRELOAD, so that all of the process meets it: Python's own file calls, SQLite's, and the clocks of both.
   Nothing changes until `machine_begin`. Then time stands still unless `machine_clock` sets it, random numbers come from
   a seed, and each operation on a file below the root is told to a hook before it is done. The hook returns 0 to have
   it done, the number of an error to have it fail, or -n to have only n bytes written. */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

enum { OPEN, CREATED, WRITE, TRUNCATE, SYNC, SYNC_DIRECTORY, RENAME, LINK, UNLINK, MKDIR, SLEEP };

typedef int (*hook_t)(int operation, const char *path, const char *other, uint64_t inode, int64_t offset,
                      const void *data, int64_t size);

static hook_t hook;
static char root[PATH_MAX];
static size_t root_length;
static int64_t monotonic, wall;
static uint64_t state;
static __thread int inside; /* what a hook does itself is told to nobody */

#define FILES 4096
static char *opened[FILES]; /* descriptor to path, of the files below the root */

void machine_begin(const char *path, hook_t told, uint64_t seed) {
    root_length = strlen(strcpy(root, path));
    state = seed;
    hook = told;
}
void machine_clock(int64_t monotonic_ns, int64_t wall_ns) { monotonic = monotonic_ns, wall = wall_ns; }
void machine_quiet(int change) { inside += change; }

#define REAL(name) static __typeof__(&name) real; if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)
static int on(void) { return hook && !inside; }
static int ours(const char *path) { return on() && path && !strncmp(path, root, root_length); }
static const char *path_of(int fd) { return on() && fd >= 0 && fd < FILES ? opened[fd] : NULL; }

static int told(int operation, const char *path, const char *other, uint64_t inode, int64_t offset, const void *data,
                int64_t size) {
    inside++;
    int answer = hook(operation, path, other, inode, offset, data, size);
    inside--;
    if (answer > 0) errno = answer;
    return answer;
}
static uint64_t inode_of(int fd) {
    struct stat status;
    return fstat(fd, &status) ? 0 : status.st_ino;
}
static uint64_t inode_at(const char *path) {
    struct stat status;
    return lstat(path, &status) ? 0 : status.st_ino;
}

/* Clocks and random numbers. */
int clock_gettime(clockid_t clock, struct timespec *now) {
    int64_t value;
    if (!hook || clock == CLOCK_PROCESS_CPUTIME_ID || clock == CLOCK_THREAD_CPUTIME_ID)
        return (int)syscall(SYS_clock_gettime, clock, now);
    value = clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE ? wall : monotonic;
    now->tv_sec = value / 1000000000, now->tv_nsec = value % 1000000000;
    return 0;
}
time_t time(time_t *now) {
    struct timespec value;
    clock_gettime(CLOCK_REALTIME, &value);
    if (now) *now = value.tv_sec;
    return value.tv_sec;
}
int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    struct timespec value;
    (void)zone;
    clock_gettime(CLOCK_REALTIME, &value);
    now->tv_sec = value.tv_sec, now->tv_usec = value.tv_nsec / 1000;
    return 0;
}
static int slept(int64_t nanoseconds) {
    return told(SLEEP, NULL, NULL, 0, 0, NULL, nanoseconds), 0;
}
int nanosleep(const struct timespec *span, struct timespec *left) {
    REAL(nanosleep);
    return on() ? slept(span->tv_sec * 1000000000 + span->tv_nsec) : real(span, left);
}
int clock_nanosleep(clockid_t clock, int flags, const struct timespec *span, struct timespec *left) {
    REAL(clock_nanosleep);
    if (!on()) return real(clock, flags, span, left);
    int64_t end = span->tv_sec * 1000000000 + span->tv_nsec;
    return slept(flags & TIMER_ABSTIME ? end - (clock == CLOCK_REALTIME ? wall : monotonic) : end);
}
int usleep(useconds_t microseconds) {
    REAL(usleep);
    return on() ? slept((int64_t)microseconds * 1000) : real(microseconds);
}
ssize_t getrandom(void *buffer, size_t length, unsigned flags) {
    if (!hook) return syscall(SYS_getrandom, buffer, length, flags);
    for (size_t i = 0; i < length; i++) { /* splitmix64 */
        uint64_t z = (state += 0x9e3779b97f4a7c15u);
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
        ((unsigned char *)buffer)[i] = (unsigned char)(z ^ (z >> 31));
    }
    return (ssize_t)length;
}

/* Files. */
static int opening(int (*real)(int, const char *, int, ...), int directory, const char *path, int flags, mode_t mode) {
    if (!ours(path)) return real(directory, path, flags, mode);
    if (told(OPEN, path, NULL, 0, 0, NULL, flags)) return -1;
    int new = (flags & O_CREAT) && !inode_at(path);
    int fd = real(directory, path, flags, mode);
    if (fd >= 0 && fd < FILES) {
        free(opened[fd]);
        opened[fd] = strdup(path);
        if (new) told(CREATED, path, NULL, inode_of(fd), 0, NULL, 0);
        if (!new && (flags & O_TRUNC)) told(TRUNCATE, path, NULL, inode_of(fd), 0, NULL, 0);
    }
    return fd;
}
#define MODE mode_t mode = 0; if (flags & (O_CREAT | O_TMPFILE)) { va_list more; va_start(more, flags); mode = va_arg(more, mode_t); va_end(more); }
int open(const char *path, int flags, ...) { MODE REAL(openat); return opening(real, AT_FDCWD, path, flags, mode); }
int open64(const char *path, int flags, ...) { MODE REAL(openat); return opening(real, AT_FDCWD, path, flags, mode); }
int openat(int directory, const char *path, int flags, ...) { MODE REAL(openat); return opening(real, directory, path, flags, mode); }
int openat64(int directory, const char *path, int flags, ...) { MODE REAL(openat); return opening(real, directory, path, flags, mode); }
DIR *opendir(const char *path) {
    REAL(opendir);
    return ours(path) && told(OPEN, path, NULL, 0, 0, NULL, O_DIRECTORY) ? NULL : real(path);
}
int close(int fd) {
    REAL(close);
    if (fd >= 0 && fd < FILES && opened[fd]) free(opened[fd]), opened[fd] = NULL;
    return real(fd);
}
static ssize_t writing(int fd, const void *data, size_t size, off_t offset, int seek) {
    const char *path = path_of(fd);
    ssize_t done;
    int answer;
    if (path) {
        answer = told(WRITE, path, NULL, inode_of(fd), seek ? lseek(fd, 0, SEEK_CUR) : offset, data, (int64_t)size);
        if (answer > 0) return -1;
        if (answer < 0) size = (size_t)-answer;
    }
    done = seek ? syscall(SYS_write, fd, data, size) : syscall(SYS_pwrite64, fd, data, size, offset);
    return done;
}
ssize_t write(int fd, const void *data, size_t size) { return writing(fd, data, size, 0, 1); }
ssize_t pwrite(int fd, const void *data, size_t size, off_t offset) { return writing(fd, data, size, offset, 0); }
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t offset) { return writing(fd, data, size, offset, 0); }
static int cutting(int fd, off_t size) {
    const char *path = path_of(fd);
    if (path && told(TRUNCATE, path, NULL, inode_of(fd), 0, NULL, size)) return -1;
    return (int)syscall(SYS_ftruncate, fd, size);
}
int ftruncate(int fd, off_t size) { return cutting(fd, size); }
int ftruncate64(int fd, off64_t size) { return cutting(fd, size); }
static int syncing(int fd) {
    const char *path = path_of(fd);
    struct stat status;
    if (!path || fstat(fd, &status)) return 0; /* nothing of this process outlives it but what is simulated */
    return told(S_ISDIR(status.st_mode) ? SYNC_DIRECTORY : SYNC, path, NULL, status.st_ino, 0, NULL, 0) ? -1 : 0;
}
int fsync(int fd) { return syncing(fd); }
int fdatasync(int fd) { return syncing(fd); }
static int renaming(const char *path, const char *other) {
    return ours(path) && told(RENAME, path, other, inode_at(path), 0, NULL, 0);
}
int rename(const char *path, const char *other) { REAL(rename); return renaming(path, other) ? -1 : real(path, other); }
int renameat(int from, const char *path, int to, const char *other) {
    REAL(renameat);
    return renaming(path, other) ? -1 : real(from, path, to, other);
}
static int linking(const char *path, const char *other) {
    return ours(other) && told(LINK, path, other, inode_at(path), 0, NULL, 0);
}
int link(const char *path, const char *other) { REAL(link); return linking(path, other) ? -1 : real(path, other); }
int linkat(int from, const char *path, int to, const char *other, int flags) {
    REAL(linkat);
    return linking(path, other) ? -1 : real(from, path, to, other, flags);
}
static int removing(const char *path) {
    uint64_t inode = ours(path) ? inode_at(path) : 0;
    return inode && told(UNLINK, path, NULL, inode, 0, NULL, 0);
}
int unlink(const char *path) { REAL(unlink); return removing(path) ? -1 : real(path); }
int rmdir(const char *path) { REAL(rmdir); return removing(path) ? -1 : real(path); }
int unlinkat(int directory, const char *path, int flags) {
    REAL(unlinkat);
    return removing(path) ? -1 : real(directory, path, flags);
}
int mkdir(const char *path, mode_t mode) {
    REAL(mkdir);
    return ours(path) && !inode_at(path) && told(MKDIR, path, NULL, 0, 0, NULL, 0) ? -1 : real(path, mode);
}
