// Groups of values on a lattice: the best neighbour of one that is off it, and what IQ1, IQ2 and IQ3 share besides.
//
// A lane is a block, except in best_neighbour: there a lane is a candidate for one group of one block. Specification:
// reference/iq_search.py, _settle.
#pragma once
#include "iq_tables.h"
#include "simd.h"

namespace lconvert::LCONVERT_ISA {
namespace {

constexpr float kLargest = 0x1.fffffep127f;

// Groups of kSize values, levels of kBits bits below kLevels, sub-blocks of kSub values with a scale each.
template <int Size, int Bits, int Levels, int Sub>
struct Shape {
    static constexpr int kSize = Size, kBits = Bits, kLevels = Levels, kSub = Sub;
    static constexpr int kGroups = Sub / Size, kSubs = 256 / Sub;

    // The weight of a value without importance. Where that makes no sense the caller has refused.
    static F own_weight(F square, F) { return square; }
};

// What a level stands for in the searches, repeated to fill the widest vector.
alignas(64) constexpr float kOdd[] = {1, 3, 5, 7, 9, 11, 13, 15, 1, 3, 5, 7, 9, 11, 13, 15};
alignas(64) constexpr float kOdd4[] = {1, 3, 5, 7, 1, 3, 5, 7, 1, 3, 5, 7, 1, 3, 5, 7};
alignas(64) constexpr float kUp[] = {-0.875f, 0.125f, 1.125f, 0, -0.875f, 0.125f, 1.125f, 0,
                                     -0.875f, 0.125f, 1.125f, 0, -0.875f, 0.125f, 1.125f, 0};
alignas(64) constexpr float kDown[] = {-1.125f, -0.125f, 0.875f, 0, -1.125f, -0.125f, 0.875f, 0,
                                       -1.125f, -0.125f, 0.875f, 0, -1.125f, -0.125f, 0.875f, 0};

// ---- the best neighbour of a group off the lattice ----

// Entry (index & (2^Bits - 1)) of a table that repeats every 2^Bits lanes.
#if defined(__AVX512F__)
template <int Bits>
LANE_FN F pick(F table, I index) {
    return Bits == 2 ? (F)_mm512_permutevar_ps((__m512)table, (__m512i)index)
                     : (F)_mm512_permutexvar_ps((__m512i)index, (__m512)table);
}
LANE_FN I load_codes(const uint16_t* p) { return (I)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)); }
#elif defined(__AVX2__)
template <int Bits>
LANE_FN F pick(F table, I index) {
    return Bits == 2 ? (F)_mm256_permutevar_ps((__m256)table, (__m256i)index)
                     : (F)_mm256_permutevar8x32_ps((__m256)table, (__m256i)index);
}
LANE_FN I load_codes(const uint16_t* p) { return (I)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)); }
#endif

#if defined(__AVX2__)

LANE_FN float lowest(F v) {
#if defined(__AVX512F__)
    const __m256 half = _mm256_min_ps(_mm512_castps512_ps256((__m512)v), _mm512_extractf32x8_ps((__m512)v, 1));
#else
    const __m256 half = (__m256)v;
#endif
    __m128 quarter = _mm_min_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    quarter = _mm_min_ps(quarter, _mm_movehl_ps(quarter, quarter));
    return _mm_cvtss_f32(_mm_min_ss(quarter, _mm_movehdup_ps(quarter)));
}

LANE_FN unsigned lane_bits(I mask) {
#if defined(__AVX512F__)
    return _mm512_movepi32_mask((__m512i)mask);
#else
    return (unsigned)_mm256_movemask_ps((__m256)mask);
#endif
}

