/* What the files of this library share: the layout of a packed weight, the functions of an
 * instruction set ("isa"), the threads of a run, scratch memory.
 *
 * Layout "16 x 4": rows lie in blocks of 16, and the units of a block one after the other, so that
 * a thread reads one stream. A plane of 64 bytes holds 4 bytes for each of 16 rows: byte 4*r + j
 * belongs to row r and to inputs 4*p + j, where p counts the positions a byte has room for. One
 * plane is thus the operand of one dot-product instruction per position. What a unit is, by `bits`:
 *
 *   8, 4, 2   one plane; position p is bits p*b.. of a byte, 8/b positions
 *   3         three planes, 8 positions: two planes with the low 2 bits (as above, 4 positions
 *             each) and one with the high bit
 *   TRITS     one plane, 5 positions: byte = ceil(v * 256 / 243), v the number of 5 base-3 digits,
 *             position 0 first. With q_0 = byte and q_{p+1} = 3 q_p mod 256 digit p is
 *             (3 q_p - q_{p+1}) / 256, exactly: dot products need no decoding
 *
 * Masks select a position in place, without a shift; every position has an accumulator of its own,
 * and the accumulators are shifted at the end. For many tokens row blocks are spread to bytes (a
 * "panel", planes of 8 bits) and multiplied with TILE tokens at a time, or (amx.inc) with 16.
 *
 * With codes c, activation codes q, z = (M-1)/2 and h = 0 or 1/2 (odd or even activation levels):
 *
 *   y = xs * ( sum_g s_g (sum c q - z sum_g q) + o sum q + constant ) + bias
 *
 * where `constant` = sum_g s_g h (sum_g c - z n_g) + o h n comes ready from the repacking side.
 * With a step xs_g for every group (and odd activation levels) it is
 *
 *   y = sum_g xs_g s_g (sum c q - z sum_g q) + o sum_g xs_g sum_g q + bias
 *
 * Float activations ("weight-only") take the place of q, with xs = 1 and a constant of 0.
 *
 * Each isa_*.c compiles isa.inc for its instruction set (isa_vnni.c for AMX too, with amx.inc); the
 * choice is made at run time, never by -march=native.
 */
#ifndef MAQD_INTERNAL_H
#define MAQD_INTERNAL_H

#include <stddef.h>
#include <stdint.h>

#include "maqd.h"

#define ROWS 16
#define TRITS 5
#define BLOCKS 2 /* row blocks that are multiplied together */
#define HIDDEN __attribute__((visibility("hidden")))
#if defined(__x86_64__) && defined(__linux__) && (defined(__clang__) || __GNUC__ > 10)
#define MAQD_AMX /* the compiler knows AMX, and the system is asked for it as Linux wants it */
#endif

/* Marks a function that is compiled for several instruction sets, one of which is chosen when the
 * library is loaded: for loops that the compiler vectorises by itself. "arch=haswell" would ask for
 * Intel's processor of that name and not for what it can do, and leave every other one without
 * AVX-512 with SSE2. */
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#if __GNUC__ >= 12
#define CLONES __attribute__((target_clones("avx512f", "arch=x86-64-v3", "default")))
#else
#define CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#endif
#else
#define CLONES
#endif

static inline int64_t maqd_planes(int32_t bits) { return bits == 3 ? 3 : 1; }
static inline int64_t maqd_inputs(int32_t bits) {
    return bits == 3 ? 32 : bits == TRITS ? 20 : 32 / bits;
}
/* Inputs of a row, padded to whole units. */
static inline int64_t maqd_stride(const maqd_weight *w) { return w->units * maqd_inputs(w->bits); }
static inline int64_t maqd_blocks(const maqd_weight *w) { return (w->rows + ROWS - 1) / ROWS; }

/* Activations. `tile` tokens lie together, `run` codes of one after as many of the next: code k of
 * token t is at (t / tile * tile) * stride + (k / run * tile + t % tile) * run + k % run. A tile of
 * 1 is plain rows. Codes beyond the columns are zero, or nobody reads them (runs of more than 4).
 */
typedef struct {
    int8_t *codes;     /* (tokens rounded up to the tile, stride) */
    float *step;       /* (tokens) */
    float *group_step; /* (tokens, groups), `step` is 1 then and the last sum is in units of the
                          steps; or NULL: all groups of a token have its step */
    float *sums;   /* (tokens, groups + 1): sum of the codes (or values) of every group, and all */
    float *values; /* (tokens, stride): float activations have these instead of codes, else NULL */
    int64_t tile, run;
} maqd_input;

/* Keys are kept in blocks of 16 positions, (kv heads, positions / 16, head_dim, 16): a query then
 * meets 16 keys per multiplication. Values are (kv heads, positions, value_stride). Both are floats
 * or, with scales (kv heads, positions), bytes in units of their position's scale. */
