/* Vectors of 16 floats and elementary functions of them, and of floats in loops that the compiler
 * vectorises. A file that compiles for an instruction set of its own includes this after it has
 * said so: the compiler lowers 16 floats to whatever registers it may use then. That costs moves,
 * so loops that must keep sums in registers work on `vec`, one register of WIDTH floats, which such
 * a file defines before. */
#ifndef MAQD_VECTOR_H
#define MAQD_VECTOR_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define LANES 16

typedef float v16 __attribute__((vector_size(64)));
typedef int32_t i16 __attribute__((vector_size(64)));
typedef uint8_t b64 __attribute__((vector_size(64)));

#ifndef WIDTH
#define WIDTH 16
#endif
typedef float vec __attribute__((vector_size(4 * WIDTH)));
typedef int32_t ivec __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t hvec __attribute__((vector_size(2 * WIDTH)));
typedef int8_t bvec __attribute__((vector_size(WIDTH)));

/* 1.5 * 2^23: a float plus this, less this, is rounded to an integer, ties to even. */
#define ROUNDING 12582912.0f
#define LEAST_NORMAL 1.17549435e-38f

INLINE v16 load(const float *p) {
    v16 v;
    memcpy(&v, p, sizeof v);
    return v;
}
INLINE void store(float *p, v16 v) { memcpy(p, &v, sizeof v); }
INLINE i16 lane_numbers(void) {
    return (i16){0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
}
INLINE vec load_vec(const float *p) {
    vec v;
    memcpy(&v, p, sizeof v);
    return v;
}
INLINE vec load_some_vec(const float *p, int64_t count) { /* the rest 0 */
    vec v = {0};
    memcpy(&v, p, (size_t)count * sizeof *p);
    return v;
}
INLINE ivec load_ints(const int32_t *p) {
    ivec v;
    memcpy(&v, p, sizeof v);
    return v;
}
#ifndef WIDENED /* a file may know a better way */
#define WIDENED widened
INLINE vec widened(const int8_t *bytes) {
    bvec v;
    memcpy(&v, bytes, sizeof v);
    return __builtin_convertvector(__builtin_convertvector(v, ivec), vec);
}
#endif
INLINE void store_vec(float *p, vec v) { memcpy(p, &v, sizeof v); }
INLINE vec all_vec(float x) { return x - (vec){0}; }
INLINE vec choose_vec(ivec mask, vec a, vec b) {
    return (vec)(((ivec)a & mask) | ((ivec)b & ~mask));
}
INLINE ivec lanes_vec(void) {
    ivec lane;
    for (int i = 0; i < WIDTH; ++i) lane[i] = i;
    return lane;
}
INLINE float sum_vec(vec v) {
    float total = 0;
    for (int i = 0; i < WIDTH; ++i) total += v[i];
    return total;
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
DEFINE_REST_OF_EXPONENTIAL(vec, rest_of_exponential_vec)
#define LOG2_E 1.44269504f
#define LARGEST_EXPONENT 87.0f /* beyond it 2^n leaves the normal floats */

/* e^x; inputs beyond +-87 saturate. */
INLINE vec exponential_vec(vec x) {
    const vec most = all_vec(LARGEST_EXPONENT), magic = all_vec(ROUNDING);
    x = choose_vec(x > most, most, x);
    x = choose_vec(x < -most, -most, x);
    const vec n = (x * LOG2_E + magic) - magic;
    const vec p = rest_of_exponential_vec(x, n);
    return p * (vec)((__builtin_convertvector(n, ivec) + 127) << 23);
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
INLINE vec load_bf16(const uint16_t *p) {
    hvec half;
    memcpy(&half, p, sizeof half);
    return (vec)(__builtin_convertvector(half, ivec) << 16);
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
