/* The compiled library without Python: every entry on buffers of exactly the size it may touch,
 * against sums in double. Built and run by .ci/valgrind, which sees a byte too far; alone it is a
 * test of the results. Exits with 1 if one is wrong. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../../maqd_hf/kernels/csrc/internal.h"

static int failures, checks;
static void expect(int fine, const char *what, int a, int b, int c, int d) {
    ++checks;
    if (fine) return;
    ++failures;
    printf("wrong: %s %d %d %d %d\n", what, a, b, c, d);
}

static uint64_t state_of_random = 1;
static uint32_t draw(uint32_t below) { /* below > 0 */
    state_of_random = state_of_random * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(state_of_random >> 33) % below;
}
static float real(void) { return (float)draw(20001) / 10000 - 1; }

/* Freed at the end of a case, so that what is used after it shows. */
static void *owned[4096];
static int owns;
static void *get(int64_t bytes) {
    void *piece = malloc((size_t)bytes + !bytes);
    if (!piece || owns == 4096) exit(2);
    return owned[owns++] = piece;
}
static void drop(void) {
    while (owns) free(owned[--owns]);
}
static float *reals(int64_t count) {
    float *p = get(count * 4);
    for (int64_t i = 0; i < count; ++i) p[i] = real();
    return p;
}

/* ------------------------------------------------------------------------------- packed product */

typedef struct {
    maqd_weight w;
    double *matrix; /* (rows, columns) */
    int activation_levels;
} layer;

static int32_t digits_of(int32_t levels) {
    int32_t count = 0;
    for (uint64_t power = levels; power <= (uint64_t)1 << 32; power *= levels) ++count;
    return count;
}

static int32_t *pack(const uint8_t *codes, int64_t columns, int32_t levels) {
    const int32_t digits = digits_of(levels);
    const int64_t words = (columns + digits - 1) / digits;
    int32_t *out = get(words * 4);
    for (int64_t i = 0; i < words; ++i) {
        uint64_t word = 0;
        for (int64_t d = digits - 1; d >= 0; --d)
            word = word * levels + (i * digits + d < columns ? codes[i * digits + d] : 0);
        out[i] = (int32_t)(uint32_t)word;
    }
    return out;
}

static layer make(int32_t levels, int32_t bits, int64_t rows, int64_t columns, int64_t groups,
                  int with, int activation_levels) {
    const int64_t blocks = (rows + 15) / 16,
                  units = (columns + maqd_inputs(bits) - 1) / maqd_inputs(bits);
    const int32_t digits = digits_of(levels);
    const int64_t words = (columns + digits - 1) / digits;
    const double zero = (levels - 1) / 2.0;
    int32_t *all = get(rows * words * 4);
    float *scale = get(blocks * 64), *offset = get(blocks * 64), *bias = get(blocks * 64);
    uint16_t *group_scale = get(blocks * groups * 32);
    float *constant = get(blocks * 64);
    layer l = {.activation_levels = activation_levels};
    uint8_t *panels = NULL;
    if (posix_memalign((void **)&panels, 64, (size_t)(blocks * units * maqd_planes(bits) * 64)))
        exit(2);
    owned[owns++] = panels;
    memset(panels, 0, (size_t)(blocks * units * maqd_planes(bits) * 64));
    l.matrix = get(rows * columns * 8);
    for (int64_t n = 0; n < blocks * 16; ++n) {
        uint8_t codes[512];
        double half = 0;
        offset[n] = with && n < rows ? real() / 8 : 0;
        bias[n] = with && n < rows ? real() : 0;
        constant[n] = 0;
        scale[n] = n < rows ? real() + 1.5f : 0;
        for (int64_t g = 0; g < groups; ++g) /* bfloat16 from 0.5 to 2.5 */
            group_scale[(n / 16 * groups + g) * 16 + n % 16] =
                n < rows ? (uint16_t)(0x3f00 + draw(0x120)) : 0;
        if (n >= rows) continue;
        for (int64_t k = 0; k < columns; ++k) {
            codes[k] = (uint8_t)(draw(4) ? draw(levels) : levels - 1);
            const uint32_t in_group =
                (uint32_t)group_scale[(n / 16 * groups + k * groups / columns) * 16 + n % 16] << 16;
            float s = scale[n];
            if (groups > 1) memcpy(&s, &in_group, sizeof s);
            l.matrix[n * columns + k] = (codes[k] - zero) * s + offset[n];
            half += l.matrix[n * columns + k] / 2;
        }
        memcpy(all + n * words, pack(codes, columns, levels), (size_t)words * 4);
        if (activation_levels && activation_levels % 2 == 0) constant[n] = (float)half;
    }
    maqd_repack(all, rows, columns, levels, digits, bits, panels, 1 + (int)draw(2));
    const int has_constant = activation_levels && activation_levels % 2 == 0;
    int32_t rotation = 1;
    while (draw(4) && columns % (2 * rotation) == 0) rotation *= 2;
    l.w = (maqd_weight){panels,
                        groups > 1 ? (void *)group_scale : scale,
                        with ? offset : NULL,
                        has_constant ? constant : NULL,
                        with ? bias : NULL,
                        rows,
                        columns,
                        groups,
                        units,
                        bits,
                        (float)zero,
                        draw(2) ? 1 : 0.75f,
                        groups > 1 && activation_levels % 2 && draw(2),
                        rotation};
    return l;
}

