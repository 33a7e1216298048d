/* One call a forward: the blocks of a pre-norm decoder (Llama and its kin) on packed weights.
 *
 * Every thread runs `decode`; a phase whose results all threads need ends in a barrier. With few
 * tokens each thread normalizes and quantizes all of them for itself, which costs less than waiting
 * for another to do it; with many, tokens are shared out. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "internal.h"
#include "vector.h"

typedef struct {
    float *hidden, *row;
    maqd_input input[3];
} feeding;

typedef struct {
    const maqd_decoder *model;
    const maqd_call *call;
    const maqd_isa *isa;
    int64_t count; /* batch * tokens */
    int private;   /* every thread feeds itself */
    int threads;
    maqd_team *team;
    int64_t widest, stride; /* the widest input of a layer; padded for any unit */
    feeding *feeding;       /* one for all, or one per thread */
    float *mixed, *out;     /* (count, widest): q, k, v or gate; attention, up or down */
    float *added;           /* (count, hidden): what attention adds */
    float *desks;           /* attention's scratch, one per thread */
    int64_t parts;          /* that attention meets the positions in */
    float *partial;         /* (batch, heads, parts, head_dim + 2): what each of them gave, see
                               maqd_attention; or NULL: there is one */
    float *cosine, *sine;   /* (count, head_dim / 2) */
    uint8_t *panels;        /* one per thread */
    maqd_input last;        /* what the head multiplies */
} state;

static int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

/* With few queries the positions are shared out in parts, or threads would have nothing to do. How
 * many there are does not depend on the threads, so that results do not. */
#define PART 512
static int64_t parts_of(const maqd_decoder *m, const maqd_call *c) {
    const int64_t queries = c->tokens * (m->heads / m->kv_heads);
    if (queries > QUERIES || c->batch * m->kv_heads > 16) return 1;
    return (c->past + c->tokens + PART - 1) / PART;
}

static void lay_out(state *s, maqd_arena *memory) {
    const maqd_decoder *m = s->model;
    const int64_t n = s->count, heads = m->heads * m->head_dim;
    const int64_t widest = most(m->hidden, most(m->intermediate, heads));
    const int64_t stride = widest + 32, desk = maqd_desk(m->head_dim, s->call->value_stride);
    const int feeders = s->private ? s->threads : 1;
    s->widest = widest;
    s->stride = stride;
    s->feeding = maqd_cut(memory, feeders * (int64_t)sizeof *s->feeding);
    s->mixed = maqd_cut_floats(memory, n * most(heads + 2 * m->kv_heads * m->head_dim, widest));
    s->out = maqd_cut_floats(memory, n * widest);
    s->added = maqd_cut_floats(memory, n * m->hidden);
    s->desks = maqd_cut_floats(memory, s->threads * desk);
    s->parts = parts_of(m, s->call);
    s->partial = NULL;
    if (s->parts > 1)
        s->partial = maqd_cut_floats(memory, n * m->heads * s->parts * (m->head_dim + 2));
    s->cosine = maqd_cut_floats(memory, n * m->head_dim / 2);
    s->sine = maqd_cut_floats(memory, n * m->head_dim / 2);
    s->panels = maqd_cut(memory, s->threads * maqd_panel(s->isa, n, stride));
    for (int i = 0; i < feeders; ++i) {
        feeding f;
        f.hidden = s->private ? maqd_cut_floats(memory, n * m->hidden) : s->call->hidden;
        f.row = maqd_cut_floats(memory, (s->private ? 1 : s->threads) * 2 * widest);
        for (int j = 0; j < 3; ++j)
            f.input[j] = maqd_cut_input(memory, n, stride, widest / 4, m->floats, m->group_steps);
        if (memory->base) s->feeding[i] = f;
    }
    s->last = maqd_cut_input(memory, s->call->batch, stride, widest / 4, m->floats, m->group_steps);
}

static uint8_t *panel_of(const state *s, int thread) {
    return s->panels + thread * maqd_panel(s->isa, s->count, s->stride);
}