// The code in `list` whose values, times scale, are nearest to x in weighted squared error; the first of equals, and
// the first of all if no error is finite (ggml aborts there). `values`: of the levels, see kOdd.
template <class T>
LANE_FN int best_neighbour(const uint16_t* list, const float* x, const float* w, float scale, const float* values) {
    static_assert(kListRead % W == 0);
    const int count = list[0];
    const F scaled = scale * load(values);
    F term[T::kSize];
    for (int i = 0; i < T::kSize; ++i) {
        const F diff = scaled - x[i];
        term[i] = w[i] * diff * diff;
    }
    F best = splat(kLargest);
    I round = splat(0);
    for (int at = 0; at < count; at += W) {
        I codes = load_codes(list + 1 + at);
        F error = pick<T::kBits>(term[0], codes);
        for (int i = 1; i < T::kSize; ++i) {
            codes = codes >> T::kBits;
            error += pick<T::kBits>(term[i], codes);
        }
        round = select(error < best, splat(at), round);
        best = min_of(error, best);
    }
    int first = count;
    for (unsigned ties = lane_bits(best == splat(lowest(best))); ties; ties &= ties - 1) {
        const int lane = __builtin_ctz(ties), at = round[lane] + lane;
        first = at < first ? at : first;
    }
    return list[1 + first];
}

// Value of level i of each code.
template <class T>
LANE_FN F value_of(I code, int i, const float* values) {
    return pick<T::kBits>(load(values), code >> T::kBits * i);
}

#else

template <class T>
LANE_FN int best_neighbour(const uint16_t* list, const float* x, const float* w, float scale, const float* values) {
    constexpr int kCodes = 1 << T::kBits;
    float term[T::kSize][kCodes];
    for (int i = 0; i < T::kSize; ++i)
        for (int level = 0; level < kCodes; ++level) {
            const float diff = scale * values[level] - x[i];
            term[i][level] = w[i] * diff * diff;
        }
    float best = kLargest;
    int winner = list[1];
    for (int at = 1; at <= list[0]; ++at) {
        const int code = list[at];
        float error = term[0][code & (kCodes - 1)];
        for (int i = 1; i < T::kSize; ++i) error += term[i][code >> T::kBits * i & (kCodes - 1)];
        winner = error < best ? code : winner;
        best = error < best ? error : best;
    }
    return winner;
}

// The values of consecutive levels differ by the same step.
template <class T>
LANE_FN F value_of(I code, int i, const float* values) {
    const F level = to_float((code >> T::kBits * i) & ((1 << T::kBits) - 1));
    return level * (values[1] - values[0]) + values[0];
}

#endif

// Groups off the lattice are replaced by their best neighbour. x, w: the values of lane k from rows[k] on.
template <class T, int N>
LANE_FN I settle(const Lattice& lattice, I codes, const float (*x)[N], const float (*w)[N], int offset, F scale,
                 const float* values) {
    alignas(64) int32_t code[W];
    alignas(64) float scales[W];
    __builtin_memcpy(code, &codes, sizeof codes);
    store(scales, scale);
    for (int k = 0; k < W; ++k) {
        const int32_t place = lattice.place[code[k]];
        if (place < 0)
            code[k] = best_neighbour<T>(lattice.lists + ~place, x[k] + offset, w[k] + offset, scales[k], values);
    }
    __builtin_memcpy(&codes, code, sizeof codes);
    return codes;
}

LANE_FN I index_of(const Lattice& lattice, I code) {
    for (int k = 0; k < W; ++k) code[k] = lattice.place[code[k]];
    return code;
}

// rows[k][i] = element i of lane k.
template <int N>
LANE_FN void store_rows(const F* v, float (*rows)[N]) {
    for (int i = 0; i < N; i += W) {
        F square[W];
        for (int k = 0; k < W; ++k) square[k] = v[i + k];
        transpose(square);
        for (int k = 0; k < W; ++k) store(rows[k] + i, square[k]);
    }
}

LANE_FN F sum_of_squares(const F* x) {
    F sum = splat(0.0f);
    for (int i = 0; i < 256; ++i) sum += x[i] * x[i];
    return sum;
}

// Codes 0..most of scales taken as d * (2 * code + 1).
LANE_FN I scale_code(F inverse, F scale, int most) {
    return to_int(clamp(nearest(0.5f * (inverse * scale - 1.0f)), 0, (float)most));
}

// Digits of `Bits` bits each, the first lowest, to words.
template <int Bits, int Words>
LANE_FN void pack_words(const I* digits, I* words) {
    constexpr int kPer = 32 / Bits;
    for (int i = 0; i < Words; ++i) {
        words[i] = splat(0);
        for (int k = 0; k < kPer; ++k) words[i] |= (digits[i * kPer + k] & ((1 << Bits) - 1)) << Bits * k;
    }
}

}  // namespace
}  // namespace lconvert::LCONVERT_ISA
