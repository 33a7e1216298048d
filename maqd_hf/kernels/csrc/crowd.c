/* How many threads to use on a machine that others use too.
 *
 * The threads of a run wait for each other hundreds of times a token, and one that the scheduler
 * has put aside for a busy process keeps all others waiting: a token took 16 to 28 ms on two
 * threads and 7 on one (notebook: "Runs beside busy processes").
 *
 * So runs are judged in windows. If the average waiting thread slept more than half of a window,
 * half as many threads take over; after a pause, which doubles as long as that fails, twice as many
 * are tried again. Results do not depend on the number of threads. */
#include "internal.h"

#define MILLISECOND 1000000
#define WINDOW (10 * MILLISECOND)
#define SHORTEST (50 * MILLISECOND)  /* the shortest pause */
#define LONGEST (1000 * MILLISECOND) /* the longest: it costs one slow window a second */

/* Threads for a run of which `asked` are wanted. */
int32_t maqd_crowd_threads(maqd_crowd *crowd, int32_t asked, int64_t now) {
    if (!crowd->limit || asked < 2) return asked;
    if (now >= crowd->until) {
        crowd->limit = crowd->limit < asked ? 2 * crowd->limit : 0;
        crowd->until = now + crowd->pause;
    }
    return crowd->limit && crowd->limit < asked ? crowd->limit : asked;
}

/* A run on `used` of `asked` threads took `wall`, and all its threads together slept `asleep`. */
void maqd_crowd_note(maqd_crowd *crowd, int32_t asked, int32_t used, int64_t asleep, int64_t wall,
                     int64_t now) {
    if (used < 2) return;
    crowd->asleep += asleep / (used - 1); /* one of them at a time keeps the others waiting */
    crowd->wall += wall;
    if (crowd->wall < WINDOW) return;
    if (2 * crowd->asleep > crowd->wall) {
        const int64_t pause = 2 * crowd->pause;
        crowd->pause = pause < SHORTEST ? SHORTEST : pause > LONGEST ? LONGEST : pause;
        crowd->until = now + crowd->pause;
        crowd->limit = used / 2;
    } else if (used == asked) {
        crowd->limit = 0;
        crowd->pause = 0;
    }
    crowd->asleep = crowd->wall = 0;
}