/* The thread's scratch for two rows: a normalized one, a rotated one. */
static float *rows_of(const state *s, int thread) {
    return s->private ? s->feeding[thread].row : s->feeding->row + thread * 2 * s->widest;
}

static int same_input(const maqd_linear_plan *a, const maqd_linear_plan *b) {
    return a->step == b->step && a->levels == b->levels && a->own_first == b->own_first &&
           a->weight->groups == b->weight->groups && a->weight->bits == b->weight->bits &&
           a->weight->clip_ratio == b->weight->clip_ratio &&
           a->weight->group_steps == b->weight->group_steps &&
           a->weight->rotation == b->weight->rotation;
}

/* The parts of `input` that a layer's `tokens` inputs have, and how they lie. */
static maqd_input input_of(const state *s, maqd_input input, const maqd_linear_plan *layer,
                           int64_t tokens) {
    if (layer->levels) input.values = NULL;
    if (!layer->weight->group_steps) input.group_step = NULL;
    maqd_arrange(s->isa, layer->weight, tokens, &input);
    return input;
}

CLONES static void add_row(float *restrict sum, const float *restrict row, int64_t width) {
    for (int64_t k = 0; k < width; ++k) sum[k] += row[k];
}

/* Adds `add` (or NULL) to the hidden states, or takes `rows` instead of them, normalizes (norm or
 * NULL) and quantizes for `n` layers; `input[i]` is then what layer i multiplies. */
static void feed(const state *s, int thread, const float *add, const float *rows, int64_t width,
                 const maqd_norm *norm, const maqd_linear_plan *const *layers, int n,
                 maqd_input *input) {
    const feeding *f = s->feeding + (s->private ? thread : 0);
    float *scratch = rows_of(s, thread);
    int64_t from = 0, to = s->count;
    if (!s->private) maqd_share(s->count, thread, s->threads, &from, &to);
    for (int i = 0; i < n; ++i) {
        input[i] = input_of(s, f->input[i], layers[i], s->count);
        for (int j = 0; j < i; ++j)
            if (same_input(layers[i], layers[j])) input[i] = input[j];
    }
    for (int64_t t = from; t < to; ++t) {
        const int first = s->call->first && s->call->first[t];
        const float *row = rows ? rows + t * width : f->hidden + t * width;
        if (add) add_row(f->hidden + t * width, add + t * width, width);
        if (norm) {
            s->isa->norm(norm, first, row, scratch);
            row = scratch;
        }
        for (int i = 0; i < n; ++i) {
            if (input[i].codes != f->input[i].codes) continue;
            input[i].step[t] = layers[i]->own_first && first ? 0 : layers[i]->step;
            maqd_take(s->isa, layers[i]->weight, row, layers[i]->levels, input + i, t,
                      scratch + s->widest);
        }
    }
    if (!s->private) maqd_barrier(s->team);
}

/* Multiplies the thread's share of the row blocks of `n` layers, whose outputs stand side by side
 * in y. */
static void multiply(const state *s, int thread, const maqd_linear_plan *const *layers, int n,
                     const maqd_input *input, float *y, int64_t stride) {
    int64_t total = 0, from, to;
    for (int i = 0; i < n; ++i) total += maqd_blocks(layers[i]->weight);
    maqd_share(total, thread, s->threads, &from, &to);
    for (int i = 0; i < n; ++i) {
        const maqd_weight *w = layers[i]->weight;
        const int64_t blocks = maqd_blocks(w);
        const int64_t first = from > 0 ? from : 0, last = to < blocks ? to : blocks;
        if (first < last)
            s->isa->matmul(w, input + i, first, last, s->count, y, stride, panel_of(s, thread));
        from -= blocks;
        to -= blocks;
        y += w->rows;
    }
}

/* Where the keys and values of one head of one sequence begin. */
typedef struct {
    char *keys, *values;
    float *key_scales, *value_scales;
} memory_of_head;

