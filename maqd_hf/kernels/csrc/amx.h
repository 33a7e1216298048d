/* Many tokens by AMX: tiles of 16 tokens x 16 rows, 64 (or 32) inputs a step. A part of path_vnni.c,
 * whose functions do the rest.
 *
 * Tile registers: 0 to 3 hold sums (token tile, row block), 4 and 5 the codes of two token tiles,
 * 6 and 7 those of two row blocks: a plane of a panel is one row of such a tile as it stands. A run
 * of a token's inputs is the row of another (`maqd_input`).
 *
 * Codes of a panel made here are doubled and moved to the middle, 2 c - (M-1), which a signed byte
 * holds up to 4-bit storage: their products then need no correction for the zero point.
 *
 * Of no use (Xeon with AMX, one thread, 2048 x 2048, 512 tokens): lines of results fetched ahead,
 * 2.4 ms as without; with groups of 64, which take 5.3 ms, two tiles by two row blocks with totals in
 * memory, as they are too many for registers then: 6.4; four groups at a time: 5.2. */
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#define AMX __attribute__((target(FEATURES ",amx-tile,amx-int8")))

/* The processor has it and the system lets this process use it. */
static int has_amx(void) {
    unsigned a, b, c, d;
    const long ask = 0x1023, tile_data = 18; /* ARCH_REQ_XCOMP_PERM */
    if (!has_vnni() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;
    return (d >> 24 & 3) == 3 && syscall(SYS_arch_prctl, ask, tile_data) == 0;
}

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16]; /* of a row, for each tile */
    uint8_t rows[16];
} tile_shapes;

/* The intrinsics will not do: gcc 12 drops the stores to what they load. */
INLINE AMX void load_shapes(const tile_shapes *s) { __asm__ volatile("ldtilecfg %0" : : "m"(*s)); }
INLINE AMX void store_shapes(tile_shapes *s) { __asm__ volatile("sttilecfg %0" : "=m"(*s)); }

/* For tiles of so many tokens, at most SQUARE. */
INLINE AMX void shape_tiles(int64_t tokens, int64_t run) {
    tile_shapes s = {.palette = 1};
    for (int i = 0; i < 8; ++i) {
        s.bytes[i] = (uint16_t)(i == 4 || i == 5 ? run : 64);
        s.rows[i] = (uint8_t)(i < 6 ? tokens : run / 4);
    }
    load_shapes(&s);
}

#define STEP(sum, inputs, codes)                                                                   \
    do                                                                                             \
        if (centered)                                                                              \
            _tile_dpbssd(sum, inputs, codes);                                                      \
        else                                                                                       \
            _tile_dpbsud(sum, inputs, codes);                                                      \
    while (0)

/* Products of up to 32 tokens with up to two row blocks. They are finished while the tiles multiply
 * the next ones: the vector units have nothing else to do then. */
typedef struct {
    _Alignas(64) int32_t sums[4 * 256]; /* [token tile][row block][token][row] */
    int64_t token, block, blocks;       /* of the first; row blocks */
    int64_t next, all;                  /* of `all` (token, row block) the next one to finish */
} products;

INLINE AMX void finish_some(const maqd_weight *w, const maqd_input *x, products *p,
                            const int centered, int64_t count, float *y, int64_t y_stride) {
    const int64_t end = p->all - p->next < count ? p->all : p->next + count;
    const int64_t blocks = p->blocks;
    for (; p->next < end; ++p->next) {
        const int64_t i = p->next >> (blocks - 1), b = p->next & (blocks - 1), t = p->token + i;
        const float *of = x->sums + 2 * t;
        i16 sum;
        memcpy(&sum, p->sums + ((i / SQUARE * blocks + b) * SQUARE + i % SQUARE) * ROWS, sizeof sum);
        const v16 scale = load((const float *)w->scale + (p->block + b) * ROWS);
        const float worth = (x->group_step ? x->group_step[t] : 1) * (centered ? 0.5f : 1);
        const v16 total = add_group((v16){0}, scale * worth, sum, centered ? 0 : w->zero * of[0]);
        finish(w, p->block + b, total, of[1], x->step[t], y + t * y_stride);
    }
}

/* `tiles` tiles of tokens from `token` on and `blocks` row blocks of a panel: `now`. `before` gets
 * finished. */