static double on_grid(float x, float step, int levels) {
    const float center = (float)(levels - 1) / 2, top = (float)(levels - 1);
    const float code = rintf(x / step + center);
    return (code < top ? code > 0 ? code : 0 : top) - center;
}

static void product_case(int isa, int32_t levels, int32_t bits, int64_t rows, int64_t columns,
                         int64_t groups, int64_t tokens, int activation_levels, int threads) {
    const int own = (int)draw(2), every = (int)draw(2);
    layer l = make(levels, bits, rows, columns, groups, (int)draw(2), activation_levels);
    float *x = reals(tokens * columns), *y = get(tokens * rows * 4),
          *step = get((every ? tokens : 1) * 4);
    for (int64_t i = 0; i < (every ? tokens : 1); ++i)
        step[i] = own ? 0 : 0.01f + 0.001f * (float)draw(9);
    if (!activation_levels) step = NULL;
    expect(!maqd_linear(&l.w, x, tokens, activation_levels, step, every, y, isa, threads), "memory",
           isa, levels, bits, 0);
    float *rotated = get(tokens * columns * 4), *row = get(columns * 4);
    maqd_get_isa(isa)->hadamard(x, tokens * columns, l.w.rotation, rotated);
    double wrong = 0, size = 1e-6;
    for (int64_t t = 0; t < tokens; ++t) {
        const int64_t parts = l.w.group_steps ? groups : 1, width = columns / parts;
        float steps[3] = {step ? step[every * t] : 1};
        for (int64_t p = 0; p < parts && (steps[0] == 0 || l.w.group_steps); ++p) {
            float most = 0;
            for (int64_t k = p * width; k < (p + 1) * width; ++k)
                most = fmaxf(most, fabsf(rotated[t * columns + k]));
            steps[p] = most / ((float)(activation_levels - 1) / 2) * l.w.clip_ratio;
            steps[p] = fmaxf(steps[p], 1.17549435e-38f);
        }
        for (int64_t n = 0; n < rows; ++n) {
            double sum = 0;
            for (int64_t k = 0; k < columns; ++k) {
                const float v = rotated[t * columns + k], s = steps[k / width];
                sum += l.matrix[n * columns + k] *
                       (activation_levels ? s * on_grid(v, s, activation_levels) : v);
            }
            if (l.w.bias) sum += l.w.bias[n];
            wrong += fabs(sum - y[t * rows + n]);
            size += fabs(sum);
        }
    }
    expect(wrong <= 1e-5 * size, "product: isa, levels, columns, tokens", isa, levels, (int)columns,
           (int)tokens);
    if (activation_levels) {
        maqd_input taken = {get(tokens * maqd_stride(&l.w)),
                            get(tokens * 4),
                            get(tokens * groups * 4),
                            get(tokens * (groups + 1) * 4),
                            NULL,
                            1,
                            4};
        if (!l.w.group_steps) taken.group_step = NULL;
        for (int64_t t = 0; t < tokens; ++t) taken.step[t] = step[every * t];
        maqd_take_inputs(&l.w, x, tokens, activation_levels, &taken, row, isa);
        for (int64_t t = 0; t < tokens; ++t) {
            double sum = 0;
            for (int64_t k = 0; k < maqd_stride(&l.w); ++k) {
                const int code = taken.codes[t * maqd_stride(&l.w) + k];
                const float *own = taken.group_step;
                const float s = own ? own[t * groups + k * groups / columns] : taken.step[t];
                sum += own ? s * (double)code : code;
                if (k < columns) {
                    const double q = on_grid(rotated[t * columns + k], s, activation_levels);
                    expect(code == (int)floor(q), "code", isa, activation_levels, (int)t, (int)k);
                } else {
                    expect(code == 0, "padding", isa, activation_levels, (int)t, (int)k);
                }
            }
            const double off = fabs(taken.sums[t * (groups + 1) + groups] - sum);
            expect(l.w.group_steps ? off <= 1e-4 * (1 + fabs(sum)) : off == 0, "sum", isa, (int)t,
                   0, 0);
        }
    }
    drop();
}

