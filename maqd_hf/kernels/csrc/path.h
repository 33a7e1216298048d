/* One instruction set's functions; included by path_*.c, which define before:
 *
 *   dot(chunk, block_stride, chunks, bits, blocks, x, x_stride, tokens, out)
 *       sums of code * activation code over one group, for `blocks` row blocks and `tokens` tokens
 *       into out[token * blocks + block][row]; bits, blocks and tokens are compile-time constants
 *   PATH, NAME, SUPPORTED
 *
 * The rest is vector code of 16 floats that the compiler lowers to the set's own registers. */
#include <math.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define TOKENS 4 /* tokens that share one pass over the weights */
#define BLOCKS 2 /* row blocks that share one pass over the activations */

typedef float v16 __attribute__((vector_size(64)));
typedef int32_t i16 __attribute__((vector_size(64)));

INLINE v16 load(const float *p) {
    v16 v;
    memcpy(&v, p, sizeof v);
    return v;
}
INLINE void store(float *p, v16 v) { memcpy(p, &v, sizeof v); }
INLINE v16 all(float x) { return x - (v16){0}; }
INLINE v16 choose(i16 mask, v16 a, v16 b) { return (v16)(((i16)a & mask) | ((i16)b & ~mask)); }
INLINE float sum16(v16 v) {
    float total = 0;
    for (int i = 0; i < 16; ++i) total += v[i];
    return total;
}
/* The first `count` floats, the rest `filler`. */
INLINE v16 load_some(const float *p, int64_t count, float filler) {
    v16 v = all(filler);
    memcpy(&v, p, (size_t)count * sizeof *p);
    return v;
}

