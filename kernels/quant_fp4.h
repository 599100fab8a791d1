// MXFP4 and NVFP4: E2M1 codes under a shared E8M0 or UE4M3 scale byte.
//
// A lane is a block. Specification: reference/fp4.py; ggml-quants.c quantize_row_mxfp4_ref, quantize_row_nvfp4_ref and
// ggml-impl.h ggml_fp32_to_ue4m3. E2M1 values are doubled and scales halved, as in ggml.
#pragma once
#include "simd.h"
#include "table.h"

namespace lconvert::LCONVERT_ISA {
namespace {

constexpr float kDoubledE2M1[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

// floor of the float nearest to log2(x), x >= 2^-126; equal to glibc's log2f on every such float. The floats just below
// 2^k whose logarithm rounds to k are the last floor(ln 2 * 2^m), with 2^m the largest power of two up to k - 1 (k > 0)
// or -k (k < 0).
LANE_FN I floor_log2(F x) {
    const I raw = bits(x), k = (raw >> 23) - 126, distance = 0x800000 - (raw & 0x7fffff);
    const I size = select(k > 0, k - 1, -k);
    const int steps[6][2] = {{2, 1}, {4, 1}, {8, 3}, {16, 6}, {32, 11}, {64, 22}};  // 1, 2, 5, 11, 22, 44 floats
    I last = splat(0);
    for (const auto& step : steps) last += select(size >= step[0], splat(step[1]), splat(0));
    return select(distance <= last, k, k - 1);
}

// 2^(e-128), also for 255.
LANE_FN F e8m0_half(I e) { return from_bits(select(e < 2, splat(0x200000) << (e & 1), (e - 1) << 23)); }

LANE_FN I to_ue4m3(F x) {
    const I rounded = ((bits(min_of(x, splat(448.0f))) + 0x80000) >> 20) - (120 << 3);
    const I tiny = to_int(min_of(x, splat(1.0f)) * 512.0f + 0.5f);
    const I normal = select(rounded >= 15 << 3, splat(0x7e), rounded);
    return select(x < splat(0.015625f), select(tiny > 7, splat(7), tiny), normal);
}

// Half the value of a byte below 0x7f.
LANE_FN F ue4m3_half(I u) {
    const I exponent = u >> 3, mantissa = u & 7;
    return select(exponent == 0, to_float(mantissa) * 0x1p-10f, from_bits((exponent + 119) << 23 | mantissa << 20));
}

// level[c] = value of code c under the halved scale d.
LANE_FN void fp4_levels(F d, F* level) {
    for (int code = 0; code < 8; ++code) level[code] = d * kDoubledE2M1[code];
}

// Nearest by rounded distance, the lower code on a tie; so the code of -0 never occurs.
LANE_FN I fp4_code(const F* level, F x) {
    const F magnitude = abs(x);
    F best = magnitude;
    I code = splat(0);
    for (int candidate = 1; candidate < 8; ++candidate) {
        const F error = abs(level[candidate] - magnitude);
        code = select(error < best, splat(candidate), code);
        best = min_of(error, best);
    }
    return select(code > 0, code | (bits(x) >> 28 & 8), code);
}

// Codes of 2 * Half values as Half bytes, value j low and value j + Half high.
template <int Half>
LANE_FN void pack_fp4(F d, const F* x, I* words) {
    F level[8];
    fp4_levels(d, level);
    for (int word = 0; word < Half / 4; ++word) {
        I packed = splat(0);
        for (int b = 0; b < 4; ++b) {
            const int i = 4 * word + b;
            packed |= (fp4_code(level, x[i]) | fp4_code(level, x[i + Half]) << 4) << 8 * b;
        }
        words[word] = packed;
    }
}

void quantize_mxfp4(const float* x, int64_t nrows, int64_t ncols, const float*, uint8_t* dst) {
    each_group<32, 17>(x, nrows, ncols, nullptr, dst, [](const Group& group) {
        alignas(64) F x[32];
        load_elements<32>(group.x, 0, x);
        const F largest = largest_magnitude<32>(x);
        // Below 2^-125 (undefined in ggml) the smallest scale.
        const I e = select(largest >= splat(0x1p-126f), floor_log2(largest) + 125, splat(0));
        const I scale = select(e > 0, e, splat(0));
        I words[4];
        pack_fp4<16>(e8m0_half(scale), x, words);
        for (int k = 0; k < W; ++k) group.dst[k][0] = (uint8_t)scale[k];
        store_words<4>(group.dst, 1, words);
    });
}

void quantize_nvfp4(const float* x, int64_t nrows, int64_t ncols, const float*, uint8_t* dst) {
    each_group<64, 36>(x, nrows, ncols, nullptr, dst, [](const Group& group) {
        alignas(64) F x[64];
        load_elements<64>(group.x, 0, x);
        I words[9];
        words[0] = splat(0);
        for (int sub = 0; sub < 4; ++sub) {
            const I scale = to_ue4m3(largest_magnitude<16>(x + 16 * sub) / 6.0f);
            words[0] |= scale << 8 * sub;
            pack_fp4<8>(ue4m3_half(scale), x + 16 * sub, words + 1 + 2 * sub);
        }
        store_words<9>(group.dst, 0, words);
    });
}

// Half bytes of nibbles to 2 * Half values under the halved scale d.
template <int Half>
LANE_FN void unpack_fp4(float d, const uint8_t* packed, float* dst) {
    float level[16];
    for (int code = 0; code < 16; ++code) level[code] = d * kDoubledE2M1[code];
    for (int i = 0; i < Half; ++i) {
        dst[i] = level[packed[i] & 15];
        dst[i + Half] = level[packed[i] >> 4];
    }
}

void dequantize_mxfp4(const uint8_t* src, int64_t ncols, float* dst) {
    for (const uint8_t* block = src; ncols > 0; ncols -= 32, block += 17, dst += 32)
        unpack_fp4<16>(e8m0_half(splat((int32_t)block[0]))[0], block + 1, dst);
}

void dequantize_nvfp4(const uint8_t* src, int64_t ncols, float* dst) {
    for (const uint8_t* block = src; ncols > 0; ncols -= 64, block += 36, dst += 64)
        for (int sub = 0; sub < 4; ++sub) {
            const int scale = block[sub] == 0x7f ? 0 : block[sub] & 0x7f;
            unpack_fp4<8>(ue4m3_half(splat(scale))[0], block + 4 + 8 * sub, dst + 16 * sub);
        }
}

}  // namespace
}  // namespace lconvert::LCONVERT_ISA