static memory_of_head remember(const state *s, int64_t layer, int64_t sequence, int64_t head) {
    const maqd_call *c = s->call;
    const int64_t index = (layer * c->batch + sequence) * s->model->kv_heads + head;
    const int64_t at = index * c->capacity, size = c->key_scales ? 1 : sizeof(float);
    memory_of_head m = {(char *)c->keys + at * s->model->head_dim * size,
                        (char *)c->values + at * c->value_stride * size, NULL, NULL};
    if (c->key_scales) {
        m.key_scales = c->key_scales + at;
        m.value_scales = c->value_scales + at;
    }
    return m;
}

/* Stores one position's key and value. */
static void store_position(const state *s, const memory_of_head *m, int64_t at, const float *key,
                           const float *value) {
    const int64_t d = s->model->head_dim, k0 = at / 16 * 16 * d + at % 16;
    const int64_t v0 = at * s->call->value_stride;
    if (m->key_scales) {
        m->key_scales[at] = s->isa->to_bytes(key, d, (int8_t *)m->keys + k0, 16);
        m->value_scales[at] = s->isa->to_bytes(value, d, (int8_t *)m->values + v0, 1);
        return;
    }
    float *keys = (float *)m->keys + k0;
    for (int64_t k = 0; k < d; ++k) keys[k * 16] = key[k];
    memcpy((float *)m->values + v0, value, (size_t)d * sizeof *value);
}

/* Normalizes queries and keys, gives them their rotary embeddings, and stores keys and values. */
static void place(const state *s, int64_t layer, int thread) {
    const maqd_decoder *m = s->model;
    const maqd_block_plan *b = m->block + layer;
    const int64_t d = m->head_dim, stride = (m->heads + 2 * m->kv_heads) * d;
    int64_t from, to;
    maqd_share(s->count * (m->heads + m->kv_heads), thread, s->threads, &from, &to);
    for (int64_t i = from; i < to; ++i) {
        const int64_t t = i / (m->heads + m->kv_heads), head = i % (m->heads + m->kv_heads);
        float *x = s->mixed + t * stride + head * d;
        const maqd_norm *norm = head < m->heads ? &b->query_norm : &b->key_norm;
        const int first = s->call->first && s->call->first[t];
        if (norm->features) s->isa->norm(norm, first, x, x);
        if (m->frequencies && b->rope)
            s->isa->rope(x, s->cosine + t * d / 2, s->sine + t * d / 2, d / 2);
        if (head < m->heads) continue;
        const memory_of_head memory = remember(s, layer, t / s->call->tokens, head - m->heads);
        store_position(s, &memory, s->call->past + t % s->call->tokens, x, x + m->kv_heads * d);
    }
}

/* Attention of queries `from` to `to` of one head of keys to one part of the positions; query i
 * belongs to token i / shared and to head i % shared of those that share the keys. */
static void attend_to(const state *s, int64_t layer, int thread, int64_t index, int64_t part,
                      int64_t from, int64_t to) {
    const maqd_decoder *m = s->model;
    const maqd_call *c = s->call;
    const int64_t sequence = index / m->kv_heads, kv_head = index % m->kv_heads;
    const int64_t d = m->head_dim, stride = (m->heads + 2 * m->kv_heads) * d;
    const int64_t shared = m->heads / m->kv_heads, window = m->block[layer].window;
    const memory_of_head memory = remember(s, layer, sequence, kv_head);
    maqd_attention a = {.queries = (int)(to - from),
                        .first = part * PART,
                        .last = s->partial ? (part + 1) * PART : c->capacity,
                        .partial = s->partial != NULL,
                        .keys = memory.keys,
                        .values = memory.values,
                        .key_scales = memory.key_scales,
                        .value_scales = memory.value_scales,
                        .mask = c->mask ? c->mask + sequence * (c->past + c->tokens) : NULL,
                        .head_dim = d,
                        .value_stride = c->value_stride,
                        .scale = m->attention_scale,
                        .scratch = s->desks + thread * maqd_desk(d, c->value_stride)};
    for (int64_t i = from; i < to; ++i) {
        const int64_t token = i / shared, t = sequence * c->tokens + token, q = i - from;
        const int64_t head = kv_head * shared + i % shared;
        a.query[q] = s->mixed + t * stride + head * d;
        a.out[q] = s->partial ? s->partial + ((t * m->heads + head) * s->parts + part) * (d + 2)
                              : s->out + (t * m->heads + head) * d;
        a.seen[q] = c->past + token + 1;
        a.from[q] = window && a.seen[q] > window ? a.seen[q] - window : 0;
    }
    s->isa->attend(&a);
}

