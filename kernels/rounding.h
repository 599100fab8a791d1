// Integers in groups: scales by the extent of a group, codes, and back; plain loops that the compiler vectorises.
//
// Specification: reference/rounding.py. Every operation is IEEE single precision, to nearest, ties to even, so results do not depend
// on the instruction set; sums of squares have a fixed number of partial sums for the same reason.
#pragma once
#include "quant_float.h"

namespace lconvert::LCONVERT_ISA {
namespace {

// Adding and subtracting kRound rounds what is up to kBound in magnitude to an integer, ties to even.
constexpr float kRound = 12582912.0f, kBound = 4194303.0f;

// Least and greatest value of a group; false if one is NaN or infinite.
bool group_extent(const float* x, int64_t n, float* low, float* high) {
    float lo = x[0], hi = x[0];
    uint32_t bad = 0;
    int64_t i = 0;
    if (n >= W) {
        F least = load(x), most = least;
        I not_finite{};
        for (; i + W <= n; i += W) {
            const F v = load(x + i);
            not_finite |= (bits(v) & 0x7f800000) == 0x7f800000;
            least = min_of(v, least);
            most = max_of(v, most);
        }
        bad = any(not_finite);
        float lows[W], highs[W];
        store(lows, least);
        store(highs, most);
        for (int half = W / 2; half > 0; half /= 2)
            for (int k = 0; k < half; ++k) {
                lows[k] = lows[k + half] < lows[k] ? lows[k + half] : lows[k];
                highs[k] = highs[k + half] > highs[k] ? highs[k + half] : highs[k];
            }
        lo = lows[0];
        hi = highs[0];
    }
    for (; i < n; ++i) {
        const float v = x[i];
        uint32_t raw;
        __builtin_memcpy(&raw, &v, 4);
        bad |= (raw & 0x7f800000u) == 0x7f800000u;
        lo = v < lo ? v : lo;
        hi = v > hi ? v : hi;
    }
    *low = lo;
    *high = hi;
    return bad == 0;
}

// clamp(round(x / scale) + zero, least, most); 0 + zero where the scale is 0.
void round_group(const float* x, int64_t n, float scale, float zero, float least, float most, int8_t* codes) {
    if (scale == 0) {
        const float v = zero < least ? least : (zero > most ? most : zero);
        __builtin_memset(codes, (int)v, (size_t)n);
        return;
    }
    int64_t i = 0;
    for (; i + 32 <= n; i += 32) {
        int32_t whole[32];
        for (int k = 0; k < 32; k += W) {
            F v = clamp(load(x + i + k) / scale, -kBound, kBound);
            v = (v + kRound) - kRound;
            store((float*)whole + k, from_bits(to_int(clamp(v + zero, least, most))));
        }
        for (int k = 0; k < 32; ++k) codes[i + k] = (int8_t)whole[k];
    }
    for (; i < n; ++i) {
        float v = x[i] / scale;
        v = v < -kBound ? -kBound : (v > kBound ? kBound : v);
        v = (v + kRound) - kRound;
        v += zero;
        v = v < least ? least : (v > most ? most : v);
        codes[i] = (int8_t)(int32_t)v;
    }
}

bool extent_groups(const float* x, int64_t count, int64_t n, float* low, float* high) {
    bool finite = true;
    for (int64_t g = 0; g < count; ++g) finite &= group_extent(x + g * n, n, low + g, high + g);
    return finite;
}

void round_groups(const float* x, int64_t count, int64_t n, const float* scales, const float* zeros, float least, float most,
                  int8_t* codes) {
    for (int64_t g = 0; g < count; ++g)
        round_group(x + g * n, n, scales[g], zeros ? zeros[g] : 0.0f, least, most, codes + g * n);
}

// A number rounded to `significant` bits; in fp16's subnormal range to a multiple of 2^-24.
LANE_FN float short_scale(float v, int significant) {
    const int cut = 24 - significant;
    uint32_t raw;
    __builtin_memcpy(&raw, &v, 4);
    raw = (raw + (1u << (cut - 1)) - 1 + ((raw >> cut) & 1)) >> cut << cut;
    __builtin_memcpy(&v, &raw, 4);
    if (v < 0x1p-14f && v > -0x1p-14f) v = ((v * 0x1p24f + kRound) - kRound) * 0x1p-24f;
    return v;
}

// Groups of n values to codes, scales and, where `zeros` is not null, zero points. signed_max: the value of the largest magnitude gets the
// least code. False if a value is NaN or infinite.
bool nearest_groups(const float* x, int64_t count, int64_t n, int width, bool signed_max, int8_t* codes, float* scales,
                    uint8_t* zeros) {
    bool finite = true;
    const float top = (float)(zeros ? (1 << width) - 1 : (1 << (width - 1)) - 1);
    for (int64_t g = 0; g < count; ++g, x += n, codes += n) {
        float low, high;
        finite &= group_extent(x, n, &low, &high);
        if (zeros) {
            low = low < 0.0f ? low : 0.0f;
            high = high > 0.0f ? high : 0.0f;
            const float scale = short_scale((high - low) / top, 7);
            float zero = 0.0f;
            if (scale > 0.0f) {
                zero = -low / scale;
                zero = zero > top ? top : (zero + kRound) - kRound;
            }
            scales[g] = scale;
            zeros[g] = (uint8_t)zero;
            round_group(x, n, scale, zero, 0.0f, top, codes);
        } else {
            const float below = low < 0.0f ? -low : low, above = high < 0.0f ? -high : high;
            const float widest = signed_max ? (below < above ? high : low) / (-top - 1.0f) : (below < above ? above : below) / top;
            scales[g] = short_scale(widest, 8) + 0.0f;
            round_group(x, n, scales[g], 0.0f, -top - 1.0f, top, codes);
        }
    }
    return finite;
}

// (code - zero) * scale of a group.
template <class Code>
LANE_FN void group_values(const Code* codes, int64_t n, float scale, float zero, float* out) {
    for (int64_t i = 0; i < n; ++i) out[i] = ((float)codes[i] - zero) * scale;
}

void value_groups(const uint8_t* codes, bool is_signed, int64_t count, int64_t n, const float* scales, const float* zeros,
                  float* out) {
    for (int64_t g = 0; g < count; ++g, codes += n, out += n) {
        const float zero = zeros ? zeros[g] : 0.0f;
        if (is_signed)
            group_values((const int8_t*)codes, n, scales[g], zero, out);
        else
            group_values(codes, n, scales[g], zero, out);
    }
}

// sums[0..7] += squares of x - y, sums[8..15] += squares of x, in double precision, element i to partial sum i % 8.
void add_squares(const float* x, const float* y, int64_t n, double* sums) {
    typedef float F4 __attribute__((vector_size(16)));
    typedef double D4 __attribute__((vector_size(32)));
    D4 partial[4];
    __builtin_memcpy(partial, sums, sizeof partial);
    for (int64_t i = 0; i < n; i += 8)
        for (int half = 0; half < 2; ++half) {
            const int64_t at = i + 4 * half, left = n - at;
            F4 a{}, b{};
            if (left >= 4) {
                __builtin_memcpy(&a, x + at, sizeof a);
                __builtin_memcpy(&b, y + at, sizeof b);
            } else if (left > 0) {
                __builtin_memcpy(&a, x + at, (size_t)left * 4);
                __builtin_memcpy(&b, y + at, (size_t)left * 4);
            }
            const D4 v = __builtin_convertvector(a, D4), e = v - __builtin_convertvector(b, D4);
            partial[half] += e * e;
            partial[2 + half] += v * v;
        }
    __builtin_memcpy(sums, partial, sizeof partial);
}

const Rounding kInGroups = {extent_groups, round_groups, nearest_groups, value_groups, add_squares};

}  // namespace
}  // namespace lconvert::LCONVERT_ISA
