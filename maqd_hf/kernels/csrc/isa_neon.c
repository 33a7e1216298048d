/* 64-bit Arm with its byte dot product (dotprod: Cortex-A55 and A76, Neoverse N1, Apple M1, and
 * what came after). The products are signed: codes of 8 bits are moved down by 128, which the sum
 * of the activation codes makes up for. It was run on an emulator only (.ci/arm), so
 * no choice here was timed. */
#include "internal.h"

#if defined(__aarch64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("dotprod"))), apply_to = function)
#else
#pragma GCC target("arch=armv8.2-a+dotprod")
#endif
#include <arm_neon.h>
#include <string.h>
#if defined(__linux__)
#include <sys/auxv.h>
#endif
#define WIDTH 4
#define SPAN 4
#include "vector.h"

#define ISA maqd_isa_neon
#define NAME "neon-dotprod"
#define SUPPORTED has_dotprod

static int has_dotprod(void) {
#if defined(__linux__)
    return (getauxval(AT_HWCAP) >> 20 & 1) != 0; /* HWCAP_ASIMDDP */
#elif defined(__APPLE__)
    return 1; /* every Arm Mac */
#else
    return 0;
#endif
}

#define TILE 4
#define DIRECT(bits) ((bits) == 2 || (bits) == 4 || (bits) == 8)
#define QUADS 4 /* registers of a plane: 4 rows each */

/* The four signed bytes at x, once for each of 4 rows. */
INLINE int8x16_t four(const int8_t *x) {
    int32_t word;
    memcpy(&word, x, 4);
    return vreinterpretq_s8_s32(vdupq_n_s32(word));
}

INLINE int8x16_t codes_of(const uint8_t *codes, const int wide) {
    const uint8x16_t w = vld1q_u8(codes);
    return vreinterpretq_s8_u8(wide ? veorq_u8(w, vdupq_n_u8(128)) : w);
}

/* Codes of position p, times 2^shift(bits, p): only the uppermost would not be positive. */
INLINE int shift(const int bits, const int p) { return bits * (p + 1) == 8 ? 0 : bits * p; }
INLINE int8x16_t field(uint8x16_t codes, const int bits, const int p) {
    const int at = bits * p, top = at + bits == 8;
    const uint8x16_t mask = vdupq_n_u8((uint8_t)(((1 << bits) - 1) << at));
    return vreinterpretq_s8_u8(top ? vshlq_u8(codes, vdupq_n_s8((int8_t)-at))
                                   : vandq_u8(codes, mask));
}

INLINE void dot_bytes(const uint8_t *codes, int64_t units, const int8_t *x, int32_t *out) {
    int32x4_t acc[QUADS], moved = vdupq_n_s32(0);
    for (int i = 0; i < QUADS; ++i) acc[i] = moved;
    for (int64_t u = 0; u < units; ++u, codes += 64, x += 4) {
        const int8x16_t q = four(x);
        moved = vdotq_s32(moved, vdupq_n_s8(1), q);
        for (int i = 0; i < QUADS; ++i) acc[i] = vdotq_s32(acc[i], codes_of(codes + 16 * i, 1), q);
    }
    for (int i = 0; i < QUADS; ++i)
        vst1q_s32(out + 4 * i, vaddq_s32(acc[i], vshlq_n_s32(moved, 7)));
}

INLINE void dot_fields(const uint8_t *codes, int64_t units, const int bits, const int8_t *x,
                       int32_t *out) {
    const int positions = 8 / bits;
    int32x4_t acc[QUADS][4];
    for (int i = 0; i < QUADS; ++i)
        for (int p = 0; p < positions; ++p) acc[i][p] = vdupq_n_s32(0);
    for (int64_t u = 0; u < units; ++u, codes += 64, x += 4 * positions)
        for (int p = 0; p < positions; ++p) {
            const int8x16_t q = four(x + 4 * p);
            for (int i = 0; i < QUADS; ++i)
                acc[i][p] = vdotq_s32(acc[i][p], field(vld1q_u8(codes + 16 * i), bits, p), q);
        }
    for (int i = 0; i < QUADS; ++i) {
        int32x4_t sum = vdupq_n_s32(0);
        for (int p = 0; p < positions; ++p)
            sum = vaddq_s32(sum, vshlq_s32(acc[i][p], vdupq_n_s32(-shift(bits, p))));
        vst1q_s32(out + 4 * i, sum);
    }
}

INLINE void dot(const uint8_t *codes, int64_t units, const int bits, const int8_t *x,
                int32_t *out) {
    if (bits == 8)
        dot_bytes(codes, units, x, out);
    else
        dot_fields(codes, units, bits, x, out);
}

/* acc += w . the codes of token t, which q has side by side. */
INLINE int32x4_t add_token(int32x4_t acc, int8x16_t w, int8x16_t q, const int t) {
    switch (t) {
        case 0: return vdotq_laneq_s32(acc, w, q, 0);
        case 1: return vdotq_laneq_s32(acc, w, q, 1);
        case 2: return vdotq_laneq_s32(acc, w, q, 2);
        default: return vdotq_laneq_s32(acc, w, q, 3);
    }
}

INLINE void dot_panel(const uint8_t *panel, int64_t block_stride, int64_t planes, const int blocks,
                      const int tokens, const int bits, const int8_t *x, int64_t every,
                      int32_t *out) {
    const int wide = bits == 8;
    for (int b = 0; b < blocks; ++b) {
        const uint8_t *at = panel + b * block_stride;
        const int8_t *from = x;
        int32x4_t acc[TILE][QUADS], moved = vdupq_n_s32(0); /* moved: token t's in lane t */
        for (int t = 0; t < tokens; ++t)
            for (int i = 0; i < QUADS; ++i) acc[t][i] = moved;
        for (int64_t c = 0; c < planes; ++c, at += 64, from += every) {
            const int8x16_t q = tokens == TILE ? vld1q_s8(from) : four(from);
            if (wide) moved = vdotq_s32(moved, vdupq_n_s8(1), q);
            for (int i = 0; i < QUADS; ++i) {
                const int8x16_t w = codes_of(at + 16 * i, wide);
                for (int t = 0; t < tokens; ++t) acc[t][i] = add_token(acc[t][i], w, q, t);
            }
        }
        for (int t = 0; t < tokens; ++t)
            for (int i = 0; i < QUADS; ++i) {
                const int32x4_t sum = vaddq_s32(acc[t][i], vdupq_n_s32(moved[t] * 128));
                vst1q_s32(out + (t * blocks + b) * ROWS + 4 * i, sum);
            }
    }
}

#include "isa.inc"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
