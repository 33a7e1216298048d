/* What callers of the library see: its structures and its entries.
 *
 * The library is plain C without Python or torch; `abi.py` spells all of this a second time for
 * ctypes, and compares `maqd_struct_size` when it loads the library. All pointers are to contiguous
 * data that the library trusts to be large enough. `isa` is an instruction set by its number, see
 * `maqd_isas`; `threads` is how many may work at most.
 */
#ifndef MAQD_H
#define MAQD_H

#include <stdint.h>

/* ---------------------------------------------------------------------------------- structures */

/* A packed weight. The layout of `codes` and what it is multiplied with are described in
 * internal.h. */
typedef struct {
    const uint8_t *codes; /* (row blocks, units, planes of a unit, 64) */
    const void *scale;    /* (row blocks, groups, 16): bfloat16, but float for one group */
    const float *offset;  /* (padded rows) or NULL, as the next two */
    const float *constant;
    const float *bias;
    int64_t rows, columns, groups, units;
    int32_t bits;
    float zero;
    float clip_ratio;    /* how much of its absmax the grid of a token's own step covers */
    int32_t group_steps; /* every group of a token's inputs has a step of its own */
    int32_t rotation;    /* the Hadamard transform rotates so many neighboring inputs before
                            anything else; 1: none */
} maqd_weight;

/* An embedding of packed words (rows, words per row) with one scale and offset a row. */
typedef struct {
    const int32_t *words;
    const float *scale, *offset; /* offset may be NULL */
    int64_t columns;
    int32_t levels, digits;
    float output_scale;
} maqd_table;

/* y = x * factor (* weight) (+ bias), x less its mean if `centered`. The factor is 1 / sqrt(mean
 * square + eps) of every token if `token`; else it is `constant`, but on first tokens, if
 * `own_first`, it is first_factor / sqrt(mean square + eps). */
typedef struct {
    const float *weight, *bias; /* (features) or NULL */
    int64_t features;
    float eps, constant, first_factor;
    int32_t token, own_first, centered;
} maqd_norm;

/* A packed layer of a decoder. */
typedef struct {
    const maqd_weight *weight;
    float step;                /* of the activations; 0: every token has its own */
    int32_t levels, own_first; /* levels 0: float activations */
} maqd_linear_plan;

/* A block of a decoder. */
typedef struct {
    maqd_norm input_norm, post_norm, query_norm, key_norm; /* the last two: features 0 if absent */
    maqd_linear_plan q, k, v, o, gate, up, down; /* k, v: weight NULL where q gives all three;
                                                    gate: NULL unless the activation is gated */
    int64_t window; /* positions a token sees, itself one of them; 0: all before it */
    int64_t rope;   /* queries and keys get rotary embeddings, where there are frequencies */
} maqd_block_plan;

enum { SWIGLU, RELU, GELU_TANH };

typedef struct {
    int64_t blocks, hidden, heads, kv_heads, head_dim, intermediate;
    float attention_scale, rope_scale;
    const float *frequencies; /* (head_dim / 2), or NULL: no rotary embeddings */
    const maqd_block_plan *block;
    maqd_norm norm;
    const maqd_table *table;     /* NULL: the caller looks up the embeddings */
    maqd_linear_plan head;       /* weight NULL: the caller multiplies with the head */
    int32_t floats, group_steps; /* some layer has float activations; steps of groups */
    int32_t activation;
} maqd_decoder;

/* One forward of a decoder. */
typedef struct {
    int64_t batch, tokens, past, capacity, value_stride; /* capacity: a multiple of 16 */
    float *hidden;            /* (batch, tokens, hidden): embeddings in, normalized states out */
    const int64_t *ids;       /* (batch, tokens) or NULL: looked up instead of `hidden` */
    float *logits;            /* (batch, vocabulary) of every sequence's last token, or NULL */
    const int64_t *positions; /* (batch, tokens) */
    const uint8_t *first;     /* (batch, tokens) or NULL: 1 on a sequence's first token */
    const uint8_t *mask;      /* (batch, past + tokens) or NULL: 0 hides a position */
    void *keys;               /* (blocks, batch, kv_heads, capacity / 16, head_dim, 16) */
    void *values;             /* (blocks, batch, kv_heads, capacity, value_stride) */
    float *key_scales, *value_scales; /* (blocks, batch, kv_heads, capacity): keys and values are
                                         bytes; or NULL: they are floats */
} maqd_call;

/* Bytes of structure `index` of those above, in their order; 0 after the last. */
int64_t maqd_struct_size(int32_t index);

/* ---------------------------------------------------------------------------- instruction sets */