/* Adds up what the parts gave to the thread's share of the heads. */
static void join(const state *s, int thread) {
    const int64_t d = s->model->head_dim, parts = s->parts;
    int64_t from, to;
    maqd_share(s->count * s->model->heads, thread, s->threads, &from, &to);
    for (int64_t i = from; i < to; ++i) {
        const float *part = s->partial + i * parts * (d + 2);
        float *out = s->out + i * d, most = -INFINITY, total = 0;
        memset(out, 0, (size_t)d * sizeof *out);
        for (int64_t p = 0; p < parts; ++p) most = fmaxf(most, part[p * (d + 2) + d]);
        for (int64_t p = 0; p < parts; ++p, part += d + 2) {
            if (part[d + 1] <= 0) continue; /* it saw nothing */
            const float share = exponential(part[d] - most);
            total += part[d + 1] * share;
            for (int64_t j = 0; j < d; ++j) out[j] += part[j] * share;
        }
        for (int64_t j = 0; total > 0 && j < d; ++j) out[j] /= total;
    }
}

static void attend(const state *s, int64_t layer, int thread) {
    const int64_t heads = s->model->kv_heads * s->call->batch;
    const int64_t queries = s->call->tokens * (s->model->heads / s->model->kv_heads);
    const int64_t tiles = (queries + QUERIES - 1) / QUERIES;
    /* dealt out one by one: later tiles see more and take longer */
    for (int64_t i = thread; i < heads * tiles * s->parts; i += s->threads) {
        const int64_t from = i / heads / s->parts * QUERIES, to = from + QUERIES;
        attend_to(s, layer, thread, i % heads, i / heads % s->parts, from,
                  to < queries ? to : queries);
    }
    if (!s->partial) return;
    maqd_barrier(s->team);
    join(s, thread);
}

/* Computes the thread's share of the inner units of the feed-forward part: its matrix or, with a
 * gate, both and their product. */
static void inner(const state *s, int thread, const maqd_block_plan *b, const maqd_input *input) {
    const int64_t width = s->model->intermediate;
    const int gated = s->model->activation == SWIGLU;
    int64_t from, to;
    maqd_share((width + ROWS - 1) / ROWS, thread, s->threads, &from, &to);
    uint8_t *panel = panel_of(s, thread);
    const maqd_linear_plan *one = gated ? &b->gate : &b->up;
    s->isa->matmul(one->weight, input, from, to, s->count, s->mixed, width, panel);
    if (gated) s->isa->matmul(b->up.weight, input + 1, from, to, s->count, s->out, width, panel);
    const int64_t first = from * ROWS, last = to * ROWS < width ? to * ROWS : width;
    for (int64_t t = 0; first < last && t < s->count; ++t)
        s->isa->activate(s->model->activation, s->mixed + t * width + first,
                         s->out + t * width + first, last - first);
}

static void angles(const state *s, int thread) {
    const maqd_decoder *m = s->model;
    const int64_t half = m->head_dim / 2;
    int64_t from, to;
    maqd_share(m->frequencies ? s->count : 0, thread, s->threads, &from, &to);
    for (int64_t t = from; t < to; ++t)
        for (int64_t i = 0; i < half; ++i) {
            const float angle = (float)s->call->positions[t] * m->frequencies[i];
            s->cosine[t * half + i] = cosf(angle) * m->rope_scale;
            s->sine[t * half + i] = sinf(angle) * m->rope_scale;
        }
}

