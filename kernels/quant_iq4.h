// IQ4_NL and IQ4_XS: 4-bit codes into a fixed non-linear codebook, 32 values per scale.
//
// A lane is a block of 32 (IQ4_NL) or a super-block of 256 (IQ4_XS). Specification: reference/iq4.py; ggml-quants.c
// quantize_row_iq4_nl_impl with ntry 7.
#pragma once
#include "fit.h"
#include "simd.h"
#include "table.h"

namespace lconvert::LCONVERT_ISA {
namespace {

constexpr float kIq4Values[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

// From here on a value is nearer to codebook entry k + 1 than to entry k; equality goes up.
constexpr float iq4_midpoint(int k) { return (kIq4Values[k] + kIq4Values[k + 1]) / 2; }

// Nearest codebook entries. `value` takes |x| < 140, which covers the search (|x| <= 134); `code` takes anything.
#if defined(__AVX512F__)

// Buckets of width 8 hold at most one midpoint each. Adding 1.5 * 2^26 rounds x to a multiple of 8 whose index modulo
// 32 ends up in the low 5 bits, which is all that the permutation reads. Indices 15, 16 and 17 stand for two distant
// buckets each (around 120 and -136, 128 and -128, 136 and -120): there the sign decides.
struct Iq4Buckets {
    float threshold[32], low[32], high[32];
    int low_code[32];
    constexpr Iq4Buckets() : threshold(), low(), high(), low_code() {
        for (int bucket = 0; bucket < 32; ++bucket) {
            const float centre = 8.0f * (bucket < 16 ? bucket : bucket - 32);
            const bool ambiguous = bucket >= 15 && bucket <= 17;
            int below = 0, inside = 0;
            for (int k = 0; k < 15; ++k) {
                below += iq4_midpoint(k) < centre - 4;
                inside += iq4_midpoint(k) > centre - 4 && iq4_midpoint(k) < centre + 4;
            }
            threshold[bucket] = ambiguous ? 0 : inside ? iq4_midpoint(below) : 1e30f;
            low[bucket] = kIq4Values[ambiguous ? 0 : below];
            high[bucket] = kIq4Values[ambiguous ? 15 : below + inside];
            low_code[bucket] = ambiguous ? 0 : below;
        }
    }
};
alignas(64) constexpr Iq4Buckets kIq4Buckets;

LANE_FN F bucket_entry(const float* table, I bucket) {
    return (F)_mm512_permutex2var_ps((__m512)load(table), (__m512i)bucket, (__m512)load(table + 16));
}
LANE_FN I iq4_bucket(F x) { return bits(x + 100663296.0f); }

LANE_FN F iq4_value(F x) {
    const I bucket = iq4_bucket(x);
    const F low = bucket_entry(kIq4Buckets.low, bucket), high = bucket_entry(kIq4Buckets.high, bucket);
    return select(x >= bucket_entry(kIq4Buckets.threshold, bucket), high, low);
}

LANE_FN I iq4_code(F x) {
    x = max_of(min_of(x, splat(113.0f)), splat(-127.0f));
    const I bucket = iq4_bucket(x);
    I low, low_upper;
    __builtin_memcpy(&low, kIq4Buckets.low_code, sizeof low);
    __builtin_memcpy(&low_upper, kIq4Buckets.low_code + 16, sizeof low);
    const I code = (I)_mm512_permutex2var_epi32((__m512i)low, (__m512i)bucket, (__m512i)low_upper);
    return code - (x >= bucket_entry(kIq4Buckets.threshold, bucket));
}

#elif defined(__AVX2__)

// Bisection: two levels by comparison, two by permutation of eight thresholds. half = code / 2.
struct Iq4Tree {
    float odd[8], even[8], low[8], high[8];
    constexpr Iq4Tree() : odd(), even(), low(), high() {
        for (int half = 0; half < 8; ++half) {
            odd[half] = iq4_midpoint(half < 7 ? 2 * half + 1 : 13);
            even[half] = iq4_midpoint(2 * half);
            low[half] = kIq4Values[2 * half];
            high[half] = kIq4Values[2 * half + 1];
        }
    }
};
alignas(32) constexpr Iq4Tree kIq4Tree;

LANE_FN F tree_entry(const float* table, I half) {
    return (F)_mm256_permutevar8x32_ps((__m256)load(table), (__m256i)half);
}

LANE_FN I iq4_half(F x) {
    const I upper = ~(x < splat(iq4_midpoint(7)));
    const I quarter = ~(x < select(upper, splat(iq4_midpoint(11)), splat(iq4_midpoint(3))));
    const I half = (upper & 4) | (quarter & 2);
    return half | (~(x < tree_entry(kIq4Tree.odd, half)) & 1);
}

LANE_FN F iq4_value(F x) {
    const I half = iq4_half(x);
    return select(x < tree_entry(kIq4Tree.even, half), tree_entry(kIq4Tree.low, half), tree_entry(kIq4Tree.high, half));
}

LANE_FN I iq4_code(F x) {
    const I half = iq4_half(x);
    return 2 * half + (~(x < tree_entry(kIq4Tree.even, half)) & 1);
}

#else

LANE_FN F iq4_value(F x) {
    F value = splat(kIq4Values[0]);
    for (int k = 0; k < 15; ++k)
        value += from_bits((x >= splat(iq4_midpoint(k))) & bits(splat(kIq4Values[k + 1] - kIq4Values[k])));
    return value;
}

LANE_FN I iq4_code(F x) {
    I code = splat(15);
    for (int k = 0; k < 15; ++k) code += x < splat(iq4_midpoint(k));
    return code;
}

#endif

// Best scale of 32 values in weighted squared error, over sixteen trials; 0 if the block counts as zero.
LANE_FN F fit_iq4(const F* x, const F* w) {
    F magnitude;
    const F top = extreme<32>(x, magnitude), zero = splat(0.0f);
    F scale = zero, best = zero;
    for (int step = -8; step <= 7; ++step) {
        const bool first = step == -8;  // the plain scale, before the fifteen around it
        const F inverse = first ? 1.0f / (-top / kIq4Values[0]) : (step + kIq4Values[0]) / top;
        F sum_qx = zero, sum_qq = zero;
        for (int i = 0; i < 32; ++i) {
            const F value = iq4_value(inverse * x[i]), wq = w[i] * value;
            sum_qx += wq * x[i];
            sum_qq += wq * value;
        }
        const F refit = sum_qx / sum_qq;
        const I defined = sum_qq > zero;
        const I better = first ? defined : defined & (sum_qx * sum_qx > best * sum_qq);
        scale = select(better, refit, scale);
        best = select(better, scale * sum_qx, first ? scale * sum_qx : best);
    }
    return select(magnitude < splat(kNothing), zero, scale);
}

LANE_FN void iq4_weights(const Group& group, int offset, const F* x, F spread, F* w) {
    if (!group.weights[0]) {
        for (int i = 0; i < 32; ++i) w[i] = x[i] * x[i];
        return;
    }
    load_elements<32>(group.weights, offset, w);
    for (int i = 0; i < 32; ++i) w[i] = w[i] * sqrt(spread + x[i] * x[i]);
}

template <int N>
LANE_FN F doubled_mean_square(const F* x) {
    F sum = splat(0.0f);
    for (int i = 0; i < N; ++i) sum += x[i] * x[i];
    return sum * (2.0f / N);
}

LANE_FN F inverse_unless_zero(F v) { return select(v != splat(0.0f), 1.0f / v, splat(0.0f)); }

LANE_FN void pack_iq4(const F* x, F inverse, I* words) {
    for (int word = 0; word < 4; ++word) {
        I packed = splat(0);
        for (int b = 0; b < 4; ++b) {
            const int i = 4 * word + b;
            packed |= (iq4_code(inverse * x[i]) | iq4_code(inverse * x[i + 16]) << 4) << 8 * b;
        }
        words[word] = packed;
    }
}

void quantize_iq4_nl(const float* x, int64_t nrows, int64_t ncols, const float* weights, uint8_t* dst) {
    each_group<32, 18>(x, nrows, ncols, weights, dst, [](const Group& group) {
        alignas(64) F x[32], w[32];
        load_elements<32>(group.x, 0, x);
        iq4_weights(group, 0, x, doubled_mean_square<32>(x), w);
        const F scale = fit_iq4(x, w);
        I words[4];
        pack_iq4(x, inverse_unless_zero(scale), words);
        store_halfword(group.dst, 0, half_bits(scale));
        store_words<4>(group.dst, 2, words);
    });
}

void quantize_iq4_xs(const float* x, int64_t nrows, int64_t ncols, const float* weights, uint8_t* dst) {
    each_group<256, 136>(x, nrows, ncols, weights, dst, [](const Group& group) {
        alignas(64) F x[256], w[32];
        load_elements<256>(group.x, 0, x);
        const F spread = doubled_mean_square<256>(x), zero = splat(0.0f);
        F scale[8], largest = zero, extreme = zero;
        for (int sub = 0; sub < 8; ++sub) {
            iq4_weights(group, 32 * sub, x + 32 * sub, spread, w);
            scale[sub] = fit_iq4(x + 32 * sub, w);
            const F magnitude = abs(scale[sub]);
            extreme = select(magnitude > largest, scale[sub], extreme);
            largest = max_of(magnitude, largest);
        }
        const F d = -extreme / 32.0f, inverse = inverse_unless_zero(d);
        I words[34];
        words[0] = half_bits(d);
        words[1] = splat(0);
        for (int sub = 0; sub < 8; ++sub) {
            const F level = clamp(nearest(inverse * scale[sub]), -32, 31);
            const I biased = to_int(level) + 32;
            words[0] |= (biased >> 4) << (16 + 2 * sub);
            words[1] |= (biased & 15) << 4 * sub;
            pack_iq4(x + 32 * sub, inverse_unless_zero(d * level), words + 2 + 4 * sub);
        }
        store_words<34>(group.dst, 0, words);
    });
}

// 16 bytes of nibbles to 32 values.
LANE_FN void unpack_iq4(float scale, const uint8_t* packed, float* dst) {
    float level[16];
    for (int code = 0; code < 16; ++code) level[code] = scale * kIq4Values[code];
    for (int i = 0; i < 16; ++i) {
        dst[i] = level[packed[i] & 15];
        dst[i + 16] = level[packed[i] >> 4];
    }
}

void dequantize_iq4_nl(const uint8_t* src, int64_t ncols, float* dst) {
    for (const uint8_t* block = src; ncols > 0; ncols -= 32, block += 18, dst += 32)
        unpack_iq4(half_at(block), block + 2, dst);
}

void dequantize_iq4_xs(const uint8_t* src, int64_t ncols, float* dst) {
    for (const uint8_t* block = src; ncols > 0; ncols -= 256, block += 136, dst += 256) {
        const float d = half_at(block);
        const unsigned high = block[2] | block[3] << 8;
        for (int sub = 0; sub < 8; ++sub) {
            const int level = (block[4 + sub / 2] >> 4 * (sub % 2) & 15) | (int)(high >> 2 * sub & 3) << 4;
            unpack_iq4(d * (level - 32), block + 8 + 16 * sub, dst + 32 * sub);
        }
    }
}

}  // namespace
}  // namespace lconvert::LCONVERT_ISA
