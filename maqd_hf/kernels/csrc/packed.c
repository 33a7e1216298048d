/* Packed matrix product for CPUs: unsigned codes times signed activation codes, int32 sums.
 *
 * Layout "16 x 4": rows in blocks of 16. A 64-byte chunk holds, for each of its 16 rows, 4
 * consecutive inputs; with b-bit storage P = 8/b such groups share a byte by bit position. Byte
 * 4*r + j of chunk c, bits b*p.., is the code of row r at input c*4P + 4p + j. One chunk is thus
 * the operand of one dot-product instruction per bit position, after a mask and without a shift:
 * every position has an accumulator of its own, and the accumulators are shifted at the end.
 *
 * With codes c, activation codes q, z = (M-1)/2 and h = 0 or 1/2 (odd or even activation levels):
 *
 *   y = xs * ( sum_g s_g (sum c q - z sum_g q) + o sum q + constant ) + bias
 *
 * where `constant` = sum_g s_g h (sum_g c - z n_g) + o h n comes ready from the repacking side.
 *
 * Plain C without Python or torch: called through ctypes on data pointers. Every function is
 * compiled for its instruction set by attribute and chosen at run time, never by -march=native.
 */

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__)
#define X86 1
#include <immintrin.h>
#endif

#define ROWS 16
#define TILE 4 /* tokens that share one pass over the weights */

typedef struct {
    const uint8_t *codes; /* (row blocks, chunks, 64) */
    const float *scale;   /* (groups, padded rows) */
    const float *offset;  /* (padded rows) */
    const float *constant;/* (padded rows) */
    const float *bias;    /* (padded rows) */
    int64_t rows, columns, groups, chunks;
    int32_t bits;
    float zero;
} maqd_weight;

typedef struct {
    const int8_t *codes; /* (tokens, chunks * inputs per chunk), zero beyond the columns */
    const float *step;   /* (tokens) */
    const int32_t *sums; /* (tokens, groups) */
} maqd_input;

/* dot: sums of code * activation code for one row block and one group, `tokens` <= TILE. */
typedef void (*dot_function)(const uint8_t *chunk, int64_t chunks, int bits, const int8_t *x,
                             int64_t x_stride, int tokens, int32_t out[TILE][ROWS]);

static void dot_portable(const uint8_t *chunk, int64_t chunks, int bits, const int8_t *x,
                         int64_t x_stride, int tokens, int32_t out[TILE][ROWS]) {
    const int positions = 8 / bits, mask = (1 << bits) - 1;
    memset(out, 0, sizeof(int32_t) * TILE * ROWS);
    for (int64_t c = 0; c < chunks; ++c, chunk += 64)
        for (int t = 0; t < tokens; ++t) {
            const int8_t *xc = x + t * x_stride + c * 4 * positions;
            for (int r = 0; r < ROWS; ++r)
                for (int p = 0; p < positions; ++p)
                    for (int j = 0; j < 4; ++j)
                        out[t][r] += ((chunk[4 * r + j] >> (bits * p)) & mask) * xc[4 * p + j];
        }
}

#ifdef X86

static inline int32_t four(const int8_t *x) {
    int32_t v;
    memcpy(&v, x, 4);
    return v;
}

/* One specialisation per (bits, tokens), so that all accumulators live in registers. */
#define VNNI __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni"), always_inline)) static inline
VNNI void vnni(const uint8_t *chunk, int64_t chunks, const int bits, const int8_t *x,
               int64_t x_stride, const int tokens, int32_t out[TILE][ROWS]) {
    const int positions = 8 / bits;
    __m512i acc[TILE][4];
    for (int t = 0; t < tokens; ++t)
        for (int p = 0; p < positions; ++p) acc[t][p] = _mm512_setzero_si512();
    for (int64_t c = 0; c < chunks; ++c, chunk += 64) {
        const __m512i w = _mm512_loadu_si512(chunk);
        _mm_prefetch((const char *)chunk + 2048, _MM_HINT_T0);
        for (int p = 0; p < positions; ++p) {
            const int mask = ((1 << bits) - 1) << (bits * p);
            const __m512i codes = bits == 8 ? w : _mm512_and_si512(w, _mm512_set1_epi8((char)mask));
            for (int t = 0; t < tokens; ++t) {
                const int8_t *xc = x + t * x_stride + c * 4 * positions + 4 * p;
                acc[t][p] = _mm512_dpbusd_epi32(acc[t][p], codes, _mm512_set1_epi32(four(xc)));
            }
        }
    }
    for (int t = 0; t < tokens; ++t) {
        __m512i sum = acc[t][0];
        for (int p = 1; p < positions; ++p)
            sum = _mm512_add_epi32(sum, _mm512_srai_epi32(acc[t][p], (unsigned)(bits * p)));
        _mm512_storeu_si512(out[t], sum);
    }
}