/* Computes the logits of every sequence's last token, whose state is ready. */
static void head(const state *s, int thread) {
    const maqd_decoder *m = s->model;
    const maqd_call *c = s->call;
    maqd_input input = input_of(s, s->last, &m->head, c->batch);
    int64_t from, to;
    maqd_share(c->batch, thread, s->threads, &from, &to);
    for (int64_t b = from; b < to; ++b) {
        const int64_t t = (b + 1) * c->tokens - 1;
        input.step[b] = m->head.own_first && c->first && c->first[t] ? 0 : m->head.step;
        maqd_take(s->isa, m->head.weight, c->hidden + t * m->hidden, m->head.levels, &input, b,
                  rows_of(s, thread));
    }
    maqd_barrier(s->team);
    maqd_share(maqd_blocks(m->head.weight), thread, s->threads, &from, &to);
    if (from < to)
        s->isa->matmul(m->head.weight, &input, from, to, c->batch, c->logits, m->head.weight->rows,
                       panel_of(s, thread));
}

static void decode(void *argument, maqd_team *team, int thread, int threads) {
    state local = *(const state *)argument;
    const state *s = &local;
    const maqd_decoder *m = s->model;
    const int64_t hidden = m->hidden, heads = m->heads * m->head_dim;
    float *own = s->feeding[s->private ? thread : 0].hidden;
    const float *add = NULL;
    maqd_input input[3];
    local.threads = threads; /* may be fewer than asked for */
    local.team = team;
    if (s->call->ids) {
        int64_t from = 0, to = s->count;
        if (!s->private) maqd_share(s->count, thread, threads, &from, &to);
        for (int64_t t = from; t < to; ++t)
            maqd_look_up(m->table, s->call->ids[t], own + t * hidden);
    } else if (s->private) {
        memcpy(own, s->call->hidden, (size_t)(s->count * hidden) * sizeof *own);
    }
    angles(s, thread);
    for (int64_t i = 0; i < m->blocks; ++i) {
        const maqd_block_plan *b = m->block + i;
        const maqd_linear_plan *const attention[] = {&b->q, &b->k, &b->v}, *const gated[] = {
                                                                               &b->gate, &b->up};
        const maqd_linear_plan *const o = &b->o, *const down = &b->down;
        const int parts = b->k.weight ? 3 : 1, plain = m->activation != SWIGLU;
        feed(s, thread, add, NULL, hidden, &b->input_norm, attention, parts, input);
        multiply(s, thread, attention, parts, input, s->mixed,
                 heads + 2 * m->kv_heads * m->head_dim);
        maqd_barrier(team);
        place(s, i, thread);
        maqd_barrier(team);
        attend(s, i, thread);
        maqd_barrier(team);
        feed(s, thread, NULL, s->out, heads, NULL, &o, 1, input);
        multiply(s, thread, &o, 1, input, s->added, hidden);
        maqd_barrier(team);
        feed(s, thread, s->added, NULL, hidden, &b->post_norm, gated + plain, 2 - plain, input);
        inner(s, thread, b, input);
        maqd_barrier(team);
        feed(s, thread, NULL, s->mixed, m->intermediate, NULL, &down, 1, input);
        multiply(s, thread, &down, 1, input, s->out, hidden);
        maqd_barrier(team);
        add = s->out;
    }
    int64_t from, to;
    maqd_share(s->count, thread, threads, &from, &to);
    for (int64_t t = from; t < to; ++t) {
        float *row = own + t * hidden;
        if (add) add_row(row, add + t * hidden, hidden);
        s->isa->norm(&m->norm, s->call->first && s->call->first[t], row,
                     s->call->hidden + t * hidden);
    }
    if (!s->call->logits) return;
    maqd_barrier(team);
    head(s, thread);
}

int32_t maqd_decode(const maqd_decoder *model, const maqd_call *call, int32_t isa,
                    int32_t threads) {
    state s = {.model = model, .call = call, .isa = maqd_get_isa(isa), .threads = threads};
    s.count = call->batch * call->tokens;
    s.private = s.count <= 2;
    maqd_arena memory = {NULL, 0};
    lay_out(&s, &memory);
    char *const allocated = malloc(memory.used + 64);
    if (!allocated) return 1;
    memory = (maqd_arena){allocated + (64 - (uintptr_t)allocated % 64) % 64, 0};
    lay_out(&s, &memory);
    maqd_run(decode, &s, model->intermediate / ROWS + 1, threads);
    free(allocated);
    return 0;
}
