/* Calls of the C library on chosen files fail, or kill the process, or are logged: loaded by LD_PRELOAD, told by
   faults_set and faults_log.

   Rules are lines "FUNCTION PATH FIRST COUNT ACTION": of the calls of FUNCTION on files whose path contains PATH, the
   FIRST one (from 1) and the COUNT - 1 behind it are struck; COUNT 0 means all behind it. FUNCTION is one of those
   below, "*" for every call that changes something, or "any" for every call. ACTION is the errno that the call fails
   with, or kills the process: "before" the call, "after" it, or "torn": in a write, half of whose bytes are written
   (another call is not made). */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

struct rule {
  char function[16], path[512], action[16];
  long first, count, calls;
};
/* What becomes of a call. */
enum { MADE, FAILS, TORN, LAST };

static struct rule rules[32];
static int n_rules;
static long hits;
static char logged[512];
static int log_file = -1;
/* Held while a call that changes something is made, so that counts and log have the order of the effects. */
static pthread_mutex_t mutex = PTHREAD_RECURSIVE_MUTEX_INITIALIZER_NP;

/* Replaces all rules. Returns how many there are, -1 for a line that is none. */
int faults_set(const char *text) {
  pthread_mutex_lock(&mutex);
  n_rules = 0;
  hits = 0;
  int good = 1;
  for (const char *line = text; *line && good && n_rules < 32; line = strchrnul(line, '\n'), line += *line == '\n') {
    struct rule *r = &rules[n_rules++];
    r->calls = 0;
    good = sscanf(line, "%15s %511s %ld %ld %15s", r->function, r->path, &r->first, &r->count, r->action) == 5;
  }
  int result = good ? n_rules : -1;
  pthread_mutex_unlock(&mutex);
  return result;
}

/* How many calls were struck. */
long faults_hits(void) { return hits; }

/* Logs every successful call that changes a file whose path contains `path`, to the open file `file`; -1 ends it. A
   line "FUNCTION RESULT NUMBER PATH OTHER", separated by tabs, and behind that of a write the bytes. NUMBER: flags of
   create, offset of write, length of truncate and allocate. PATH of rename is the new name, OTHER the old one. */
void faults_log(const char *path, int file) {
  snprintf(logged, sizeof logged, "%s", path);
  log_file = file;
}

static void die(void) {
  syscall(SYS_kill, syscall(SYS_getpid), SIGKILL);
  for (;;) pause();
}

/* Decides on a call. One that changes something holds the mutex until `end`, unless it FAILS. */
static int begin(const char *function, int changes, const char *path) {
  if (!n_rules && log_file < 0) return MADE;
  int verdict = MADE, error = 0;
  pthread_mutex_lock(&mutex);
  for (int i = 0; i < n_rules; i++) {
    struct rule *r = &rules[i];
    int any = strcmp(r->function, "any") == 0 || (changes && strcmp(r->function, "*") == 0);
    if ((!any && strcmp(r->function, function) != 0) || !strstr(path, r->path)) continue;
    r->calls++;
    if (r->calls < r->first || (r->count != 0 && r->calls >= r->first + r->count)) continue;
    hits++;
    if (strcmp(r->action, "before") == 0) die();
    verdict = strcmp(r->action, "after") == 0 ? LAST : strcmp(r->action, "torn") == 0 ? TORN : FAILS;
    if (verdict == TORN && strcmp(function, "write") != 0) die();
    error = atoi(r->action);
  }
  if (!changes || verdict == FAILS) pthread_mutex_unlock(&mutex);
  if (verdict == FAILS) errno = error;
  return verdict;
}

/* Ends a call that changed something: logs it, or kills the process. */
static void end(int verdict, const char *function, long result, long number, const char *path, const char *other,
                const void *data) {
  if (!n_rules && log_file < 0) return;
  int before = errno;
  if (log_file >= 0 && result >= 0 && strstr(path, logged)) {
    char line[2 * PATH_MAX + 100];
    int n = snprintf(line, sizeof line, "%s\t%ld\t%ld\t%s\t%s\n", function, result, number, path, other);
    syscall(SYS_write, log_file, line, n);
    if (data) syscall(SYS_write, log_file, data, result);
  }
  if (verdict == LAST) die();
  pthread_mutex_unlock(&mutex);
  errno = before;
}

