/* Passes over rows: the Hadamard transform, norms, rows of a packed table. */
#include "internal.h"

typedef struct {
    const maqd_isa *isa;
    const float *x;
    float *y;
    int64_t columns, size;
} transform;

static void transform_rows(const void *argument, int64_t from, int64_t to) {
    const transform *t = argument;
    t->isa->hadamard(t->x + from * t->columns, (to - from) * t->columns, t->size,
                     t->y + from * t->columns);
}

void maqd_hadamard(const float *x, float *y, int64_t rows, int64_t columns, int64_t size,
                   int32_t isa, int32_t threads) {
    transform t = {maqd_get_isa(isa), x, y, columns, size};
    maqd_run_pieces(transform_rows, &t, rows, threads);
}

typedef struct {
    const maqd_isa *isa;
    const maqd_norm *norm;
    const float *x;
    const uint8_t *first;
    float *y;
} normalizing;

static void normalize_rows(const void *argument, int64_t from, int64_t to) {
    const normalizing *n = argument;
    const int64_t features = n->norm->features;
    for (int64_t i = from; i < to; ++i)
        n->isa->norm(n->norm, n->first && n->first[i], n->x + i * features, n->y + i * features);
}

void maqd_normalize(const maqd_norm *norm, const float *x, const uint8_t *first, int64_t rows,
                    float *y, int32_t isa, int32_t threads) {
    normalizing n = {maqd_get_isa(isa), norm, x, first, y};
    maqd_run_pieces(normalize_rows, &n, rows, threads);
}

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

void maqd_embedding(const maqd_table *table, const int64_t *ids, int64_t count, float *y) {
    for (int64_t i = 0; i < count; ++i) maqd_look_up(table, ids[i], y + i * table->columns);
}
