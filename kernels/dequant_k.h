// K-quants back to floats: scalar loops over a super-block that the compiler vectorises.
//
// Layouts and order of operations of ggml-quants.c dequantize_row_q*_K.
#pragma once
#include "simd.h"

namespace lconvert::LCONVERT_ISA {
namespace {

constexpr int kSuper = 256;

// Calls block(source, destination) for every super-block of a row.
template <int Bytes, class Block>
LANE_FN void each_super(const uint8_t* src, int64_t ncols, float* dst, Block block) {
    for (; ncols > 0; ncols -= kSuper, src += Bytes, dst += kSuper) block(src, dst);
}

void dequantize_q2_k(const uint8_t* src, int64_t ncols, float* dst) {
    each_super<84>(src, ncols, dst, [](const uint8_t* block, float* out) {
        const float d = half_at(block + 80), dmin = half_at(block + 82);
        for (int j = 0; j < 16; ++j) {
            const float step = d * (block[j] & 15), offset = dmin * (block[j] >> 4);
            const uint8_t* codes = block + 16 + j / 8 * 32 + j % 2 * 16;
            const int shift = j % 8 / 2 * 2;
            for (int i = 0; i < 16; ++i) out[16 * j + i] = step * (codes[i] >> shift & 3) - offset;
        }
    });
}

void dequantize_q3_k(const uint8_t* src, int64_t ncols, float* dst) {
    each_super<110>(src, ncols, dst, [](const uint8_t* block, float* out) {
        const float d = half_at(block + 108);
        const uint8_t* scales = block + 96;
        for (int j = 0; j < 16; ++j) {
            const int low = j < 8 ? scales[j] & 15 : scales[j - 8] >> 4, high = scales[8 + j % 4] >> 2 * (j / 4) & 3;
            const float step = d * ((low | high << 4) - 32);
            const uint8_t *codes = block + 32 + j / 8 * 32 + j % 2 * 16, *top = block + j % 2 * 16;
            const int shift = j % 8 / 2 * 2, plane = j / 2;
            for (int i = 0; i < 16; ++i)
                out[16 * j + i] = step * ((codes[i] >> shift & 3) + (top[i] >> plane & 1) * 4 - 4);
        }
    });
}

LANE_FN void scale_min_at(const uint8_t* packed, int j, int& scale, int& min) {
    scale = j < 4 ? packed[j] & 63 : (packed[j + 4] & 15) | packed[j - 4] >> 6 << 4;
    min = j < 4 ? packed[j + 4] & 63 : packed[j + 4] >> 4 | packed[j] >> 6 << 4;
}

void dequantize_q4_k(const uint8_t* src, int64_t ncols, float* dst) {
    each_super<144>(src, ncols, dst, [](const uint8_t* block, float* out) {
        const float d = half_at(block), dmin = half_at(block + 2);
        for (int j = 0; j < 8; ++j) {
            int scale, min;
            scale_min_at(block + 4, j, scale, min);
            const float step = d * scale, offset = dmin * min;
            const uint8_t* codes = block + 16 + j / 2 * 32;
            const int shift = 4 * (j % 2);
            for (int i = 0; i < 32; ++i) out[32 * j + i] = step * (codes[i] >> shift & 15) - offset;
        }
    });
}

void dequantize_q5_k(const uint8_t* src, int64_t ncols, float* dst) {
    each_super<176>(src, ncols, dst, [](const uint8_t* block, float* out) {
        const float d = half_at(block), dmin = half_at(block + 2);
        for (int j = 0; j < 8; ++j) {
            int scale, min;
            scale_min_at(block + 4, j, scale, min);
            const float step = d * scale, offset = dmin * min;
            const uint8_t *high = block + 16, *codes = block + 48 + j / 2 * 32;
            const int shift = 4 * (j % 2);
            for (int i = 0; i < 32; ++i)
                out[32 * j + i] = step * ((codes[i] >> shift & 15) + (high[i] >> j & 1) * 16) - offset;
        }
    });
}

void dequantize_q6_k(const uint8_t* src, int64_t ncols, float* dst) {
    each_super<210>(src, ncols, dst, [](const uint8_t* block, float* out) {
        const float d = half_at(block + 208);
        for (int j = 0; j < 16; ++j) {
            const float step = d * (int8_t)block[192 + j];
            const int half = j / 8, plane = j % 8 / 2, side = j % 2 * 16;
            const uint8_t* low = block + 64 * half + plane % 2 * 32 + side;
            const uint8_t* high = block + 128 + 32 * half + side;
            for (int i = 0; i < 16; ++i)
                out[16 * j + i] =
                    step * ((low[i] >> plane / 2 * 4 & 15) + (high[i] >> 2 * plane & 3) * 16 - 32);
        }
    });
}

}  // namespace
}  // namespace lconvert::LCONVERT_ISA