/* The path of an open file; empty where it has none. */
static const char *path_of(int descriptor, char path[PATH_MAX]) {
  path[0] = 0;
  if (!n_rules && log_file < 0) return path;
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
  ssize_t length = syscall(SYS_readlinkat, AT_FDCWD, link, path, PATH_MAX - 1);
  path[length > 0 ? length : 0] = 0;
  return path;
}

/* The path of `name` in an open folder. */
static const char *path_in(int folder, const char *name, char path[PATH_MAX]) {
  if (folder == AT_FDCWD || name[0] == '/') return name;
  size_t length = strlen(path_of(folder, path));
  snprintf(path + length, PATH_MAX - length, "/%s", name);
  return path;
}

static int reads(const char *function, int descriptor) {
  char path[PATH_MAX];
  return begin(function, 0, path_of(descriptor, path)) == MADE;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
/* A call that changes the file `path`, from its name, its result, and what the log has of it. */
#define CHANGE(name, path, call, number, other, data) \
  int verdict = begin(name, 1, path);                 \
  if (verdict == FAILS) return -1;                    \
  long result = call;                                 \
  end(verdict, name, result, number, path, other, data); \
  return result

/* open: "open" to read, "create" to write. */
static int do_open(int folder, const char *name, int flags, mode_t mode) {
  char buffer[PATH_MAX];
  const char *path = path_in(folder, name, buffer);
  if ((flags & O_ACCMODE) == O_RDONLY && !(flags & O_CREAT))
    return begin("open", 0, path) == MADE ? syscall(SYS_openat, folder, name, flags, mode) : -1;
  CHANGE("create", path, syscall(SYS_openat, folder, name, flags, mode), flags, "", 0);
}
static mode_t mode_of(int flags, va_list rest) { return flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; }
#define OPEN(folder)                 \
  va_list rest;                      \
  va_start(rest, flags);             \
  mode_t mode = mode_of(flags, rest); \
  va_end(rest);                      \
  return do_open(folder, path, flags, mode)
int open(const char *path, int flags, ...) { OPEN(AT_FDCWD); }
int open64(const char *path, int flags, ...) { OPEN(AT_FDCWD); }
int openat(int folder, const char *path, int flags, ...) { OPEN(folder); }
int openat64(int folder, const char *path, int flags, ...) { OPEN(folder); }

ssize_t read(int fd, void *data, size_t n) { return reads("read", fd) ? syscall(SYS_read, fd, data, n) : -1; }
ssize_t pread(int fd, void *data, size_t n, off_t at) {
  return reads("read", fd) ? syscall(SYS_pread64, fd, data, n, at) : -1;
}
ssize_t pread64(int fd, void *data, size_t n, off64_t at) { return pread(fd, data, n, at); }
ssize_t preadv(int fd, const struct iovec *parts, int n, off_t at) {
  return reads("read", fd) ? REAL(preadv)(fd, parts, n, at) : -1;
}
ssize_t preadv64(int fd, const struct iovec *parts, int n, off64_t at) { return preadv(fd, parts, n, at); }
ssize_t preadv2(int fd, const struct iovec *parts, int n, off_t at, int flags) {
  return reads("read", fd) ? REAL(preadv2)(fd, parts, n, at, flags) : -1;
}
ssize_t preadv64v2(int fd, const struct iovec *parts, int n, off64_t at, int flags) {
  return preadv2(fd, parts, n, at, flags);
}

static ssize_t do_write(int fd, const void *data, size_t n, off_t at, int placed) {
  char path[PATH_MAX];
  int verdict = begin("write", 1, path_of(fd, path));
  if (verdict == FAILS) return -1;
  if (verdict == TORN) n /= 2;
  if (!placed) at = syscall(SYS_lseek, fd, 0, SEEK_CUR);
  ssize_t result = placed ? syscall(SYS_pwrite64, fd, data, n, at) : syscall(SYS_write, fd, data, n);
  end(verdict == TORN ? LAST : verdict, "write", result, at, path, "", data);
  return result;
}
ssize_t write(int fd, const void *data, size_t n) { return do_write(fd, data, n, 0, 0); }
ssize_t pwrite(int fd, const void *data, size_t n, off_t at) { return do_write(fd, data, n, at, 1); }
ssize_t pwrite64(int fd, const void *data, size_t n, off64_t at) { return do_write(fd, data, n, at, 1); }

static int do_sync(int fd, long call) {
  char path[PATH_MAX];
  struct stat status;
  int is_folder = REAL(fstat)(fd, &status) == 0 && S_ISDIR(status.st_mode);
  path_of(fd, path);
  CHANGE(is_folder ? "fsync_folder" : "fsync", path, syscall(call, fd), 0, "", 0);
}
int fsync(int fd) { return do_sync(fd, SYS_fsync); }
int fdatasync(int fd) { return do_sync(fd, SYS_fdatasync); }

int ftruncate(int fd, off_t n) {
  char path[PATH_MAX];
  path_of(fd, path);
  CHANGE("truncate", path, syscall(SYS_ftruncate, fd, n), n, "", 0);
}
int ftruncate64(int fd, off64_t n) { return ftruncate(fd, n); }
static int do_allocate(int fd, off_t at, off_t n) {
  char path[PATH_MAX];
  path_of(fd, path);
  CHANGE("allocate", path, syscall(SYS_fallocate, fd, 0, at, n), at + n, "", 0);
}
/* Returns the error and leaves errno. */
int posix_fallocate(int fd, off_t at, off_t n) {
  int before = errno, error = do_allocate(fd, at, n) ? errno : 0;
  errno = before;
  return error;
}
int posix_fallocate64(int fd, off64_t at, off64_t n) { return posix_fallocate(fd, at, n); }

int flock(int fd, int operation) { return reads("lock", fd) ? syscall(SYS_flock, fd, operation) : -1; }
off_t lseek(int fd, off_t at, int whence) { return reads("seek", fd) ? syscall(SYS_lseek, fd, at, whence) : -1; }
off64_t lseek64(int fd, off64_t at, int whence) { return lseek(fd, at, whence); }

/* "direct": asking for O_DIRECT on an open file. */
int fcntl(int fd, int command, ...) {
  va_list rest;
  va_start(rest, command);
  long argument = va_arg(rest, long);
  va_end(rest);
  if (command == F_SETFL && (argument & O_DIRECT) && !reads("direct", fd)) return -1;
  return syscall(SYS_fcntl, fd, command, argument);
}
int fcntl64(int fd, int command, ...) {
  va_list rest;
  va_start(rest, command);
  long argument = va_arg(rest, long);
  va_end(rest);
  return fcntl(fd, command, argument);
}

static int looks(const char *path) { return begin("stat", 0, path) == MADE; }
int stat(const char *restrict path, struct stat *restrict result) {
  return looks(path) ? REAL(stat)(path, result) : -1;
}
int stat64(const char *restrict path, struct stat64 *restrict result) {
  return looks(path) ? REAL(stat64)(path, result) : -1;
}
int lstat(const char *restrict path, struct stat *restrict result) {
  return looks(path) ? REAL(lstat)(path, result) : -1;
}
int lstat64(const char *restrict path, struct stat64 *restrict result) {
  return looks(path) ? REAL(lstat64)(path, result) : -1;
}

/* Rules of rename speak of the new name. */
int rename(const char *from, const char *to) {
  CHANGE("rename", to, syscall(SYS_renameat2, AT_FDCWD, from, AT_FDCWD, to, 0), 0, from, 0);
}
int unlinkat(int folder, const char *name, int flags) {
  char buffer[PATH_MAX];
  const char *path = path_in(folder, name, buffer);
  const char *function = flags & AT_REMOVEDIR ? "rmdir" : "unlink";
  CHANGE(function, path, syscall(SYS_unlinkat, folder, name, flags), 0, "", 0);
}
int unlink(const char *path) { return unlinkat(AT_FDCWD, path, 0); }
int rmdir(const char *path) { return unlinkat(AT_FDCWD, path, AT_REMOVEDIR); }
int mkdir(const char *path, mode_t mode) {
  CHANGE("mkdir", path, syscall(SYS_mkdirat, AT_FDCWD, path, mode), 0, "", 0);
}
