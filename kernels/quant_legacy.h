// Q4_0, Q4_1, Q5_0, Q5_1, Q8_0: 32 values under a float16 scale, with or without a float16 minimum.
//
// A lane is a block. Specification: reference/legacy.py; order of operations of ggml-quants.c quantize_row_q4_0_ref
// and siblings, with an importance matrix quantize_row_q4_0_impl and siblings.
#pragma once
#include "fit.h"
#include "simd.h"
#include "table.h"

namespace lconvert::LCONVERT_ISA {
namespace {

constexpr int kBlock = 32;

// d, m if Offset, the fifth bits if Bits is 5, then nibbles: value j low and value j + 16 high in byte j.
template <int Bits, bool Offset>
struct Legacy {
    static constexpr int kZero = Offset ? 0 : 1 << (Bits - 1);
    static constexpr int kMax = (1 << Bits) - 1;
    static constexpr int kHeader = Offset ? 4 : 2;
    static constexpr int kHigh = Bits == 5 ? 4 : 0;
    static constexpr int kBytes = kHeader + kHigh + 16;
};

// Toward zero into 0..max; NaN gives 0.
LANE_FN I truncate_code(F v, int max) { return to_int(min_of(max_of(v, splat(0.0f)), splat((float)max))); }

template <int Bits, bool Offset>
LANE_FN void store_block(const Group& group, F d, F m, const I* code) {
    typedef Legacy<Bits, Offset> Type;
    I words[6];
    int n = 0;
    if (Offset)
        words[n++] = half_bits(d) | half_bits(m) << 16;
    else
        store_halfword(group.dst, 0, half_bits(d));
    if (Bits == 5) {
        I high = splat(0);
        for (int i = 0; i < 32; ++i) high |= (code[i] >> 4) << i;
        words[n++] = high;
    }
    for (int word = 0; word < 4; ++word) {
        I packed = splat(0);
        for (int b = 0; b < 4; ++b) {
            const int i = 4 * word + b;
            packed |= ((code[i] & 15) | (code[i + 16] & 15) << 4) << 8 * b;
        }
        words[n++] = packed;
    }
    store_words<Type::kBytes / 4>(group.dst, Offset ? 0 : 2, words);
}

template <int Bits, bool Offset>
LANE_FN void round_group(const Group& group) {
    typedef Legacy<Bits, Offset> Type;
    alignas(64) F x[kBlock];
    I code[kBlock];
    load_elements<kBlock>(group.x, 0, x);
    F d, low = splat(0.0f);
    if (Offset) {
        low = x[0];
        F high = x[0];
        for (int i = 1; i < kBlock; ++i) {
            low = min_of(x[i], low);
            high = max_of(x[i], high);
        }
        d = (high - low) / (float)Type::kMax;
        const F inverse = inverse_or_zero(d);
        for (int i = 0; i < kBlock; ++i) code[i] = truncate_code((x[i] - low) * inverse + 0.5f, Type::kMax);
    } else {
        F magnitude;
        d = extreme<kBlock>(x, magnitude) / (float)-Type::kZero;
        const F inverse = inverse_or_zero(d);
        // Where the reciprocal overflows x86-64 builds of ggml give code 0.
        const I overflow = (inverse == splat(0.0f)) & (d != splat(0.0f));
        const F shift = select(overflow, splat(0.0f), splat(Type::kZero + 0.5f));
        for (int i = 0; i < kBlock; ++i) code[i] = truncate_code(x[i] * inverse + shift, Type::kMax);
    }
    store_block<Bits, Offset>(group, d, low, code);
}

template <int Bits, bool Offset>
LANE_FN void search_group(const Group& group, F mean_square) {
    typedef Legacy<Bits, Offset> Type;
    alignas(64) F x[kBlock], w[kBlock];
    I code[kBlock];
    load_elements<kBlock>(group.x, 0, x);
    load_elements<kBlock>(group.weights, 0, w);
    for (int i = 0; i < kBlock; ++i) w[i] = w[i] * sqrt(mean_square + x[i] * x[i]);
    if (Offset) {
        const Affine fit = fit_affine<kBlock, Type::kMax, 36, false>(x, w, -0.9f, 0.05f);
        for (int i = 0; i < kBlock; ++i) code[i] = to_int(affine_code<Type::kMax>(fit, x[i]));
        store_block<Bits, Offset>(group, fit.scale, fit.min, code);
    } else {
        const Symmetric fit = fit_symmetric<kBlock, Type::kZero>(x, w);
        for (int i = 0; i < kBlock; ++i) code[i] = symmetric_code<Type::kZero>(fit, x[i]);
        store_block<Bits, Offset>(group, fit.scale, splat(0.0f), code);
    }
}

// Mean squares of up to W rows, each summed left to right; spare lanes repeat the last row. ncols is a multiple of 32.
LANE_FN F row_mean_squares(const float* x, int64_t nrows, int64_t ncols) {
    const float* rows[W];
    for (int k = 0; k < W; ++k) rows[k] = x + (k < nrows ? k : nrows - 1) * ncols;
    F sum = splat(0.0f);
    for (int64_t i = 0; i < ncols; i += W) {
        F column[W];
        for (int k = 0; k < W; ++k) column[k] = load(rows[k] + i);
        transpose(column);
        for (int k = 0; k < W; ++k) sum += column[k] * column[k];
    }
    return sum / (float)ncols;
}

template <int Bits, bool Offset>
LANE_FN void quantize_legacy(const float* x, int64_t nrows, int64_t ncols, const float* weights, uint8_t* dst) {
    typedef Legacy<Bits, Offset> Type;
    if (!weights) {
        each_group<kBlock, Type::kBytes>(x, nrows, ncols, nullptr, dst,
                                         [](const Group& group) { round_group<Bits, Offset>(group); });
        return;
    }
    for (int64_t row = 0; row < nrows; row += W) {
        const int64_t count = nrows - row < W ? nrows - row : W;
        const float* first = x + row * ncols;
        const F mean_squares = row_mean_squares(first, count, ncols);
        each_group<kBlock, Type::kBytes>(first, count, ncols, weights, dst + row * (ncols / kBlock * Type::kBytes),
                                         [&](const Group& group) {
                                             F mean_square;
                                             for (int k = 0; k < W; ++k)
                                                 mean_square[k] = mean_squares[(group.x[k] - first) / ncols];
                                             search_group<Bits, Offset>(group, mean_square);
                                         });
    }
}

template <int Bits, bool Offset>
LANE_FN void dequantize_legacy(const uint8_t* src, int64_t ncols, float* dst) {
    typedef Legacy<Bits, Offset> Type;
    for (const uint8_t* block = src; ncols > 0; ncols -= kBlock, block += Type::kBytes, dst += kBlock) {
        const float d = half_at(block), m = Offset ? half_at(block + 2) : 0.0f;
        uint32_t high = 0;
        if (Bits == 5) __builtin_memcpy(&high, block + Type::kHeader, 4);
        const uint8_t* nibbles = block + Type::kHeader + Type::kHigh;
        for (int i = 0; i < 16; ++i) {
            const int low_code = (nibbles[i] & 15) | (int)(high >> i & 1) << 4;
            const int high_code = nibbles[i] >> 4 | (int)(high >> (i + 16) & 1) << 4;
            const float a = d * (low_code - Type::kZero), b = d * (high_code - Type::kZero);
            dst[i] = Offset ? a + m : a;
            dst[i + 16] = Offset ? b + m : b;
        }
    }
}

void quantize_q4_0(const float* x, int64_t nrows, int64_t ncols, const float* weights, uint8_t* dst) {
    quantize_legacy<4, false>(x, nrows, ncols, weights, dst);
}
void quantize_q4_1(const float* x, int64_t nrows, int64_t ncols, const float* weights, uint8_t* dst) {
    quantize_legacy<4, true>(x, nrows, ncols, weights, dst);
}
void quantize_q5_0(const float* x, int64_t nrows, int64_t ncols, const float* weights, uint8_t* dst) {
    quantize_legacy<5, false>(x, nrows, ncols, weights, dst);
}
void quantize_q5_1(const float* x, int64_t nrows, int64_t ncols, const float* weights, uint8_t* dst) {
    quantize_legacy<5, true>(x, nrows, ncols, weights, dst);
}
void dequantize_q4_0(const uint8_t* src, int64_t ncols, float* dst) { dequantize_legacy<4, false>(src, ncols, dst); }
void dequantize_q4_1(const uint8_t* src, int64_t ncols, float* dst) { dequantize_legacy<4, true>(src, ncols, dst); }
void dequantize_q5_0(const uint8_t* src, int64_t ncols, float* dst) { dequantize_legacy<5, false>(src, ncols, dst); }
void dequantize_q5_1(const uint8_t* src, int64_t ncols, float* dst) { dequantize_legacy<5, true>(src, ncols, dst); }

// Half away from zero into a byte. Adding the float below 0.5 carries to the next integer exactly from a fraction of
// 0.5 on (the sum of 0.5 and it rounds to 1).
LANE_FN I round_away(F v) { return to_int(v + from_bits((bits(v) & (int32_t)0x80000000) | 0x3effffff)); }

LANE_FN void quantize_q8_0_group(const Group& group) {
    alignas(64) F x[kBlock];
    load_elements<kBlock>(group.x, 0, x);
    const F d = largest_magnitude<kBlock>(x) / 127.0f, inverse = inverse_or_zero(d);
    I words[8];
    for (int word = 0; word < 8; ++word) {
        I packed = splat(0);
        for (int b = 0; b < 4; ++b) packed |= (round_away(x[4 * word + b] * inverse) & 255) << 8 * b;
        words[word] = packed;
    }
    store_halfword(group.dst, 0, half_bits(d));
    store_words<8>(group.dst, 2, words);
}

void quantize_q8_0(const float* x, int64_t nrows, int64_t ncols, const float*, uint8_t* dst) {
    each_group<kBlock, 34>(x, nrows, ncols, nullptr, dst, [](const Group& group) { quantize_q8_0_group(group); });
}

void dequantize_q8_0(const uint8_t* src, int64_t ncols, float* dst) {
    for (const uint8_t* block = src; ncols > 0; ncols -= kBlock, block += 34, dst += kBlock) {
        const float d = half_at(block);
        for (int i = 0; i < kBlock; ++i) dst[i] = d * (int8_t)block[2 + i];
    }
}

}  // namespace
}  // namespace lconvert::LCONVERT_ISA
