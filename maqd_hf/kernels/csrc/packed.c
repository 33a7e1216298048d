/* Repacking a layer's words, its product with inputs, rows of a packed table. */
#include "maqd.h"

#include <string.h>

static const maqd_path *const PATHS[] = {
    &maqd_path_portable,
#if defined(__x86_64__)
    &maqd_path_avx2,
    &maqd_path_vnni,
#endif
};

const maqd_path *maqd_get_path(int32_t path) { return PATHS[path]; }

/* Number of paths this build knows; `maqd_supported(i)` says whether this machine runs path i. */
int32_t maqd_paths(void) { return (int32_t)(sizeof PATHS / sizeof PATHS[0]); }
const char *maqd_path_name(int32_t path) { return PATHS[path]->name; }
int32_t maqd_supported(int32_t path) { return PATHS[path]->supported(); }

typedef struct {
    const int32_t *words;
    int64_t rows, columns;
    int32_t levels, digits, bits;
    uint8_t *codes;
} repacking;

static void repack_share(void *argument, maqd_team *team, int thread, int threads) {
    (void)team;
    const repacking *r = argument;
    const int64_t per_row = (r->columns + r->digits - 1) / r->digits;
    const int64_t inputs = 32 / r->bits, chunks = (r->columns + inputs - 1) / inputs;
    const uint32_t levels = (uint32_t)r->levels;
    int64_t block, last;
    maqd_share((r->rows + ROWS - 1) / ROWS, thread, threads, &block, &last);
    for (int64_t n = block * ROWS; n < r->rows && n < last * ROWS; ++n) {
        uint8_t *base = r->codes + n / ROWS * chunks * 64 + 4 * (n % ROWS);
        const int32_t *words = r->words + n * per_row;
        int64_t k = 0;
        for (int64_t i = 0; i < per_row; ++i) {
            uint32_t rest = (uint32_t)words[i];
            for (int d = 0; d < r->digits && k < r->columns; ++d, ++k, rest /= levels) {
                const int64_t within = k % inputs;
                base[k / inputs * 64 + within % 4] |=
                    (uint8_t)(rest % levels << (r->bits * (within / 4)));
            }
        }
    }
}

/* Dense words (rows, words per row; mixed radix, see packing.py) to layout 16 x 4, zeroed. */
void maqd_repack(const int32_t *words, int64_t rows, int64_t columns, int32_t levels,
                 int32_t digits, int32_t bits, uint8_t *codes, int32_t threads) {
    repacking r = {words, rows, columns, levels, digits, bits, codes};
    maqd_run(repack_share, &r, threads);
}

typedef struct {
    const maqd_path *path;
    const maqd_weight *weight;
    maqd_input *input;
    const float *x;
    int64_t tokens;
    int32_t levels;
    float *y;
} product;

static void product_share(void *argument, maqd_team *team, int thread, int threads) {
    const product *p = argument;
    const maqd_weight *w = p->weight;
    int64_t from, to;
    maqd_share(p->tokens, thread, threads, &from, &to);
    for (int64_t t = from; t < to; ++t)
        maqd_take(p->path, w, p->x + t * w->columns, p->levels, p->input, t);
    maqd_barrier(team);
    maqd_share((w->rows + ROWS - 1) / ROWS, thread, threads, &from, &to);
    p->path->matmul(w, p->input, from, to, p->tokens, p->y, w->rows);
}

/* x (tokens, columns) -> y (tokens, rows). `input` is scratch, but for its steps: 0 asks for the
 * token's own and gets it. `levels` 0: float activations. */
void maqd_linear(const maqd_weight *w, const float *x, int64_t tokens, int32_t levels,
                 maqd_input *input, float *y, int32_t path, int32_t threads) {
    product p = {PATHS[path], w, input, x, tokens, levels, y};
    maqd_run(product_share, &p, threads);
}

/* Rows `ids` of a table of packed words with one scale and offset a row: y (count, columns). */
void maqd_embedding(const int32_t *words, int64_t columns, int32_t levels, int32_t digits,
                    const float *scale, const float *offset, const int64_t *ids, int64_t count,
                    float *y) {
    const int64_t per_row = (columns + digits - 1) / digits;
    const float center = (float)(levels - 1) / 2;
    for (int64_t i = 0; i < count; ++i, y += columns) {
        const int32_t *row = words + ids[i] * per_row;
        const float s = scale[ids[i]], o = offset ? offset[ids[i]] : 0;
        for (int64_t k = 0; k < columns; k += digits) {
            uint32_t rest = (uint32_t)row[k / digits];
            for (int64_t j = k; j < columns && j < k + digits; ++j, rest /= (uint32_t)levels)
                y[j] = (float)((float)(rest % (uint32_t)levels) - center) * s + o;
        }
    }
}
