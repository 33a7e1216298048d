/* The packed product and what prepares its inputs; a part of path.h. One token multiplies the codes
 * as they stand, many tokens a panel of bytes, float activations codes that became floats. */

typedef uint16_t h16 __attribute__((vector_size(32)));

/* A plane of a panel. `centered`: codes are doubled and moved to the middle, 2 c - (M-1), where `most`
 * is M-1. */
INLINE void spread_plane(b64 codes, const int centered, uint8_t most, uint8_t *plane) {
    if (centered) codes += codes - most;
    memcpy(plane, &codes, 64);
}

/* One unit as planes of whole bytes, in the order of its inputs. */
INLINE void unpack_unit(const uint8_t *unit, const int bits, const int centered, uint8_t most,
                        uint8_t *panel) {
    b64 q, upper, high;
    memcpy(&q, unit, 64);
    if (bits == 3) {
        memcpy(&upper, unit + 64, 64);
        memcpy(&high, unit + 128, 64);
        for (int p = 0; p < 8; ++p) {
            const b64 low = (p < 4 ? q : upper) >> (2 * (p % 4)) & 3;
            spread_plane(low | (high >> p & 1) << 2, centered, most, panel + 64 * p);
        }
    } else if (bits == TRITS) {
        for (int p = 0; p < 5; ++p, q += q + q)
            spread_plane(-((b64)(q > 85) + (b64)(q > 170)), centered, most, panel + 64 * p);
    } else {
        for (int p = 0; p < 8 / bits; ++p) {
            const b64 codes = q >> (bits * p) & (uint8_t)((1 << bits) - 1);
            spread_plane(codes, centered, most, panel + 64 * p);
        }
    }
}

INLINE void unpack_units(const maqd_weight *w, const uint8_t *codes, const int bits,
                         const int centered, uint8_t *panel) {
    const int64_t size = maqd_planes(bits) * 64, planes = maqd_inputs(bits) / 4;
    const uint8_t most = (uint8_t)(2 * w->zero);
    for (int64_t u = 0; u < w->units; ++u)
        unpack_unit(codes + u * size, bits, centered, most, panel + u * planes * 64);
}

/* `count` row blocks as a panel; 8-bit codes are one as they stand, never centered. */
INLINE const uint8_t *unpack(const maqd_weight *w, int64_t block, int64_t count, const int centered,
                             uint8_t *panel) {
    const int64_t size = w->units * maqd_planes(w->bits) * 64, stride = maqd_stride(w) * ROWS;
    const uint8_t *codes = w->codes + block * size;
    if (w->bits == 8) return codes;
    for (int64_t b = 0; b < count; ++b, codes += size) switch (w->bits) {
            case 2: unpack_units(w, codes, 2, centered, panel + b * stride); break;
            case 3: unpack_units(w, codes, 3, centered, panel + b * stride); break;
            case 4: unpack_units(w, codes, 4, centered, panel + b * stride); break;
            default: unpack_units(w, codes, TRITS, centered, panel + b * stride);
        }
    return panel;
}

/* Scales of a group of one row block; bfloat16 is the upper half of a float. */
INLINE v16 scales_of(const maqd_weight *w, int64_t block, int64_t group) {
    if (w->groups == 1) return load((const float *)w->scale + block * ROWS);
    h16 half;
    memcpy(&half, (const uint16_t *)w->scale + (block * w->groups + group) * ROWS, sizeof half);
    return (v16)(__builtin_convertvector(half, i16) << 16);
}

/* Adds to the total of one token and row block what a group's sum of code * q is worth;
 * `zero_inputs`: what it is too large by, as code 0 stands for -zero. */
INLINE v16 add_group(v16 total, v16 scale, i16 sum, float zero_inputs) {
    return total + scale * (__builtin_convertvector(sum, v16) - zero_inputs);
}

INLINE void finish(const maqd_weight *w, int64_t block, v16 total, float sum, float step, float *y) {
    const int64_t n = block * ROWS, live = w->rows - n;
    if (w->offset) total += load(w->offset + n) * sum;
    if (w->constant) total += load(w->constant + n);
    total *= step;
    if (w->bias) total += load(w->bias + n);
    if (live >= ROWS)
        store(y + n, total);
    else
        memcpy(y + n, &total, (size_t)live * sizeof *y);
}

