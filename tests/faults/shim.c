/* Calls of the C library on chosen files fail with a chosen errno: loaded by LD_PRELOAD, told by faults_set.

   Rules are lines "FUNCTION PATH FIRST COUNT ERRNO": of the calls of FUNCTION on files whose path contains PATH, the
   FIRST one (from 1) and the COUNT - 1 behind it fail; COUNT 0 means all behind it. FUNCTION is one of those below, or
   "*" for every call that changes something. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

struct rule {
  char function[16];
  char path[512];
  long first, count, calls;
  int error;
};

static struct rule rules[32];
static int n_rules;
static long hits;
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;

/* Replaces all rules. Returns how many there are, -1 for a line that is none. */
int faults_set(const char *text) {
  pthread_mutex_lock(&mutex);
  n_rules = 0;
  hits = 0;
  int good = 1;
  for (const char *line = text; *line && good && n_rules < 32; line = strchrnul(line, '\n'), line += *line == '\n') {
    struct rule *r = &rules[n_rules++];
    r->calls = 0;
    good = sscanf(line, "%15s %511s %ld %ld %d", r->function, r->path, &r->first, &r->count, &r->error) == 5;
  }
  int result = good ? n_rules : -1;
  pthread_mutex_unlock(&mutex);
  return result;
}

/* How many calls failed. */
long faults_hits(void) { return hits; }

static int fails(const char *function, int changes, const char *path) {
  int error = 0;
  pthread_mutex_lock(&mutex);
  for (int i = 0; i < n_rules; i++) {
    struct rule *r = &rules[i];
    int applies = strcmp(r->function, function) == 0 || (changes && strcmp(r->function, "*") == 0);
    if (!applies || !strstr(path, r->path)) continue;
    r->calls++;
    if (r->calls >= r->first && (r->count == 0 || r->calls < r->first + r->count)) error = r->error;
  }
  hits += error != 0;
  pthread_mutex_unlock(&mutex);
  if (error) errno = error;
  return error;
}

