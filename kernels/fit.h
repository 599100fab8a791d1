// Searches for the scale (and minimum) of W sub-blocks at once, one per lane.
//
// Each follows one routine of ggml-quants.c operation by operation; the comments name it. Sums run over the values of
// a sub-block from left to right and products associate to the left, as there. Codes are float lanes that hold
// integers. A comparison with NaN (absurd scales) is false, as there.
#pragma once
#include "simd.h"

namespace lconvert::LCONVERT_ISA {
namespace {

constexpr float kNothing = 1e-15f;  // sub-blocks below are all zero (GROUP_MAX_EPS)

// x ~ scale * l + min with l = clamp(nearest(iscale * (x - base)), 0, nmax).
struct Affine {
    F scale, min, iscale, base;
};

template <int NMax>
LANE_FN F affine_code(const Affine& fit, F x) {
    return clamp(nearest(fit.iscale * (x - fit.base)), 0, NMax);
}

// What the search of one sub-block carries from candidate to candidate.
struct AffineSearch {
    F low, high, sum_w, sum_x, error;
    Affine best;
};

template <int N>
LANE_FN AffineSearch start_affine(const F* x, const F* w) {
    AffineSearch search;
    search.low = search.high = x[0];
    search.sum_w = w[0];
    search.sum_x = w[0] * x[0];
    for (int i = 1; i < N; ++i) {
        search.low = min_of(x[i], search.low);
        search.high = max_of(x[i], search.high);
        search.sum_w += w[i];
        search.sum_x += w[i] * x[i];
    }
    search.low = select(search.low > splat(0.0f), splat(0.0f), search.low);
    search.best.min = search.low;
    return search;
}

// The weighted least squares scale and minimum for given codes; a positive minimum is replaced by zero.
LANE_FN I refit_affine(const AffineSearch& search, F sum_l, F sum_l2, F sum_xl, Affine& fit) {
    const F zero = splat(0.0f);
    const F det = search.sum_w * sum_l2 - sum_l * sum_l;
    fit.scale = (search.sum_w * sum_xl - search.sum_x * sum_l) / det;
    fit.min = (sum_l2 * search.sum_x - sum_l * sum_xl) / det;
    const I positive = fit.min > zero;
    fit.min = select(positive, zero, fit.min);
    fit.scale = select(positive, sum_xl / sum_l2, fit.scale);
    return det > zero;
}

// make_qkx2_quants and make_qkx3_quants with weights, for U consecutive sub-blocks: tries Steps + 1 inverse scales,
// refits scale and minimum for each and keeps the best. A winner's minimum is the base of the candidates after it.
// The sub-blocks are independent; working on two at a time fills the gaps that the chains of additions leave.
template <int U, int N, int NMax, int Steps, bool Absolute>
LANE_FN void fit_affine(const F* x, const F* w, float rmin, float rdelta, Affine* result) {
    const F zero = splat(0.0f);
    AffineSearch search[U];
    for (int u = 0; u < U; ++u) search[u] = start_affine<N>(x + u * N, w + u * N);

    for (int step = -1; step <= Steps; ++step) {  // -1: the range itself, without refit
        const bool first = step < 0;
        const float levels = first ? NMax : rmin + rdelta * step + NMax;
        Affine fit[U];
        F sum_l[U], sum_l2[U], sum_xl[U], error[U], code[U * N];
        I valid[U];
        for (int u = 0; u < U; ++u) {
            fit[u].base = search[u].best.min;
            fit[u].iscale = splat(levels) / (search[u].high - fit[u].base);
            sum_l[u] = sum_l2[u] = sum_xl[u] = error[u] = zero;
        }
        for (int i = 0; i < N; ++i)
            for (int u = 0; u < U; ++u) {
                const int at = u * N + i;
                const F l = affine_code<NMax>(fit[u], x[at]);
                const F wl = w[at] * l;
                code[at] = l;
                sum_l[u] += wl;
                sum_l2[u] += wl * l;
                sum_xl[u] += wl * x[at];
            }
        for (int u = 0; u < U; ++u) {
            if (first) {
                fit[u].scale = splat(1.0f) / fit[u].iscale;
                fit[u].min = fit[u].base;
            } else {
                valid[u] = refit_affine(search[u], sum_l[u], sum_l2[u], sum_xl[u], fit[u]);
            }
        }
        for (int i = 0; i < N; ++i)
            for (int u = 0; u < U; ++u) {
                const int at = u * N + i;
                const F diff = fit[u].scale * code[at] + fit[u].min - x[at];
                error[u] += w[at] * (Absolute ? abs(diff) : diff * diff);
            }
        for (int u = 0; u < U; ++u) {
            AffineSearch& s = search[u];
            const I better = first ? splat(-1) : valid[u] & (error[u] < s.error);
            s.error = select(better, error[u], s.error);
            s.best.scale = select(better, fit[u].scale, s.best.scale);
            s.best.min = select(better, fit[u].min, s.best.min);
            s.best.iscale = select(better, fit[u].iscale, s.best.iscale);
            s.best.base = select(better, fit[u].base, s.best.base);
        }
    }
    for (int u = 0; u < U; ++u) {
        const I constant = search[u].high == search[u].low;
        result[u] = search[u].best;
        result[u].scale = select(constant, zero, result[u].scale);
        result[u].min = select(constant, search[u].low, result[u].min);
        result[u].iscale = select(constant, zero, result[u].iscale);
    }
}

template <int N, int NMax, int Steps, bool Absolute>
LANE_FN Affine fit_affine(const F* x, const F* w, float rmin, float rdelta) {
    Affine result;
    fit_affine<1, N, NMax, Steps, Absolute>(x, w, rmin, rdelta, &result);
    return result;
}

// x ~ scale * (l - nmax) with l = nmax + clamp(nearest(iscale * x), -nmax, nmax - 1), or l = 0 where `empty`.
struct Symmetric {
    F scale, iscale;
    I empty;
};

template <int NMax>
LANE_FN I symmetric_code(const Symmetric& fit, F x) {
    const I code = to_int(clamp(nearest(fit.iscale * x), -NMax, NMax - 1)) + NMax;
    return select(fit.empty, splat(0), code);
}

// The value of largest magnitude, the first of several.
template <int N>
LANE_FN F extreme(const F* x, F& magnitude) {
    F top = splat(0.0f);
    magnitude = splat(0.0f);
    for (int i = 0; i < N; ++i) {
        top = select(abs(x[i]) > magnitude, x[i], top);
        magnitude = max_of(abs(x[i]), magnitude);
    }
    return top;
}

// make_qx_quants with rmse_type 1 and weights: 19 inverse scales around -nmax / extreme, least squares for each.
template <int N, int NMax>
LANE_FN Symmetric fit_symmetric(const F* x, const F* w) {
    const F zero = splat(0.0f);
    F magnitude;
    const F top = extreme<N>(x, magnitude);
    F wx[N];
    for (int i = 0; i < N; ++i) wx[i] = w[i] * x[i];

    Symmetric best;
    best.empty = magnitude < splat(kNothing);
    best.iscale = splat((float)-NMax) / top;
    F best_gain = zero;
    for (int step = 0; step < 19; ++step) {
        const int is = step == 0 ? 0 : step <= 9 ? step - 10 : step - 9;  // the middle first, then -9..-1, 1..9
        const F iscale = -splat(NMax + 0.1f * is) / top;
        F sum_lx = zero, sum_l2 = zero;
        for (int i = 0; i < N; ++i) {
            const F l = clamp(nearest(iscale * x[i]), -NMax, NMax - 1);
            sum_lx += wx[i] * l;
            sum_l2 += w[i] * l * l;
        }
        const F scale = sum_lx / sum_l2;
        if (step == 0) {
            best.scale = select(sum_l2 != zero, scale, zero);
            best_gain = best.scale * sum_lx;
        } else {
            const I better = (sum_l2 > zero) & (sum_lx * sum_lx > best_gain * sum_l2);
            best.scale = select(better, scale, best.scale);
            best.iscale = select(better, iscale, best.iscale);
            best_gain = select(better, scale * sum_lx, best_gain);
        }
    }
    best.scale = select(best.empty, zero, best.scale);
    return best;
}

// The state of a coordinate descent on one sub-block: its codes are elsewhere.
struct Descent {
    F sum_lx, sum_l2;
};

// Coordinate descent of make_q3_quants and make_qp_quants on U sub-blocks: moves one code at a time while the fit
// improves, at most five passes. A pass without change ends it; for lanes that are done already, another pass changes
// nothing. clip bounds a new code, wrap is what a code becomes when it is stored.
template <int U, int N, bool CheckBefore, class Clip, class Wrap>
LANE_FN void descend(const F* x, const F* w, F* code, Descent* state, Clip clip, Wrap wrap) {
    const F zero = splat(0.0f);
    for (int pass = 0; pass < 5; ++pass) {
        I changed = splat(0);
        for (int i = 0; i < N; ++i)
            for (int u = 0; u < U; ++u) {
                const int at = u * N + i;
                const F wx = w[at] * x[at];
                F lx = state[u].sum_lx - wx * code[at];
                F l2 = state[u].sum_l2 - w[at] * code[at] * code[at];
                I better = lx > zero;
                if (CheckBefore) better &= l2 > zero;
                const F l = clip(nearest(x[at] * l2 / lx));
                better &= l != code[at];
                lx += wx * l;
                l2 += w[at] * l * l;
                if (!CheckBefore) better &= l2 > zero;
                better &= lx * lx * state[u].sum_l2 > state[u].sum_lx * state[u].sum_lx * l2;
                code[at] = select(better, wrap(l), code[at]);
                state[u].sum_lx = select(better, lx, state[u].sum_lx);
                state[u].sum_l2 = select(better, l2, state[u].sum_l2);
                changed |= better;
            }
        if (!any(changed)) break;
    }
}

LANE_FN F descent_scale(const Descent& state) {
    return select(state.sum_l2 > splat(0.0f), state.sum_lx / state.sum_l2, splat(0.0f));
}

// make_q3_quants with do_rmse, for U consecutive sub-blocks: x ~ scale * (code - nmax); an empty sub-block has scale
// and codes 0.
template <int U, int N, int NMax>
LANE_FN void fit_descent(const F* x, F* code, F* scale) {
    const F zero = splat(0.0f);
    F w[U * N];
    Descent state[U];
    I empty[U];
    for (int u = 0; u < U; ++u) {
        F magnitude;
        const F top = extreme<N>(x + u * N, magnitude);
        empty[u] = magnitude < splat(kNothing);
        const F iscale = splat((float)-NMax) / top;
        state[u].sum_lx = state[u].sum_l2 = zero;
        for (int at = u * N; at < u * N + N; ++at) {
            w[at] = x[at] * x[at];
            const F l = clamp(nearest(iscale * x[at]), -NMax, NMax - 1);
            code[at] = l;
            state[u].sum_lx += w[at] * x[at] * l;
            state[u].sum_l2 += w[at] * l * l;
        }
    }
    descend<U, N, false>(
        x, w, code, state, [](F l) { return clamp(l, -NMax, NMax - 1); }, [](F l) { return l; });
    for (int u = 0; u < U; ++u) {
        scale[u] = select(empty[u], zero, descent_scale(state[u]));
        for (int at = u * N; at < u * N + N; ++at) code[at] = select(empty[u], zero, code[at] + (float)NMax);
    }
}

// A code as the reference stores it in a byte: modulo 256. Negative ones occur where a sub-scale is negative.
LANE_FN F wrap_byte(F l) { return to_float(to_int(l) & 255); }

// make_qp_quants: x ~ scale * level with non-negative levels, for the sub-scales of a super-block.
template <int N, int NMax>
LANE_FN F fit_levels(const F* x, const F* w, F* level) {
    const F zero = splat(0.0f);
    F top = zero;
    for (int i = 0; i < N; ++i) top = max_of(top, x[i]);
    const I empty = top < splat(kNothing);

    F best_iscale = splat((float)NMax) / top, best_error = zero;
    const F first_scale = splat(1.0f) / best_iscale;
    for (int i = 0; i < N; ++i) {
        const F diff = x[i] - first_scale * wrap_byte(nearest(best_iscale * x[i]));
        best_error += w[i] * diff * diff;
    }
    for (int is = -4; is <= 4; ++is) {
        if (is == 0) continue;
        const F iscale = splat(0.1f * is + NMax) / top;
        const F scale = splat(1.0f) / iscale;
        F error = zero;
        for (int i = 0; i < N; ++i) {
            const F diff = x[i] - scale * min_of(splat((float)NMax), nearest(iscale * x[i]));
            error += w[i] * diff * diff;
        }
        const I better = error < best_error;
        best_error = select(better, error, best_error);
        best_iscale = select(better, iscale, best_iscale);
    }
    Descent state = {zero, zero};
    for (int i = 0; i < N; ++i) {
        const F l = min_of(splat((float)NMax), nearest(best_iscale * x[i]));
        level[i] = wrap_byte(l);
        state.sum_lx += w[i] * x[i] * l;
        state.sum_l2 += w[i] * l * l;
    }
    descend<1, N, true>(
        x, w, level, &state, [](F l) { return min_of(splat((float)NMax), l); }, wrap_byte);
    for (int i = 0; i < N; ++i) level[i] = select(empty, zero, level[i]);
    return select(empty, zero, descent_scale(state));
}

}  // namespace
}  // namespace lconvert::LCONVERT_ISA
