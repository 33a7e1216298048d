/* What the files of this library share: the packed weight, a path's functions, the threads.
 *
 * Layout "16 x 4": rows in blocks of 16. A 64-byte chunk holds, for each of its 16 rows, 4
 * consecutive inputs; with b-bit storage P = 8/b such groups share a byte by bit position. Byte
 * 4*r + j of chunk c, bits b*p.., is the code of row r at input c*4P + 4p + j. One chunk is thus
 * the operand of one dot-product instruction per bit position, after a mask and without a shift:
 * every position has an accumulator of its own, and the accumulators are shifted at the end.
 *
 * With codes c, activation codes q, z = (M-1)/2 and h = 0 or 1/2 (odd or even activation levels):
 *
 *   y = xs * ( sum_g s_g (sum c q - z sum_g q) + o sum q + constant ) + bias
 *
 * where `constant` = sum_g s_g h (sum_g c - z n_g) + o h n comes ready from the repacking side.
 * Float activations ("weight-only") take the place of q, with xs = 1 and a constant of 0.
 *
 * Plain C without Python or torch: called through ctypes on data pointers. Each path_*.c compiles
 * path.h for its instruction set; the choice is made at run time, never by -march=native.
 */
#ifndef MAQD_H
#define MAQD_H

#include <stddef.h>
#include <stdint.h>

#define ROWS 16
#define HIDDEN __attribute__((visibility("hidden")))

typedef struct {
    const uint8_t *codes;  /* (row blocks, chunks, 64) */
    const float *scale;    /* (groups, padded rows) */
    const float *offset;   /* (padded rows) */
    const float *constant; /* (padded rows) */
    const float *bias;     /* (padded rows) */
    int64_t rows, columns, groups, chunks;
    int32_t bits;
    float zero;
} maqd_weight;

typedef struct {
    int8_t *codes; /* (tokens, chunks * inputs per chunk), zero beyond the columns */
    float *step;   /* (tokens) */
    int32_t *sums; /* (tokens, groups + 1): sum of the codes of every group, and of all */
    /* float activations have these instead; NULL where codes are used */
    float *values;     /* shaped as codes */
    float *value_sums; /* shaped as sums */
} maqd_input;

/* y = x * factor (weight) (+ bias). `token`: factor = 1 / sqrt(mean square + eps), for every token;
 * else it is `constant`, but for first tokens if `own_first`: first_factor / sqrt(...). */
typedef struct {
    const float *weight, *bias; /* (features) or NULL */
    int64_t features;
    float eps, constant, first_factor;
    int32_t token, own_first, centered;
} maqd_norm;

/* Keys are kept in blocks of 16 positions, (kv heads, positions / 16, head_dim, 16): a query then
 * meets 16 keys per multiplication. Values are (kv heads, positions, value_stride). */
typedef struct {
    const float *query[4]; /* up to 4 queries of one kv head */
    int64_t seen[4];       /* positions each of them may see */
    float *out[4];
    int queries;
    const float *keys, *values;
    const uint8_t *mask; /* (positions) or NULL: 0 hides */
    int64_t head_dim, value_stride;
    float scale;
    float *scores; /* scratch: 4 * (seen rounded up to 16) */
} maqd_attention;

typedef struct {
    const char *name;
    int (*supported)(void);
    /* Row blocks first..last-1 of all tokens; y has y_stride floats a token. */
    void (*matmul)(const maqd_weight *w, const maqd_input *x, int64_t first, int64_t last,
                   int64_t tokens, float *y, int64_t y_stride);
    /* One token: codes = clamp(rint(x / step + (M-1)/2), 0, M-1) - M/2 (floor). A step of 0 asks
     * for the token's own, absmax / ((M-1)/2). NaN counts as the largest code, infinity clips. */
    void (*quantize)(const float *x, int64_t columns, int64_t groups, int32_t levels, float *step,
                     int8_t *codes, int64_t stride, int32_t *sums);
    /* One token of float activations: copied, padded, summed. */
    void (*spread)(const float *x, int64_t columns, int64_t groups, float *values, int64_t stride,
                   float *sums);
    void (*norm)(const maqd_norm *norm, int first, const float *x, float *y);
    void (*rope)(float *x, const float *cosine, const float *sine, int64_t half);
    void (*attend)(const maqd_attention *a);
    void (*swiglu)(float *gate, const float *up, int64_t count);
} maqd_path;

extern HIDDEN const maqd_path maqd_path_portable, maqd_path_avx2, maqd_path_vnni;
HIDDEN const maqd_path *maqd_get_path(int32_t path);

/* Runs work(argument, team, thread, threads) on up to `threads` threads at once. */
typedef struct maqd_team maqd_team;
typedef void (*maqd_work)(void *argument, maqd_team *team, int thread, int threads);
HIDDEN void maqd_run(maqd_work work, void *argument, int threads);
/* Every thread of the team waits here for the others. */
HIDDEN void maqd_barrier(maqd_team *team);

/* Quantises, or for `levels` 0 copies, one token: `x` becomes row `token` of `input`. */
static inline void maqd_take(const maqd_path *path, const maqd_weight *w, const float *x,
                             int32_t levels, maqd_input *input, int64_t token) {
    const int64_t stride = w->chunks * (32 / w->bits), sums = w->groups + 1;
    if (levels)
        path->quantize(x, w->columns, w->groups, levels, input->step + token,
                       input->codes + token * stride, stride, input->sums + token * sums);
    else
        path->spread(x, w->columns, w->groups, input->values + token * stride, stride,
                     input->value_sums + token * sums);
}

/* The part of 0..count that belongs to a thread. */
static inline void maqd_share(int64_t count, int thread, int threads, int64_t *from, int64_t *to) {
    *from = count * thread / threads;
    *to = count * (thread + 1) / threads;
}

#endif
