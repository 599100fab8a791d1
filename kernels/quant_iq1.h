// IQ1: levels -1, 0, 1 on a lattice, shifted by an eighth up or down, 256 values to a block. A lane is a block.
//
// Follows the order of operations of ggml-quants.c (quantize_row_iq1_s_impl, quantize_row_iq1_m_impl); the
// specification is reference/iq_search.py, _ternary.
#pragma once
#include "iq_lattice.h"
#include "simd.h"

namespace lconvert::LCONVERT_ISA {
namespace {

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
        w[i] = group.weights[0] ? w[i] * sqrt(mean + square) : T::own_weight(square, mean);
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

}  // namespace
}  // namespace lconvert::LCONVERT_ISA