INLINE AMX void multiply_rows(const maqd_weight *w, const maqd_input *x, const uint8_t *panel,
                              const int blocks, const int tiles, const int centered, products *now,
                              products *before, float *y, int64_t y_stride) {
    const int64_t stride = maqd_stride(w), run = x->run, steps = w->columns / run;
    const int64_t next_block = ROWS * stride, next_tile = SQUARE * stride;
    const int64_t some = (2 * 2 * SQUARE + steps - 1) / steps;
    const int8_t *q = x->codes + now->token * stride;
    int32_t *sums = now->sums;
    _tile_zero(0);
    if (blocks > 1) _tile_zero(1);
    if (tiles > 1) _tile_zero(2);
    if (tiles > 1 && blocks > 1) _tile_zero(3);
    for (int64_t i = 0; i < steps; ++i, panel += 16 * run, q += 16 * run) {
        _tile_loadd(6, panel, 64);
        _tile_loadd(4, q, run);
        STEP(0, 4, 6);
        if (blocks > 1) {
            _tile_loadd(7, panel + next_block, 64);
            STEP(1, 4, 7);
        }
        if (tiles > 1) {
            _tile_loadd(5, q + next_tile, run);
            STEP(2, 5, 6);
            if (blocks > 1) STEP(3, 5, 7);
        }
        finish_some(w, x, before, centered, some, y, y_stride);
    }
    _tile_stored(0, sums, 64);
    if (blocks > 1) _tile_stored(1, sums + 256, 64);
    if (tiles > 1) _tile_stored(2, sums + blocks * 256, 64);
    if (tiles > 1 && blocks > 1) _tile_stored(3, sums + 3 * 256, 64);
}

/* A group of one tile of tokens and one row block; `odd` ones have registers of their own. */
INLINE AMX void multiply_group(const uint8_t *panel, const int8_t *q, int64_t run, int64_t steps,
                               const int odd, const int centered, int32_t *sums) {
    if (odd)
        _tile_zero(1);
    else
        _tile_zero(0);
    for (int64_t i = 0; i < steps; ++i, panel += 16 * run, q += 16 * run) {
        if (odd) {
            _tile_loadd(7, panel, 64);
            _tile_loadd(5, q, run);
            STEP(1, 5, 7);
        } else {
            _tile_loadd(6, panel, 64);
            _tile_loadd(4, q, run);
            STEP(0, 4, 6);
        }
    }
    if (odd)
        _tile_stored(1, sums, 64);
    else
        _tile_stored(0, sums, 64);
}
#undef STEP

/* Groups of inputs: what each is worth is added up in registers, while the tiles multiply the
 * next one. */
INLINE AMX void tile_of_groups(const maqd_weight *w, const maqd_input *x, const uint8_t *panel,
                               int64_t block, int64_t token, const int64_t live,
                               const int centered, const int steps_of_groups, float *y,
                               int64_t y_stride) {
    const int64_t groups = w->groups, width = w->columns / groups, steps = width / x->run;
    const int8_t *q = x->codes + token * maqd_stride(w);
    const float *of = x->sums + token * (groups + 1);
    const float *own = steps_of_groups ? x->group_step + token * groups : NULL;
    _Alignas(64) int32_t sums[2][256];
    v16 total[SQUARE];
    for (int64_t t = 0; t < live; ++t) {
        total[t] = (v16){0};
        __builtin_prefetch(y + (token + t) * y_stride + block * ROWS, 1);
    }
    multiply_group(panel, q, x->run, steps, 0, centered, sums[0]);
    for (int64_t g = 0; g < groups; ++g) {
        panel += 16 * width, q += 16 * width;
        if (g + 1 < groups && g % 2)
            multiply_group(panel, q, x->run, steps, 0, centered, sums[0]);
        else if (g + 1 < groups)
            multiply_group(panel, q, x->run, steps, 1, centered, sums[1]);
        const v16 scale = scales_of(w, block, g) * (centered ? 0.5f : 1);
        for (int64_t t = 0; t < live; ++t) {
            i16 sum;
            memcpy(&sum, sums[g % 2] + t * ROWS, sizeof sum);
            const v16 worth = own ? scale * own[t * groups + g] : scale;
            total[t] = add_group(total[t], worth, sum,
                                 centered ? 0 : w->zero * of[t * (groups + 1) + g]);
        }
    }
    for (int64_t t = 0; t < live; ++t)
        finish(w, block, total[t], of[t * (groups + 1) + groups], x->step[token + t],
               y + (token + t) * y_stride);
}

/* Tokens from..to and row blocks block..last of one panel. Tokens outside, so that results are
 * written some hundred bytes at a time. */
