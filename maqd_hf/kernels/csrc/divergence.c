/* The Kullback-Leibler divergence of two rows of logits, and its gradient: the loss of
 * distillation.
 *
 * With e = exp(x - max) and Z = sum e of student (s) and teacher (t):
 *
 *   KL = sum_i q_i (t_i - s_i) - (log Z_t + max_t) + (log Z_s + max_s),   dKL/ds = p - q
 *
 * These are two passes over two rows of some 50 thousand logits, which the second-level cache
 * holds, where torch makes ten, each of them into new memory.
 */
#include "internal.h"
#include "vector.h"

typedef struct {
    float *student, *teacher;
    double *loss;
    int64_t width;
    float cooling, factor;
} divergence;

/* The larger of each lane and its number; NaN stays. */
INLINE void raise_to(const float *x, const int count, float *most) {
    for (int i = 0; i < count; ++i) most[i] = x[i] > most[i] || x[i] != x[i] ? x[i] : most[i];
}

INLINE float most_of(const float *x, int64_t width) {
    const int64_t whole = width / LANES * LANES;
    float lanes[LANES], most = -INFINITY;
    for (int i = 0; i < LANES; ++i) lanes[i] = most;
    for (int64_t k = 0; k < whole; k += LANES) raise_to(x + k, LANES, lanes);
    raise_to(x + whole, (int)(width - whole), lanes);
    for (int i = 0; i < LANES; ++i)
        most = lanes[i] > most || lanes[i] != lanes[i] ? lanes[i] : most;
    return most;
}

typedef struct {
    double student[LANES], teacher[LANES], gap[LANES];
} totals;

INLINE void exponentiate(float *s, float *t, float cooling, float most_s, float most_t,
                         const int count, totals *total) {
    for (int i = 0; i < count; ++i) {
        const float a = s[i] * cooling, b = t[i] * cooling;
        const float p = exponential(a - most_s), q = exponential(b - most_t);
        total->student[i] += p;
        total->teacher[i] += q;
        total->gap[i] += q > 0 ? q * (b - a) : 0; /* an impossible word's gap may be infinite */
        s[i] = p;
        t[i] = q;
    }
}

CLONES static void diverge(const divergence *d, int64_t row) {
    const int64_t width = d->width, whole = width / LANES * LANES;
    float *s = d->student + row * width, *t = d->teacher + row * width;
    const float most_s = most_of(s, width) * d->cooling, most_t = most_of(t, width) * d->cooling;
    totals lanes = {{0}, {0}, {0}};
    for (int64_t k = 0; k < whole; k += LANES)
        exponentiate(s + k, t + k, d->cooling, most_s, most_t, LANES, &lanes);
    exponentiate(s + whole, t + whole, d->cooling, most_s, most_t, (int)(width - whole), &lanes);
    double zs = 0, zt = 0, gap = 0;
    for (int i = 0; i < LANES; ++i) {
        zs += lanes.student[i];
        zt += lanes.teacher[i];
        gap += lanes.gap[i];
    }
    d->loss[row] = gap / zt - (log(zt) + most_t) + (log(zs) + most_s);
    const float fs = (float)(d->factor / zs), ft = (float)(d->factor / zt);
    for (int64_t k = 0; k < width; ++k) s[k] = s[k] * fs - t[k] * ft;
}

static void diverge_rows(const void *argument, int64_t from, int64_t to) {
    for (; from < to; ++from) diverge(argument, from);
}

void maqd_divergence(float *student, float *teacher, double *loss, int64_t rows, int64_t width,
                     float cooling, float factor, int32_t threads) {
    divergence d = {student, teacher, loss, width, cooling, factor};
    maqd_run_pieces(diverge_rows, &d, rows, threads);
}
