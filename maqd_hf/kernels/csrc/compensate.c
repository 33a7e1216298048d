/* The column loops of error compensation: one block of columns, each rounded given the ones before.
 *
 * Matrices are (columns, rows), a column of the weight contiguous, so that the rows, which do not
 * know of each other, are what is vectorised and shared out over threads. A stripe of rows stays in
 * the first-level cache while all columns of a block pass over it.
 * The same loops stand in torch in columns.py.
 */
#include "internal.h"
#include "vector.h"

#define STRIPE 64

static int64_t stripes(int64_t rows) { return (rows + STRIPE - 1) / STRIPE; }

/* A stripe: `width` <= STRIPE rows of matrices with `rows` rows. */
typedef struct {
    int64_t columns, rows, width;
    float top, zero; /* levels - 1 and half of it */
} stripe;

static stripe stripe_at(int64_t first, int64_t levels, int64_t columns, int64_t rows) {
    const int64_t width = rows - first < STRIPE ? rows - first : STRIPE;
    return (stripe){columns, rows, width, (float)(levels - 1), (float)(levels - 1) / 2};
}

CLONES static void compensate_stripe(float *restrict w, const float *restrict factor,
                                     const float *restrict steps, const float *restrict center,
                                     float *restrict codes, float *restrict errors, stripe s) {
    for (int64_t i = 0; i < s.columns; ++i, factor += s.columns) {
        const int64_t at = i * s.rows;
        float error[STRIPE];
        for (int64_t r = 0; r < s.width; ++r) {
            const float step = steps[at + r], x = w[at + r];
            const float code = code_of((x - center[r]) / step, s.zero, s.top);
            codes[at + r] = code;
            errors[at + r] = error[r] = (x - ((code - s.zero) * step + center[r])) / factor[i];
        }
        for (int64_t k = i + 1; k < s.columns; ++k) {
            const float share = factor[k];
            float *later = w + k * s.rows;
            for (int64_t r = 0; r < s.width; ++r) later[r] -= share * error[r];
        }
    }
}

typedef struct {
    float *w, *codes, *errors;
    const float *factor, *steps, *center;
    int64_t levels, columns, rows;
} compensation;

static void compensate_stripes(const void *argument, int64_t from, int64_t to) {
    const compensation *c = argument;
    for (int64_t n = from * STRIPE; n < c->rows && n < to * STRIPE; n += STRIPE)
        compensate_stripe(c->w + n, c->factor, c->steps + n, c->center + n, c->codes + n,
                          c->errors + n, stripe_at(n, c->levels, c->columns, c->rows));
}

void maqd_compensate(float *w, const float *factor, const float *steps, const float *center,
                     float *codes, float *errors, int64_t levels, int64_t columns, int64_t rows,
                     int32_t threads) {
    compensation c = {w, codes, errors, factor, steps, center, levels, columns, rows};
    maqd_run_pieces(compensate_stripes, &c, stripes(rows), threads);
}

CLONES static void descend_stripe(float *restrict value, float *restrict gradient,
                                  const float *restrict h, const float *restrict steps,
                                  const float *restrict center, float *restrict codes,
                                  float *restrict wanted, float *restrict moved, stripe s) {
    for (int64_t i = 0; i < s.columns; ++i, h += s.columns) {
        const int64_t at = i * s.rows;
        float move[STRIPE];
        for (int64_t r = 0; r < s.width; ++r) {
            const float step = steps[at + r], old = value[at + r];
            const float x = old + gradient[at + r] / h[i];
            const float code = code_of((x - center[r]) / step, s.zero, s.top);
            const float now = (code - s.zero) * step + center[r];
            codes[at + r] = code;
            wanted[at + r] = x;
            value[at + r] = now;
            moved[at + r] = move[r] = now - old;
        }
        for (int64_t k = 0; k < s.columns; ++k) {
            const float share = h[k];
            float *other = gradient + k * s.rows;
            for (int64_t r = 0; r < s.width; ++r) other[r] -= share * move[r];
        }
    }
}

typedef struct {
    float *value, *gradient, *codes, *wanted, *moved;
    const float *h, *steps, *center;
    int64_t levels, columns, rows;
} descent;

static void descend_stripes(const void *argument, int64_t from, int64_t to) {
    const descent *d = argument;
    for (int64_t n = from * STRIPE; n < d->rows && n < to * STRIPE; n += STRIPE)
        descend_stripe(d->value + n, d->gradient + n, d->h, d->steps + n, d->center + n,
                       d->codes + n, d->wanted + n, d->moved + n,
                       stripe_at(n, d->levels, d->columns, d->rows));
}

void maqd_descend(float *value, float *gradient, const float *h, const float *steps,
                  const float *center, float *codes, float *wanted, float *moved, int64_t levels,
                  int64_t columns, int64_t rows, int32_t threads) {
    descent d = {value, gradient, codes, wanted, moved, h, steps, center, levels, columns, rows};
    maqd_run_pieces(descend_stripes, &d, stripes(rows), threads);
}