/* One token and one row block, from the codes as they stand. */
INLINE void single(const maqd_weight *w, const maqd_input *x, int64_t block, int64_t token,
                   const int bits, float *y) {
    const int64_t size = maqd_planes(bits) * 64, stride = maqd_stride(w), groups = w->groups;
    const int64_t units = groups == 1 ? w->units : w->columns / groups / maqd_inputs(bits);
    const uint8_t *codes = w->codes + block * w->units * size;
    const int8_t *q = x->codes + token * stride;
    const float *sums = x->sums + token * (groups + 1);
    const float *steps = x->group_step ? x->group_step + token * groups : NULL;
    v16 total = {0};
    for (int64_t g = 0; g < groups; ++g, codes += units * size, q += units * maqd_inputs(bits)) {
        i16 out;
        v16 scale = scales_of(w, block, g);
        if (steps) scale *= steps[g];
        dot(codes, units, bits, q, (int32_t *)&out);
        total = add_group(total, scale, out, w->zero * sums[g]);
    }
    finish(w, block, total, sums[groups], x->step[token], y);
}

/* What a group's sums of one tile are worth, added to its totals or, of the `first`, in their place;
 * `sums` and `steps` are those of the tile's first token. */
INLINE void settle(const maqd_weight *w, int64_t block, const int blocks, const int tokens,
                   int64_t group, const int first, const i16 *out, const float *sums,
                   const float *steps, v16 *total) {
    for (int b = 0; b < blocks; ++b) {
        const v16 scale = scales_of(w, block + b, group);
        for (int t = 0; t < tokens; ++t) {
            const int i = t * blocks + b;
            const float zero_inputs = w->zero * sums[t * (w->groups + 1) + group];
            const v16 worth = steps ? scale * steps[t * w->groups + group] : scale;
            total[i] = add_group(first ? (v16){0} : total[i], worth, out[i], zero_inputs);
        }
    }
}

/* `tokens` tokens of a tile and the `blocks` row blocks of a panel. */
INLINE void tile(const maqd_weight *w, const maqd_input *x, const uint8_t *panel, int64_t block,
                 const int blocks, int64_t token, const int tokens, const int wide, float *y,
                 int64_t y_stride) {
    const int64_t stride = maqd_stride(w), groups = w->groups, within = token % x->tile;
    const int64_t planes = (groups == 1 ? stride : w->columns / groups) / 4;
    const int8_t *q = x->codes + (token - within) * stride + within * 4;
    const float *sums = x->sums + token * (groups + 1);
    const float *steps = x->group_step ? x->group_step + token * groups : NULL;
    v16 total[TILE * BLOCKS];
    y += token * y_stride;
    for (int t = 0; t < tokens; ++t) /* the results' lines are far apart: fetched meanwhile */
        for (int b = 0; b < blocks; ++b)
            __builtin_prefetch(y + t * y_stride + (block + b) * ROWS, 1);
    int64_t g = 0;
    do {
        i16 out[TILE * BLOCKS];
        dot_panel(panel, stride * ROWS, planes, blocks, tokens, wide, q, 4 * x->tile,
                  (int32_t *)out);
        if (g == 0)
            settle(w, block, blocks, tokens, g, 1, out, sums, steps, total);
        else
            settle(w, block, blocks, tokens, g, 0, out, sums, steps, total);
        panel += planes * 64;
        q += planes * 4 * x->tile;
    } while (++g < groups);
    for (int b = 0; b < blocks; ++b)
        for (int t = 0; t < tokens; ++t)
            finish(w, block + b, total[t * blocks + b], sums[t * (groups + 1) + groups],
                   x->step[token + t], y + t * y_stride);
}

INLINE void tiles(const maqd_weight *w, const maqd_input *x, const uint8_t *panel, int64_t block,
                  const int blocks, const int wide, int64_t tokens, float *y, int64_t y_stride) {
    for (int64_t t = 0; t < tokens;) {
        const int64_t whole = t - t % x->tile + x->tile;
        const int64_t rest = (whole < tokens ? whole : tokens) - t;
        /* by sixes where groups end: registers then hold a total beside every sum */
        if (TILE >= 12 && rest >= 12 && w->groups == 1) {
            tile(w, x, panel, block, blocks, t, TILE >= 12 ? 12 : 1, wide, y, y_stride);
            t += 12;
        } else if (TILE >= 12 && rest >= 6 && (rest == 12 || rest % 4 > 1)) {
            tile(w, x, panel, block, blocks, t, TILE >= 12 ? 6 : 1, wide, y, y_stride);
            t += 6;
        } else if (rest >= 4) {
            tile(w, x, panel, block, blocks, t, 4, wide, y, y_stride);
            t += 4;
        } else {
            tile(w, x, panel, block, blocks, t, 1, wide, y, y_stride);
            t += 1;
        }
    }
}