#define QUERIES 24 /* that meet a key together, at most */
#define KEYS 64    /* positions that are met together */
typedef struct {
    const float *query[QUERIES];          /* all of them meet the same head of keys */
    int64_t from[QUERIES], seen[QUERIES]; /* positions each may see, the second not included */
    float *out[QUERIES];
    int queries;
    int64_t first, last; /* the part of the positions to be met, the second not included */
    int partial;         /* out: sums of weights * values, and behind them the largest score and
                            the sum of the weights; what other parts gave is to be added */
    const void *keys, *values;
    const float *key_scales, *value_scales; /* NULL: keys and values are floats */
    const uint8_t *mask;                    /* (positions) or NULL: 0 hides */
    int64_t head_dim, value_stride;
    float scale;
    float *scratch; /* maqd_desk floats */
} maqd_attention;

/* Floats of scratch that an attention wants. */
static inline int64_t maqd_desk(int64_t head_dim, int64_t value_stride) {
    return (QUERIES + KEYS) * (head_dim + value_stride) + QUERIES * KEYS;
}

/* The functions of an instruction set. */
typedef struct {
    const char *name;
    int (*supported)(void);
    int64_t tile;   /* tokens that share one pass over a panel */
    int32_t square; /* many tokens are multiplied as square tiles: runs of inputs, not of 4 */
    /* Multiplies row blocks first..last-1 with all tokens; y has y_stride floats a token. `panel`
     * is scratch, aligned to 64 bytes. */
    void (*matmul)(const maqd_weight *w, const maqd_input *x, int64_t first, int64_t last,
                   int64_t tokens, float *y, int64_t y_stride, uint8_t *panel);
    /* Quantizes one token: codes = clamp(rint(x / step + (M-1)/2), 0, M-1) - M/2 (floor), `run` of
     * them together and such runs `every` bytes apart. A step of 0 asks for the token's own, absmax
     * /
     * ((M-1)/2) * clip_ratio; `group_step`, unless NULL, for that of every group. NaN counts as the
     * largest code, infinity clips. */
    void (*quantize)(const float *x, int64_t columns, int64_t groups, int32_t levels,
                     float clip_ratio, float *step, float *group_step, int8_t *codes, int64_t run,
                     int64_t every, int64_t stride, float *sums);
    /* Copies, pads and sums one token of float activations. */
    void (*spread)(const float *x, int64_t columns, int64_t groups, float *values, int64_t stride,
                   float *sums);
    void (*norm)(const maqd_norm *norm, int first, const float *x, float *y);
    void (*rope)(float *x, const float *cosine, const float *sine, int64_t half);
    /* Multiplies every `size` neighbors of x, a power of two, with the normalized Hadamard
     * matrix. */
    void (*hadamard)(const float *x, int64_t count, int64_t size, float *y);
    void (*attend)(const maqd_attention *a);
    /* x = silu(x) * up, relu(x) or gelu(x), by `kind` */
    void (*activate)(int32_t kind, float *x, const float *up, int64_t count);
    /* Stores x in 255 steps of its largest magnitude, bytes `every` bytes apart; returns the scale.
     * NaN becomes the least byte, infinity clips at the largest float. */
    float (*to_bytes)(const float *x, int64_t count, int8_t *bytes, int64_t every);
} maqd_isa;

extern HIDDEN const maqd_isa maqd_isa_portable, maqd_isa_avx2, maqd_isa_vnni, maqd_isa_amx,
    maqd_isa_neon;
HIDDEN const maqd_isa *maqd_get_isa(int32_t isa);

/* Writes row `id` of a table to y (columns). */
HIDDEN void maqd_look_up(const maqd_table *table, int64_t id, float *y);

/* Runs work(argument, team, thread, threads) on up to `threads` threads at once, and no more than
 * there are pieces of work. */
typedef struct maqd_team maqd_team;
typedef void (*maqd_work)(void *argument, maqd_team *team, int thread, int threads);
HIDDEN void maqd_run(maqd_work work, void *argument, int64_t pieces, int threads);
/* The same for pieces that do not wait for one another: pieces(argument, from, to) on every thread,
 * with its share of 0..count. */
typedef void (*maqd_pieces)(const void *argument, int64_t from, int64_t to);
HIDDEN void maqd_run_pieces(maqd_pieces pieces, const void *argument, int64_t count, int threads);
/* The part of 0..count that belongs to a thread. */
static inline void maqd_share(int64_t count, int thread, int threads, int64_t *from, int64_t *to) {
    *from = count * thread / threads;
    *to = count * (thread + 1) / threads;
}
/* Every thread of the team waits here for the others. */
HIDDEN void maqd_barrier(maqd_team *team);

/* How many threads a run gets, by what those before it lost; see crowd.c. All times are in
 * nanoseconds; a crowd begins as zeros. These three functions are visible, for the tests. */
