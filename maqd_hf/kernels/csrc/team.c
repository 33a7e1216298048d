/* Threads of one run. They are those of the host's OpenMP pool, which torch uses too: a pool of our
 * own would fight with its spinning threads for the cores (notebook: "A thread pool of our own").
 * Inside a run threads wait for each other some two hundred times, for microseconds, so the barrier
 * is ours: it spins for a bound and sleeps after it, which keeps a busy machine usable. */
#define _GNU_SOURCE
#include "internal.h"

#ifdef _OPENMP
#include <omp.h>
#endif
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <time.h>

#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define SPINS 3000 /* pauses before a thread sleeps: some 50 microseconds */

/* A cache line each: a waiting thread reads `passed` while the others count themselves in. */
struct maqd_team {
    _Atomic int threads;
    _Alignas(64) _Atomic uint32_t arrived;
    _Alignas(64) _Atomic uint32_t passed;
    _Atomic uint32_t sleepers;
    _Atomic int64_t asleep; /* nanoseconds that all threads slept together */
};

static inline void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static int64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * INT64_C(1000000000) + t.tv_nsec;
}

static void await(maqd_team *team, uint32_t round) {
    for (int i = 0; i < SPINS; ++i) {
        if (atomic_load_explicit(&team->passed, memory_order_acquire) != round) return;
        relax();
    }
    const int64_t began = now();
    atomic_fetch_add(&team->sleepers, 1);
    while (atomic_load(&team->passed) == round) {
#ifdef __linux__
        syscall(SYS_futex, &team->passed, FUTEX_WAIT_PRIVATE, round, NULL, NULL, 0);
#else
        sched_yield();
#endif
    }
    atomic_fetch_sub(&team->sleepers, 1);
    atomic_fetch_add(&team->asleep, now() - began);
}

void maqd_barrier(maqd_team *team) {
    const int threads = atomic_load_explicit(&team->threads, memory_order_relaxed);
    if (threads < 2) return;
    const uint32_t round = atomic_load_explicit(&team->passed, memory_order_relaxed);
    if (atomic_fetch_add(&team->arrived, 1) != (uint32_t)threads - 1) {
        await(team, round);
        return;
    }
    atomic_store_explicit(&team->arrived, 0, memory_order_relaxed);
    atomic_store(&team->passed, round + 1);
#ifdef __linux__
    if (atomic_load(&team->sleepers))
        syscall(SYS_futex, &team->passed, FUTEX_WAKE_PRIVATE, threads, NULL, NULL, 0);
#endif
}

/* OpenMP's threads do not survive a fork, and the child waits for them for ever. */
static int forked;
static pthread_once_t once = PTHREAD_ONCE_INIT;
static void note_fork(void) { forked = 1; }
static void prepare(void) { pthread_atfork(NULL, NULL, note_fork); }

#ifdef _OPENMP
/* One for all runs: who else uses the machine is the same for them. A run that finds another one at
 * it goes on without. */
static maqd_crowd crowd;
static pthread_mutex_t crowded = PTHREAD_MUTEX_INITIALIZER;
#endif

void maqd_run(maqd_work work, void *argument, int64_t pieces, int threads) {
    pthread_once(&once, prepare);
    maqd_team team = {.threads = 1};
#ifdef _OPENMP
    /* one without a piece would wait, and look like one that the machine keeps waiting */
    const int asked = pieces < threads ? (int)pieces : threads;
    threads = asked;
    const int64_t began = asked > 1 ? now() : 0;
    if (asked > 1 && !pthread_mutex_trylock(&crowded)) {
        threads = maqd_crowd_threads(&crowd, asked, began);
        pthread_mutex_unlock(&crowded);
    }
    if (threads > 1 && !forked && !omp_in_parallel()) {
#pragma omp parallel num_threads(threads)
        {
            /* may be fewer than asked for; all write the same, so nobody waits for another's */
            const int got = omp_get_num_threads();
            atomic_store_explicit(&team.threads, got, memory_order_relaxed);
            work(argument, &team, omp_get_thread_num(), got);
            maqd_barrier(&team); /* OpenMP's own below would spin for long */
        }
        if (!pthread_mutex_trylock(&crowded)) {
            const int64_t ended = now();
            const int before = crowd.pause != 0;
            maqd_crowd_note(&crowd, asked, team.threads, team.asleep, ended - began, ended);
            if (before || crowd.pause) maqd_spin_less(crowd.pause != 0);
            pthread_mutex_unlock(&crowded);
        }
        return;
    }
#endif
    work(argument, &team, 0, 1);
}

typedef struct {
    maqd_pieces pieces;
    const void *argument;
    int64_t count;
} sharing;

static void share(void *argument, maqd_team *team, int thread, int threads) {
    (void)team;
    const sharing *s = argument;
    int64_t from, to;
    maqd_share(s->count, thread, threads, &from, &to);
    if (from < to) s->pieces(s->argument, from, to);
}

void maqd_run_pieces(maqd_pieces pieces, const void *argument, int64_t count, int threads) {
    sharing s = {pieces, argument, count};
    maqd_run(share, &s, count, threads);
}