#define AVX2 __attribute__((target("avx2"), always_inline)) static inline
AVX2 void avx2(const uint8_t *chunk, int64_t chunks, const int bits, const int8_t *x,
               int64_t x_stride, const int tokens, int32_t out[TILE][ROWS]) {
    /* maddubs adds two products in 16 bits, so codes stay below 16: 8-bit codes go as nibbles. */
    const int inputs = 32 / bits, width = bits == 8 ? 4 : bits, fields = 8 / width;
    const __m256i ones = _mm256_set1_epi16(1), mask = _mm256_set1_epi8((char)((1 << width) - 1));
    for (int half = 0; half < 2; ++half) {
        __m256i acc[TILE][2]; /* [1] only for the high nibbles of 8-bit codes */
        for (int t = 0; t < tokens; ++t) acc[t][0] = acc[t][1] = _mm256_setzero_si256();
        const uint8_t *at = chunk + 32 * half;
        for (int64_t c = 0; c < chunks; ++c, at += 64) {
            const __m256i w = _mm256_loadu_si256((const __m256i *)at);
            for (int p = 0; p < fields; ++p) {
                const __m256i codes = _mm256_and_si256(_mm256_srli_epi16(w, width * p), mask);
                for (int t = 0; t < tokens; ++t) {
                    const int8_t *xc = x + t * x_stride + c * inputs + (bits == 8 ? 0 : 4 * p);
                    const __m256i pairs = _mm256_maddubs_epi16(codes, _mm256_set1_epi32(four(xc)));
                    const int high = bits == 8 && p;
                    acc[t][high] =
                        _mm256_add_epi32(acc[t][high], _mm256_madd_epi16(pairs, ones));
                }
            }
        }
        for (int t = 0; t < tokens; ++t)
            _mm256_storeu_si256((__m256i *)(out[t] + 8 * half),
                                _mm256_add_epi32(acc[t][0], _mm256_slli_epi32(acc[t][1], 4)));
    }
}

#define SPECIALISE(name, features)                                                              \
    __attribute__((target(features))) static void dot_##name(                                   \
        const uint8_t *w, int64_t n, int bits, const int8_t *x, int64_t stride, int tokens,     \
        int32_t out[TILE][ROWS]) {                                                              \
        switch (bits * 8 + tokens) {                                                            \
            case 17: name(w, n, 2, x, stride, 1, out); break;                                   \
            case 18: name(w, n, 2, x, stride, 2, out); break;                                   \
            case 19: name(w, n, 2, x, stride, 3, out); break;                                   \
            case 20: name(w, n, 2, x, stride, 4, out); break;                                   \
            case 33: name(w, n, 4, x, stride, 1, out); break;                                   \
            case 34: name(w, n, 4, x, stride, 2, out); break;                                   \
            case 35: name(w, n, 4, x, stride, 3, out); break;                                   \
            case 36: name(w, n, 4, x, stride, 4, out); break;                                   \
            case 65: name(w, n, 8, x, stride, 1, out); break;                                   \
            case 66: name(w, n, 8, x, stride, 2, out); break;                                   \
            case 67: name(w, n, 8, x, stride, 3, out); break;                                   \
            case 68: name(w, n, 8, x, stride, 4, out); break;                                   \
        }                                                                                       \
    }
SPECIALISE(vnni, "avx512f,avx512bw,avx512vl,avx512vnni")
SPECIALISE(avx2, "avx2")

#endif

static const struct {
    const char *name;
    dot_function dot;
} PATHS[] = {
    {"portable", dot_portable},
#ifdef X86
    {"avx2", dot_avx2},
    {"avx512-vnni", dot_vnni},
#endif
};

/* Number of paths this build knows; `maqd_supported(i)` says whether this machine runs path i. */
int32_t maqd_paths(void) { return (int32_t)(sizeof PATHS / sizeof PATHS[0]); }

const char *maqd_path_name(int32_t path) { return PATHS[path].name; }

int32_t maqd_supported(int32_t path) {
#ifdef X86
    __builtin_cpu_init();
    if (path == 1) return __builtin_cpu_supports("avx2") != 0;
    if (path == 2)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
#endif
    return path == 0;
}