static const uint8_t *unpack_plain(const maqd_weight *w, int64_t block, int64_t count,
                                   uint8_t *panel) {
    return unpack(w, block, count, 0, panel);
}

/* The same with float activations: codes become floats, four sums a token keep them independent. */
INLINE void tile_float(const maqd_weight *w, const maqd_input *x, const uint8_t *panel,
                       int64_t block, int64_t token, const int tokens, float *y, int64_t y_stride) {
    const int64_t stride = maqd_stride(w), groups = w->groups;
    const int64_t planes = (groups == 1 ? stride : w->columns / groups) / 4;
    const float *values = x->values + token * stride;
    v16 total[4];
    for (int t = 0; t < tokens; ++t) total[t] = (v16){0};
    for (int64_t g = 0; g < groups; ++g) {
        v16 sum[4][4];
        for (int t = 0; t < tokens; ++t)
            for (int j = 0; j < 4; ++j) sum[t][j] = (v16){0};
        for (int64_t c = 0; c < planes; ++c, panel += 64, values += 4) {
            i16 word;
            memcpy(&word, panel, sizeof word);
            for (int j = 0; j < 4; ++j) {
                const v16 value = __builtin_convertvector(word >> (8 * j) & 255, v16);
                for (int t = 0; t < tokens; ++t) sum[t][j] += value * values[t * stride + j];
            }
        }
        const v16 scale = scales_of(w, block, g);
        for (int t = 0; t < tokens; ++t) {
            const v16 all_four = (sum[t][0] + sum[t][1]) + (sum[t][2] + sum[t][3]);
            total[t] += scale * (all_four - w->zero * x->sums[(token + t) * (groups + 1) + g]);
        }
    }
    for (int t = 0; t < tokens; ++t) {
        const float sum = x->sums[(token + t) * (groups + 1) + groups];
        finish(w, block, total[t], sum, 1, y + (token + t) * y_stride);
    }
}

static void matmul_float(const maqd_weight *w, const maqd_input *x, int64_t block, int64_t last,
                         int64_t tokens, float *y, int64_t y_stride, uint8_t *scratch) {
    for (; block < last; ++block) {
        const uint8_t *panel = unpack_plain(w, block, 1, scratch);
        int64_t t = 0;
        for (; t + 4 <= tokens; t += 4) tile_float(w, x, panel, block, t, 4, y, y_stride);
        for (; t < tokens; ++t) tile_float(w, x, panel, block, t, 1, y, y_stride);
    }
}

static void matmul_panels(const maqd_weight *w, const maqd_input *x, int64_t block, int64_t last,
                          int64_t tokens, float *y, int64_t y_stride, uint8_t *scratch) {
    for (; block < last; block += BLOCKS) {
        const int pair = block + BLOCKS <= last;
        const uint8_t *panel = unpack_plain(w, block, pair ? BLOCKS : 1, scratch);
        if (pair && w->wide)
            tiles(w, x, panel, block, BLOCKS, 1, tokens, y, y_stride);
        else if (pair)
            tiles(w, x, panel, block, BLOCKS, 0, tokens, y, y_stride);
        else
            tiles(w, x, panel, block, 1, 1, tokens, y, y_stride);
    }
}

INLINE void matmul_single(const maqd_weight *w, const maqd_input *x, int64_t block, int64_t last,
                          int64_t tokens, float *y, int64_t y_stride, const int bits) {
    for (; block < last; ++block)
        for (int64_t t = 0; t < tokens; ++t) single(w, x, block, t, bits, y + t * y_stride);
}

static void matmul(const maqd_weight *w, const maqd_input *x, int64_t first, int64_t last,
                   int64_t tokens, float *y, int64_t y_stride, uint8_t *panel) {
    if (x->values)
        matmul_float(w, x, first, last, tokens, y, y_stride, panel);
    else if (tokens >= MANY || !DIRECT(w->bits))
        matmul_panels(w, x, first, last, tokens, y, y_stride, panel);
    else
        switch (w->bits) {
            case 2: matmul_single(w, x, first, last, tokens, y, y_stride, 2); break;
            case 3: matmul_single(w, x, first, last, tokens, y, y_stride, 3); break;
            case 4: matmul_single(w, x, first, last, tokens, y, y_stride, 4); break;
            case 8: matmul_single(w, x, first, last, tokens, y, y_stride, 8); break;
            default: matmul_single(w, x, first, last, tokens, y, y_stride, TRITS);
        }
}

