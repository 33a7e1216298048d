/* Vectors of 16 floats and elementary functions of them, and of floats in loops that the compiler
 * vectorises. A file that compiles for an instruction set of its own includes this after it has
 * said so: the compiler lowers 16 floats to whatever registers it may use then. */
#ifndef MAQD_VECTOR_H
#define MAQD_VECTOR_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define LANES 16

typedef float v16 __attribute__((vector_size(64)));
typedef int32_t i16 __attribute__((vector_size(64)));
typedef uint16_t h16 __attribute__((vector_size(32)));
typedef int8_t bytes16 __attribute__((vector_size(16)));
typedef uint8_t b64 __attribute__((vector_size(64)));

/* 1.5 * 2^23: a float plus this, less this, is rounded to an integer, ties to even. */
#define ROUNDING 12582912.0f
#define LEAST_NORMAL 1.17549435e-38f

INLINE v16 load(const float *p) {
    v16 v;
    memcpy(&v, p, sizeof v);
    return v;
}
INLINE void store(float *p, v16 v) { memcpy(p, &v, sizeof v); }
INLINE v16 all(float x) { return x - (v16){0}; }
INLINE i16 lane_numbers(void) {
    return (i16){0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
}
INLINE v16 choose(i16 mask, v16 a, v16 b) { return (v16)(((i16)a & mask) | ((i16)b & ~mask)); }
INLINE float sum16(v16 v) {
    float total = 0;
    for (int i = 0; i < LANES; ++i) total += v[i];
    return total;
}
/* The first `count` floats, the rest `filler`. */
INLINE v16 load_some(const float *p, int64_t count, float filler) {
    v16 v = all(filler);
    memcpy(&v, p, (size_t)count * sizeof *p);
    return v;
}

/* e^(x - n ln 2) to 2 ulp where n is x / ln 2, rounded: a polynomial on [-ln 2 / 2, ln 2 / 2]. */
#define DEFINE_REST_OF_EXPONENTIAL(type, name)                      \
    INLINE type name(type x, type n) {                              \
        const type r = (x - n * 0.693359375f) + n * 2.12194440e-4f; \
        type p = r * 1.9875691500e-4f + 1.3981999507e-3f;           \
        p = p * r + 8.3334519073e-3f;                               \
        p = p * r + 4.1665795894e-2f;                               \
        p = p * r + 1.6666665459e-1f;                               \
        p = p * r + 5.0000001201e-1f;                               \
        return p * (r * r) + r + 1.0f;                              \
    }
DEFINE_REST_OF_EXPONENTIAL(float, rest_of_exponential)
DEFINE_REST_OF_EXPONENTIAL(v16, rest_of_exponential16)
#define LOG2_E 1.44269504f
#define LARGEST_EXPONENT 87.0f /* beyond it 2^n leaves the normal floats */

/* e^x; inputs beyond +-87 saturate. */
INLINE v16 exponential16(v16 x) {
    x = choose(x > LARGEST_EXPONENT, all(LARGEST_EXPONENT), x);
    x = choose(x < -LARGEST_EXPONENT, all(-LARGEST_EXPONENT), x);
    const v16 magic = all(ROUNDING);
    const v16 n = (x * LOG2_E + magic) - magic;
    const v16 p = rest_of_exponential16(x, n);
    return p * (v16)((__builtin_convertvector(n, i16) + 127) << 23);
}

/* e^x for x <= 0; 0 below -87. */
INLINE float exponential(float x) {
    const float low = x < -LARGEST_EXPONENT ? -LARGEST_EXPONENT : x;
    const float n = rintf(low * LOG2_E);
    const float p = rest_of_exponential(low, n);
    const int32_t bits = ((int32_t)n + 127) * (1 << 23);
    float power;
    memcpy(&power, &bits, 4);
    return x < -LARGEST_EXPONENT ? 0.0f : p * power;
}

/* The rule of functional.quantize: the code, in 0..top, of a value in units of its step; `zero` is
 * top / 2. NaN stays NaN. */
INLINE float code_of(float u, float zero, float top) {
    const float code = rintf(u + zero);
    return code < 0 ? 0 : code > top ? top : code;
}

/* bfloat16 is the upper half of a float. */
INLINE float from_bf16(uint16_t x) {
    const uint32_t bits = (uint32_t)x << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
}
INLINE uint16_t to_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return (uint16_t)(x != x ? 0x7fc0 : rounded);
}
INLINE v16 load_bf16(const uint16_t *p) {
    h16 half;
    memcpy(&half, p, sizeof half);
    return (v16)(__builtin_convertvector(half, i16) << 16);
}

/* v[i ^ bit] for every i */
#ifdef __clang__
#define PERMUTED(v, ...) __builtin_shufflevector(v, v, __VA_ARGS__)
#else
#define PERMUTED(v, ...) __builtin_shuffle(v, (i16){__VA_ARGS__})
#endif
INLINE v16 swapped(v16 v, const int bit) {
    if (bit == 1) return PERMUTED(v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
    if (bit == 2) return PERMUTED(v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    if (bit == 4) return PERMUTED(v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
    return PERMUTED(v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
}

#endif
