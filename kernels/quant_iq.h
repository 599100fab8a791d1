// IQ1, IQ2, IQ3: groups of 4 or 8 values snapped to a point of a lattice, 256 values to a block.
//
// A lane is a block, except in best_neighbour: there a lane is a candidate point of one group of one block. Follows
// the order of operations of ggml-quants.c (quantize_row_iq*_impl); the specification is reference/iq.py and
// reference/iq_search.py.
#pragma once
#include "fit.h"
#include "iq_tables.h"
#include "simd.h"
#include "table.h"

namespace lconvert::LCONVERT_ISA {
namespace {

constexpr float kLargest = 0x1.fffffep127f;

// Groups of kSize values, levels of kBits bits below kLevels, sub-blocks of kSub values with a scale each.
template <int Size, int Bits, int Levels, int Sub>
struct Shape {
    static constexpr int kSize = Size, kBits = Bits, kLevels = Levels, kSub = Sub;
    static constexpr int kGroups = Sub / Size, kSubs = 256 / Sub;
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

// ---- IQ2 and IQ3 ----

enum class Refit { kOff, kAllIfOff, kAll };

// kTrials, kStep: inverse scales (2 * kLevels - 1 + kStep * trial) / largest value are tried, trial up to +-kTrials.
// kEnergy: how often the mean square of a block counts in its weights. kNegligible: sub-blocks whose largest value is
// below hold only zeros. kRefit: which groups are rounded again with the winning scale: those off the lattice, all if
// one is off it, or all. kFudge: factor of d. kEvenSigns: every 8 values have an even number of negative ones.
struct Iq2Xxs : Shape<8, 2, 3, 32> {
    static constexpr int kTrials = 6;
    static constexpr float kStep = 0.1f, kEnergy = 1, kNegligible = 1e-15f, kFudge = 1;
    static constexpr Refit kRefit = Refit::kAll;
    static constexpr bool kEvenSigns = true;
    static F own_weight(F square, F) { return square; }  // the caller refuses to go without importance
};

struct Iq2Xs : Shape<8, 2, 3, 16> {
    static constexpr int kTrials = 9;
    static constexpr float kStep = 0.1f, kEnergy = 1, kNegligible = 1e-15f, kFudge = 1;
    static constexpr Refit kRefit = Refit::kOff;
    static constexpr bool kEvenSigns = true;
    static F own_weight(F square, F) { return square; }
};

struct Iq2S : Shape<8, 2, 3, 16> {
    static constexpr int kTrials = 9;
    static constexpr float kStep = 0.1f, kEnergy = 2, kNegligible = 1e-8f, kFudge = 0.9875f;
    static constexpr Refit kRefit = Refit::kOff;
    static constexpr bool kEvenSigns = false;
    static F own_weight(F square, F mean) { return 0.25f * mean + square; }
};

struct Iq3Xxs : Shape<4, 3, 8, 32> {
    static constexpr int kTrials = 15;
    static constexpr float kStep = 0.2f, kEnergy = 2, kNegligible = 1e-8f, kFudge = 1.0125f;
    static constexpr Refit kRefit = Refit::kOff;
    static constexpr bool kEvenSigns = true;
    static F own_weight(F square, F) { return square; }
};

struct Iq3S : Shape<4, 3, 8, 32> {
    static constexpr int kTrials = 9;
    static constexpr float kStep = 0.2f, kEnergy = 2, kNegligible = 0x1p-149f, kFudge = 1.033f;
    static constexpr Refit kRefit = Refit::kAllIfOff;
    static constexpr bool kEvenSigns = false;
    static F own_weight(F square, F) { return square; }
};

// One sub-block per lane: code of every group, sign byte of every 8 values. `dead`: nothing was fitted.
template <class T>
struct Fitted {
    F scale;
    I code[T::kGroups], sign[T::kSub / 8], dead;
};

// Magnitudes a and sign bytes of x. With even signs the value that weighs least may become a negative magnitude.
template <class T>
LANE_FN void split_signs(const F* x, const F* w, F* a, I* sign) {
    for (int k = 0; k < T::kSub; k += 8) {
        I byte = splat(0), odd = splat(0);
        for (int i = 0; i < 8; ++i) {
            const I negative = x[k + i] < splat(0.0f);
            a[k + i] = abs(x[k + i]);
            byte |= negative & (1 << i);
            odd ^= negative;
        }
        if (T::kEvenSigns) {
            I at = splat(0);
            F least = w[k] * x[k] * x[k];
            for (int i = 1; i < 8; ++i) {
                const F cost = w[k + i] * x[k + i] * x[k + i];
                at = select(cost < least, splat(i), at);
                least = min_of(cost, least);
            }
            for (int i = 0; i < 8; ++i) {
                const I flip = odd & (at == i);
                a[k + i] = from_bits(bits(a[k + i]) ^ (flip & INT32_MIN));
                byte ^= flip & (1 << i);
            }
        }
        sign[k / 8] = byte;
    }
}

// The levels nearest to inverse * a = 2 * level + 1, as the code of a group.
template <class T>
LANE_FN I rounded(const F* a, F inverse) {
    F code = splat(0.0f);
    for (int i = 0; i < T::kSize; ++i)
        code += clamp(nearest(0.5f * (inverse * a[i] - 1.0f)), 0, T::kLevels - 1) * (float)(1 << T::kBits * i);
    return to_int(code);
}

template <class T>
LANE_FN void sums(const F* w, const F* wa, const I* code, F& sum_qx, F& sum_qq) {
    sum_qx = sum_qq = splat(0.0f);
    for (int i = 0; i < T::kSub; ++i) {
        const F q = value_of<T>(code[i / T::kSize], i % T::kSize, T::kSize == 8 ? kOdd4 : kOdd);
        sum_qx += wa[i] * q;
        sum_qq += w[i] * q * q;
    }
}

template <class T>
void fit_scan(const Lattice& lattice, const F* x, const F* w, Fitted<T>& best) {
    constexpr int kOddMost = 2 * T::kLevels - 1;
    const float* values = T::kSize == 8 ? kOdd4 : kOdd;
    const F zero = splat(0.0f), one = splat(1.0f);
    F a[T::kSub], wa[T::kSub], root[T::kSub];
    alignas(64) float a_rows[W][T::kSub], root_rows[W][T::kSub];
    split_signs<T>(x, w, a, best.sign);
    F largest = a[0];
    for (int i = 1; i < T::kSub; ++i) largest = max_of(largest, a[i]);
    for (int i = 0; i < T::kSub; ++i) {
        wa[i] = w[i] * a[i];
        root[i] = sqrt(w[i]);
    }
    store_rows(a, a_rows);
    store_rows(root, root_rows);
    best.dead = largest < splat(T::kNegligible);
    if (T::kRefit == Refit::kAll) {  // IQ2_XXS looks around the scale of a fit without lattice
        F level[T::kSub];
        best.scale = fit_levels<T::kSub, T::kLevels + 1>(a, w, level);
        largest = best.scale * (float)T::kLevels;
        best.dead |= largest <= zero;
    } else {
        best.scale = largest / (float)kOddMost;
    }
    F gain = zero;
    I off[T::kGroups];
    for (int g = 0; g < T::kGroups; ++g) {
        best.code[g] = splat(0);
        off[g] = splat(T::kRefit == Refit::kOff ? 0 : -1);
    }
    F sum_qx, sum_qq;
    for (int trial = -T::kTrials; trial <= T::kTrials; ++trial) {
        const F inverse = splat(kOddMost + trial * T::kStep) / largest, scale = one / inverse;
        I code[T::kGroups], moved[T::kGroups];
        for (int g = 0; g < T::kGroups; ++g) {
            const I nearest_code = rounded<T>(a + g * T::kSize, inverse);
            code[g] = settle<T>(lattice, nearest_code, a_rows, root_rows, g * T::kSize, scale, values);
            moved[g] = code[g] != nearest_code;
        }
        sums<T>(w, wa, code, sum_qx, sum_qq);
        const I better = (sum_qq > zero) & (sum_qx * sum_qx > gain * sum_qq);
        if (!any(better)) continue;
        best.scale = select(better, sum_qx / sum_qq, best.scale);
        gain = select(better, best.scale * sum_qx, gain);
        for (int g = 0; g < T::kGroups; ++g) {
            best.code[g] = select(better, code[g], best.code[g]);
            off[g] = select(better, moved[g], off[g]);
        }
    }
    I some_off = splat(T::kRefit == Refit::kAll ? -1 : 0);
    for (int g = 0; g < T::kGroups; ++g) some_off |= off[g];
    some_off &= best.scale > zero;
    const F inverse = one / best.scale;
    for (int g = 0; g < T::kGroups; ++g) {
        const I again = T::kRefit == Refit::kOff ? off[g] & some_off : some_off;
        I code = select(again, rounded<T>(a + g * T::kSize, inverse), best.code[g]);
        code = settle<T>(lattice, code, a_rows, root_rows, g * T::kSize, best.scale, values);
        best.code[g] = code;
    }
    sums<T>(w, wa, best.code, sum_qx, sum_qq);
    best.scale = select(some_off & (sum_qq > zero), sum_qx / sum_qq, best.scale);
    const I flip = best.scale < zero;
    for (int k = 0; k < T::kSub / 8; ++k) best.sign[k] ^= flip & 255;
    best.scale = select(best.dead, zero, abs(best.scale));
}

// The contents of W blocks before they are packed.
template <class T>
struct Block {
    I index[256 / T::kSize], sign[32], scale[T::kSubs], d, dead[T::kSubs];
};

template <class T>
LANE_FN void scan_block(const Group& group, const Lattice& lattice, Block<T>& block) {
    alignas(64) F x[256];
    load_elements<256>(group.x, 0, x);
    const F mean = T::kEnergy * sum_of_squares(x) / 256.0f;
    F scale[T::kSubs], top = splat(0.0f);
    for (int j = 0; j < T::kSubs; ++j) {
        const F* xs = x + j * T::kSub;
        F w[T::kSub];
        if (group.weights[0]) load_elements<T::kSub>(group.weights, j * T::kSub, w);
        for (int i = 0; i < T::kSub; ++i) {
            const F square = xs[i] * xs[i];
            w[i] = group.weights[0] ? w[i] * sqrt(mean + square) : T::own_weight(square, mean);
        }
        Fitted<T> fit;
        fit_scan<T>(lattice, xs, w, fit);
        for (int g = 0; g < T::kGroups; ++g)
            block.index[j * T::kGroups + g] = index_of(lattice, fit.code[g]) & ~fit.dead;
        for (int k = 0; k < T::kSub / 8; ++k) block.sign[j * T::kSub / 8 + k] = fit.sign[k] & ~fit.dead;
        block.dead[j] = fit.dead;
        scale[j] = fit.scale;
        top = max_of(top, scale[j]);
    }
    const I empty = top == splat(0.0f);
    const F d = top / 31.0f, inverse = splat(1.0f) / d;
    for (int j = 0; j < T::kSubs; ++j) block.scale[j] = scale_code(inverse, scale[j], 15) & ~empty;
    if (T::kEvenSigns) {  // a block whose scales are all zero is cleared; the types without leave it as it is
        for (I& index : block.index) index &= ~empty;
        for (I& sign : block.sign) sign &= ~empty;
    }
    block.d = half_bits(d * T::kFudge);
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

// Four sign bytes as 7 bits each, the eighth is their parity, and a 4-bit scale.
LANE_FN I signs_and_scale(const I* sign, I scale) {
    return (sign[0] & 127) | (sign[1] & 127) << 7 | (sign[2] & 127) << 14 | (sign[3] & 127) << 21 | scale << 28;
}

void quantize_iq2_xxs(const float* x, int64_t nrows, int64_t ncols, const float* weights, uint8_t* dst) {
    const Lattice& points = lattice(LatticeName::iq2_xxs);
    each_group<256, 66>(x, nrows, ncols, weights, dst, [&](const Group& group) {
        Block<Iq2Xxs> block;
        scan_block(group, points, block);
        I words[16];
        for (int j = 0; j < 8; ++j) {
            pack_words<8, 1>(block.index + 4 * j, words + 2 * j);
            words[2 * j + 1] = signs_and_scale(block.sign + 4 * j, block.scale[j]);
        }
        store_halfword(group.dst, 0, block.d);
        store_words<16>(group.dst, 2, words);
    });
}

void quantize_iq2_xs(const float* x, int64_t nrows, int64_t ncols, const float* weights, uint8_t* dst) {
    const Lattice& points = lattice(LatticeName::iq2_xs);
    each_group<256, 74>(x, nrows, ncols, weights, dst, [&](const Group& group) {
        Block<Iq2Xs> block;
        scan_block(group, points, block);
        I words[18];
        for (int k = 0; k < 32; ++k) block.index[k] |= (block.sign[k] & 127) << 9;
        pack_words<16, 16>(block.index, words);
        pack_words<4, 2>(block.scale, words + 16);
        store_halfword(group.dst, 0, block.d);
        store_words<18>(group.dst, 2, words);
    });
}

void quantize_iq2_s(const float* x, int64_t nrows, int64_t ncols, const float* weights, uint8_t* dst) {
    const Lattice& points = lattice(LatticeName::iq2_s);
    each_group<256, 82>(x, nrows, ncols, weights, dst, [&](const Group& group) {
        Block<Iq2S> block;
        scan_block(group, points, block);
        I words[20];
        pack_words<8, 8>(block.index, words);
        pack_words<8, 8>(block.sign, words + 8);
        for (I& index : block.index) index >>= 8;
        pack_words<2, 2>(block.index, words + 16);
        pack_words<4, 2>(block.scale, words + 18);
        store_halfword(group.dst, 0, block.d);
        store_words<20>(group.dst, 2, words);
    });
}

void quantize_iq3_xxs(const float* x, int64_t nrows, int64_t ncols, const float* weights, uint8_t* dst) {
    const Lattice& points = lattice(LatticeName::iq3_xxs);
    each_group<256, 98>(x, nrows, ncols, weights, dst, [&](const Group& group) {
        Block<Iq3Xxs> block;
        scan_block(group, points, block);
        I words[24];
        pack_words<8, 16>(block.index, words);
        for (int j = 0; j < 8; ++j) words[16 + j] = signs_and_scale(block.sign + 4 * j, block.scale[j]);
        store_halfword(group.dst, 0, block.d);
        store_words<24>(group.dst, 2, words);
    });
}

void quantize_iq3_s(const float* x, int64_t nrows, int64_t ncols, const float* weights, uint8_t* dst) {
    const Lattice& points = lattice(LatticeName::iq3_s);
    each_group<256, 110>(x, nrows, ncols, weights, dst, [&](const Group& group) {
        Block<Iq3S> block;
        scan_block(group, points, block);
        I words[27], *low = words, *high = words + 16, *sign = words + 18;
        pack_words<8, 16>(block.index, low);
        pack_words<8, 8>(block.sign, sign);
        for (I& index : block.index) index >>= 8;
        pack_words<1, 2>(block.index, high);
        pack_words<4, 1>(block.scale, words + 26);
        // ggml writes nothing for a sub-block of zeros and does not advance either: what follows moves up, but for
        // the ninth bits of the indices and the scales. See reference/iq_search.py, _closed_up.
        for (int j = 7; j >= 0; --j) {
            if (!any(block.dead[j])) continue;
            for (int k = j; k < 8; ++k) {
                const I zero = splat(0);
                for (int half = 0; half < 2; ++half)
                    low[2 * k + half] = select(block.dead[j], k < 7 ? low[2 * k + 2 + half] : zero, low[2 * k + half]);
                sign[k] = select(block.dead[j], k < 7 ? sign[k + 1] : zero, sign[k]);
            }
        }
        store_halfword(group.dst, 0, block.d);
        store_words<27>(group.dst, 2, words);
    });
}

// ---- IQ1 ----

struct Iq1S : Shape<8, 2, 3, 32> {
    static constexpr float kNegligible = 1e-12f, kFudge = 1.125f;
};

struct Iq1M : Shape<8, 2, 3, 16> {
    static constexpr float kNegligible = 1e-7f, kFudge = 1.1125f;
};

// Sorts each lane by value, equal values by position: the stable sort that glibc's qsort is at this size. Batcher's
// odd-even merge network.
template <int N>
LANE_FN void sort_positions(const F* x, I* position) {
    F v[N];
    for (int i = 0; i < N; ++i) {
        v[i] = x[i];
        position[i] = splat(i);
    }
    for (int p = 1; p < N; p *= 2)
        for (int k = p; k >= 1; k /= 2)
            for (int j = k % p; j + k < N; j += 2 * k)
                for (int i = j; i < j + k && i + k < N; ++i) {
                    if (i / (2 * p) != (i + k) / (2 * p)) continue;
                    const I swap = (v[i] > v[i + k]) | ((v[i] == v[i + k]) & (position[i] > position[i + k]));
                    const F low = select(swap, v[i + k], v[i]);
                    v[i + k] = select(swap, v[i], v[i + k]);
                    v[i] = low;
                    const I first = select(swap, position[i + k], position[i]);
                    position[i + k] = select(swap, position[i], position[i + k]);
                    position[i] = first;
                }
}

// The best split of the sorted values of a sub-block: before `low` level 0, from `high` on level 2.
struct Split {
    F scale, gain;
    I low, high, shift;  // shift -1: none found
};

LANE_FN void offer(Split& best, int low, int high, int shift, F sum_qx, F sum_qq) {
    const I better = (sum_qq > splat(0.0f)) & (sum_qx * sum_qx > best.gain * sum_qq);
    if (!any(better)) return;
    best.scale = select(better, sum_qx / sum_qq, best.scale);
    best.gain = select(better, best.scale * sum_qx, best.gain);
    best.low = select(better, splat(low), best.low);
    best.high = select(better, splat(high), best.high);
    best.shift = select(better, splat(shift), best.shift);
}

// Element position[i] of every lane.
template <int N>
LANE_FN void permuted(const F* v, const I* position, F* out) {
    for (int i = 0; i < N; ++i)
        for (int k = 0; k < W; ++k) out[i][k] = v[position[i][k]][k];
}

// One shift for the sub-block: 0 up, 1 down.
LANE_FN void best_split(const F* wx, const F* w, const I* position, Split& best, Iq1S) {
    constexpr int N = Iq1S::kSub;
    const float* shifts[] = {kUp, kDown};
    F sorted_x[N], sorted_w[N], x[N + 1], sum_w[N + 1];
    permuted<N>(wx, position, sorted_x);
    permuted<N>(w, position, sorted_w);
    x[0] = sum_w[0] = splat(0.0f);
    for (int i = 0; i < N; ++i) {
        x[i + 1] = x[i] + sorted_x[i];
        sum_w[i + 1] = sum_w[i] + sorted_w[i];
    }
    F last_x[2][N + 1], last_w[2][N + 1];
    for (int i = 0; i <= N; ++i)
        for (int s = 0; s < 2; ++s) {
            const float q = shifts[s][2];
            last_x[s][i] = (x[N] - x[i]) * q;
            last_w[s][i] = (sum_w[N] - sum_w[i]) * q * q;
        }
    for (int low = 0; low <= N; ++low) {
        F first_x[2], first_w[2];
        for (int s = 0; s < 2; ++s) {
            const float q = shifts[s][0];
            first_x[s] = x[low] * q;
            first_w[s] = sum_w[low] * q * q;
        }
        for (int high = low; high <= N; ++high) {
            const F middle_x = x[high] - x[low], middle_w = sum_w[high] - sum_w[low];
            for (int s = 0; s < 2; ++s) {
                const float q = shifts[s][1];
                offer(best, low, high, s, first_x[s] + middle_x * q + last_x[s][high],
                      first_w[s] + middle_w * q * q + last_w[s][high]);
            }
        }
    }
}

// A shift for each half of the sub-block: 2 * first + second.
LANE_FN void best_split(const F* wx, const F* w, const I* position, Split& best, Iq1M) {
    constexpr int N = Iq1M::kSub;
    const float* shifts[] = {kUp, kDown};
    F sorted_x[N], sorted_w[N], x[2][N + 1], sum_w[2][N + 1];
    permuted<N>(wx, position, sorted_x);
    permuted<N>(w, position, sorted_w);
    for (int h = 0; h < 2; ++h) {
        x[h][0] = sum_w[h][0] = splat(0.0f);
        for (int i = 0; i < N; ++i) {
            const I inside = (position[i] >= N / 2) == splat(-h);
            x[h][i + 1] = select(inside, x[h][i] + sorted_x[i], x[h][i]);
            sum_w[h][i + 1] = select(inside, sum_w[h][i] + sorted_w[i], sum_w[h][i]);
        }
    }
    for (int low = 0; low <= N; ++low)
        for (int high = low; high <= N; ++high) {
            F qx[2][2], qq[2][2];
            for (int h = 0; h < 2; ++h) {
                const F outer = x[h][low] + x[h][high];
                for (int s = 0; s < 2; ++s) {
                    const float* q = shifts[s];
                    qx[h][s] = x[h][N] * q[2] - outer;
                    qq[h][s] = sum_w[h][N] * q[2] * q[2] + sum_w[h][low] * (q[0] * q[0] - q[1] * q[1]) +
                               sum_w[h][high] * (q[1] * q[1] - q[2] * q[2]);
                }
            }
            for (int s = 0; s < 4; ++s)
                offer(best, low, high, s, qx[0][s / 2] + qx[1][s % 2], qq[0][s / 2] + qq[1][s % 2]);
        }
}

// One sub-block: scale, codes of its groups, and whether each group is shifted down (mask).
template <class T>
struct Ternary {
    F scale;
    I code[T::kGroups], down[T::kGroups], dead;
};

template <class T>
LANE_FN F shifted_value(I code, I down, int i) {
    const F level = to_float((code >> 2 * i) & 3);
    return level + select(down, splat(kDown[0]), splat(kUp[0]));
}

template <class T>
void fit_ternary(const Lattice& lattice, const F* x, const F* w, Ternary<T>& fit) {
    const F zero = splat(0.0f);
    F largest = abs(x[0]), wx[T::kSub];
    for (int i = 1; i < T::kSub; ++i) largest = max_of(largest, abs(x[i]));
    for (int i = 0; i < T::kSub; ++i) wx[i] = w[i] * x[i];
    I position[T::kSub];
    sort_positions<T::kSub>(x, position);
    Split best = {largest, splat(-kLargest), splat(-1), splat(-1), splat(-1)};
    best_split(wx, w, position, best, T());
    fit.dead = (largest < splat(T::kNegligible)) | (best.shift < 0);

    const I flip = best.scale < zero;
    fit.scale = abs(best.scale);
    I code[T::kGroups];
    for (I& c : code) c = splat(0);
    for (int i = 0; i < T::kSub; ++i) {
        I level = -((best.low <= i) + (best.high <= i));
        level = select(flip, 2 - level, level);
        for (int k = 0; k < W; ++k) code[position[i][k] / 8][k] |= level[k] << 2 * (position[i][k] % 8);
    }
    constexpr bool kHalves = T::kSub == 16;
    const I shift = select(flip, (kHalves ? 3 : 1) - best.shift, best.shift);
    for (int g = 0; g < T::kGroups; ++g) fit.down[g] = -(kHalves && g == 0 ? shift >> 1 & 1 : shift & 1);

    alignas(64) float x_rows[W][T::kSub], w_rows[W][T::kSub];
    store_rows(x, x_rows);
    store_rows(w, w_rows);
    I moved = splat(0);
    for (int g = 0; g < T::kGroups; ++g) {
        fit.code[g] = code[g];
        for (int k = 0; k < W; ++k) {
            const int32_t place = lattice.place[code[g][k]];
            if (place < 0)
                fit.code[g][k] = best_neighbour<T>(lattice.lists + ~place, x_rows[k] + 8 * g, w_rows[k] + 8 * g,
                                                   fit.scale[k], fit.down[g][k] ? kDown : kUp);
        }
        moved |= fit.code[g] != code[g];
    }
    F sum_qx = zero, sum_qq = zero;
    for (int i = 0; i < T::kSub; ++i) {
        const F wq = w[i] * shifted_value<T>(fit.code[i / 8], fit.down[i / 8], i % 8);
        sum_qx += wq * x[i];
        sum_qq += wq * shifted_value<T>(fit.code[i / 8], fit.down[i / 8], i % 8);
    }
    fit.scale = select(moved & (sum_qx > zero) & (sum_qq > zero), sum_qx / sum_qq, fit.scale);
    fit.scale = select(fit.dead, zero, fit.scale);
}

// The contents of W blocks: `down` is 0 or 1 for each group.
template <class T>
struct TernaryBlock {
    I index[32], down[32], scale[T::kSubs], d;
};

// IQ1_M: least-squares d for the levels, shifts and scales of whole blocks.
LANE_FN F refit(const F* x, const F* w, const I* code, const TernaryBlock<Iq1M>& block, F d) {
    F sum_qx = splat(0.0f), sum_qq = splat(0.0f);
    for (int i = 0; i < 256; ++i) {
        const F step = to_float(2 * block.scale[i / 16] + 1);
        const F q = shifted_value<Iq1M>(code[i / 8], -block.down[i / 8], i % 8) * step, wq = w[i] * q;
        sum_qx += wq * x[i];
        sum_qq += wq * q;
    }
    return select(sum_qq > splat(0.0f), sum_qx / sum_qq, d);
}
LANE_FN F refit(const F*, const F*, const I*, const TernaryBlock<Iq1S>&, F d) { return d; }

template <class T>
LANE_FN void ternary_block(const Group& group, const Lattice& lattice, TernaryBlock<T>& block) {
    alignas(64) F x[256], w[256];
    load_elements<256>(group.x, 0, x);
    if (group.weights[0]) load_elements<256>(group.weights, 0, w);
    const F mean = 2.0f * sum_of_squares(x) / 256.0f;
    for (int i = 0; i < 256; ++i) {
        const F square = x[i] * x[i];
        w[i] = group.weights[0] ? w[i] * sqrt(mean + square) : square;
    }
    F scale[T::kSubs], top = splat(0.0f);
    I code[32];
    for (int j = 0; j < T::kSubs; ++j) {
        Ternary<T> fit;
        fit_ternary<T>(lattice, x + j * T::kSub, w + j * T::kSub, fit);
        for (int g = 0; g < T::kGroups; ++g) {
            const int at = j * T::kGroups + g;
            block.index[at] = index_of(lattice, fit.code[g]) & ~fit.dead;
            code[at] = fit.code[g] & ~fit.dead;  // point 0 has code 0
            block.down[at] = -(fit.down[g] & ~fit.dead);
        }
        scale[j] = fit.scale;
        top = max_of(top, scale[j]);
    }
    const F zero = splat(0.0f), d = top / 15.0f, inverse = splat(1.0f) / d;
    const I empty = top == zero;
    for (I& down : block.down) down &= ~empty;
    for (int j = 0; j < T::kSubs; ++j) block.scale[j] = scale_code(inverse, scale[j], 7) & ~empty;
    block.d = half_bits(select(empty, zero, refit(x, w, code, block, d) * T::kFudge));
}

void quantize_iq1_s(const float* x, int64_t nrows, int64_t ncols, const float* weights, uint8_t* dst) {
    const Lattice& points = lattice(LatticeName::iq1);
    each_group<256, 50>(x, nrows, ncols, weights, dst, [&](const Group& group) {
        TernaryBlock<Iq1S> block;
        ternary_block(group, points, block);
        I words[12], high[8];
        pack_words<8, 8>(block.index, words);
        for (int j = 0; j < 8; ++j) {
            high[j] = block.scale[j] << 12 | block.down[4 * j] << 15;
            for (int g = 0; g < 4; ++g) high[j] |= block.index[4 * j + g] >> 8 << 3 * g;
        }
        pack_words<16, 4>(high, words + 8);
        store_halfword(group.dst, 0, block.d);
        store_words<12>(group.dst, 2, words);
    });
}

// d goes into the top nibbles of the four halfwords that hold the scales.
void quantize_iq1_m(const float* x, int64_t nrows, int64_t ncols, const float* weights, uint8_t* dst) {
    const Lattice& points = lattice(LatticeName::iq1);
    each_group<256, 56>(x, nrows, ncols, weights, dst, [&](const Group& group) {
        TernaryBlock<Iq1M> block;
        ternary_block(group, points, block);
        I words[14], scales[4];
        pack_words<8, 8>(block.index, words);
        for (int g = 0; g < 32; ++g) block.index[g] = block.index[g] >> 8 | block.down[g] << 3;
        pack_words<4, 4>(block.index, words + 8);
        for (int j = 0; j < 4; ++j) {
            scales[j] = (block.d >> 4 * j & 15) << 12;
            for (int k = 0; k < 4; ++k) scales[j] |= block.scale[4 * j + k] << 3 * k;
        }
        pack_words<16, 2>(scales, words + 12);
        store_words<14>(group.dst, 0, words);
    });
}

// ---- dequantisation ----

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
