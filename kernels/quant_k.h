// K-quants: super-blocks of 256 values, sub-blocks of 16 or 32 with quantised scales (and minima).
//
// A lane is a super-block. Every type goes load -> fit the sub-blocks -> quantise their scales -> requantise the values
// with the stored scales -> pack; where a stored step is zero, the codes of the fit are kept. Order of operations and
// layouts are those of ggml-quants.c (quantize_row_q*_K_ref without, quantize_row_q*_K_impl with importance weights)
// and ggml-common.h; reference/kquants.py says the same in NumPy.
#pragma once
#include "dequant_k.h"
#include "fit.h"

namespace lconvert::LCONVERT_ISA {
namespace {

constexpr int kAbreast = W == 16 ? 4 : 2;  // sub-blocks that a search works on at a time; registers limit it

// ---- parts that the types share ----

LANE_FN F sum_of_squares(const F* x, int n) {
    F sum = splat(0.0f);
    for (int i = 0; i < n; ++i) sum += x[i] * x[i];
    return sum;
}

// Weights without importance: magnitude plus the root mean square of the sub-block (Q4_K, Q5_K).
LANE_FN void rms_weights(const F* x, F* w) {
    const F rms = sqrt(sum_of_squares(x, 32) / 32.0f);
    for (int i = 0; i < 32; ++i) w[i] = rms + abs(x[i]);
}

// Weights with importance: importance * sqrt(sigma2 + x^2). Returns their sum.
template <int N>
LANE_FN F importance_weights(const Group& group, int offset, const F* x, F sigma2, F* w) {
    load_elements<N>(group.weights, offset, w);
    F sum = splat(0.0f);
    for (int i = 0; i < N; ++i) {
        w[i] = w[i] * sqrt(sigma2 + x[i] * x[i]);
        sum += w[i];
    }
    return sum;
}

// Levels 0..Max of non-negative values by plain rounding; returns the step. A negative value wraps like a byte.
template <int N, int Max>
LANE_FN F round_levels(const F* value, I* level) {
    const F zero = splat(0.0f);
    F top = zero;
    for (int j = 0; j < N; ++j) top = max_of(value[j], top);
    const F inverse = select(top > zero, splat((float)Max) / top, zero);
    for (int j = 0; j < N; ++j) level[j] = to_int(nearest(inverse * value[j])) & 255;
    return top / (float)Max;
}

template <int N, int Max>
LANE_FN F weighted_levels(const F* value, const F* weight, I* level) {
    F codes[N];
    const F step = fit_levels<N, Max>(value, weight, codes);
    for (int j = 0; j < N; ++j) level[j] = to_int(codes[j]);
    return step;
}

// Codes of a sub-block x ~ step * code - offset; the fit's own codes where step is zero.
template <int N, int NMax>
LANE_FN void affine_codes(const F* x, const Affine& fit, F step, F offset, I* code) {
    for (int i = 0; i < N; ++i) code[i] = to_int(clamp(nearest((x[i] + offset) / step), 0, NMax));
    const I keep = step == splat(0.0f);
    if (any(keep))
        for (int i = 0; i < N; ++i) code[i] = select(keep, to_int(affine_code<NMax>(fit, x[i])), code[i]);
}

// Codes of a sub-block x ~ step * (code - nmax), before the rule for a zero step.
template <int N, int NMax>
LANE_FN void symmetric_codes(const F* x, F step, I* code) {
    for (int i = 0; i < N; ++i) code[i] = to_int(clamp(nearest(x[i] / step), -NMax, NMax - 1)) + NMax;
}

// Four bytes: byte b holds the fields (code[b + Stride * p] >> shift) & mask of planes p, Bits bits each.
template <int Planes, int Bits, int Stride>
LANE_FN I pack_word(const I* code, int shift, int mask) {
    I word = splat(0);
    for (int b = 0; b < 4; ++b)
        for (int p = 0; p < Planes; ++p) word |= ((code[b + Stride * p] >> shift) & mask) << (8 * b + Bits * p);
    return word;
}

LANE_FN void put_byte(I* words, int index, I byte) {
    words[index / 4] |= (byte & 255) << (8 * (index % 4));
}

LANE_FN I get_byte(const I* words, int index) { return (words[index / 4] >> (8 * (index % 4))) & 255; }

// ---- Q2_K: w = d * scale * q - dmin * min, 16 sub-blocks of 16, scale and min 4 bits, q 2 bits ----

template <bool Weighted>
LANE_FN void quantize_q2_k_group(const Group& group) {
    F x[kSuper], scale[16], min[16], weight[16];
    Affine fit[16];
    load_elements<kSuper>(group.x, 0, x);
    const F sigma2 = Weighted ? sum_of_squares(x, kSuper) / 256.0f : splat(0.0f);
    for (int j = 0; j < 16; j += kAbreast) {
        const F* xs = x + 16 * j;
        F w[16 * kAbreast];
        if (Weighted) {
            for (int u = 0; u < kAbreast; ++u)
                weight[j + u] = importance_weights<16>(group, 16 * (j + u), xs + 16 * u, sigma2, w + 16 * u);
            fit_affine<kAbreast, 16, 3, 36, false>(xs, w, -0.9f, 0.05f, fit + j);
        } else {
            for (int i = 0; i < 16 * kAbreast; ++i) w[i] = abs(xs[i]);
            fit_affine<kAbreast, 16, 3, 15, true>(xs, w, -0.5f, 0.1f, fit + j);
        }
    }
    for (int j = 0; j < 16; ++j) {
        scale[j] = fit[j].scale;
        min[j] = -fit[j].min;
    }

    I ls[16], lm[16], code[kSuper], words[21] = {};
    const F d = Weighted ? weighted_levels<16, 15>(scale, weight, ls) : round_levels<16, 15>(scale, ls);
    const F dmin = Weighted ? weighted_levels<16, 15>(min, weight, lm) : round_levels<16, 15>(min, lm);
    const I half_d = half_bits(d), half_dmin = half_bits(dmin);
    for (int j = 0; j < 16; ++j) {
        put_byte(words, j, ls[j] | lm[j] << 4);
        const I stored = get_byte(words, j);
        const F step = half_value(half_d) * to_float(stored & 15);
        const F offset = half_value(half_dmin) * to_float(stored >> 4);
        affine_codes<16, 3>(x + 16 * j, fit[j], step, offset, code + 16 * j);
    }
    for (int k = 0; k < 16; ++k) words[4 + k] = pack_word<4, 2, 32>(code + k / 8 * 128 + k % 8 * 4, 0, 3);
    words[20] = half_d | half_dmin << 16;
    store_words<21>(group.dst, 0, words);
}

// ---- Q4_K, Q5_K: w = d * scale * q - dmin * min, 8 sub-blocks of 32, scale and min 6 bits ----

// The 12 bytes of 8 scales and 8 minima, as three words.
LANE_FN void pack_scale_min(const I* scale, const I* min, I* words) {
    for (int j = 0; j < 4; ++j) {
        put_byte(words, j, scale[j] | scale[j + 4] >> 4 << 6);
        put_byte(words, j + 4, min[j] | min[j + 4] >> 4 << 6);
        put_byte(words, j + 8, (scale[j + 4] & 15) | (min[j + 4] & 15) << 4);
    }
}

LANE_FN void unpack_scale_min(const I* words, int j, I& scale, I& min) {
    if (j < 4) {
        scale = get_byte(words, j) & 63;
        min = get_byte(words, j + 4) & 63;
    } else {
        scale = (get_byte(words, j + 4) & 15) | get_byte(words, j - 4) >> 6 << 4;
        min = get_byte(words, j + 4) >> 4 | get_byte(words, j) >> 6 << 4;
    }
}

// Fits, levels and codes of Q4_K (NMax 15) and Q5_K (NMax 31). header: d, dmin and the 12 scale bytes.
// Only weighted Q4_K takes levels as they come, Clip is false for it.
template <int NMax, int Steps, bool Weighted, bool Clip>
LANE_FN void quantize_q45_k(const Group& group, float rmin, I* header, I* code) {
    F x[kSuper], scale[8], min[8], weight[8];
    Affine fit[8];
    load_elements<kSuper>(group.x, 0, x);
    const F sigma2 = Weighted ? 2.0f * sum_of_squares(x, kSuper) / 256.0f : splat(0.0f);
    for (int j = 0; j < 8; j += kAbreast) {
        const F* xs = x + 32 * j;
        F w[32 * kAbreast];
        for (int u = 0; u < kAbreast; ++u) {
            if (Weighted)
                weight[j + u] = importance_weights<32>(group, 32 * (j + u), xs + 32 * u, sigma2, w + 32 * u);
            else
                rms_weights(xs + 32 * u, w + 32 * u);
        }
        if (Weighted)
            fit_affine<kAbreast, 32, NMax, 36, false>(xs, w, -0.9f, 0.05f, fit + j);
        else
            fit_affine<kAbreast, 32, NMax, Steps, false>(xs, w, rmin, 0.1f, fit + j);
    }
    for (int j = 0; j < 8; ++j) {
        scale[j] = fit[j].scale;
        min[j] = -fit[j].min;
    }

    I ls[8], lm[8];
    const F d = Weighted ? weighted_levels<8, 63>(scale, weight, ls) : round_levels<8, 63>(scale, ls);
    const F dmin = Weighted ? weighted_levels<8, 63>(min, weight, lm) : round_levels<8, 63>(min, lm);
    if (Clip)
        for (int j = 0; j < 8; ++j) {
            ls[j] = select(ls[j] > 63, splat(63), ls[j]);
            lm[j] = select(lm[j] > 63, splat(63), lm[j]);
        }
    const I half_d = half_bits(d), half_dmin = half_bits(dmin);
    header[0] = half_d | half_dmin << 16;
    header[1] = header[2] = header[3] = splat(0);
    pack_scale_min(ls, lm, header + 1);
    for (int j = 0; j < 8; ++j) {
        I sc, m;
        unpack_scale_min(header + 1, j, sc, m);
        const F step = half_value(half_d) * to_float(sc), offset = half_value(half_dmin) * to_float(m);
        affine_codes<32, NMax>(x + 32 * j, fit[j], step, offset, code + 32 * j);
    }
}

template <bool Weighted>
LANE_FN void quantize_q4_k_group(const Group& group) {
    I words[36], code[kSuper];
    quantize_q45_k<15, 20, Weighted, !Weighted>(group, -1.0f, words, code);
    for (int k = 0; k < 32; ++k) words[4 + k] = pack_word<2, 4, 32>(code + k / 8 * 64 + k % 8 * 4, 0, 15);
    store_words<36>(group.dst, 0, words);
}

template <bool Weighted>
LANE_FN void quantize_q5_k_group(const Group& group) {
    I words[44], code[kSuper];
    quantize_q45_k<31, 15, Weighted, true>(group, -0.5f, words, code);
    for (int k = 0; k < 8; ++k) words[4 + k] = pack_word<8, 1, 32>(code + 4 * k, 4, 1);
    for (int k = 0; k < 32; ++k) words[12 + k] = pack_word<2, 4, 32>(code + k / 8 * 64 + k % 8 * 4, 0, 15);
    store_words<44>(group.dst, 0, words);
}

// ---- Q3_K: w = d * scale * (q - 4), 16 sub-blocks of 16, scale 6 bits signed, q 3 bits ----

template <bool Weighted>
LANE_FN void quantize_q3_k_group(const Group& group) {
    const F zero = splat(0.0f);
    F x[kSuper], scale[16], weight[16];
    F kept[Weighted ? 1 : kSuper];  // codes of the fits; weighted fits recompute them from their parameters
    Symmetric fit[16];
    load_elements<kSuper>(group.x, 0, x);
    const F sigma2 = Weighted ? 2.0f * sum_of_squares(x, kSuper) / 256.0f : zero;
    for (int j = 0; j < 16; ++j) {
        const F* xs = x + 16 * j;
        if (Weighted) {
            F w[16];
            weight[j] = importance_weights<16>(group, 16 * j, xs, sigma2, w);
            fit[j] = fit_symmetric<16, 4>(xs, w);
            scale[j] = fit[j].scale;
        } else if (j % kAbreast == 0) {
            fit_descent<kAbreast, 16, 4>(xs, kept + 16 * j, scale + j);
        }
    }

    I level[16], code[kSuper], words[27] = {};
    F d;
    if (Weighted) {
        const Symmetric super = fit_symmetric<16, 32>(scale, weight);
        d = super.scale;
        for (int j = 0; j < 16; ++j) level[j] = symmetric_code<32>(super, scale[j]);
    } else {
        F magnitude;
        const F top = extreme<16>(scale, magnitude);
        const I nothing = top == zero;
        const F iscale = splat(-32.0f) / top;
        d = select(nothing, zero, splat(1.0f) / iscale);
        for (int j = 0; j < 16; ++j) {
            const I byte = (to_int(nearest(iscale * scale[j])) << 24) >> 24;
            level[j] = to_int(clamp(to_float(byte), -32, 31)) + 32;
            level[j] = select(nothing, splat(0), level[j]);
        }
    }
    for (int j = 0; j < 8; ++j) put_byte(words + 24, j, (level[j] & 15) | (level[j + 8] & 15) << 4);
    for (int j = 0; j < 16; ++j) words[26] |= level[j] >> 4 << (8 * (j % 4) + 2 * (j / 4));
    const I half_d = half_bits(d);
    for (int j = 0; j < 16; ++j) {
        const F step = half_value(half_d) * to_float(level[j] - 32);
        symmetric_codes<16, 4>(x + 16 * j, step, code + 16 * j);
        const I keep = step == zero;
        if (any(keep))
            for (int i = 16 * j; i < 16 * j + 16; ++i)
                code[i] = select(keep, Weighted ? symmetric_code<4>(fit[j], x[i]) : to_int(kept[i]), code[i]);
    }
    for (int k = 0; k < 8; ++k) words[k] = pack_word<8, 1, 32>(code + 4 * k, 2, 1);
    for (int k = 0; k < 16; ++k) words[8 + k] = pack_word<4, 2, 32>(code + k / 8 * 128 + k % 8 * 4, 0, 3);
    store_words<27>(group.dst, 0, words);
    store_halfword(group.dst, 108, half_d);
}

// ---- Q6_K: w = d * scale * (q - 32), 16 sub-blocks of 16, scale 8 bits signed, q 6 bits ----

template <bool Weighted>
LANE_FN void quantize_q6_k_group(const Group& group) {
    const F zero = splat(0.0f);
    F x[kSuper], scale[16];
    Symmetric fit[16];
    load_elements<kSuper>(group.x, 0, x);
    for (int j = 0; j < 16; ++j) {
        const F* xs = x + 16 * j;
        F w[16];
        if (Weighted)
            load_elements<16>(group.weights, 16 * j, w);
        else
            for (int i = 0; i < 16; ++i) w[i] = xs[i] * xs[i];
        fit[j] = fit_symmetric<16, 32>(xs, w);
        scale[j] = fit[j].scale;
    }

    F magnitude;
    const F top = extreme<16>(scale, magnitude);
    const I nothing = magnitude < splat(kNothing);
    const F iscale = splat(-128.0f) / top;
    const I half_d = select(nothing, splat(0), half_bits(splat(1.0f) / iscale));
    I code[kSuper], words[52] = {};
    for (int j = 0; j < 16; ++j) {
        const F level = min_of(splat(127.0f), nearest(iscale * scale[j]));
        put_byte(words + 48, j, to_int(level));
        const F step = half_value(half_d) * to_float((to_int(level) << 24) >> 24);
        symmetric_codes<16, 32>(x + 16 * j, step, code + 16 * j);
        const I keep = step == zero;
        if (any(keep))
            for (int i = 16 * j; i < 16 * j + 16; ++i)
                code[i] = select(keep, symmetric_code<32>(fit[j], x[i]), code[i]);
    }
    for (int k = 0; k < 32; ++k) words[k] = pack_word<2, 4, 64>(code + k / 16 * 128 + k % 16 * 4, 0, 15);
    for (int k = 0; k < 16; ++k) words[32 + k] = pack_word<4, 2, 32>(code + k / 8 * 128 + k % 8 * 4, 4, 3);
    if (any(nothing))
        for (int k = 0; k < 52; ++k) words[k] = select(nothing, splat(0), words[k]);
    store_words<52>(group.dst, 0, words);
    store_halfword(group.dst, 208, half_d);
}

// ---- the functions of the table ----

#define LCONVERT_K_QUANT(name, bytes)                                                                       \
    void quantize_##name(const float* x, int64_t nrows, int64_t ncols, const float* weights, uint8_t* dst) { \
        if (weights)                                                                                        \
            each_group<kSuper, bytes>(x, nrows, ncols, weights, dst,                                        \
                                      [](const Group& group) { quantize_##name##_group<true>(group); });    \
        else                                                                                                \
            each_group<kSuper, bytes>(x, nrows, ncols, weights, dst,                                        \
                                      [](const Group& group) { quantize_##name##_group<false>(group); });   \
    }
LCONVERT_K_QUANT(q2_k, 84)
LCONVERT_K_QUANT(q3_k, 110)
LCONVERT_K_QUANT(q4_k, 144)
LCONVERT_K_QUANT(q5_k, 176)
LCONVERT_K_QUANT(q6_k, 210)
#undef LCONVERT_K_QUANT

}  // namespace
}  // namespace lconvert::LCONVERT_ISA
