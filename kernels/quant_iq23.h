// IQ2 and IQ3: magnitudes on a lattice, signs apart, 256 values to a block. A lane is a block.
//
// Follows the order of operations of ggml-quants.c (quantize_row_iq2_*_impl, quantize_row_iq3_*_impl); the
// specification is reference/iq_search.py, _scan.
#pragma once
#include "fit.h"
#include "iq_lattice.h"
#include "simd.h"

namespace lconvert::LCONVERT_ISA {
namespace {

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
};

struct Iq2Xs : Shape<8, 2, 3, 16> {
    static constexpr int kTrials = 9;
    static constexpr float kStep = 0.1f, kEnergy = 1, kNegligible = 1e-15f, kFudge = 1;
    static constexpr Refit kRefit = Refit::kOff;
    static constexpr bool kEvenSigns = true;
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
};

struct Iq3S : Shape<4, 3, 8, 32> {
    static constexpr int kTrials = 9;
    static constexpr float kStep = 0.2f, kEnergy = 2, kNegligible = 0x1p-149f, kFudge = 1.033f;
    static constexpr Refit kRefit = Refit::kAllIfOff;
    static constexpr bool kEvenSigns = false;
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

}  // namespace
}  // namespace lconvert::LCONVERT_ISA
