/* Repacking a layer's words, and its product with inputs. */
#include <stdlib.h>

#include "internal.h"

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

static void repack_blocks(const void *argument, int64_t block, int64_t last) {
    const repacking *r = argument;
    const int64_t per_row = (r->columns + r->digits - 1) / r->digits;
    const int64_t inputs = maqd_inputs(r->bits), size = maqd_planes(r->bits) * 64;
    const int64_t block_size = (r->columns + inputs - 1) / inputs * size;
    const uint32_t levels = (uint32_t)r->levels;
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

void maqd_repack(const int32_t *words, int64_t rows, int64_t columns, int32_t levels,
                 int32_t digits, int32_t bits, uint8_t *codes, int32_t threads) {
    repacking r = {words, rows, columns, levels, digits, bits, codes};
    maqd_run_pieces(repack_blocks, &r, (rows + ROWS - 1) / ROWS, threads);
}

typedef struct {
    const maqd_isa *isa;
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
    uint8_t *panel = p->panels + thread * maqd_panel(p->isa, p->tokens, maqd_stride(w));
    int64_t from, to;
    /* backwards: a single token belongs to the caller's thread, which is there first */
    maqd_share(p->tokens, threads - 1 - thread, threads, &from, &to);
    for (int64_t t = from; t < to; ++t) {
        p->input.step[t] = p->step ? p->step[t * p->step_every] : 0;
        maqd_take(p->isa, w, p->x + t * w->columns, p->levels, &p->input, t,
                  p->rotated + thread * w->columns);
    }
    maqd_barrier(team);
    maqd_share(maqd_blocks(w), thread, threads, &from, &to);
    if (from < to) p->isa->matmul(w, &p->input, from, to, p->tokens, p->y, w->rows, panel);
}

int32_t maqd_linear(const maqd_weight *w, const float *x, int64_t tokens, int32_t levels,
                    const float *step, int64_t step_every, float *y, int32_t isa, int32_t threads) {
    product p = {.isa = maqd_get_isa(isa),
                 .weight = w,
                 .x = x,
                 .step = step,
                 .tokens = tokens,
                 .step_every = step_every,
                 .levels = levels,
                 .y = y};
    char *base = NULL;
    for (int pass = 0; pass < 2; ++pass) {
        maqd_arena memory = {base, 0};
        if (base) memory.base += 64 - (uintptr_t)base % 64;
        p.input =
            maqd_cut_input(&memory, tokens, maqd_stride(w), w->groups, !levels, w->group_steps);
        p.rotated = maqd_cut_floats(&memory, threads * w->columns);
        p.panels = maqd_cut(&memory, threads * maqd_panel(p.isa, tokens, maqd_stride(w)));
        if (!base && !(base = malloc(memory.used + 64))) return 1;
    }
    maqd_arrange(p.isa, w, tokens, &p.input);
    maqd_run(product_share, &p, tokens + maqd_blocks(w), threads);
    free(base);
    return 0;
}

/* Makes of its inputs, row by row, what maqd_linear makes of them, for the tests: `input` holds the
 * results and the steps, `rotated` has room for a row. */
void maqd_take_inputs(const maqd_weight *w, const float *x, int64_t tokens, int32_t levels,
                      maqd_input *input, float *rotated, int32_t isa) {
    for (int64_t t = 0; t < tokens; ++t)
        maqd_take(maqd_get_isa(isa), w, x + t * w->columns, levels, input, t, rotated);
}
