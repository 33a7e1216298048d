/* Fake quantization in training: a weight's, forwards and backwards, and that of the tokens it
 * meets.
 *
 * The equations are those of functional.py, where they stand in torch. There every operation is a
 * pass over a matrix in memory nobody has touched before; here a row stays in the first-level cache
 * and nothing is written but the result.
 *
 * A row's mean and deviation are summed in double, which makes them independent of the instruction
 * set; codes come from one function, for training and packing alike.
 */
#include "internal.h"
#include "vector.h"

enum { VALUES, VALUES_BF16, CODES };

typedef struct {
    const float *weight, *step, *scale, *offset; /* (rows, columns), (rows, groups) x 2, (rows) */
    void *out;                                   /* (rows, columns): VALUES .. CODES */
    const void *grad;                            /* (rows, columns), bfloat16 if `narrow` */
    float *grad_weight, *grad_scale, *grad_offset;
    int64_t columns, groups;
    int32_t levels, kind, narrow;
} fake;

typedef struct {
    float mean, std;
} statistics;

INLINE statistics statistics_of(const float *w, int64_t columns) {
    double sum[LANES] = {0}, square[LANES] = {0}, total = 0;
    const int64_t whole = columns / LANES * LANES;
    for (int64_t k = 0; k < whole; k += LANES)
        for (int i = 0; i < LANES; ++i) sum[i] += w[k + i];
    for (int64_t k = whole; k < columns; ++k) sum[k - whole] += w[k];
    for (int i = 0; i < LANES; ++i) total += sum[i];
    const float mean = (float)(total / (double)columns);
    for (int64_t k = 0; k < whole; k += LANES)
        for (int i = 0; i < LANES; ++i) {
            const double d = w[k + i] - mean;
            square[i] += d * d;
        }
    for (int64_t k = whole; k < columns; ++k) {
        const double d = w[k] - mean;
        square[k - whole] += d * d;
    }
    total = 0;
    for (int i = 0; i < LANES; ++i) total += square[i];
    return (statistics){mean, sqrtf((float)(total / (double)columns) + 1e-12f)};
}

INLINE void quantize_row(const fake *f, int64_t row, const int kind) {
    const int64_t columns = f->columns, groups = f->groups, width = columns / groups;
    const float *w = f->weight + row * columns;
    const float top = (float)(f->levels - 1), zero = top / 2;
    const float offset = f->offset ? f->offset[row] : 0;
    const statistics s = statistics_of(w, columns);
    for (int64_t g = 0; g < groups; ++g, w += width) {
        const float step = f->step[row * groups + g];
        const float scale = kind == CODES ? 1 : f->scale[row * groups + g];
        const int64_t at = row * columns + g * width;
        for (int64_t k = 0; k < width; ++k) {
            const float code = code_of((w[k] - s.mean) / s.std / step, zero, top);
            const float value = (code - zero) * scale + offset;
            if (kind == CODES) ((float *)f->out)[at + k] = code;
            if (kind == VALUES) ((float *)f->out)[at + k] = value;
            if (kind == VALUES_BF16) ((uint16_t *)f->out)[at + k] = to_bf16(value);
        }
    }
}

/* Sums that a row's gradient needs, LANES at a time so that they are vectors. */
typedef struct {
    float scale[LANES], offset[LANES], gh[LANES], along[LANES];
} sums;

/* Writes gh = d loss / d standardized weight to `out`; `count` is a constant but for the last
 * piece. */
INLINE void gradient_piece(const float *w, const float *grad, float *out, statistics s, float step,
                           float slope, float zero, float top, const int count, sums *t) {
    for (int i = 0; i < count; ++i) {
        const float hat = (w[i] - s.mean) / s.std, u = hat / step;
        const float gh = fabsf(u) <= zero + 0.5f ? slope * grad[i] : 0;
        out[i] = gh;
        t->scale[i] += (code_of(u, zero, top) - zero) * grad[i];
        t->offset[i] += grad[i];
        t->gh[i] += gh;
        t->along[i] += gh * hat;
    }
}

INLINE void read_gradient(const fake *f, int64_t at, const int count, const int narrow, float *to) {
    for (int i = 0; i < count; ++i)
        to[i] = narrow ? from_bf16(((const uint16_t *)f->grad)[at + i])
                       : ((const float *)f->grad)[at + i];
}

INLINE float sum_of(const float *lanes) {
    float total = 0;
    for (int i = 0; i < LANES; ++i) total += lanes[i];
    return total;
}

