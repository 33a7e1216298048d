/* Any machine: plain C, for the compiler's default instruction set. */
#include "internal.h"
#define WIDTH 4
#define SPAN 2
#include "vector.h"

#define ISA maqd_isa_portable
#define NAME "portable"
#define SUPPORTED always

static int always(void) { return 1; }

#define TILE 4
#define DIRECT(bits) 0

INLINE void dot(const uint8_t *codes, int64_t units, const int bits, const int8_t *x,
                int32_t *out) {
    (void)codes, (void)units, (void)bits, (void)x, (void)out;
}

INLINE void dot_panel(const uint8_t *panel, int64_t block_stride, int64_t planes, const int blocks,
                      const int tokens, const int bits, const int8_t *x, int64_t every,
                      int32_t *out) {
    (void)bits;
    for (int i = 0; i < tokens * blocks; ++i) {
        const uint8_t *w = panel + i % blocks * block_stride;
        const int8_t *q = x + 4 * (i / blocks);
        int32_t *sums = out + i * ROWS;
        for (int r = 0; r < ROWS; ++r) sums[r] = 0;
        for (int64_t c = 0; c < planes; ++c, w += 64, q += every)
            for (int r = 0; r < ROWS; ++r)
                for (int j = 0; j < 4; ++j) sums[r] += w[4 * r + j] * q[j];
    }
}

#include "isa.inc"