/* e^x to 2 ulp: 2^n * p(r), r in [-ln2/2, ln2/2]; inputs beyond +-87 saturate. */
INLINE v16 exponential(v16 x) {
    x = choose(x > 87.0f, all(87.0f), x);
    x = choose(x < -87.0f, all(-87.0f), x);
    const v16 magic = all(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer */
    const v16 n = (x * 1.44269504f + magic) - magic;
    const v16 r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    v16 p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    return p * (v16)((__builtin_convertvector(n, i16) + 127) << 23);
}

/* --------------------------------------------------------------------------- packed product */

INLINE void tile(const maqd_weight *w, const maqd_input *x, int64_t block, const int blocks,
                 int64_t token, const int tokens, const int bits, float *y, int64_t y_stride) {
    const int64_t inputs = 32 / bits, stride = w->chunks * inputs, sums = w->groups + 1;
    const int64_t padded = (w->rows + ROWS - 1) / ROWS * ROWS, first = block * ROWS;
    const int64_t chunks = w->groups == 1 ? w->chunks : w->columns / w->groups / inputs;
    const uint8_t *codes = w->codes + block * w->chunks * 64;
    const int8_t *q = x->codes + token * stride;
    v16 total[TOKENS * BLOCKS];
    for (int i = 0; i < tokens * blocks; ++i) total[i] = (v16){0};
    for (int64_t g = 0; g < w->groups; ++g, codes += chunks * 64, q += chunks * inputs) {
        i16 out[TOKENS * BLOCKS];
        dot(codes, w->chunks * 64, chunks, bits, blocks, q, stride, tokens, out);
        for (int t = 0; t < tokens; ++t) {
            const float shift = w->zero * (float)x->sums[(token + t) * sums + g];
            for (int b = 0; b < blocks; ++b) {
                const v16 scale = load(w->scale + g * padded + first + b * ROWS);
                const int i = t * blocks + b;
                total[i] += scale * (__builtin_convertvector(out[i], v16) - shift);
            }
        }
    }
    for (int t = 0; t < tokens; ++t) {
        const float step = x->step[token + t];
        const float sum = (float)x->sums[(token + t) * sums + w->groups];
        for (int b = 0; b < blocks; ++b) {
            const int64_t n = first + b * ROWS, live = w->rows - n < ROWS ? w->rows - n : ROWS;
            const v16 inner = total[t * blocks + b] + load(w->offset + n) * sum + load(w->constant + n);
            const v16 value = inner * step + load(w->bias + n);
            memcpy(y + (token + t) * y_stride + n, &value, (size_t)live * sizeof *y);
        }
    }
}

/* The same with float activations: codes become floats, four sums a token keep them independent. */
INLINE void tile_float(const maqd_weight *w, const maqd_input *x, int64_t block, int64_t token,
                       const int tokens, const int bits, float *y, int64_t y_stride) {
    const int64_t inputs = 32 / bits, stride = w->chunks * inputs, sums = w->groups + 1;
    const int64_t padded = (w->rows + ROWS - 1) / ROWS * ROWS, first = block * ROWS;
    const int64_t chunks = w->groups == 1 ? w->chunks : w->columns / w->groups / inputs;
    const int64_t live = w->rows - first < ROWS ? w->rows - first : ROWS;
    const uint8_t *codes = w->codes + block * w->chunks * 64;
    const float *values = x->values + token * stride;
    v16 total[TOKENS];
    for (int t = 0; t < tokens; ++t) total[t] = (v16){0};
    for (int64_t g = 0; g < w->groups; ++g) {
        v16 sum[TOKENS][4];
        for (int t = 0; t < tokens; ++t)
            for (int j = 0; j < 4; ++j) sum[t][j] = (v16){0};
        for (int64_t c = 0; c < chunks; ++c, codes += 64, values += inputs) {
            i16 word;
            memcpy(&word, codes, sizeof word);
            for (int p = 0; p < 8 / bits; ++p)
                for (int j = 0; j < 4; ++j) {
                    const i16 code = word >> (8 * j + bits * p) & ((1 << bits) - 1);
                    const v16 value = __builtin_convertvector(code, v16);
                    for (int t = 0; t < tokens; ++t)
                        sum[t][j] += value * values[t * stride + 4 * p + j];
                }
        }
        const v16 scale = load(w->scale + g * padded + first);
        for (int t = 0; t < tokens; ++t) {
            const v16 all_four = (sum[t][0] + sum[t][1]) + (sum[t][2] + sum[t][3]);
            total[t] += scale * (all_four - w->zero * x->value_sums[(token + t) * sums + g]);
        }
    }
    for (int t = 0; t < tokens; ++t) {
        const float sum = x->value_sums[(token + t) * sums + w->groups];
        const v16 value = total[t] + load(w->offset + first) * sum + load(w->bias + first);
        memcpy(y + (token + t) * y_stride + first, &value, (size_t)live * sizeof *y);
    }
}

INLINE void matmul_float(const maqd_weight *w, const maqd_input *x, int64_t block, int64_t last,
                         int64_t tokens, float *y, int64_t y_stride, const int bits) {
    for (; block < last; ++block) {
        int64_t t = 0;
        for (; t + 4 <= tokens; t += 4) tile_float(w, x, block, t, 4, bits, y, y_stride);
        for (; t < tokens; ++t) tile_float(w, x, block, t, 1, bits, y, y_stride);
    }
}

INLINE void matmul_bits(const maqd_weight *w, const maqd_input *x, int64_t block, int64_t last,
                        int64_t tokens, float *y, int64_t y_stride, const int bits) {
    if (x->values) {
        matmul_float(w, x, block, last, tokens, y, y_stride, bits);
        return;
    }
    /* 2-bit codes of 4 tokens fill the registers with one row block */
    const int pair = bits > 2 || tokens < TOKENS ? BLOCKS : 1;
    for (; block + pair <= last; block += pair) {
        int64_t t = 0;
        for (; t + 4 <= tokens; t += 4)
            if (bits > 2)
                tile(w, x, block, BLOCKS, t, 4, bits, y, y_stride);
            else
                tile(w, x, block, 1, t, 4, bits, y, y_stride);
        for (; t < tokens; ++t)
            if (pair == BLOCKS)
                tile(w, x, block, BLOCKS, t, 1, bits, y, y_stride);
            else
                tile(w, x, block, 1, t, 1, bits, y, y_stride);
    }
    for (; block < last; ++block) {
        int64_t t = 0;
        for (; t + 4 <= tokens; t += 4) tile(w, x, block, 1, t, 4, bits, y, y_stride);
        for (; t < tokens; ++t) tile(w, x, block, 1, t, 1, bits, y, y_stride);
    }
}

static void matmul(const maqd_weight *w, const maqd_input *x, int64_t first, int64_t last,
                   int64_t tokens, float *y, int64_t y_stride) {
    if (w->bits == 2)
        matmul_bits(w, x, first, last, tokens, y, y_stride, 2);
    else if (w->bits == 4)
        matmul_bits(w, x, first, last, tokens, y, y_stride, 4);
    else
        matmul_bits(w, x, first, last, tokens, y, y_stride, 8);
}

static void quantize(const float *x, int64_t columns, int64_t groups, int32_t levels, float *step,
                     int8_t *codes, int64_t stride, int32_t *sums) {
    const float center = (float)(levels - 1) / 2, top = (float)(levels - 1);
    const int32_t middle = levels / 2;
    const int64_t width = columns / groups;
    if (*step == 0) {
        float most = 0;
        for (int64_t k = 0; k < columns; ++k) {
            const float size = fabsf(x[k]);
            most = size > most ? size : most;
        }
        *step = most / center;
        if (!(*step >= 1.17549435e-38f)) *step = 1.17549435e-38f;
    }
    const float s = *step;
    int32_t everything = 0;
    for (int64_t g = 0; g < groups; ++g) {
        int32_t sum = 0;
        for (int64_t k = g * width; k < (g + 1) * width; ++k) {
            float code = rintf(x[k] / s + center);
            code = code < top ? code : top;
            code = code > 0 ? code : 0;
            const int32_t q = (int32_t)code - middle;
            codes[k] = (int8_t)q;
            sum += q;
        }
        sums[g] = sum;
        everything += sum;
    }
    sums[groups] = everything;
    memset(codes + columns, 0, (size_t)(stride - columns));
}

static void spread(const float *x, int64_t columns, int64_t groups, float *values, int64_t stride,
                   float *sums) {
    const int64_t width = columns / groups;
    float everything = 0;
    for (int64_t g = 0; g < groups; ++g) {
        const float *part = x + g * width;
        v16 sum = {0};
        for (int64_t k = 0; k < width; k += 16)
            sum += load_some(part + k, width - k < 16 ? width - k : 16, 0);
        sums[g] = sum16(sum);
        everything += sums[g];
    }
    sums[groups] = everything;
    memcpy(values, x, (size_t)columns * sizeof *x);
    for (int64_t k = columns; k < stride; ++k) values[k] = 0;
}

/* ----------------------------------------------------------------------- the rest of a decoder */

static void norm(const maqd_norm *n, int first, const float *x, float *y) {
    const int64_t size = n->features, whole = size / 16 * 16;
    float mean = 0, factor = n->constant;
    if (n->centered) {
        v16 sum = {0};
        for (int64_t k = 0; k < whole; k += 16) sum += load(x + k);
        mean = sum16(sum);
        for (int64_t k = whole; k < size; ++k) mean += x[k];
        mean /= (float)size;
    }
    if (n->token || (n->own_first && first)) {
        v16 sum = {0};
        for (int64_t k = 0; k < whole; k += 16) {
            const v16 v = load(x + k) - mean;
            sum += v * v;
        }
        float square = sum16(sum);
        for (int64_t k = whole; k < size; ++k) square += (x[k] - mean) * (x[k] - mean);
        factor = n->first_factor / sqrtf(square / (float)size + n->eps);
    }
    for (int64_t k = 0; k < size; ++k) y[k] = (x[k] - mean) * factor;
    if (n->weight)
        for (int64_t k = 0; k < size; ++k) y[k] *= n->weight[k];
    if (n->bias)
        for (int64_t k = 0; k < size; ++k) y[k] += n->bias[k];
}

static void rope(float *x, const float *cosine, const float *sine, int64_t half) {
    for (int64_t i = 0; i < half; ++i) {
        const float a = x[i], b = x[i + half];
        x[i] = a * cosine[i] - b * sine[i];
        x[i + half] = b * cosine[i] + a * sine[i];
    }
}

/* Scores of `queries` (a constant) queries; returns each one's largest. */
INLINE void score(const maqd_attention *a, const int queries, float most[4]) {
    int64_t positions = 0;
    for (int q = 0; q < queries; ++q) positions = a->seen[q] > positions ? a->seen[q] : positions;
    const int64_t blocks = (positions + 15) / 16, d = a->head_dim;
    const i16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    v16 best[4];
    for (int q = 0; q < queries; ++q) best[q] = all(-INFINITY);
    for (int64_t k = 0; k < blocks; ++k) {
        const float *key = a->keys + k * d * 16;
        v16 sum[4];
        for (int i = 0; i < 4; ++i) sum[i] = (v16){0};
        if (queries == 1) { /* four sums, or every addition would wait for the one before */
            for (int64_t j = 0; j + 4 <= d; j += 4)
                for (int i = 0; i < 4; ++i) sum[i] += load(key + (j + i) * 16) * a->query[0][j + i];
            for (int64_t j = d / 4 * 4; j < d; ++j) sum[0] += load(key + j * 16) * a->query[0][j];
            sum[0] = (sum[0] + sum[1]) + (sum[2] + sum[3]);
        } else {
            for (int64_t j = 0; j < d; ++j) {
                const v16 column = load(key + j * 16);
                for (int q = 0; q < queries; ++q) sum[q] += column * a->query[q][j];
            }
        }
        i16 shown = lane - lane - 1;
        if (a->mask)
            for (int64_t i = 0; i < 16; ++i)
                shown[i] = k * 16 + i < positions && a->mask[k * 16 + i] ? -1 : 0;
        for (int q = 0; q < queries; ++q) {
            const i16 visible = shown & (lane < (int32_t)(a->seen[q] - k * 16));
            const v16 s = choose(visible, sum[q] * a->scale, all(-INFINITY));
            store(a->scores + (q * blocks + k) * 16, s);
            best[q] = choose(s > best[q], s, best[q]);
        }
    }
    for (int q = 0; q < queries; ++q) {
        most[q] = -INFINITY;
        for (int i = 0; i < 16; ++i) most[q] = best[q][i] > most[q] ? best[q][i] : most[q];
        float total = 0;
        v16 sum = {0};
        for (int64_t k = 0; k < blocks; ++k) {
            float *s = a->scores + (q * blocks + k) * 16;
            const v16 logit = load(s), p = exponential(logit - most[q]);
            const v16 kept = choose(logit > -INFINITY, p, all(0.0f));
            store(s, kept);
            sum += kept;
        }
        total = sum16(sum);
        most[q] = total > 0 ? 1 / total : 0; /* a token that sees nothing puts out zeros */
    }
}

/* out[:, from:from+16*wide] of `queries` queries; wide <= 4 vectors stay in registers. */
INLINE void blend(const maqd_attention *a, const int queries, const float inverse[4], int64_t from,
                  const int wide, int64_t positions) {
    const int64_t row = (positions + 15) / 16 * 16;
    v16 sum[4][4];
    for (int q = 0; q < queries; ++q)
        for (int i = 0; i < wide; ++i) sum[q][i] = (v16){0};
    for (int64_t k = 0; k < positions; ++k) {
        const float *value = a->values + k * a->value_stride + from;
        for (int i = 0; i < wide; ++i) {
            const v16 v = load(value + 16 * i);
            for (int q = 0; q < queries; ++q) sum[q][i] += v * a->scores[q * row + k];
        }
    }
    for (int q = 0; q < queries; ++q)
        for (int i = 0; i < wide; ++i) {
            const v16 out = sum[q][i] * inverse[q];
            const int64_t at = from + 16 * i, rest = a->head_dim - at;
            if (rest > 0) memcpy(a->out[q] + at, &out, (size_t)(rest < 16 ? rest : 16) * sizeof(float));
        }
}

INLINE void attend_to(const maqd_attention *a, const int queries) {
    float inverse[4];
    int64_t positions = 0, from = 0;
    for (int q = 0; q < queries; ++q) positions = a->seen[q] > positions ? a->seen[q] : positions;
    score(a, queries, inverse);
    for (; from + 64 <= a->value_stride; from += 64) blend(a, queries, inverse, from, 4, positions);
    for (; from < a->value_stride; from += 16) blend(a, queries, inverse, from, 1, positions);
}

static void attend(const maqd_attention *a) {
    switch (a->queries) {
        case 1: attend_to(a, 1); break;
        case 2: attend_to(a, 2); break;
        case 3: attend_to(a, 3); break;
        default: attend_to(a, 4);
    }
}

static void swiglu(float *gate, const float *up, int64_t count) {
    for (int64_t k = 0; k < count; k += 16) {
        const int64_t some = count - k < 16 ? count - k : 16;
        const v16 g = load_some(gate + k, some, 0), u = load_some(up + k, some, 0);
        const v16 y = g / (exponential(-g) + 1.0f) * u;
        memcpy(gate + k, &y, (size_t)some * sizeof *gate);
    }
}

const maqd_path PATH = {NAME, SUPPORTED, matmul, quantize, spread, norm, rope, attend, swiglu};
