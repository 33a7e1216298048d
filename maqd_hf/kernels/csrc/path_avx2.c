/* x86-64 with AVX2 and FMA. */
#include "maqd.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#include <immintrin.h>
#include <string.h>

#define PATH maqd_path_avx2
#define NAME "avx2"
#define SUPPORTED has_avx2

static int has_avx2(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

/* maddubs adds two products in 16 bits, so codes stay below 16: 8-bit codes go as nibbles. */
static inline __attribute__((always_inline)) void dot(const uint8_t *chunk, int64_t block_stride,
                                                      int64_t chunks, const int bits,
                                                      const int blocks, const int8_t *x,
                                                      int64_t x_stride, const int tokens,
                                                      void *out) {
    const int inputs = 32 / bits, width = bits == 8 ? 4 : bits, fields = 8 / width;
    const __m256i ones = _mm256_set1_epi16(1), mask = _mm256_set1_epi8((char)((1 << width) - 1));
    for (int half = 0; half < 2 * blocks; ++half) {
        __m256i acc[4][2]; /* [1] only for the high nibbles of 8-bit codes */
        for (int t = 0; t < tokens; ++t) acc[t][0] = acc[t][1] = _mm256_setzero_si256();
        const uint8_t *at = chunk + half / 2 * block_stride + half % 2 * 32;
        for (int64_t c = 0; c < chunks; ++c, at += 64) {
            const __m256i w = _mm256_loadu_si256((const __m256i *)at);
            _mm_prefetch((const char *)at + 2048, _MM_HINT_T0);
            for (int p = 0; p < fields; ++p) {
                const __m256i codes = _mm256_and_si256(_mm256_srli_epi16(w, width * p), mask);
                for (int t = 0; t < tokens; ++t) {
                    int32_t four;
                    memcpy(&four, x + t * x_stride + c * inputs + (bits == 8 ? 0 : 4 * p), 4);
                    const __m256i pairs = _mm256_maddubs_epi16(codes, _mm256_set1_epi32(four));
                    const int high = bits == 8 && p;
                    acc[t][high] = _mm256_add_epi32(acc[t][high], _mm256_madd_epi16(pairs, ones));
                }
            }
        }
        for (int t = 0; t < tokens; ++t) {
            int32_t *sums = (int32_t *)out + (t * blocks + half / 2) * ROWS + half % 2 * 8;
            const __m256i high = _mm256_slli_epi32(acc[t][1], 4);
            _mm256_storeu_si256((__m256i *)sums, _mm256_add_epi32(acc[t][0], high));
        }
    }
}

#include "path.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