typedef struct {
    int32_t limit;        /* threads of a run, 0: as many as are asked for */
    int64_t until;        /* when the limit is lifted */
    int64_t pause;        /* how long the last one held */
    int64_t asleep, wall; /* what the runs that are being judged slept and took */
} maqd_crowd;
int32_t maqd_crowd_threads(maqd_crowd *crowd, int32_t asked, int64_t now);
void maqd_crowd_note(maqd_crowd *crowd, int32_t asked, int32_t used, int64_t asleep, int64_t wall,
                     int64_t now);
void maqd_spin_less(int crowded);

/* Tokens from which on products are made with panels and tiles. */
#define MANY 4
#define SQUARE 16 /* tokens of a square tile */

/* Row blocks of a panel for `stride` inputs: where many tokens meet them, as many as WIDE bytes
 * hold, so that a token's results lie side by side; else those that are multiplied together. */
#define WIDE (1 << 18) /* an eighth of a second-level cache */
static inline int maqd_wide(const maqd_isa *isa, int64_t tokens) {
    return isa->square && tokens >= 64;
}
static inline int64_t maqd_panel_blocks(const maqd_isa *isa, int64_t tokens, int64_t stride) {
    const int64_t most = maqd_wide(isa, tokens) ? WIDE / (ROWS * stride) : BLOCKS;
    return most < 2 * BLOCKS ? BLOCKS : most < 4 * BLOCKS ? 2 * BLOCKS : 4 * BLOCKS;
}
/* Bytes that are enough for the panels of all weights with up to `stride` inputs. */
static inline int64_t maqd_panel(const maqd_isa *isa, int64_t tokens, int64_t stride) {
    const int64_t least = BLOCKS * ROWS * stride;
    return maqd_wide(isa, tokens) && least < WIDE ? WIDE : least;
}

/* Says in `input` how the inputs of a weight lie. */
static inline void maqd_arrange(const maqd_isa *isa, const maqd_weight *w, int64_t tokens,
                                maqd_input *input) {
    const int64_t width = w->columns / w->groups;
    input->tile = tokens < MANY || input->values ? 1 : isa->tile;
    input->run = 4;
    if (isa->square && input->tile > 1 && width % 32 == 0) {
        input->tile = SQUARE;
        input->run = width % 64 ? 32 : 64;
    }
}

/* Makes row `token` of `input` of one token's `x`: rotates it, then quantizes it or, for `levels`
 * 0, copies it. `rotated` has room for a row if the weight wants it rotated. */
static inline void maqd_take(const maqd_isa *isa, const maqd_weight *w, const float *x,
                             int32_t levels, maqd_input *input, int64_t token, float *rotated) {
    const int64_t stride = maqd_stride(w), sums = w->groups + 1;
    const int64_t tile = input->tile, run = input->run;
    int8_t *codes = input->codes + token / tile * tile * stride + token % tile * run;
    float *group_step = input->group_step ? input->group_step + token * w->groups : NULL;
    if (w->rotation > 1) {
        isa->hadamard(x, w->columns, w->rotation, rotated);
        x = rotated;
    }
    if (levels)
        isa->quantize(x, w->columns, w->groups, levels, w->clip_ratio, input->step + token,
                      group_step, codes, run, run * tile, stride, input->sums + token * sums);
    else
        isa->spread(x, w->columns, w->groups, input->values + token * stride, stride,
                    input->sums + token * sums);
}

/* Visible for the tests, see linear.c. */
void maqd_take_inputs(const maqd_weight *w, const float *x, int64_t tokens, int32_t levels,
                      maqd_input *input, float *rotated, int32_t isa);

/* Scratch in one piece: laid out once without a base, to count, and once to hand out. */
typedef struct {
    char *base; /* NULL while counting */
    size_t used;
} maqd_arena;

static inline void *maqd_cut(maqd_arena *memory, int64_t bytes) {
    void *piece = memory->base ? memory->base + memory->used : NULL;
    memory->used += ((size_t)bytes + 63) / 64 * 64;
    return piece;
}

static inline float *maqd_cut_floats(maqd_arena *memory, int64_t count) {
    return maqd_cut(memory, count * (int64_t)sizeof(float));
}

/* Room for what `tokens` tokens of at most `stride` padded inputs become, however they lie. */
static inline maqd_input maqd_cut_input(maqd_arena *memory, int64_t tokens, int64_t stride,
                                        int64_t groups, int floats, int group_steps) {
    maqd_input input = {0};
    input.codes = maqd_cut(memory, (tokens < MANY ? tokens : tokens + SQUARE - 1) * stride);
    input.step = maqd_cut_floats(memory, tokens);
    input.group_step = group_steps ? maqd_cut_floats(memory, tokens * groups) : NULL;
    input.sums = maqd_cut_floats(memory, tokens * (groups + 1));
    input.values = floats ? maqd_cut_floats(memory, tokens * stride) : NULL;
    return input;
}

#endif