static int fails_open(const char *function, int changes, int descriptor) {
  if (!n_rules) return 0;
  char link[64], path[PATH_MAX];
  snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
  ssize_t length = syscall(SYS_readlinkat, AT_FDCWD, link, path, sizeof path - 1);
  if (length < 0) return 0;
  path[length] = 0;
  return fails(function, changes, path);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

/* open: "open" to read, "create" to write. */
static int do_open(int folder, const char *path, int flags, mode_t mode) {
  int writes = (flags & O_ACCMODE) != O_RDONLY || (flags & O_CREAT);
  if (fails(writes ? "create" : "open", writes, path)) return -1;
  return syscall(SYS_openat, folder, path, flags, mode);
}
static mode_t mode_of(int flags, va_list rest) { return flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; }
#define OPEN(folder)                                                            \
  va_list rest;                                                             \
  va_start(rest, flags);                                                    \
  mode_t mode = mode_of(flags, rest);                                       \
  va_end(rest);                                                             \
  return do_open(folder, path, flags, mode)
int open(const char *path, int flags, ...) { OPEN(AT_FDCWD); }
int open64(const char *path, int flags, ...) { OPEN(AT_FDCWD); }
int openat(int folder, const char *path, int flags, ...) { OPEN(folder); }
int openat64(int folder, const char *path, int flags, ...) { OPEN(folder); }

ssize_t read(int fd, void *data, size_t n) {
  return fails_open("read", 0, fd) ? -1 : syscall(SYS_read, fd, data, n);
}
ssize_t pread(int fd, void *data, size_t n, off_t at) {
  return fails_open("read", 0, fd) ? -1 : syscall(SYS_pread64, fd, data, n, at);
}
ssize_t pread64(int fd, void *data, size_t n, off64_t at) { return pread(fd, data, n, at); }
ssize_t preadv(int fd, const struct iovec *parts, int n, off_t at) {
  return fails_open("read", 0, fd) ? -1 : REAL(preadv)(fd, parts, n, at);
}
ssize_t preadv64(int fd, const struct iovec *parts, int n, off64_t at) { return preadv(fd, parts, n, at); }
ssize_t preadv2(int fd, const struct iovec *parts, int n, off_t at, int flags) {
  return fails_open("read", 0, fd) ? -1 : REAL(preadv2)(fd, parts, n, at, flags);
}
ssize_t preadv64v2(int fd, const struct iovec *parts, int n, off64_t at, int flags) {
  return preadv2(fd, parts, n, at, flags);
}
ssize_t write(int fd, const void *data, size_t n) {
  return fails_open("write", 1, fd) ? -1 : syscall(SYS_write, fd, data, n);
}
ssize_t pwrite(int fd, const void *data, size_t n, off_t at) {
  return fails_open("write", 1, fd) ? -1 : syscall(SYS_pwrite64, fd, data, n, at);
}
ssize_t pwrite64(int fd, const void *data, size_t n, off64_t at) { return pwrite(fd, data, n, at); }

static int is_folder(int fd) {
  struct stat status;
  return REAL(fstat)(fd, &status) == 0 && S_ISDIR(status.st_mode);
}
int fsync(int fd) {
  return fails_open(is_folder(fd) ? "fsync_folder" : "fsync", 1, fd) ? -1 : syscall(SYS_fsync, fd);
}
int fdatasync(int fd) { return fails_open("fsync", 1, fd) ? -1 : syscall(SYS_fdatasync, fd); }
int ftruncate(int fd, off_t n) { return fails_open("truncate", 1, fd) ? -1 : syscall(SYS_ftruncate, fd, n); }
int ftruncate64(int fd, off64_t n) { return ftruncate(fd, n); }
int posix_fallocate(int fd, off_t at, off_t n) {
  int before = errno, error = fails_open("allocate", 1, fd);
  errno = before;
  return error ? error : REAL(posix_fallocate)(fd, at, n);
}
int posix_fallocate64(int fd, off64_t at, off64_t n) { return posix_fallocate(fd, at, n); }
int flock(int fd, int operation) { return fails_open("lock", 0, fd) ? -1 : syscall(SYS_flock, fd, operation); }
off_t lseek(int fd, off_t at, int whence) {
  return fails_open("seek", 0, fd) ? -1 : syscall(SYS_lseek, fd, at, whence);
}
off64_t lseek64(int fd, off64_t at, int whence) { return lseek(fd, at, whence); }

/* "direct": asking for O_DIRECT on an open file. */
int fcntl(int fd, int command, ...) {
  va_list rest;
  va_start(rest, command);
  long argument = va_arg(rest, long);
  va_end(rest);
  if (command == F_SETFL && (argument & O_DIRECT) && fails_open("direct", 0, fd)) return -1;
  return syscall(SYS_fcntl, fd, command, argument);
}
int fcntl64(int fd, int command, ...) {
  va_list rest;
  va_start(rest, command);
  long argument = va_arg(rest, long);
  va_end(rest);
  return fcntl(fd, command, argument);
}

int stat(const char *restrict path, struct stat *restrict result) {
  return fails("stat", 0, path) ? -1 : REAL(stat)(path, result);
}
int stat64(const char *restrict path, struct stat64 *restrict result) {
  return fails("stat", 0, path) ? -1 : REAL(stat64)(path, result);
}
int lstat(const char *restrict path, struct stat *restrict result) {
  return fails("stat", 0, path) ? -1 : REAL(lstat)(path, result);
}
int lstat64(const char *restrict path, struct stat64 *restrict result) {
  return fails("stat", 0, path) ? -1 : REAL(lstat64)(path, result);
}

int rename(const char *from, const char *to) {
  return fails("rename", 1, to) ? -1 : syscall(SYS_renameat2, AT_FDCWD, from, AT_FDCWD, to, 0);
}
int unlink(const char *path) { return fails("unlink", 1, path) ? -1 : syscall(SYS_unlinkat, AT_FDCWD, path, 0); }
int mkdir(const char *path, mode_t mode) {
  return fails("mkdir", 1, path) ? -1 : syscall(SYS_mkdirat, AT_FDCWD, path, mode);
}