static void products(int isa) {
    const struct {
        int32_t levels, bits;
    } storages[] = {{2, 2},  {3, TRITS}, {3, 2},  {4, 2},   {5, 3},  {8, 3},
                    {16, 4}, {15, 4},    {17, 8}, {255, 8}, {256, 8}};
    const int64_t widths[] = {1, 3, 19, 67, 129, 64, 160}, heights[] = {1, 15, 17, 33, 64};
    const int64_t batches[] = {1, 2, 3, 4, 5, 7, 12, 17, 32, 37};
    const int64_t activations[] = {0, 2, 15, 16, 255, 256};
    int turn = 0;
    for (size_t s = 0; s < sizeof storages / sizeof *storages; ++s)
        for (size_t b = 0; b < sizeof batches / sizeof *batches; ++b, ++turn)
            for (int groups = 1; groups <= 3; groups += 2) {
                if (groups > 1 && storages[s].bits == TRITS) continue;
                const int64_t inputs = maqd_inputs(storages[s].bits);
                const int64_t columns =
                    groups == 1 ? widths[turn % 7] : groups * inputs * (1 << turn % 3);
                product_case(isa, storages[s].levels, storages[s].bits,
                             heights[(turn + groups) % 5], columns, groups, batches[b],
                             (int)activations[(turn + groups) % 6], 1 + turn % 2);
            }
}

/* Activations that no grid holds: the call returns, and stays within its buffers. */
static void strange_inputs(int isa) {
    const float odd[] = {NAN, INFINITY, -INFINITY, 3e38f, -3e38f, 1e-45f, -0.0f};
    for (int levels = 0; levels < 257; levels += 64)
        for (int64_t tokens = 1; tokens < 6; tokens += 4) {
            layer l = make(4, 2, 19, 35, 1, 1,
                           levels ? levels + (levels < 256) * 1 - (levels == 256) : 0);
            float *x = get(tokens * 35 * 4), *y = get(tokens * 19 * 4), step[] = {0, 1e-38f, 3e38f};
            for (int64_t i = 0; i < tokens * 35; ++i) x[i] = odd[draw(7)];
            for (int i = 0; i < 3; ++i) {
                maqd_linear(&l.w, x, tokens, l.activation_levels, step + i, 0, y, isa, 1);
                for (int64_t k = 0; k < tokens * 19; ++k) checks += y[k] == y[k];
            }
            drop();
        }
}

static void tables(void) {
    const int32_t levels[] = {2, 3, 5, 16, 255};
    for (int i = 0; i < 5; ++i) {
        const int64_t columns = 1 + 13 * i, rows = 4, ids[] = {3, 0, 3};
        uint8_t codes[64];
        const int64_t words = (columns + digits_of(levels[i]) - 1) / digits_of(levels[i]);
        int32_t *all = get(rows * words * 4);
        for (int64_t n = 0; n < rows; ++n) {
            for (int64_t k = 0; k < columns; ++k) codes[k] = (uint8_t)((n + k) % levels[i]);
            memcpy(all + n * words, pack(codes, columns, levels[i]), (size_t)words * 4);
        }
        maqd_table table = {all,     reals(rows), i % 2 ? reals(rows) : NULL,
                            columns, levels[i],   digits_of(levels[i]),
                            0.5f};
        float *y = get(3 * columns * 4);
        maqd_embedding(&table, ids, 3, y);
        for (int64_t j = 0; j < 3; ++j)
            for (int64_t k = 0; k < columns; ++k) {
                const double code = (double)((ids[j] + k) % levels[i]) - (levels[i] - 1) / 2.0;
                const double value =
                    code * table.scale[ids[j]] + (table.offset ? table.offset[ids[j]] : 0);
                expect(fabs(y[j * columns + k] - value / 2) < 1e-4, "row", levels[i], (int)j,
                       (int)k, 0);
            }
        drop();
    }
}

