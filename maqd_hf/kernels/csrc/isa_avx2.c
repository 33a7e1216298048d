/* x86-64 with AVX2 and FMA. */
#include "internal.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#include <immintrin.h>
#include <string.h>

#include "vector.h"

#define ISA maqd_isa_avx2
#define NAME "avx2"
#define SUPPORTED has_avx2

static int has_avx2(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

#define TILE 4
#define DIRECT(bits) ((bits) == 2 || (bits) == 4)

/* codes (unsigned) . the four bytes at x (signed), for each of 8 rows. maddubs adds two products in
 * 16 bits, which holds them while codes stay below 130. */
INLINE __m256i four(__m256i codes, const int8_t *x) {
    int32_t word;
    memcpy(&word, x, 4);
    const __m256i pairs = _mm256_maddubs_epi16(codes, _mm256_set1_epi32(word));
    return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}

INLINE __m256i half_plane(const uint8_t *codes) {
    return _mm256_loadu_si256((const __m256i *)codes);
}
INLINE __m256i field(__m256i codes, int width, int at) {
    return _mm256_and_si256(_mm256_srli_epi16(codes, at),
                            _mm256_set1_epi8((char)((1 << width) - 1)));
}

INLINE void dot(const uint8_t *codes, int64_t units, const int bits, const int8_t *x,
                int32_t *out) {
    const int positions = 8 / bits;
    __m256i acc[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
    for (int64_t u = 0; u < units; ++u, codes += 64, x += 4 * positions)
        for (int half = 0; half < 2; ++half) {
            const __m256i w = half_plane(codes + 32 * half);
            for (int p = 0; p < positions; ++p)
                acc[half] = _mm256_add_epi32(acc[half], four(field(w, bits, bits * p), x + 4 * p));
        }
    for (int half = 0; half < 2; ++half)
        _mm256_storeu_si256((__m256i *)(out + 8 * half), acc[half]);
}

INLINE void dot_panel(const uint8_t *panel, int64_t block_stride, int64_t planes, const int blocks,
                      const int tokens, const int wide, const int8_t *x, int64_t every,
                      int32_t *out) {
    for (int half = 0; half < 2 * blocks; ++half) {
        const uint8_t *at = panel + half / 2 * block_stride + half % 2 * 32;
        const int8_t *q = x;
        __m256i acc[TILE], high[TILE]; /* high: the upper nibbles of wide codes */
        for (int t = 0; t < tokens; ++t) acc[t] = high[t] = _mm256_setzero_si256();
        for (int64_t c = 0; c < planes; ++c, at += 64, q += every) {
            const __m256i w = half_plane(at);
            for (int t = 0; t < tokens; ++t) {
                acc[t] = _mm256_add_epi32(acc[t], four(wide ? field(w, 4, 0) : w, q + 4 * t));
                if (wide) high[t] = _mm256_add_epi32(high[t], four(field(w, 4, 4), q + 4 * t));
            }
        }
        for (int t = 0; t < tokens; ++t) {
            const __m256i sum = _mm256_add_epi32(acc[t], _mm256_slli_epi32(high[t], 4));
            int32_t *sums = out + (t * blocks + half / 2) * ROWS + half % 2 * 8;
            _mm256_storeu_si256((__m256i *)sums, sum);
        }
    }
}

#include "isa.inc"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
