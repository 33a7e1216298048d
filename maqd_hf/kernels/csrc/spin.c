/* The host's OpenMP threads while others use the machine too.
 *
 * After a parallel region they spin for milliseconds, in case the next one is near. Beside a busy
 * process that uses up their share of the core, and the next region, of torch as of ours, waits for
 * a thread that was put aside. libgomp lets them sleep at once where it has more threads than the
 * machine has cores. So it gets more: a thread here keeps as many as there are cores asleep until
 * the machine is quiet again or nobody has said for a while that it is not: a token takes 6 to 9 ms
 * so, and 10 to 15 without (notebook: "OpenMP's threads sleep beside busy processes"). */
#define _GNU_SOURCE
#include "internal.h"

#if defined(_OPENMP) && defined(__GNUC__) && !defined(__clang__)
#include <omp.h>
#include <pthread.h>
#include <time.h>

#define SECONDS 2 /* crowd.c says so once a second at least, while there are runs */

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t change = PTHREAD_COND_INITIALIZER;
static struct timespec until;
static int running;

static int passed(struct timespec t) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now); /* the clock of pthread_cond_timedwait */
    return now.tv_sec > t.tv_sec || (now.tv_sec == t.tv_sec && now.tv_nsec >= t.tv_nsec);
}

static void *hold_threads(void *unused) {
#pragma omp parallel num_threads(omp_get_num_procs())
    {
#pragma omp barrier
    }
    pthread_mutex_lock(&lock);
    while (!passed(until)) pthread_cond_timedwait(&change, &lock, &until);
    running = 0;
    pthread_mutex_unlock(&lock);
    return unused; /* its OpenMP threads end with it */
}

/* Says whether the machine is crowded; `maqd_spin_less(1)` holds for two seconds. */
void maqd_spin_less(int crowded) {
    pthread_mutex_lock(&lock);
    clock_gettime(CLOCK_REALTIME, &until);
    if (crowded) until.tv_sec += SECONDS;
    if (!crowded) pthread_cond_signal(&change);
    pthread_t thread;
    if (crowded && !running && !pthread_create(&thread, NULL, hold_threads, NULL)) {
        running = 1;
        pthread_detach(thread);
    }
    pthread_mutex_unlock(&lock);
}
#else
void maqd_spin_less(int crowded) { (void)crowded; }
#endif
