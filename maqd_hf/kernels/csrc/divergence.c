/* The Kullback-Leibler divergence of two rows of logits, and its gradient: the loss of distillation.
 *
 * With e = exp(x - max) and Z = sum e of student (s) and teacher (t):
 *
 *   KL = sum_i q_i (t_i - s_i) - (log Z_t + max_t) + (log Z_s + max_s),   dKL/ds = p - q
 *
 * Two passes over two rows of some 50 thousand logits, which the second-level cache holds, instead
 * of ten in torch, each of them into new memory.
 *
 * Plain C without Python or torch: called through ctypes on data pointers (divergence.py).
 */
#include "maqd.h"

#include <math.h>
#include <string.h>

#define LANES 16
#define INLINE static inline __attribute__((always_inline))

/* e^x to 2 ulp for x <= 0, in operations that the compiler vectorises; 0 below -87. */
INLINE float exponential(float x) {
    const float low = x < -87.0f ? -87.0f : x;
    const float n = rintf(low * 1.44269504f);
    const float r = (low - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    const int32_t bits = ((int32_t)n + 127) * (1 << 23);
    float power;
    memcpy(&power, &bits, 4);
    return x < -87.0f ? 0.0f : p * power;
}

typedef struct {
    float *student, *teacher;
    double *loss;
    int64_t rows, width;
    float cooling, factor;
} divergence;

INLINE void keep_most(const float *x, const int count, float *most) {
    for (int i = 0; i < count; ++i) most[i] = x[i] > most[i] || x[i] != x[i] ? x[i] : most[i];
}

INLINE float most_of(const float *x, int64_t width) {
    const int64_t whole = width / LANES * LANES;
    float lanes[LANES], most = -INFINITY;
    for (int i = 0; i < LANES; ++i) lanes[i] = most;
    for (int64_t k = 0; k < whole; k += LANES) keep_most(x + k, LANES, lanes);
    keep_most(x + whole, (int)(width - whole), lanes);
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

static void diverge_share(void *argument, maqd_team *team, int thread, int threads) {
    (void)team;
    const divergence *d = argument;
    int64_t from, to;
    maqd_share(d->rows, thread, threads, &from, &to);
    for (; from < to; ++from) diverge(d, from);
}

/* student, teacher (rows, width): logits, to be multiplied by `cooling`. loss (rows): KL(teacher ||
 * student); student becomes `factor` times the gradient in its cooled logits, teacher is spoilt. */
void maqd_divergence(float *student, float *teacher, double *loss, int64_t rows, int64_t width,
                     float cooling, float factor, int32_t threads) {
    divergence d = {student, teacher, loss, rows, width, cooling, factor};
    maqd_run(diverge_share, &d, rows, threads);
}
