/* Repacking a layer's words, its product with inputs, rows of a packed table. */
#include "maqd.h"

#include <stdlib.h>

static const maqd_path *const PATHS[] = {
    &maqd_path_portable,
#if defined(__x86_64__)
    &maqd_path_avx2,
    &maqd_path_vnni,
#if defined(MAQD_AMX)
    &maqd_path_amx,
#endif
#elif defined(__aarch64__)
    &maqd_path_neon,
#endif
};

const maqd_path *maqd_get_path(int32_t path) { return PATHS[path]; }

/* Number of paths this build knows; `maqd_supported(i)` says whether this machine runs path i. */
int32_t maqd_paths(void) { return (int32_t)(sizeof PATHS / sizeof PATHS[0]); }
const char *maqd_path_name(int32_t path) { return PATHS[path]->name; }
int32_t maqd_supported(int32_t path) { return PATHS[path]->supported(); }
/* The path that the environment asks for. Python's `os.environ` takes ten times as long to say it,
 * a twentieth of a token that goes through a model's own modules. */
const char *maqd_asked_path(void) { return getenv("MAQD_KERNEL"); }

typedef struct {
    const int32_t *words;
    int64_t rows, columns;
    int32_t levels, digits, bits;
    uint8_t *codes;
} repacking;

/* Puts code `c` of input `within` of a unit into row `r`; trits are scaled when all are in. */
static void put(uint8_t *unit, int32_t bits, int64_t r, int64_t within, uint32_t c) {
    static const uint8_t power[] = {81, 27, 9, 3, 1};
    const int64_t p = within / 4;
    uint8_t *byte = unit + 4 * r + within % 4;
    if (bits == TRITS) {
        *byte += (uint8_t)(c * power[p]);
    } else if (bits == 3) {
        byte[p / 4 * 64] |= (uint8_t)((c & 3) << (2 * (p % 4)));
        byte[128] |= (uint8_t)((c >> 2) << p);
    } else {
        *byte |= (uint8_t)(c << (bits * p));
    }
}

static void repack_share(void *argument, maqd_team *team, int thread, int threads) {
    (void)team;
    const repacking *r = argument;
    const int64_t per_row = (r->columns + r->digits - 1) / r->digits;
    const int64_t inputs = maqd_inputs(r->bits), size = maqd_planes(r->bits) * 64;
    const int64_t block_size = (r->columns + inputs - 1) / inputs * size;
    const uint32_t levels = (uint32_t)r->levels;
    int64_t block, last;
    maqd_share((r->rows + ROWS - 1) / ROWS, thread, threads, &block, &last);
    for (; block < last; ++block) {
        uint8_t *codes = r->codes + block * block_size;
        for (int64_t n = block * ROWS; n < r->rows && n < (block + 1) * ROWS; ++n) {
            const int32_t *words = r->words + n * per_row;
            int64_t k = 0;
            for (int64_t i = 0; i < per_row; ++i) {
                uint32_t rest = (uint32_t)words[i];
                for (int d = 0; d < r->digits && k < r->columns; ++d, ++k, rest /= levels)
                    put(codes + k / inputs * size, r->bits, n % ROWS, k % inputs, rest % levels);
            }
        }
        for (int64_t i = 0; r->bits == TRITS && i < block_size; ++i)
            codes[i] = (uint8_t)((codes[i] * 256 + 242) / 243);
    }
}

/* Dense words (rows, words per row; mixed radix, see packing.py) to layout 16 x 4; `codes` is zero
 * before. */
void maqd_repack(const int32_t *words, int64_t rows, int64_t columns, int32_t levels,
                 int32_t digits, int32_t bits, uint8_t *codes, int32_t threads) {
    repacking r = {words, rows, columns, levels, digits, bits, codes};
    maqd_run(repack_share, &r, (rows + ROWS - 1) / ROWS, threads);
}

typedef struct {
    const maqd_path *path;
    const maqd_weight *weight;
    maqd_input input;
    const float *x, *step;
    int64_t tokens, step_every;
    int32_t levels;
    float *y;
    float *rotated; /* a row for every thread */
    uint8_t *panels;
} product;

static void product_share(void *argument, maqd_team *team, int thread, int threads) {
    product *p = argument;
    const maqd_weight *w = p->weight;
    uint8_t *panel = p->panels + thread * maqd_panel(p->path, p->tokens, maqd_stride(w));
    int64_t from, to;
    /* backwards: a single token belongs to the caller's thread, which is there first */
    maqd_share(p->tokens, threads - 1 - thread, threads, &from, &to);
    for (int64_t t = from; t < to; ++t) {
        p->input.step[t] = p->step ? p->step[t * p->step_every] : 0;
        maqd_take(p->path, w, p->x + t * w->columns, p->levels, &p->input, t,
                  p->rotated + thread * w->columns);
    }
    maqd_barrier(team);
    maqd_share(maqd_blocks(w), thread, threads, &from, &to);
    if (from < to) p->path->matmul(w, &p->input, from, to, p->tokens, p->y, w->rows, panel);
}