/* How many instruction sets this build knows, slowest first. */
int32_t maqd_isas(void);
const char *maqd_isa_name(int32_t isa);
/* Whether this machine runs it. */
int32_t maqd_supported(int32_t isa);
/* The one that the environment asks for, by its name, or NULL. */
const char *maqd_asked_isa(void);

/* ------------------------------------------------------------------------------------ products */

/* Dense words (rows, words per row; mixed radix, see packing.py) to the layout of a weight;
 * `codes` is zero before. */
void maqd_repack(const int32_t *words, int64_t rows, int64_t columns, int32_t levels,
                 int32_t digits, int32_t bits, uint8_t *codes, int32_t threads);

/* x (tokens, columns) times the weight, to y (tokens, rows). `levels` 0: float activations; else
 * `step` is theirs, one every `step_every` floats (0: the same for all), where 0 asks for the
 * token's own; NULL: all have their own. Returns 0, or 1 if memory is short. */
int32_t maqd_linear(const maqd_weight *w, const float *x, int64_t tokens, int32_t levels,
                    const float *step, int64_t step_every, float *y, int32_t isa, int32_t threads);

/* Runs all blocks and the final norm on call->hidden. Returns 0, or 1 if memory is short. */
int32_t maqd_decode(const maqd_decoder *model, const maqd_call *call, int32_t isa, int32_t threads);

/* --------------------------------------------------------------------------- passes over rows */

/* Rows `ids` of a table, to y (count, columns). */
void maqd_embedding(const maqd_table *table, const int64_t *ids, int64_t count, float *y);

/* Rows of x (rows, features) normalized, to y; `first` (rows) or NULL: 1 on first tokens. */
void maqd_normalize(const maqd_norm *norm, const float *x, const uint8_t *first, int64_t rows,
                    float *y, int32_t isa, int32_t threads);

/* Every `size` neighbors of x (rows, columns) times the normalized Hadamard matrix, to y. */
void maqd_hadamard(const float *x, float *y, int64_t rows, int64_t columns, int64_t size,
                   int32_t isa, int32_t threads);

/* ------------------------------------------------------------------- calibration and training */

/* Error compensation: w (columns, rows) in place. Each column keeps the value that was rounded, and
 * the later ones take over its error by the row of `factor` (columns, columns). The grid is `steps`
 * (columns, rows) and `center` (rows). Codes and scaled errors are (columns, rows). */
void maqd_compensate(float *w, const float *factor, const float *steps, const float *center,
                     float *codes, float *errors, int64_t levels, int64_t columns, int64_t rows,
                     int32_t threads);

/* Coordinate descent: value and gradient (columns, rows) in place. Each column goes to its best
 * value given the others, `gradient` being h (columns, columns) times what is still missing. The
 * grid as above. Codes, the values that were rounded, and how far each value moved are (columns,
 * rows). */
void maqd_descend(float *value, float *gradient, const float *h, const float *steps,
                  const float *center, float *codes, float *wanted, float *moved, int64_t levels,
                  int64_t columns, int64_t rows, int32_t threads);

/* weight (rows, columns) with step and scale (rows, groups), offset (rows) or NULL, to `out`
 * (rows, columns), by `kind` 0: values in float32, 1: values in bfloat16, 2: codes in float32 (for
 * which scale may be NULL). */
void maqd_fake_quantize(const float *weight, const float *step, const float *scale,
                        const float *offset, void *out, int64_t rows, int64_t columns,
                        int64_t groups, int32_t levels, int32_t kind, int32_t threads);

/* The gradients of the same from that of its values: `grad` (rows, columns), bfloat16 if `narrow`.
 * grad_offset may be NULL. */
void maqd_fake_quantize_backward(const float *weight, const float *step, const float *scale,
                                 const void *grad, float *grad_weight, float *grad_scale,
                                 float *grad_offset, int64_t rows, int64_t columns, int64_t groups,
                                 int32_t levels, int32_t narrow, int32_t threads);

/* Every token of x (tokens, width) on a grid over `clip_ratio` of its own absmax, to `out` of the
 * same shape; each of the two is bfloat16 if it is `narrow`, else float32. */
void maqd_round_tokens(const void *x, void *out, int64_t tokens, int64_t width, float clip_ratio,
                       int32_t levels, int32_t narrow_in, int32_t narrow_out, int32_t threads);

/* student, teacher (rows, width): logits, to be multiplied by `cooling`. loss (rows): KL(teacher ||
 * student); student becomes `factor` times the gradient in its cooled logits, teacher is spoilt. */
void maqd_divergence(float *student, float *teacher, double *loss, int64_t rows, int64_t width,
                     float cooling, float factor, int32_t threads);

#endif