INLINE void differentiate_row(const fake *f, int64_t row, const int narrow) {
    const int64_t columns = f->columns, groups = f->groups, width = columns / groups;
    const int64_t start = row * columns, whole = width / LANES * LANES;
    const float top = (float)(f->levels - 1), zero = top / 2;
    const float *w = f->weight + start;
    float *out = f->grad_weight + start;
    const statistics s = statistics_of(w, columns);
    sums t = {{0}, {0}, {0}, {0}};
    for (int64_t g = 0; g < groups; ++g) {
        const float step = f->step[row * groups + g];
        const float slope = f->scale[row * groups + g] / step;
        float piece[LANES];
        memset(t.scale, 0, sizeof t.scale);
        for (int64_t k = g * width; k < g * width + whole; k += LANES) {
            read_gradient(f, start + k, LANES, narrow, piece);
            gradient_piece(w + k, piece, out + k, s, step, slope, zero, top, LANES, &t);
        }
        const int64_t k = g * width + whole;
        read_gradient(f, start + k, (int)(width - whole), narrow, piece);
        gradient_piece(w + k, piece, out + k, s, step, slope, zero, top, (int)(width - whole), &t);
        f->grad_scale[row * groups + g] = sum_of(t.scale);
    }
    if (f->grad_offset) f->grad_offset[row] = sum_of(t.offset);
    const float mean = sum_of(t.gh) / (float)columns, along = sum_of(t.along) / (float)columns;
    const float inverse = 1 / s.std;
    for (int64_t k = 0; k < columns; ++k)
        out[k] = (out[k] - mean - (w[k] - s.mean) * inverse * along) * inverse;
}

CLONES static void quantize_rows(const void *argument, int64_t from, int64_t to) {
    const fake *f = argument;
    switch (f->kind) {
        case VALUES:
            for (; from < to; ++from) quantize_row(f, from, VALUES);
            break;
        case VALUES_BF16:
            for (; from < to; ++from) quantize_row(f, from, VALUES_BF16);
            break;
        default:
            for (; from < to; ++from) quantize_row(f, from, CODES);
    }
}

CLONES static void differentiate_rows(const void *argument, int64_t from, int64_t to) {
    const fake *f = argument;
    if (f->narrow)
        for (; from < to; ++from) differentiate_row(f, from, 1);
    else
        for (; from < to; ++from) differentiate_row(f, from, 0);
}

void maqd_fake_quantize(const float *weight, const float *step, const float *scale,
                        const float *offset, void *out, int64_t rows, int64_t columns,
                        int64_t groups, int32_t levels, int32_t kind, int32_t threads) {
    fake f = {.weight = weight,
              .step = step,
              .scale = scale,
              .offset = offset,
              .out = out,
              .columns = columns,
              .groups = groups,
              .levels = levels,
              .kind = kind};
    maqd_run_pieces(quantize_rows, &f, rows, threads);
}

void maqd_fake_quantize_backward(const float *weight, const float *step, const float *scale,
                                 const void *grad, float *grad_weight, float *grad_scale,
                                 float *grad_offset, int64_t rows, int64_t columns, int64_t groups,
                                 int32_t levels, int32_t narrow, int32_t threads) {
    fake f = {.weight = weight,
              .step = step,
              .scale = scale,
              .grad = grad,
              .grad_weight = grad_weight,
              .grad_scale = grad_scale,
              .grad_offset = grad_offset,
              .columns = columns,
              .groups = groups,
              .levels = levels,
              .narrow = narrow};
    maqd_run_pieces(differentiate_rows, &f, rows, threads);
}

/* ------------------------------------------------------------------------------------- tokens */

typedef struct {
    const void *x;
    void *out;
    int64_t width;
    float clip_ratio;
    int32_t levels, narrow_in, narrow_out;
} rounding;

INLINE void round_token(const rounding *r, int64_t token, const int narrow_in,
                        const int narrow_out) {
    const int64_t width = r->width, start = token * width, whole = width / LANES * LANES;
    const float *wide = (const float *)r->x + start;
    const uint16_t *narrow = (const uint16_t *)r->x + start;
    const float top = (float)(r->levels - 1), zero = top / 2;
    float most[LANES] = {0}, absmax = 0;
    for (int64_t k = 0; k < width; k += LANES) {
        const int count = k < whole ? LANES : (int)(width - whole);
        for (int i = 0; i < count; ++i) {
            const float a = fabsf(narrow_in ? from_bf16(narrow[k + i]) : wide[k + i]);
            most[i] = a > most[i] || a != a ? a : most[i]; /* NaN stays */
        }
    }
    for (int i = 0; i < LANES; ++i)
        absmax = most[i] > absmax || most[i] != most[i] ? most[i] : absmax;
    const float wanted = absmax / zero * r->clip_ratio;
    const float step = wanted < LEAST_NORMAL ? LEAST_NORMAL : wanted;
    for (int64_t k = 0; k < width; ++k) {
        const float x = narrow_in ? from_bf16(narrow[k]) : wide[k];
        const float value = (code_of(x / step, zero, top) - zero) * step;
        if (narrow_out)
            ((uint16_t *)r->out)[start + k] = to_bf16(value);
        else
            ((float *)r->out)[start + k] = value;
    }
}

CLONES static void round_some(const void *argument, int64_t from, int64_t to) {
    const rounding *r = argument;
    for (; from < to; ++from) {
        if (r->narrow_in && r->narrow_out)
            round_token(r, from, 1, 1);
        else if (r->narrow_in)
            round_token(r, from, 1, 0);
        else if (r->narrow_out)
            round_token(r, from, 0, 1);
        else
            round_token(r, from, 0, 0);
    }
}

void maqd_round_tokens(const void *x, void *out, int64_t tokens, int64_t width, float clip_ratio,
                       int32_t levels, int32_t narrow_in, int32_t narrow_out, int32_t threads) {
    rounding r = {x, out, width, clip_ratio, levels, narrow_in, narrow_out};
    maqd_run_pieces(round_some, &r, tokens, threads);
}
