// The values of IQ1, IQ2 and IQ3 blocks (ggml-quants.c dequantize_row_iq*), plain scalar code.
#pragma once
#include "iq_tables.h"
#include "simd.h"

namespace lconvert::LCONVERT_ISA {
namespace {

LANE_FN int half_word(const uint8_t* p) { return p[0] | p[1] << 8; }
LANE_FN uint32_t word(const uint8_t* p) { return half_word(p) | (uint32_t)half_word(p + 2) << 16; }

// The sign byte of 8 values from its low seven bits.
LANE_FN int even_signs(uint32_t seven) { return (int)(seven & 127) | __builtin_parity(seven & 127) << 7; }

// `size` values of a lattice point times step; bit i of signs negates value i.
template <int Size>
LANE_FN void put_signed(const Lattice& points, int index, float step, int signs, float* dst) {
    const int8_t* values = points.values + Size * index;
    for (int i = 0; i < Size; ++i) dst[i] = step * (float)(signs >> i & 1 ? -values[i] : values[i]);
}

LANE_FN void put_shifted(const Lattice& points, int index, float step, bool down, float* dst) {
    const int8_t* values = points.values + 8 * index;
    const float shift = down ? -0.125f : 0.125f;
    for (int i = 0; i < 8; ++i) dst[i] = step * (values[i] + shift);
}

void dequantize_iq2_xxs(const uint8_t* src, int64_t ncols, float* dst) {
    const Lattice& points = lattice(LatticeName::iq2_xxs);
    for (const uint8_t* block = src; ncols > 0; ncols -= 256, block += 66) {
        const float d = half_at(block);
        for (int j = 0; j < 8; ++j) {
            const uint8_t* index = block + 2 + 8 * j;
            const uint32_t rest = word(index + 4);
            const float step = d * (0.5f + (rest >> 28)) * 0.25f;
            for (int k = 0; k < 4; ++k, dst += 8) put_signed<8>(points, index[k], step, even_signs(rest >> 7 * k), dst);
        }
    }
}

void dequantize_iq2_xs(const uint8_t* src, int64_t ncols, float* dst) {
    const Lattice& points = lattice(LatticeName::iq2_xs);
    for (const uint8_t* block = src; ncols > 0; ncols -= 256, block += 74) {
        const float d = half_at(block);
        for (int g = 0; g < 32; ++g, dst += 8) {
            const int code = half_word(block + 2 + 2 * g);
            const float step = d * (0.5f + (block[66 + g / 4] >> 2 * (g & 2) & 15)) * 0.25f;
            put_signed<8>(points, code & 511, step, even_signs(code >> 9), dst);
        }
    }
}

void dequantize_iq2_s(const uint8_t* src, int64_t ncols, float* dst) {
    const Lattice& points = lattice(LatticeName::iq2_s);
    for (const uint8_t* block = src; ncols > 0; ncols -= 256, block += 82) {
        const float d = half_at(block);
        for (int g = 0; g < 32; ++g, dst += 8) {
            const int index = block[2 + g] | (block[66 + g / 4] >> 2 * (g % 4) & 3) << 8;
            const float step = d * (0.5f + (block[74 + g / 4] >> 2 * (g & 2) & 15)) * 0.25f;
            put_signed<8>(points, index, step, block[34 + g], dst);
        }
    }
}

void dequantize_iq3_xxs(const uint8_t* src, int64_t ncols, float* dst) {
    const Lattice& points = lattice(LatticeName::iq3_xxs);
    for (const uint8_t* block = src; ncols > 0; ncols -= 256, block += 98) {
        const float d = half_at(block);
        for (int j = 0; j < 8; ++j) {
            const uint8_t* index = block + 2 + 8 * j;
            const uint32_t rest = word(block + 66 + 4 * j);
            const float step = d * (0.5f + (rest >> 28)) * 0.5f;
            for (int k = 0; k < 4; ++k, dst += 8) {
                const int signs = even_signs(rest >> 7 * k);
                put_signed<4>(points, index[2 * k], step, signs, dst);
                put_signed<4>(points, index[2 * k + 1], step, signs >> 4, dst + 4);
            }
        }
    }
}

void dequantize_iq3_s(const uint8_t* src, int64_t ncols, float* dst) {
    const Lattice& points = lattice(LatticeName::iq3_s);
    for (const uint8_t* block = src; ncols > 0; ncols -= 256, block += 110) {
        const float d = half_at(block);
        for (int g = 0; g < 32; ++g, dst += 8) {
            const float step = d * (1 + 2 * (block[106 + g / 8] >> (g & 4) & 15));
            const uint8_t* low = block + 2 + 2 * g;
            const int high = block[66 + g / 4] >> 2 * (g % 4), signs = block[74 + g];
            put_signed<4>(points, low[0] | (high & 1) << 8, step, signs, dst);
            put_signed<4>(points, low[1] | (high & 2) << 7, step, signs >> 4, dst + 4);
        }
    }
}

void dequantize_iq1_s(const uint8_t* src, int64_t ncols, float* dst) {
    const Lattice& points = lattice(LatticeName::iq1);
    for (const uint8_t* block = src; ncols > 0; ncols -= 256, block += 50) {
        const float d = half_at(block);
        for (int g = 0; g < 32; ++g, dst += 8) {
            const int rest = half_word(block + 34 + g / 4 * 2);
            const int index = block[2 + g] | (rest >> 3 * (g % 4) & 7) << 8;
            put_shifted(points, index, d * (2 * (rest >> 12 & 7) + 1), rest >> 15, dst);
        }
    }
}

void dequantize_iq1_m(const uint8_t* src, int64_t ncols, float* dst) {
    const Lattice& points = lattice(LatticeName::iq1);
    for (const uint8_t* block = src; ncols > 0; ncols -= 256, block += 56) {
        uint8_t half[2] = {};
        for (int k = 0; k < 4; ++k) half[k / 2] |= block[49 + 2 * k] >> 4 << 4 * (k % 2);
        const float d = half_at(half);
        for (int g = 0; g < 32; ++g, dst += 8) {
            const int scale = half_word(block + 48 + g / 8 * 2) >> 3 * (g / 2 % 4) & 7;
            const int high = block[32 + g / 2] >> 4 * (g % 2);
            put_shifted(points, block[g] | (high & 7) << 8, d * (2 * scale + 1), high & 8, dst);
        }
    }
}

}  // namespace
}  // namespace lconvert::LCONVERT_ISA
