/* A pool of threads that wait by spinning for a bound and sleep after it: a decode step has some
 * two hundred phases of microseconds, too short to sleep through, and a machine may be busy. */
#define _GNU_SOURCE
#include "maqd.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>

#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define MOST 64     /* threads of a run */
#define SPINS 3000  /* pauses before a thread sleeps: some 50 microseconds */

static pthread_mutex_t busy = PTHREAD_MUTEX_INITIALIZER;
static pthread_once_t once = PTHREAD_ONCE_INIT;
static int workers; /* beside the callers */
static struct {
    maqd_work work;
    void *argument;
} job;
static _Atomic uint32_t order;    /* runs so far * 256 + threads of the current one */
static _Atomic uint32_t working;  /* workers that have not finished it */
static _Atomic uint32_t arrived, passed, sleepers;

static inline void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Returns once *word is not `old`. */
static void await(_Atomic uint32_t *word, uint32_t old) {
    for (int i = 0; i < SPINS; ++i) {
        if (atomic_load_explicit(word, memory_order_acquire) != old) return;
        relax();
    }
    atomic_fetch_add(&sleepers, 1);
    while (atomic_load_explicit(word, memory_order_acquire) == old) {
#ifdef __linux__
        syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, old, NULL, NULL, 0);
#else
        sched_yield();
#endif
    }
    atomic_fetch_sub(&sleepers, 1);
}

static void wake(_Atomic uint32_t *word) {
#ifdef __linux__
    if (atomic_load(&sleepers)) syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, MOST, NULL, NULL, 0);
#else
    (void)word;
#endif
}

void maqd_barrier(int threads) {
    if (threads < 2) return;
    const uint32_t round = atomic_load_explicit(&passed, memory_order_relaxed);
    if (atomic_fetch_add(&arrived, 1) == (uint32_t)threads - 1) {
        atomic_store_explicit(&arrived, 0, memory_order_relaxed);
        atomic_store(&passed, round + 1);
        wake(&passed);
    } else {
        await(&passed, round);
    }
}

static void *serve(void *argument) {
    const uint32_t self = (uint32_t)(uintptr_t)argument;
    uint32_t seen = 0;
    for (;;) {
        await(&order, seen);
        seen = atomic_load_explicit(&order, memory_order_acquire);
        /* the caller changes the job only after every thread of the run has finished */
        if (self >= seen % 256) continue;
        job.work(job.argument, (int)self, (int)(seen % 256));
        if (atomic_fetch_sub(&working, 1) == 1) wake(&working);
    }
    return NULL;
}

/* A forked child has none of the threads; the run it interrupted was another thread's. */
static void forget(void) {
    pthread_mutex_init(&busy, NULL);
    workers = 0;
    atomic_store(&order, 0);
    atomic_store(&working, 0);
    atomic_store(&arrived, 0);
    atomic_store(&sleepers, 0);
}

static void prepare(void) { pthread_atfork(NULL, NULL, forget); }

static int hire(int threads) {
    while (workers < threads - 1) {
        pthread_t thread;
        pthread_attr_t detached;
        pthread_attr_init(&detached);
        pthread_attr_setdetachstate(&detached, PTHREAD_CREATE_DETACHED);
        const int failed =
            pthread_create(&thread, &detached, serve, (void *)(uintptr_t)(workers + 1));
        pthread_attr_destroy(&detached);
        if (failed) break;
        ++workers;
    }
    return workers + 1 < threads ? workers + 1 : threads;
}

void maqd_run(maqd_work work, void *argument, int threads) {
    if (threads > MOST) threads = MOST;
    if (threads < 2 || pthread_mutex_trylock(&busy)) {
        work(argument, 0, 1);
        return;
    }
    pthread_once(&once, prepare);
    threads = hire(threads);
    job.work = work;
    job.argument = argument;
    atomic_store(&working, (uint32_t)threads - 1);
    const uint32_t runs = atomic_load(&order) / 256 + 1;
    atomic_store(&order, runs * 256 + (uint32_t)threads);
    wake(&order);
    work(argument, 0, threads);
    for (uint32_t left; (left = atomic_load_explicit(&working, memory_order_acquire));)
        await(&working, left);
    pthread_mutex_unlock(&busy);
}
