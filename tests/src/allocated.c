/* Preloaded into a chatd under test: the file that ALLOCATED_FILE names says how many bytes are allocated, 100 times a second.
 * The memory that a process has in RAM says less: what was freed lies between what is in use, and the allocator keeps it; its own count
 * of what is in use has in it what it keeps for each thread. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <malloc.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

/* glibc's own, behind those that are counted. */
void *__libc_malloc(size_t);
void *__libc_calloc(size_t, size_t);
void *__libc_realloc(void *, size_t);
void *__libc_memalign(size_t, size_t);
void __libc_free(void *);

static atomic_long allocated;

static void *came(void *block) {
    atomic_fetch_add_explicit(&allocated, (long)malloc_usable_size(block), memory_order_relaxed);
    return block;
}

static void goes(void *block) {
    atomic_fetch_sub_explicit(&allocated, (long)malloc_usable_size(block), memory_order_relaxed);
}

void *malloc(size_t size) {
    return came(__libc_malloc(size));
}

void *calloc(size_t count, size_t size) {
    return came(__libc_calloc(count, size));
}

void *memalign(size_t alignment, size_t size) {
    return came(__libc_memalign(alignment, size));
}

void *aligned_alloc(size_t alignment, size_t size) {
    return memalign(alignment, size);
}

int posix_memalign(void **block, size_t alignment, size_t size) {
    void *made = memalign(alignment, size);
    if (!made)
        return ENOMEM;
    *block = made;
    return 0;
}

void *realloc(void *block, size_t size) {
    long before = (long)malloc_usable_size(block);
    void *moved = __libc_realloc(block, size);
    /* If it could not be had, the old one is still there. */
    if (moved || size == 0) {
        atomic_fetch_sub_explicit(&allocated, before, memory_order_relaxed);
        came(moved);
    }
    return moved;
}

void free(void *block) {
    goes(block);
    __libc_free(block);
}

static void *tell(void *path) {
    int file = open(path, O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
    for (;;) {
        char line[32];
        /* Always as long: there is never half of an earlier one behind it. */
        int length = snprintf(line, sizeof line, "%020ld\n", atomic_load(&allocated));
        if (file < 0 || pwrite(file, line, (size_t)length, 0) != length)
            abort();
        usleep(10000);
    }
    return NULL;
}

__attribute__((constructor)) static void begin(void) {
    static pthread_t thread;
    char *path = getenv("ALLOCATED_FILE");
    if (path && pthread_create(&thread, NULL, tell, path) != 0)
        abort();
}