/* x (tokens, columns) -> y (tokens, rows). `levels` 0: float activations; else `step` is theirs,
 * one every `step_every` floats (0: the same for all), where 0 asks for the token's own. Returns
 * 0, or 1 if memory is short. */
int32_t maqd_linear(const maqd_weight *w, const float *x, int64_t tokens, int32_t levels,
                    const float *step, int64_t step_every, float *y, int32_t path,
                    int32_t threads) {
    product p = {.path = PATHS[path], .weight = w, .x = x, .step = step, .tokens = tokens,
                 .step_every = step_every, .levels = levels, .y = y};
    char *base = NULL;
    for (int pass = 0; pass < 2; ++pass) {
        maqd_arena memory = {base, 0};
        if (base) memory.base += 64 - (uintptr_t)base % 64;
        p.input = maqd_cut_input(&memory, tokens, maqd_stride(w), w->groups, !levels,
                                 w->group_steps);
        p.rotated = maqd_cut_floats(&memory, threads * w->columns);
        p.panels = maqd_cut(&memory, threads * maqd_panel(p.path, tokens, maqd_stride(w)));
        if (!base && !(base = malloc(memory.used + 64))) return 1;
    }
    maqd_arrange(p.path, w, tokens, &p.input);
    maqd_run(product_share, &p, tokens + maqd_blocks(w), threads);
    free(base);
    return 0;
}

/* What maqd_linear makes of its inputs, row by row: `input` holds the results and the steps.
 * `rotated` has room for a row. */
void maqd_take_inputs(const maqd_weight *w, const float *x, int64_t tokens, int32_t levels,
                      maqd_input *input, float *rotated, int32_t path) {
    for (int64_t t = 0; t < tokens; ++t)
        maqd_take(PATHS[path], w, x + t * w->columns, levels, input, t, rotated);
}

typedef struct {
    const maqd_path *path;
    const float *x;
    float *y;
    int64_t rows, columns, size;
} rotation;

static void rotate_share(void *argument, maqd_team *team, int thread, int threads) {
    (void)team;
    const rotation *r = argument;
    int64_t from, to;
    maqd_share(r->rows, thread, threads, &from, &to);
    if (from < to)
        r->path->hadamard(r->x + from * r->columns, (to - from) * r->columns, r->size,
                          r->y + from * r->columns);
}

/* Every `size` neighbours of x (rows, columns) times the normalised Hadamard matrix, to y. */
void maqd_hadamard(const float *x, float *y, int64_t rows, int64_t columns, int64_t size,
                   int32_t path, int32_t threads) {
    rotation r = {PATHS[path], x, y, rows, columns, size};
    maqd_run(rotate_share, &r, rows, threads);
}

typedef struct {
    const maqd_path *path;
    const maqd_norm *norm;
    const float *x;
    const uint8_t *first;
    float *y;
    int64_t rows;
} normalizing;

static void normalize_share(void *argument, maqd_team *team, int thread, int threads) {
    (void)team;
    const normalizing *n = argument;
    const int64_t features = n->norm->features;
    int64_t from, to;
    maqd_share(n->rows, thread, threads, &from, &to);
    for (int64_t i = from; i < to; ++i)
        n->path->norm(n->norm, n->first && n->first[i], n->x + i * features, n->y + i * features);
}

/* Rows of x (rows, features) normalised, to y; `first` (rows) or NULL: 1 on first tokens. */
void maqd_normalize(const maqd_norm *norm, const float *x, const uint8_t *first, int64_t rows,
                    float *y, int32_t path, int32_t threads) {
    normalizing n = {PATHS[path], norm, x, first, y, rows};
    maqd_run(normalize_share, &n, rows, threads);
}

/* Row `id` of a table of packed words with one scale and offset a row: y (columns). */
void maqd_look_up(const maqd_table *table, int64_t id, float *y) {
    const int64_t digits = table->digits, columns = table->columns;
    const int32_t *row = table->words + id * ((columns + digits - 1) / digits);
    const uint32_t levels = (uint32_t)table->levels;
    const float s = table->scale[id], o = table->offset ? table->offset[id] : 0;
    const float center = (float)(table->levels - 1) / 2;
    for (int64_t k = 0; k < columns; k += digits) {
        uint32_t rest = (uint32_t)row[k / digits];
        for (int64_t j = k; j < columns && j < k + digits; ++j, rest /= levels)
            y[j] = (((float)(rest % levels) - center) * s + o) * table->output_scale;
    }
}

/* Rows `ids` of a table: y (count, columns). */
void maqd_embedding(const maqd_table *table, const int64_t *ids, int64_t count, float *y) {
    for (int64_t i = 0; i < count; ++i) maqd_look_up(table, ids[i], y + i * table->columns);
}