/* -------------------------------------------------------------------------------------- decoder */

enum {
    HIDDEN_SIZE = 23,
    HEADS = 4,
    KV_HEADS = 2,
    HEAD_DIM = 10,
    INTERMEDIATE = 37,
    WORDS = 29,
    BATCH = 2
};

static maqd_linear_plan plan_of(layer *l, int own_first) {
    return (maqd_linear_plan){&l->w, l->activation_levels ? 0.02f : 0, l->activation_levels,
                              own_first};
}

static maqd_norm norm_of(int64_t features, int token) {
    return (maqd_norm){reals(features), reals(features), features, 1e-5f, 0.7f, 1, token, 1, token};
}

/* `tokens` of every sequence in pieces of `piece`: states of all, logits of the last. `bytes`: keys
 * and values are kept so. */
static void feed_model(const maqd_decoder *m, const int64_t *ids, int64_t tokens, int64_t piece,
                       int isa, int threads, int bytes, float *states, float *logits) {
    const int64_t capacity = (tokens + 15) / 16 * 16, width = (HEAD_DIM + 15) / 16 * 16;
    const int64_t places = m->blocks * BATCH * KV_HEADS * capacity, size = bytes ? 1 : 4;
    void *keys = get(places * HEAD_DIM * size), *values = get(places * width * size);
    float *scales[2] = {bytes ? get(places * 4) : NULL, bytes ? get(places * 4) : NULL};
    memset(values, 0, (size_t)(places * width * size));
    for (int64_t past = 0; past < tokens; past += piece) {
        const int64_t now = tokens - past < piece ? tokens - past : piece, seen = past + now;
        int64_t *some = get(BATCH * now * 8), *positions = get(BATCH * now * 8);
        uint8_t *first = get(BATCH * now), *mask = get(BATCH * seen);
        float *hidden = get(BATCH * now * HIDDEN_SIZE * 4);
        for (int64_t b = 0; b < BATCH; ++b) {
            for (int64_t t = 0; t < now; ++t) {
                some[b * now + t] = ids[b * tokens + past + t];
                positions[b * now + t] = past + t;
                first[b * now + t] = past + t == b;
            }
            for (int64_t t = 0; t < seen; ++t)
                mask[b * seen + t] = t >= b; /* one pads on the left */
        }
        maqd_call call = {BATCH,     now,   past, capacity, width,  hidden,    some,     logits,
                          positions, first, mask, keys,     values, scales[0], scales[1]};
        expect(!maqd_decode(m, &call, isa, threads), "memory of a decoder", isa, threads, 0, 0);
        for (int64_t b = 0; b < BATCH; ++b)
            memcpy(states + (b * tokens + past) * HIDDEN_SIZE, hidden + b * now * HIDDEN_SIZE,
                   (size_t)(now * HIDDEN_SIZE) * 4);
    }
}

/* Against the matrix itself, whose element (i, j) has the sign of the bits i and j share. */
static void rotations(int isa) {
    for (int64_t size = 2; size <= 512; size *= 2) {
        const int64_t count = 3 * size;
        float *x = reals(count), *y = get(count * 4);
        maqd_get_isa(isa)->hadamard(x, count, size, y);
        for (int64_t i = 0; i < count; ++i) {
            double sum = 0;
            for (int64_t j = 0; j < size; ++j)
                sum += __builtin_parityll(i % size & j) ? -x[i / size * size + j]
                                                        : x[i / size * size + j];
            expect(fabs(sum / sqrt((double)size) - y[i]) < 1e-4, "rotation", isa, (int)size, (int)i,
                   0);
        }
    }
    drop();
}

