/* x86-64 with AVX-512 and its byte dot product (VNNI). */
#include "maqd.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,prefer-vector-width=512")
#endif
#include <immintrin.h>
#include <string.h>

#define PATH maqd_path_vnni
#define NAME "avx512-vnni"
#define SUPPORTED has_vnni

static int has_vnni(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("fma");
}

static inline __attribute__((always_inline)) void dot(const uint8_t *chunk, int64_t block_stride,
                                                      int64_t chunks, const int bits,
                                                      const int blocks, const int8_t *x,
                                                      int64_t x_stride, const int tokens,
                                                      void *out) {
    const int positions = 8 / bits;
    __m512i acc[4][2][4]; /* tokens, blocks, positions: all in registers */
    for (int t = 0; t < tokens; ++t)
        for (int b = 0; b < blocks; ++b)
            for (int p = 0; p < positions; ++p) acc[t][b][p] = _mm512_setzero_si512();
    /* the same place of the next blocks, or of a long row only a little further on */
    const int64_t next = blocks * block_stride;
    const int64_t ahead = next > 32768 ? 4096 : next < 2048 ? 2048 : next;
    for (int64_t c = 0; c < chunks; ++c, chunk += 64) {
        __m512i w[2];
        for (int b = 0; b < blocks; ++b) {
            w[b] = _mm512_loadu_si512(chunk + b * block_stride);
            _mm_prefetch((const char *)chunk + b * block_stride + ahead, _MM_HINT_T0);
        }
        for (int p = 0; p < positions; ++p) {
            const __m512i mask = _mm512_set1_epi8((char)(((1 << bits) - 1) << (bits * p)));
            __m512i codes[2];
            for (int b = 0; b < blocks; ++b)
                codes[b] = bits == 8 ? w[b] : _mm512_and_si512(w[b], mask);
            for (int t = 0; t < tokens; ++t) {
                int32_t four;
                memcpy(&four, x + t * x_stride + c * 4 * positions + 4 * p, 4);
                for (int b = 0; b < blocks; ++b)
                    acc[t][b][p] =
                        _mm512_dpbusd_epi32(acc[t][b][p], codes[b], _mm512_set1_epi32(four));
            }
        }
    }
    for (int t = 0; t < tokens; ++t)
        for (int b = 0; b < blocks; ++b) {
            __m512i sum = acc[t][b][0];
            for (int p = 1; p < positions; ++p)
                sum = _mm512_add_epi32(sum, _mm512_srai_epi32(acc[t][b][p], (unsigned)(bits * p)));
            _mm512_storeu_si512((int32_t *)out + (t * blocks + b) * ROWS, sum);
        }
}

#include "path.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
