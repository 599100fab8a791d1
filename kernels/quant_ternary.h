// TQ1_0 and TQ2_0: 256 values are -d, 0 or d, stored as base-3 or 2-bit digits 0, 1, 2.
//
// A lane is a block. Specification: reference/ternary.py; ggml-quants.c quantize_row_tq1_0_ref, quantize_row_tq2_0_ref.
#pragma once
#include "simd.h"
#include "table.h"

namespace lconvert::LCONVERT_ISA {
namespace {

constexpr int kTernary = 256;

// Loads a group, returns d and fills digit, half away from zero. |scaled| is at most 1 + 2^-23.
LANE_FN F ternary_digits(const Group& group, I* digit) {
    alignas(64) F x[kTernary];
    load_elements<kTernary>(group.x, 0, x);
    const F d = largest_magnitude<kTernary>(x), inverse = inverse_or_zero(d);
    for (int i = 0; i < kTernary; ++i) {
        const F scaled = x[i] * inverse;
        digit[i] = 1 - (scaled >= splat(0.5f)) + (scaled <= splat(-0.5f));
    }
    return d;
}

// Ceiling of value * 256 / 243 for value <= 242, i.e. value + floor((13 * value + 242) / 243). 4316 / 2^20 is close
// enough to 1 / 243 for numerators up to 3388.
LANE_FN I ternary_byte(I value) { return value + ((13 * value + 242) * 4316 >> 20); }

// Count digits per byte, most significant first: digit k of byte j is value k * Bytes + j. 5 - Count low digits are 0.
template <int Bytes, int Count>
LANE_FN void pack_ternary_run(const I* digit, I* words) {
    for (int word = 0; word < Bytes / 4; ++word) {
        I packed = splat(0);
        for (int b = 0; b < 4; ++b) {
            I value = digit[4 * word + b];
            for (int k = 1; k < 5; ++k) value = k < Count ? 3 * value + digit[k * Bytes + 4 * word + b] : 3 * value;
            packed |= ternary_byte(value) << 8 * b;
        }
        words[word] = packed;
    }
}

void quantize_tq1_0(const float* x, int64_t nrows, int64_t ncols, const float*, uint8_t* dst) {
    each_group<kTernary, 54>(x, nrows, ncols, nullptr, dst, [](const Group& group) {
        I digit[kTernary], words[13];
        const F d = ternary_digits(group, digit);
        pack_ternary_run<32, 5>(digit, words);
        pack_ternary_run<16, 5>(digit + 160, words + 8);
        pack_ternary_run<4, 4>(digit + 240, words + 12);
        store_words<13>(group.dst, 0, words);
        store_halfword(group.dst, 52, half_bits(d));
    });
}

void quantize_tq2_0(const float* x, int64_t nrows, int64_t ncols, const float*, uint8_t* dst) {
    each_group<kTernary, 66>(x, nrows, ncols, nullptr, dst, [](const Group& group) {
        I digit[kTernary], words[16];
        const F d = ternary_digits(group, digit);
        for (int word = 0; word < 16; ++word) {
            const I* run = digit + word / 8 * 128 + word % 8 * 4;
            I packed = splat(0);
            for (int b = 0; b < 4; ++b)
                for (int k = 0; k < 4; ++k) packed |= run[32 * k + b] << (8 * b + 2 * k);
            words[word] = packed;
        }
        store_words<16>(group.dst, 0, words);
        store_halfword(group.dst, 64, half_bits(d));
    });
}

LANE_FN void unpack_ternary_run(const uint8_t* packed, int nbytes, int count, float d, float* dst) {
    unsigned power = 1;
    for (int k = 0; k < count; ++k, power *= 3)
        for (int j = 0; j < nbytes; ++j) dst[k * nbytes + j] = d * ((int)((packed[j] * power & 255) * 3 >> 8) - 1);
}

void dequantize_tq1_0(const uint8_t* src, int64_t ncols, float* dst) {
    for (const uint8_t* block = src; ncols > 0; ncols -= kTernary, block += 54, dst += kTernary) {
        const float d = half_at(block + 52);
        unpack_ternary_run(block, 32, 5, d, dst);
        unpack_ternary_run(block + 32, 16, 5, d, dst + 160);
        unpack_ternary_run(block + 48, 4, 4, d, dst + 240);
    }
}

void dequantize_tq2_0(const uint8_t* src, int64_t ncols, float* dst) {
    for (const uint8_t* block = src; ncols > 0; ncols -= kTernary, block += 66, dst += kTernary) {
        const float d = half_at(block + 64);
        for (int half = 0; half < 2; ++half)
            for (int k = 0; k < 4; ++k)
                for (int j = 0; j < 32; ++j)
                    dst[128 * half + 32 * k + j] = d * ((int)(block[32 * half + j] >> 2 * k & 3) - 1);
    }
}

}  // namespace
}  // namespace lconvert::LCONVERT_ISA