INLINE AMX void rows_of_panel(const maqd_weight *w, const maqd_input *x, const uint8_t *panel,
                              int64_t block, int64_t last, const int centered, int64_t from,
                              int64_t to, float *y, int64_t y_stride) {
    const int64_t stride = maqd_stride(w) * ROWS;
    products of[2], *now = of, *before = of + 1;
    int64_t shaped = 0;
    before->next = before->all = 0, before->blocks = 1;
    for (int64_t t = from, live; t < to; t += live) {
        live = to - t >= 2 * SQUARE ? 2 * SQUARE : to - t >= SQUARE ? SQUARE : to - t;
        const int64_t shape = live < SQUARE ? live : SQUARE;
        if (shape != shaped) shape_tiles(shaped = shape, x->run);
        for (int64_t b = block; b < last; b += 2) {
            const uint8_t *pair = panel + (b - block) * stride;
            products *other = now;
            now->token = t, now->block = b, now->blocks = last - b < 2 ? 1 : 2;
            now->next = 0, now->all = now->blocks * live;
            if (live > SQUARE && now->blocks > 1)
                multiply_rows(w, x, pair, 2, 2, centered, now, before, y, y_stride);
            else if (live > SQUARE)
                multiply_rows(w, x, pair, 1, 2, centered, now, before, y, y_stride);
            else if (now->blocks > 1)
                multiply_rows(w, x, pair, 2, 1, centered, now, before, y, y_stride);
            else
                multiply_rows(w, x, pair, 1, 1, centered, now, before, y, y_stride);
            now = before, before = other;
        }
    }
    finish_some(w, x, before, centered, before->all, y, y_stride);
}

INLINE AMX void groups_of_panel(const maqd_weight *w, const maqd_input *x, const uint8_t *panel,
                                int64_t block, int64_t last, const int centered, int64_t from,
                                int64_t to, float *y, int64_t y_stride) {
    const int64_t stride = maqd_stride(w) * ROWS;
    shape_tiles(to - from < SQUARE ? to - from : SQUARE, x->run);
    for (int64_t t = from; t < to; t += SQUARE) {
        const int64_t live = to - t < SQUARE ? to - t : SQUARE;
        if (live < SQUARE) shape_tiles(live, x->run);
        for (int64_t b = block; b < last; ++b) {
            const uint8_t *rows = panel + (b - block) * stride;
            if (x->group_step)
                tile_of_groups(w, x, rows, b, t, live, centered, 1, y, y_stride);
            else if (live == SQUARE)
                tile_of_groups(w, x, rows, b, t, SQUARE, centered, 0, y, y_stride);
            else
                tile_of_groups(w, x, rows, b, t, live, centered, 0, y, y_stride);
        }
    }
}

INLINE AMX void multiply_panel(const maqd_weight *w, const maqd_input *x, const uint8_t *panel,
                               int64_t block, int64_t last, const int centered, int64_t from,
                               int64_t to, float *y, int64_t y_stride) {
    if (w->groups == 1)
        rows_of_panel(w, x, panel, block, last, centered, from, to, y, y_stride);
    else
        groups_of_panel(w, x, panel, block, last, centered, from, to, y, y_stride);
}

/* Bytes of inputs that stay in a core's own cache (2 MiB) while the row blocks pass by. */
#define NEAR (3 << 19)

static AMX void matmul_tiles(const maqd_weight *w, const maqd_input *x, int64_t first, int64_t last,
                             int64_t tokens, float *y, int64_t y_stride, uint8_t *scratch) {
    if (x->run == 4) {
        matmul(w, x, first, last, tokens, y, y_stride, scratch);
        return;
    }
    const int64_t stride = maqd_stride(w), pieces = tokens * stride / NEAR + 1;
    const int64_t pairs = ((tokens + pieces - 1) / pieces + 2 * SQUARE - 1) / (2 * SQUARE);
    const int64_t piece = pairs * 2 * SQUARE;
    const int64_t wide = maqd_panel_blocks(&maqd_path_amx, tokens, stride);
    tile_shapes others; /* the caller's: other libraries keep theirs */
    store_shapes(&others);
    for (int64_t from = 0; from < tokens; from += piece) {
        const int64_t to = tokens - from < piece ? tokens : from + piece;
        for (int64_t block = first, end; block < last; block = end) {
            end = last - block < wide ? last : block + wide;
            const uint8_t *panel = unpack(w, block, end - block, 1, scratch);
            if (w->bits == 8)
                multiply_panel(w, x, panel, block, end, 0, from, to, y, y_stride);
            else
                multiply_panel(w, x, panel, block, end, 1, from, to, y, y_stride);
        }
    }
    load_shapes(&others);
}

const maqd_path maqd_path_amx = {"amx-int8", has_amx, TILE, 1, matmul_tiles, quantize, spread, norm,
                                 rope, hadamard, attend, activate, keep};
