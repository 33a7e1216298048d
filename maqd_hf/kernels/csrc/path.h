/* One instruction set's functions; included by path_*.c, which define before:
 *
 *   dot(codes, units, bits, x, out)
 *       one token, one row block: out[row] = sum of code * activation code. DIRECT(bits) says for
 *       which storage; the others go through a panel
 *   dot_panel(panel, block_stride, planes, blocks, tokens, wide, x, every, out)
 *       out[(t * blocks + b) * 16 + row], tokens at x + 4 * t, their codes four every `every` bytes
 *   TILE: tokens that dot_panel has registers for; PATH, NAME, SUPPORTED
 *
 * bits, blocks, tokens and wide are compile-time constants there. The rest is vector code of 16
 * floats that the compiler lowers to the set's own registers. */
#include <math.h>
#include <string.h>


typedef float v16 __attribute__((vector_size(64)));
typedef int32_t i16 __attribute__((vector_size(64)));
typedef int8_t bytes16 __attribute__((vector_size(16)));
typedef uint8_t b64 __attribute__((vector_size(64)));

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

#include "product.h"

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

/* v[i ^ bit] for every i */
#ifdef __clang__
#define PERMUTED(v, ...) __builtin_shufflevector(v, v, __VA_ARGS__)
#else
#define PERMUTED(v, ...) __builtin_shuffle(v, (i16){__VA_ARGS__})
#endif
INLINE v16 swapped(v16 v, const int bit) {
    if (bit == 1) return PERMUTED(v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
    if (bit == 2) return PERMUTED(v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    if (bit == 4) return PERMUTED(v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
    return PERMUTED(v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
}
/* Sums and differences of elements `bit` apart. */
INLINE v16 butterfly(v16 v, const int bit) {
    const i16 index = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const i16 minus = ((index & bit) != 0) & INT32_MIN;
    return swapped(v, bit) + (v16)((i16)v ^ minus);
}

/* The first passes, over neighbours less than 16 apart. */
static void hadamard_near(const float *x, int64_t count, int64_t size, float scale, float *y) {
    if (size >= 16) {
        for (int64_t k = 0; k < count; k += 16)
            store(y + k, butterfly(butterfly(butterfly(butterfly(load(x + k) * scale, 1), 2), 4), 8));
        return;
    }
    for (int64_t k = 0; k < count; ++k) y[k] = x[k] * scale;
    for (int64_t half = 1; half < size; half *= 2)
        for (int64_t k = 0; k < count; ++k) {
            if (k & half) continue;
            const float a = y[k], b = y[k + half];
            y[k] = a + b;
            y[k + half] = a - b;
        }
}

/* Two passes at a time, over neighbours `half` and 2 * `half` apart, or one alone. */
static void hadamard(const float *x, int64_t count, int64_t size, float *y) {
    int64_t half = 16;
    hadamard_near(x, count, size, (float)(1 / sqrt((double)size)), y);
    for (; 2 * half < size; half *= 4)
        for (int64_t from = 0; from < count; from += 4 * half)
            for (float *p = y + from; p < y + from + half; p += 16) {
                const v16 a = load(p), b = load(p + half);
                const v16 c = load(p + 2 * half), d = load(p + 3 * half);
                store(p, (a + b) + (c + d));
                store(p + half, (a - b) + (c - d));
                store(p + 2 * half, (a + b) - (c + d));
                store(p + 3 * half, (a - b) - (c - d));
            }
    for (; half < size; half *= 2)
        for (int64_t from = 0; from < count; from += 2 * half)
            for (float *p = y + from; p < y + from + half; p += 16) {
                const v16 a = load(p), b = load(p + half);
                store(p, a + b);
                store(p + half, a - b);
            }
}

/* 16 keys or values, `at` elements on; `bytes` (a constant): stored as bytes. */
INLINE v16 stored(const void *from, int64_t at, const int bytes) {
    if (!bytes) return load((const float *)from + at);
    bytes16 v;
    memcpy(&v, (const int8_t *)from + at, sizeof v);
    return __builtin_convertvector(v, v16);
}

/* Products of `queries` (a constant) queries with `wide` blocks of 16 keys from position `start`
 * on, into sum[block][query]. Several blocks at a time, or loading would take longer than
 * multiplying. (8 queries and 2 blocks at a time, which read keys half as often: no difference.) */
#define MEET 4
INLINE void meet(const maqd_attention *a, int64_t start, const int queries, const int wide,
                 const int bytes, v16 sum[MEET][4]) {
    const int64_t d = a->head_dim;
    int64_t at = start * d;
    for (int w = 0; w < wide; ++w)
        for (int i = 0; i < 4; ++i) sum[w][i] = (v16){0};
    if (queries > 1) {
        for (int64_t j = 0; j < d; ++j)
            for (int w = 0; w < wide; ++w) {
                const v16 column = stored(a->keys, at + (w * d + j) * 16, bytes);
                for (int q = 0; q < queries; ++q) sum[w][q] += column * a->query[q][j];
            }
        return;
    }
    for (int w = 0; w < wide; ++w, at += d * 16) { /* four sums do not wait for one another */
        for (int64_t j = 0; j + 4 <= d; j += 4)
            for (int i = 0; i < 4; ++i)
                sum[w][i] += stored(a->keys, at + (j + i) * 16, bytes) * a->query[0][j + i];
        for (int64_t j = d / 4 * 4; j < d; ++j)
            sum[w][0] += stored(a->keys, at + j * 16, bytes) * a->query[0][j];
        sum[w][0] = (sum[w][0] + sum[w][1]) + (sum[w][2] + sum[w][3]);
    }
}

/* Weights of `queries` (a constant) queries for positions start.. (a multiple of 32) to positions;
 * returns what each one's sum is divided by, inverted. */
INLINE void score(const maqd_attention *a, const int queries, const int bytes, int64_t start,
                  int64_t positions, float most[4]) {
    const int64_t blocks = (positions + 15) / 16;
    const i16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    v16 best[4], sum[MEET][4];
    int64_t met = start / 16; /* blocks up to here are in `sum`, those from `first` on */
    int64_t first = met;
    for (int q = 0; q < queries; ++q) best[q] = all(-INFINITY);
    for (int64_t k = start / 16; k < blocks; ++k) {
        if (k == met) {
            first = k;
            met = k + (blocks - k >= MEET ? MEET : blocks - k >= 2 ? 2 : 1);
            if (met - k == MEET)
                meet(a, k * 16, queries, MEET, bytes, sum);
            else if (met - k == 2)
                meet(a, k * 16, queries, 2, bytes, sum);
            else
                meet(a, k * 16, queries, 1, bytes, sum);
        }
        const v16 scale = bytes ? load(a->key_scales + k * 16) * a->scale : all(a->scale);
        i16 shown = lane - lane - 1;
        if (a->mask)
            for (int64_t i = 0; i < 16; ++i)
                shown[i] = k * 16 + i < positions && a->mask[k * 16 + i] ? -1 : 0;
        for (int q = 0; q < queries; ++q) {
            const i16 visible = shown & (lane < (int32_t)(a->seen[q] - k * 16)) &
                                (lane >= (int32_t)(a->from[q] - k * 16));
            const v16 s = choose(visible, sum[k - first][q] * scale, all(-INFINITY));
            store(a->scores + (q * blocks + k) * 16, s);
            best[q] = choose(s > best[q], s, best[q]);
        }
    }
    for (int q = 0; q < queries; ++q) {
        most[q] = -INFINITY;
        for (int i = 0; i < 16; ++i) most[q] = best[q][i] > most[q] ? best[q][i] : most[q];
        float total = 0;
        v16 sum = {0};
        for (int64_t k = start / 16; k < blocks; ++k) {
            float *s = a->scores + (q * blocks + k) * 16;
            const v16 logit = load(s), p = exponential(logit - most[q]);
            const v16 kept = choose(logit > -INFINITY, p, all(0.0f));
            /* unseen positions may hold anything, NaN too */
            store(s, bytes ? choose(kept > 0, kept * load(a->value_scales + k * 16), kept) : kept);
            sum += kept;
        }
        total = sum16(sum);
        most[q] = total > 0 ? 1 / total : 0; /* a token that sees nothing puts out zeros */
    }
}

/* out[:, from:from+16*wide] of `queries` queries; wide <= 4 vectors stay in registers. */
INLINE void blend(const maqd_attention *a, const int queries, const int bytes, int64_t start,
                  int64_t positions, const float inverse[4], int64_t from, const int wide) {
    const int64_t row = (positions + 15) / 16 * 16;
    v16 sum[4][4];
    for (int q = 0; q < queries; ++q)
        for (int i = 0; i < wide; ++i) sum[q][i] = (v16){0};
    for (int64_t k = start; k < positions; ++k) {
        for (int i = 0; i < wide; ++i) {
            const v16 v = stored(a->values, k * a->value_stride + from + 16 * i, bytes);
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

INLINE void attend_to(const maqd_attention *a, const int queries, const int bytes) {
    float inverse[4];
    int64_t start = a->from[0], positions = 0, from = 0;
    for (int q = 0; q < queries; ++q) {
        start = a->from[q] < start ? a->from[q] : start;
        positions = a->seen[q] > positions ? a->seen[q] : positions;
    }
    start = start / 32 * 32;
    score(a, queries, bytes, start, positions, inverse);
    for (; from + 64 <= a->value_stride; from += 64)
        blend(a, queries, bytes, start, positions, inverse, from, 4);
    for (; from < a->value_stride; from += 16)
        blend(a, queries, bytes, start, positions, inverse, from, 1);
}

INLINE void attend_as(const maqd_attention *a, const int bytes) {
    switch (a->queries) {
        case 1: attend_to(a, 1, bytes); break;
        case 2: attend_to(a, 2, bytes); break;
        case 3: attend_to(a, 3, bytes); break;
        default: attend_to(a, 4, bytes);
    }
}

static void attend_floats(const maqd_attention *a) { attend_as(a, 0); }
static void attend_bytes(const maqd_attention *a) { attend_as(a, 1); }
static void attend(const maqd_attention *a) {
    if (a->key_scales)
        attend_bytes(a);
    else
        attend_floats(a);
}

static float keep(const float *x, int64_t count, int8_t *bytes, int64_t every) {
    float most = 0;
    for (int64_t k = 0; k < count; ++k) most = fabsf(x[k]) > most ? fabsf(x[k]) : most;
    most = most < 3.4e38f ? most : 3.4e38f;
    const float scale = most / 127, inverse = most > 1e-37f ? 127 / most : 0;
    for (int64_t k = 0; k < count; ++k) {
        const float u = x[k] * inverse, low = u > -127 ? u : -127;
        bytes[k * every] = (int8_t)rintf(low < 127 ? low : 127);
    }
    return scale;
}

INLINE v16 gelu_tanh(v16 x) {
    const v16 u = x * (x * x * 0.044715f + 1.0f) * 1.5957691216f; /* twice sqrt(2 / pi) */
    return x - x / (exponential(u) + 1.0f);
}

INLINE v16 activated(const int kind, v16 x, v16 up) {
    if (kind == SWIGLU) return x / (exponential(-x) + 1.0f) * up;
    return kind == RELU ? choose(x > 0, x, all(0)) : gelu_tanh(x);
}

INLINE void activate_as(const int kind, float *x, const float *up, int64_t count) {
    const int64_t rest = count % 16, whole = count - rest;
    for (int64_t k = 0; k < whole; k += 16)
        store(x + k, activated(kind, load(x + k), kind == SWIGLU ? load(up + k) : all(0)));
    if (rest) {
        const v16 some = kind == SWIGLU ? load_some(up + whole, rest, 0) : all(0);
        const v16 y = activated(kind, load_some(x + whole, rest, 0), some);
        memcpy(x + whole, &y, (size_t)rest * sizeof *x);
    }
}

static void activate(int32_t kind, float *x, const float *up, int64_t count) {
    switch (kind) {
        case SWIGLU: activate_as(SWIGLU, x, up, count); break;
        case RELU: activate_as(RELU, x, up, count); break;
        default: activate_as(GELU_TANH, x, up, count);
    }
}

const maqd_path PATH = {NAME, SUPPORTED, TILE, 0, matmul, quantize, spread, norm,
                      rope, hadamard, attend, activate, keep};
