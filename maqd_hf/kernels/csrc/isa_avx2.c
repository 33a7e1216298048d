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

#define WIDTH 8
#define SPAN 2
/* gcc 12 takes eight bytes apart. */
#define WIDENED(p) \
    ((vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(p)))))
#include "vector.h"

#define ISA maqd_isa_avx2
#define NAME "avx2"
#define SUPPORTED has_avx2

static int has_avx2(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

#define TILE 4
#define DIRECT(bits) 1

/* maddubs adds two products of codes (unsigned) and activation codes (signed) in 16 bits. So many
 * of its results fit 16 bits together, whatever the activations; only then are they widened, since
 * widening takes as long as the product (notebook: "Sums in 16 bits on AVX2"). */
#define FIT(most) (32767 / (2 * 128 * (most)))

/* The four signed bytes at x, once for each of 8 rows. */
INLINE __m256i four(const int8_t *x) {
    int32_t word;
    memcpy(&word, x, 4);
    return _mm256_set1_epi32(word);
}
/* The intrinsic would do, but gcc 12 puts additions off until all products are there, in memory. */
INLINE __m256i add_pairs(__m256i sum, __m256i codes, __m256i x) {
    __asm__("vpaddw %1, %0, %0" : "+x"(sum) : "x"(_mm256_maddubs_epi16(codes, x)));
    return sum;
}
INLINE __m256i add_widened(__m256i sum, __m256i pairs) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

INLINE __m256i half_plane(const uint8_t *codes) {
    return _mm256_loadu_si256((const __m256i *)codes);
}
INLINE __m256i field(__m256i codes, const int width, const int at) {
    const __m256i moved = at < 0 ? _mm256_slli_epi16(codes, -at) : _mm256_srli_epi16(codes, at);
    return _mm256_and_si256(moved, _mm256_set1_epi8((char)((1 << width) - 1)));
}

/* The codes of half a unit, one position after the other: what is left for the next ones is in
 * `rest`. A trit is how many of 85 and 170 the byte exceeds; bytes are compared as signed ones, so
 * 128 is subtracted from them at first, which leaves 3 * byte mod 256 as it is. */
INLINE __m256i codes_at(const uint8_t *half, const int bits, const int p, __m256i *rest) {
    if (bits == 3) {
        const __m256i low = field(half_plane(half + p / 4 * 64), 2, 2 * (p % 4));
        const __m256i high = field(half_plane(half + 128), 3, p - 2);
        return _mm256_or_si256(low, _mm256_and_si256(high, _mm256_set1_epi8(4)));
    }
    if (bits != TRITS) return field(half_plane(half), bits, bits * p);
    const __m256i q = p ? *rest : _mm256_xor_si256(half_plane(half), _mm256_set1_epi8(-128));
    *rest = _mm256_add_epi8(_mm256_add_epi8(q, q), q);
    const __m256i one = _mm256_cmpgt_epi8(q, _mm256_set1_epi8(85 - 128));
    const __m256i two = _mm256_cmpgt_epi8(q, _mm256_set1_epi8(170 - 128));
    return _mm256_abs_epi8(_mm256_add_epi8(one, two));
}

/* Adds `units` units of codes that fit together; of bytes their lower and upper nibbles. */
INLINE void dot_units(const uint8_t *codes, int64_t units, const int bits, const int8_t *x,
                      __m256i sum[2]) {
    const int positions = (int)maqd_inputs(bits) / 4, size = (int)maqd_planes(bits) * 64;
    __m256i pairs[2], upper[2], rest[2];
    for (int i = 0; i < 2; ++i) pairs[i] = upper[i] = _mm256_setzero_si256();
    for (int64_t u = 0; u < units; ++u, codes += size, x += 4 * positions)
        for (int p = 0; p < positions; ++p) {
            const __m256i q = four(x + 4 * p);
            for (int i = 0; i < 2; ++i) {
                if (bits == 8) {
                    const __m256i w = half_plane(codes + 32 * i);
                    pairs[i] = add_pairs(pairs[i], field(w, 4, 0), q);
                    upper[i] = add_pairs(upper[i], field(w, 4, 4), q);
                } else {
                    pairs[i] = add_pairs(pairs[i], codes_at(codes + 32 * i, bits, p, rest + i), q);
                }
            }
        }
    for (int i = 0; i < 2; ++i) {
        sum[i] = add_widened(sum[i], pairs[i]);
        if (bits != 8) continue;
        const __m256i wide = add_widened(_mm256_setzero_si256(), upper[i]);
        sum[i] = _mm256_add_epi32(sum[i], _mm256_slli_epi32(wide, 4));
    }
}

INLINE void dot(const uint8_t *codes, int64_t units, const int bits, const int8_t *x,
                int32_t *out) {
    const int64_t size = maqd_planes(bits) * 64, inputs = maqd_inputs(bits);
    const int most = bits == 8 ? 15 : bits == TRITS ? 2 : (1 << bits) - 1;
    const int fit = bits == 8 ? FIT(most) : FIT(most) / ((int)inputs / 4);
    __m256i sum[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
    for (; units >= fit; units -= fit, codes += fit * size, x += fit * inputs)
        dot_units(codes, fit, bits, x, sum);
    if (units) dot_units(codes, units, bits, x, sum);
    for (int i = 0; i < 2; ++i) _mm256_storeu_si256((__m256i *)(out + 8 * i), sum[i]);
}

/* Adds `planes` planes that fit together to the sums of two registers of codes with each token:
 * both halves of the rows or, if the codes are `wide`, the nibbles of one half. */
INLINE void dot_planes(const uint8_t *panel, int64_t planes, const int tokens, const int wide,
                       const int8_t *x, int64_t every, __m256i sum[2][TILE]) {
    __m256i pairs[2][TILE];
    for (int t = 0; t < tokens; ++t) pairs[0][t] = pairs[1][t] = _mm256_setzero_si256();
    for (int64_t c = 0; c < planes; ++c, panel += 64, x += every) {
        const __m256i w = half_plane(panel);
        const __m256i first = wide ? field(w, 4, 0) : w;
        const __m256i second = wide ? field(w, 4, 4) : half_plane(panel + 32);
        for (int t = 0; t < tokens; ++t) {
            const __m256i q = four(x + 4 * t);
            pairs[0][t] = add_pairs(pairs[0][t], first, q);
            pairs[1][t] = add_pairs(pairs[1][t], second, q);
        }
    }
    for (int t = 0; t < tokens; ++t)
        for (int i = 0; i < 2; ++i) sum[i][t] = add_widened(sum[i][t], pairs[i][t]);
}

INLINE void dot_panel(const uint8_t *panel, int64_t block_stride, int64_t planes, const int blocks,
                      const int tokens, const int bits, const int8_t *x, int64_t every,
                      int32_t *out) {
    const int wide = bits == 8, fit = bits == 2 ? 16 : FIT(15);
    for (int half = 0; half < 2 * blocks; half += wide ? 1 : 2) {
        const uint8_t *at = panel + half / 2 * block_stride + half % 2 * 32;
        const int8_t *q = x;
        int64_t left = planes;
        __m256i sum[2][TILE];
        for (int t = 0; t < tokens; ++t) sum[0][t] = sum[1][t] = _mm256_setzero_si256();
        for (; left >= fit; left -= fit, at += 64 * fit, q += fit * every)
            dot_planes(at, fit, tokens, wide, q, every, sum);
        if (left) dot_planes(at, left, tokens, wide, q, every, sum);
        for (int t = 0; t < tokens; ++t) {
            __m256i *to = (__m256i *)(out + (t * blocks + half / 2) * ROWS);
            if (wide) {
                const __m256i upper = _mm256_slli_epi32(sum[1][t], 4);
                _mm256_storeu_si256(to + half % 2, _mm256_add_epi32(sum[0][t], upper));
            } else {
                _mm256_storeu_si256(to, sum[0][t]);
                _mm256_storeu_si256(to + 1, sum[1][t]);
            }
        }
    }
}

#include "isa.inc"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
