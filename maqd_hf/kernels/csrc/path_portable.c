/* Any machine: plain C, for the compiler's default instruction set. */
#include "maqd.h"

#define PATH maqd_path_portable
#define NAME "portable"
#define SUPPORTED always

static int always(void) { return 1; }

static inline __attribute__((always_inline)) void dot(const uint8_t *chunk, int64_t block_stride,
                                                      int64_t chunks, const int bits,
                                                      const int blocks, const int8_t *x,
                                                      int64_t x_stride, const int tokens,
                                                      void *out) {
    const int positions = 8 / bits, mask = (1 << bits) - 1;
    for (int t = 0; t < tokens; ++t)
        for (int b = 0; b < blocks; ++b) {
            int32_t *sums = (int32_t *)out + (t * blocks + b) * ROWS;
            for (int r = 0; r < ROWS; ++r) sums[r] = 0;
            for (int64_t c = 0; c < chunks; ++c) {
                const uint8_t *w = chunk + b * block_stride + c * 64;
                const int8_t *q = x + t * x_stride + c * 4 * positions;
                for (int p = 0; p < positions; ++p)
                    for (int r = 0; r < ROWS; ++r)
                        for (int j = 0; j < 4; ++j)
                            sums[r] += ((w[4 * r + j] >> (bits * p)) & mask) * q[4 * p + j];
            }
        }
}

#include "path.h"