static void norms(int isa) {
    for (int64_t features = 1; features < 40; features += 13)
        for (int kind = 0; kind < 4; ++kind) {
            const int64_t rows = 5, threads = 1 + kind % 2;
            maqd_norm norm = norm_of(features, kind / 2);
            const uint8_t marks[] = {1, 0, 0, 1, 0}, *first = kind % 2 ? marks : NULL;
            float *x = reals(rows * features), *y = get(rows * features * 4);
            maqd_normalize(&norm, x, first, rows, y, isa, (int32_t)threads);
            for (int64_t i = 0; i < rows * features; ++i) {
                const float *row = x + i / features * features;
                double mean = 0, square = 0, factor = norm.constant;
                for (int64_t k = 0; k < features; ++k)
                    mean += norm.centered ? row[k] / (double)features : 0;
                for (int64_t k = 0; k < features; ++k) square += (row[k] - mean) * (row[k] - mean);
                if (norm.token || (first && first[i / features]))
                    factor = norm.first_factor / sqrt(square / (double)features + norm.eps);
                const double wanted =
                    (x[i] - mean) * factor * norm.weight[i % features] + norm.bias[i % features];
                expect(fabs(wanted - y[i]) < 1e-4, "norm", isa, (int)features, kind, (int)i);
            }
            drop();
        }
}

static void decoders(int isa, int levels, int32_t bits, int activation_levels, int bytes) {
    enum { BLOCK_COUNT = 2, TOKENS = 19 };
    const int64_t queries = HEADS * HEAD_DIM, pairs = KV_HEADS * HEAD_DIM;
    maqd_block_plan blocks_of[BLOCK_COUNT];
    layer l[BLOCK_COUNT][7];
    for (int i = 0; i < BLOCK_COUNT; ++i) {
        const int64_t shapes[7][2] = {{queries, HIDDEN_SIZE},      {pairs, HIDDEN_SIZE},
                                      {pairs, HIDDEN_SIZE},        {HIDDEN_SIZE, queries},
                                      {INTERMEDIATE, HIDDEN_SIZE}, {INTERMEDIATE, HIDDEN_SIZE},
                                      {HIDDEN_SIZE, INTERMEDIATE}};
        maqd_linear_plan *to[7] = {&blocks_of[i].q,   &blocks_of[i].k,    &blocks_of[i].v,
                                   &blocks_of[i].o,   &blocks_of[i].gate, &blocks_of[i].up,
                                   &blocks_of[i].down};
        for (int j = 0; j < 7; ++j) {
            l[i][j] = make(levels, bits, shapes[j][0], shapes[j][1], 1, j % 2, activation_levels);
            *to[j] = plan_of(&l[i][j], 1);
        }
        blocks_of[i].window = i * 6;
        blocks_of[i].rope = i == 0;
        blocks_of[i].input_norm = norm_of(HIDDEN_SIZE, 1);
        blocks_of[i].post_norm = norm_of(HIDDEN_SIZE, 0);
        blocks_of[i].query_norm = norm_of(i ? HEAD_DIM : 0, 1);
        blocks_of[i].key_norm = norm_of(i ? HEAD_DIM : 0, 1);
    }
    layer head = make(levels, bits, WORDS, HIDDEN_SIZE, 1, 0, activation_levels);
    const int64_t words = (HIDDEN_SIZE + digits_of(255) - 1) / digits_of(255);
    int32_t *rows = get(WORDS * words * 4);
    for (int64_t i = 0; i < WORDS * words; ++i) rows[i] = (int32_t)draw(1u << 30);
    float *scale = reals(WORDS);
    for (int i = 0; i < WORDS; ++i) scale[i] /= 100;
    maqd_table table = {rows, scale, NULL, HIDDEN_SIZE, 255, digits_of(255), 1};
    float *frequencies = reals(HEAD_DIM / 2);
    maqd_decoder m = {BLOCK_COUNT,
                      HIDDEN_SIZE,
                      HEADS,
                      KV_HEADS,
                      HEAD_DIM,
                      INTERMEDIATE,
                      0.3f,
                      1.0f,
                      frequencies,
                      blocks_of,
                      norm_of(HIDDEN_SIZE, 1),
                      &table,
                      plan_of(&head, 1),
                      !activation_levels};
    int64_t *ids = get(BATCH * TOKENS * 8);
    for (int64_t i = 0; i < BATCH * TOKENS; ++i) ids[i] = draw(WORDS);
    float *whole = get(BATCH * TOKENS * HIDDEN_SIZE * 4),
          *parts = get(BATCH * TOKENS * HIDDEN_SIZE * 4);
    float *logits = get(BATCH * WORDS * 4), *again = get(BATCH * WORDS * 4);
    feed_model(&m, ids, TOKENS, TOKENS, isa, 1, bytes, whole, logits);
    feed_model(&m, ids, TOKENS, 1, isa, 2, bytes, parts, again);
    double wrong = 0, size = 0;
    for (int64_t i = 0; i < BATCH * TOKENS * HIDDEN_SIZE; ++i) {
        if (i < HIDDEN_SIZE * TOKENS + HIDDEN_SIZE && i >= HIDDEN_SIZE * TOKENS)
            continue; /* padding */
        wrong += fabs(whole[i] - parts[i]);
        size += fabs(whole[i]);
    }
    for (int i = 0; i < BATCH * WORDS; ++i) {
        wrong += fabs(logits[i] - again[i]);
        size += fabs(logits[i]);
    }
    /* with codes a rounding that tips one over grows to the size of a step */
    expect(wrong <= (activation_levels ? 0.1
                     : bytes           ? 0.01
                                       : 1e-4) *
                        size,
           "pieces: isa, levels, activations", isa, levels, activation_levels, 0);
    drop();
}