/* Dense words (rows, words per row; mixed radix, see packing.py) to the layout above, zeroed. */
void maqd_repack(const int32_t *words, int64_t rows, int64_t columns, int32_t levels,
                 int32_t digits, int32_t bits, uint8_t *codes) {
    const int64_t per_row = (columns + digits - 1) / digits;
    const int64_t inputs = 32 / bits, chunks = (columns + inputs - 1) / inputs;
#pragma omp parallel for schedule(static)
    for (int64_t block = 0; block < (rows + ROWS - 1) / ROWS; ++block)
        for (int64_t n = block * ROWS; n < rows && n < (block + 1) * ROWS; ++n) {
            uint8_t *base = codes + block * chunks * 64 + 4 * (n % ROWS);
            int64_t k = 0;
            for (int64_t i = 0; i < per_row; ++i) {
                uint32_t rest = (uint32_t)words[n * per_row + i];
                for (int d = 0; d < digits && k < columns; ++d, ++k, rest /= (uint32_t)levels) {
                    const int64_t within = k % inputs;
                    base[k / inputs * 64 + within % 4] |=
                        (uint8_t)((rest % (uint32_t)levels) << (bits * (within / 4)));
                }
            }
        }
}

/* Activation codes of x (tokens, columns): code = clamp(rint(x / step + (M-1)/2), 0, M-1), stored
 * as code - M/2 (floor), int8. A step of 0 asks for the token's own, absmax / ((M-1)/2). NaN counts
 * as the largest code, infinity clips. `codes` rows are `stride` long and zeroed beyond columns. */
void maqd_quantize(const float *x, int64_t tokens, int64_t columns, int64_t groups, int32_t levels,
                   float *step, int8_t *codes, int64_t stride, int32_t *sums) {
    const float center = (float)(levels - 1) / 2, top = (float)(levels - 1);
    const int64_t width = columns / groups;
#pragma omp parallel for schedule(static) if (tokens > 3)
    for (int64_t t = 0; t < tokens; ++t) {
        const float *row = x + t * columns;
        int8_t *out = codes + t * stride;
        float s = step[t];
        if (s == 0) {
            float most = 0;
            for (int64_t k = 0; k < columns; ++k) most = fmaxf(most, fabsf(row[k]));
            s = most / center;
            if (!(s >= 1.17549435e-38f)) s = 1.17549435e-38f;
            step[t] = s;
        }
        for (int64_t g = 0; g < groups; ++g) {
            int32_t sum = 0;
            for (int64_t k = g * width; k < (g + 1) * width; ++k) {
                float code = rintf(row[k] / s + center);
                code = code < top ? (code > 0 ? code : 0) : top;
                const int32_t q = (int32_t)code - levels / 2;
                out[k] = (int8_t)q;
                sum += q;
            }
            sums[t * groups + g] = sum;
        }
        memset(out + columns, 0, (size_t)(stride - columns));
    }
}

static void row_block(const maqd_weight *w, const maqd_input *x, int64_t block, int64_t token,
                      int tokens, dot_function dot, float *y) {
    const int64_t inputs = 32 / w->bits, stride = w->chunks * inputs;
    const int64_t padded = (w->rows + ROWS - 1) / ROWS * ROWS, first = block * ROWS;
    const int64_t chunks = w->groups == 1 ? w->chunks : w->columns / w->groups / inputs;
    const uint8_t *codes = w->codes + block * w->chunks * 64;
    float total[TILE][ROWS] = {{0}};
    for (int64_t g = 0; g < w->groups; ++g, codes += chunks * 64) {
        int32_t sums[TILE][ROWS];
        dot(codes, chunks, w->bits, x->codes + token * stride + g * chunks * inputs, stride, tokens,
            sums);
        const float *scale = w->scale + g * padded + first;
        for (int t = 0; t < tokens; ++t) {
            const float shift = w->zero * (float)x->sums[(token + t) * w->groups + g];
            for (int r = 0; r < ROWS; ++r) total[t][r] += scale[r] * ((float)sums[t][r] - shift);
        }
    }
    const int64_t live = w->rows - first < ROWS ? w->rows - first : ROWS;
    for (int t = 0; t < tokens; ++t) {
        int64_t all = 0;
        for (int64_t g = 0; g < w->groups; ++g) all += x->sums[(token + t) * w->groups + g];
        for (int64_t r = 0; r < live; ++r) {
            const int64_t n = first + r;
            const float inner = total[t][r] + w->offset[n] * (float)all + w->constant[n];
            y[(token + t) * w->rows + n] = x->step[token + t] * inner + w->bias[n];
        }
    }
}

/* y (tokens, rows) float32. `threads` <= 1 runs in the calling thread. */
void maqd_linear(const maqd_weight *w, const maqd_input *x, int64_t tokens, float *y, int32_t path,
                 int32_t threads) {
    const dot_function dot = PATHS[path].dot;
    const int64_t blocks = (w->rows + ROWS - 1) / ROWS;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t block = 0; block < blocks; ++block)
        for (int64_t t = 0; t < tokens; t += TILE) {
            const int count = tokens - t < TILE ? (int)(tokens - t) : TILE;
            row_block(w, x, block, t, count, dot, y);
        }
}
