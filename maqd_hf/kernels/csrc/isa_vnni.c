/* x86-64 with AVX-512 and its byte dot product (VNNI). */
#include "internal.h"

#if defined(__x86_64__)
#define FEATURES "avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni"
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target(FEATURES))), apply_to = function)
#else
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,prefer-vector-width=512")
#endif
#include <immintrin.h>
#include <string.h>

#define WIDTH 16
#define SPAN 4
#include "vector.h"

#define ISA maqd_isa_vnni
#define NAME "avx512-vnni"
#define SUPPORTED has_vnni

static int has_vnni(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("fma");
}

#define TILE 12
#define DIRECT(bits) 1

/* acc += codes (unsigned) . x (four signed bytes), for each row. The intrinsic would do, but gcc 12
 * then moves the accumulators about. x is broadcast by a load of its own: as a memory operand of
 * the product it took twice the time (Zen 4). */
INLINE __m512i add_dot(__m512i acc, __m512i codes, __m512i x) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(codes), "v"(x));
    return acc;
}

INLINE __m512i four(const int8_t *x) {
    int32_t word;
    memcpy(&word, x, 4);
    return _mm512_set1_epi32(word);
}

/* Rows are short and many, so the hardware's prefetcher starts anew all the time; nearer than this
 * software prefetching slows reading down (25 GB/s at 1 KiB, 31 at 8 KiB). */
#define AHEAD 8192

INLINE void prefetch(const uint8_t *codes) {
    _mm_prefetch((const char *)codes + AHEAD, _MM_HINT_T0);
}

INLINE __m512i plane(const uint8_t *codes) { return _mm512_loadu_si512(codes); }
INLINE __m512i bits_at(__m512i codes, int width, int at) {
    return _mm512_and_si512(codes, _mm512_set1_epi8((char)(((1 << width) - 1) << at)));
}

/* `sets` units take turns with sums of their own: an addition waits for the one before, 4 cycles on
 * Zen 4 and 5 on Intel's, and with 4 bits a unit has only two sums. */
INLINE __m512i dot_fields(const uint8_t *codes, int64_t units, const int bits, const int sets,
                          const int8_t *x) {
    const int positions = 8 / bits;
    __m512i acc[16], sum = _mm512_setzero_si512();
    for (int i = 0; i < sets * positions; ++i) acc[i] = sum;
    for (; units >= sets; units -= sets)
        for (int i = 0; i < sets; ++i, codes += 64, x += 4 * positions) {
            prefetch(codes);
            for (int p = 0; p < positions; ++p) {
                __m512i *one = acc + i * positions + p;
                *one = add_dot(*one, bits_at(plane(codes), bits, bits * p), four(x + 4 * p));
            }
        }
    for (; units; --units, codes += 64, x += 4 * positions)
        for (int p = 0; p < positions; ++p)
            acc[p] = add_dot(acc[p], bits_at(plane(codes), bits, bits * p), four(x + 4 * p));
    for (int p = 0; p < positions; ++p) {
        for (int i = 1; i < sets; ++i) acc[p] = _mm512_add_epi32(acc[p], acc[i * positions + p]);
        sum = _mm512_add_epi32(sum, _mm512_srai_epi32(acc[p], (unsigned)(bits * p)));
    }
    return sum;
}

INLINE __m512i dot_planes(const uint8_t *codes, int64_t units, const int8_t *x) {
    __m512i low[4], high[8], sum = _mm512_setzero_si512();
    for (int p = 0; p < 8; ++p) low[p % 4] = high[p] = sum;
    for (int64_t u = 0; u < units; ++u, codes += 192, x += 32) {
        for (int i = 0; i < 3; ++i) prefetch(codes + 64 * i);
        for (int p = 0; p < 8; ++p) {
            const __m512i q = four(x + 4 * p);
            low[p % 4] = add_dot(low[p % 4], bits_at(plane(codes + p / 4 * 64), 2, 2 * (p % 4)), q);
            high[p] = add_dot(high[p], bits_at(plane(codes + 128), 1, p), q);
        }
    }
    for (int p = 7; p >= 0; --p) {
        const __m512i bit = _mm512_srai_epi32(high[p], (unsigned)p);
        sum = _mm512_add_epi32(sum, _mm512_slli_epi32(bit, 2));
        if (p < 4) sum = _mm512_add_epi32(sum, _mm512_srai_epi32(low[p], (unsigned)(2 * p)));
    }
    return sum;
}

INLINE __m512i dot_trits(const uint8_t *codes, int64_t units, const int8_t *x) {
    __m512i now[5], next[5], sum = _mm512_setzero_si512();
    for (int p = 0; p < 5; ++p) now[p] = next[p] = sum;
    for (int64_t u = 0; u < units; ++u, codes += 64, x += 20) {
        __m512i q = plane(codes);
        prefetch(codes);
        for (int p = 0; p < 5; ++p) {
            const __m512i inputs = four(x + 4 * p);
            now[p] = add_dot(now[p], q, inputs);
            q = _mm512_add_epi8(_mm512_add_epi8(q, q), q);
            next[p] = add_dot(next[p], q, inputs);
        }
    }
    for (int p = 0; p < 5; ++p) {
        const __m512i three = _mm512_add_epi32(_mm512_slli_epi32(now[p], 1), now[p]);
        sum = _mm512_add_epi32(sum, _mm512_sub_epi32(three, next[p]));
    }
    return _mm512_srai_epi32(sum, 8);
}

INLINE void dot(const uint8_t *codes, int64_t units, const int bits, const int8_t *x,
                int32_t *out) {
    const __m512i sum = bits == 3       ? dot_planes(codes, units, x)
                        : bits == TRITS ? dot_trits(codes, units, x)
                        : units < 16    ? dot_fields(codes, units, bits, 1, x)
                                        : dot_fields(codes, units, bits, bits == 8 ? 4 : bits, x);
    _mm512_storeu_si512(out, sum);
}

INLINE void dot_panel(const uint8_t *panel, int64_t block_stride, int64_t planes, const int blocks,
                      const int tokens, const int bits, const int8_t *x, int64_t every,
                      int32_t *out) {
    (void)bits;
    __m512i acc[TILE * BLOCKS]; /* all in registers */
    for (int i = 0; i < tokens * blocks; ++i) acc[i] = _mm512_setzero_si512();
    for (int64_t c = 0; c < planes; ++c, panel += 64, x += every) {
        __m512i w[BLOCKS];
        for (int b = 0; b < blocks; ++b) w[b] = plane(panel + b * block_stride);
        for (int t = 0; t < tokens; ++t) {
            const __m512i q = four(x + 4 * t);
            for (int b = 0; b < blocks; ++b)
                acc[t * blocks + b] = add_dot(acc[t * blocks + b], w[b], q);
        }
    }
    for (int i = 0; i < tokens * blocks; ++i) _mm512_storeu_si512(out + i * ROWS, acc[i]);
}

#include "isa.inc"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#if defined(MAQD_AMX)
#include "amx.inc"
#endif
#endif