/* ---------------------------------------------------------------------------------- column loops
 */

static void columns_of(int64_t columns, int64_t rows, int threads) {
    float *w = reals(columns * rows), *step = get(columns * rows * 4), *center = reals(rows);
    float *h = reals(columns * columns), *codes = get(columns * rows * 4),
          *errors = get(columns * rows * 4);
    float *gradient = reals(columns * rows), *moved = get(columns * rows * 4);
    for (int64_t i = 0; i < columns * rows; ++i) step[i] = 0.1f;
    for (int64_t i = 0; i < columns; ++i) h[i * columns + i] = 2;
    maqd_compensate(w, h, step, center, codes, errors, 16, columns, rows, threads);
    for (int64_t i = 0; i < columns * rows; ++i)
        expect(codes[i] >= 0 && codes[i] <= 15 && errors[i] == errors[i], "column", (int)i, 0, 0,
               0);
    maqd_descend(w, gradient, h, step, center, codes, errors, moved, 16, columns, rows, threads);
    for (int64_t i = 0; i < columns * rows; ++i)
        expect(codes[i] >= 0 && codes[i] <= 15 && moved[i] == moved[i], "descent", (int)i, 0, 0, 0);
    drop();
}

/* -------------------------------------------------------------------------------------- training
 */

static void training_of(int64_t rows, int64_t columns, int64_t groups, int levels, int threads) {
    float *w = reals(rows * columns), *step = get(rows * groups * 4),
          *scale = get(rows * groups * 4);
    float *offset = reals(rows), *values = get(rows * columns * 4),
          *codes = get(rows * columns * 4);
    uint16_t *narrow = get(rows * columns * 2);
    for (int64_t i = 0; i < rows * groups; ++i) step[i] = 0.5f, scale[i] = 0.25f;
    maqd_fake_quantize(w, step, scale, offset, values, rows, columns, groups, levels, 0, threads);
    maqd_fake_quantize(w, step, scale, NULL, narrow, rows, columns, groups, levels, 1, threads);
    maqd_fake_quantize(w, step, NULL, NULL, codes, rows, columns, groups, levels, 2, threads);
    for (int64_t i = 0; i < rows * columns; ++i) {
        const float plain = (codes[i] - (float)(levels - 1) / 2) * 0.25f;
        const uint32_t bits = (uint32_t)narrow[i] << 16;
        float read;
        memcpy(&read, &bits, 4);
        expect(codes[i] >= 0 && codes[i] < levels, "weight code", (int)i, levels, 0, 0);
        expect(fabsf(values[i] - plain - offset[i / columns]) < 1e-5f, "value", (int)i, levels, 0,
               0);
        expect(fabsf(read - plain) <= fabsf(plain) / 256, "bfloat16", (int)i, levels, 0, 0);
    }
    float *grad = reals(rows * columns), *to_weight = get(rows * columns * 4);
    float *to_scale = get(rows * groups * 4), *to_offset = get(rows * 4);
    maqd_fake_quantize_backward(w, step, scale, grad, to_weight, to_scale, to_offset, rows, columns,
                                groups, levels, 0, threads);
    maqd_fake_quantize_backward(w, step, scale, narrow, to_weight, to_scale, NULL, rows, columns,
                                groups, levels, 1, threads);
    for (int64_t r = 0; r < rows; ++r) {
        double sum = 0, along = 0; /* of a gradient that a row's mean and size do not feel */
        for (int64_t k = 0; k < columns; ++k) {
            sum += to_weight[r * columns + k];
            along += to_weight[r * columns + k] * w[r * columns + k];
        }
        expect(columns == 1 || (fabs(sum) < 1e-3 && fabs(along) < 1e-3), "gradient", (int)r, 0, 0,
               0);
    }
    maqd_round_tokens(w, values, rows, columns, 0.75f, levels, 0, 0, threads);
    for (int64_t r = 0; r < rows; ++r) {
        float most = 0, largest = 0;
        for (int64_t k = 0; k < columns; ++k) {
            most = fmaxf(most, fabsf(w[r * columns + k]));
            largest = fmaxf(largest, fabsf(values[r * columns + k]));
        }
        expect(fabsf(largest - 0.75f * most) <= 1e-5f * most, "clipped", (int)r, levels, 0, 0);
    }
    maqd_round_tokens(w, narrow, rows, columns, 1, levels, 0, 1, threads);
    maqd_round_tokens(narrow, values, rows, columns, 1, levels, 1, 0, threads);
    double *loss = get(rows * 8);
    memcpy(values, w, (size_t)(rows * columns) * 4);
    maqd_divergence(values, w, loss, rows, columns, 1, 1, threads);
    for (int64_t r = 0; r < rows; ++r)
        expect(fabs(loss[r]) < 1e-5 && fabsf(values[r * columns]) < 1e-6f, "divergence", (int)r, 0,
               0, 0);
    drop();
}