INLINE float absmax(const float *x, int64_t columns) {
    v16 most = {0};
    float largest = 0;
    for (int64_t k = 0; k < columns; k += 16) {
        const v16 v = columns - k < 16 ? load_some(x + k, columns - k, 0) : load(x + k);
        const v16 size = (v16)((i16)v & 0x7fffffff);
        most = choose(size > most, size, most);
    }
    for (int i = 0; i < 16; ++i) largest = most[i] > largest ? most[i] : largest;
    return largest;
}

/* absmax / ((M-1)/2) * clip_ratio, or the least normal float where that is less or NaN. */
INLINE float own_step(const float *x, int64_t columns, int32_t levels, float clip_ratio) {
    const float least = 1.17549435e-38f;
    const float step = absmax(x, columns) / ((float)(levels - 1) / 2) * clip_ratio;
    return step >= least ? step : least;
}

/* Four codes at a time, `every` bytes apart. Written out, as gcc makes a scatter of a loop, and of all
 * this function does that took half the time (Zen 4). */
INLINE void deal(bytes16 codes, int8_t *to, int64_t every) {
    int32_t four[4];
    memcpy(four, &codes, sizeof four);
    memcpy(to, four, 4);
    memcpy(to + every, four + 1, 4);
    memcpy(to + 2 * every, four + 2, 4);
    memcpy(to + 3 * every, four + 3, 4);
}

static void quantize(const float *x, int64_t columns, int64_t groups, int32_t levels,
                     float clip_ratio, float *step, float *group_step, int8_t *codes, int64_t run,
                     int64_t every, int64_t stride, float *sums) {
    const float center = (float)(levels - 1) / 2, top = (float)(levels - 1);
    const int64_t width = columns / groups;
    const v16 magic = all(12582912.0f); /* as in `exponential`: rounds to even */
    if (group_step)
        *step = 1;
    else if (*step == 0)
        *step = own_step(x, columns, levels, clip_ratio);
    v16 s = all(*step);
    const i16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    int32_t everything = 0;
    float worth = 0;
    for (int64_t g = 0; g < groups; ++g) {
        i16 sum = {0};
        if (group_step) {
            group_step[g] = own_step(x + g * width, width, levels, clip_ratio);
            s = all(group_step[g]);
        }
        for (int64_t k = g * width, end = k + width; k < end; k += 16) {
            const int64_t some = end - k < 16 ? end - k : 16;
            v16 code = (some < 16 ? load_some(x + k, some, 0) : load(x + k)) / s + center;
            code = choose(code < top, code, all(top));
            code = choose(code > 0, code, all(0));
            i16 whole = __builtin_convertvector((code + magic) - magic, i16) - levels / 2;
            if (some < 16) whole &= lane < (int32_t)some;
            sum += whole;
            const bytes16 bytes = __builtin_convertvector(whole, bytes16);
            int8_t *to = codes + k / run * every + k % run;
            if (run > 4) /* whole runs of 32 or 64 */
                memcpy(to, &bytes, sizeof bytes);
            else if (some == 16)
                deal(bytes, to, every);
            else
                for (int64_t i = 0; i < some; i += 4, to += every)
                    memcpy(to, (const char *)&bytes + i, 4);
        }
        int32_t part = 0;
        for (int i = 0; i < 16; ++i) part += sum[i];
        sums[g] = (float)part;
        everything += part;
        if (group_step) worth += sums[g] * group_step[g];
    }
    sums[groups] = group_step ? worth : (float)everything;
    for (int64_t k = columns; run == 4 && k < stride; ++k) codes[k / 4 * every + k % 4] = 0;
}

static void spread(const float *x, int64_t columns, int64_t groups, float *values, int64_t stride,
                   float *sums) {
    const int64_t width = columns / groups;
    float everything = 0;
    for (int64_t g = 0; g < groups; ++g) {
        const float *part = x + g * width;
        v16 sum = {0};
        for (int64_t k = 0; k < width; k += 16)
            sum += load_some(part + k, width - k < 16 ? width - k : 16, 0);
        sums[g] = sum16(sum);
        everything += sums[g];
    }
    sums[groups] = everything;
    memcpy(values, x, (size_t)columns * sizeof *x);
    for (int64_t k = columns; k < stride; ++k) values[k] = 0;
}