/* A panel of any weight finds room in what the widest one asks for. */
static void panels(int isa) {
    const int64_t batches[] = {1, 8, 63, 64, 512};
    const maqd_isa *p = maqd_get_isa(isa);
    for (int b = 0; b < 5; ++b)
        for (int64_t widest = 4; widest < 12000; widest = widest * 9 / 8 + 4)
            for (int64_t stride = 4; stride <= widest; stride = stride * 9 / 8 + 4)
                expect(maqd_panel_blocks(p, batches[b], stride) * ROWS * stride <=
                           maqd_panel(p, batches[b], widest),
                       "panel: isa, tokens, stride, widest", isa, (int)batches[b], (int)stride,
                       (int)widest);
}

int main(void) {
    for (int isa = 0; isa < maqd_isas(); ++isa) {
        if (!maqd_supported(isa)) {
            printf("%s: this machine does not run it\n", maqd_isa_name(isa));
            continue;
        }
        const int before = checks;
        panels(isa);
        products(isa);
        strange_inputs(isa);
        rotations(isa);
        norms(isa);
        decoders(isa, 4, 2, 0, 0);
        decoders(isa, 4, 2, 0, 1);
        decoders(isa, 3, TRITS, 255, 0);
        decoders(isa, 8, 3, 16, 1);
        decoders(isa, 256, 8, 256, 0);
        printf("%s: %d checks\n", maqd_isa_name(isa), checks - before);
    }
    tables();
    columns_of(7, 1, 1);
    columns_of(5, 67, 1);
    columns_of(3, 130, 2);
    training_of(1, 1, 1, 2, 1);
    training_of(5, 39, 3, 16, 2);
    training_of(3, 130, 1, 3, 1);
    training_of(33, 192, 3, 256, 2);
    printf("%d of %d checks failed\n", failures, checks);
    return failures > 0;
}
