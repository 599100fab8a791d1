// GPTQ's sweep over a stretch of columns: each is rounded, its error spreads over those to come. And coordinate descent over codes that
// are there already (`old`): w is then the error times the Hessian, `upper` the Hessian, `error` the change of the values.
//
// Specification: lconvert.primitives.sweep.in_torch. A lane is a row, so every row sees the same operations in the same order whatever the
// width of vectors: results do not depend on the instruction set.
#pragma once
#include "rounding.h"

namespace lconvert::LCONVERT_ISA {
namespace {

constexpr int kStretch = 256;  // columns at most

// Where a value comes among levels; of integers the nearest one, not clamped.
LANE_FN F position_of(F v, const Levels& t) {
    if (!t.values) {
        v = clamp(v, -kBound, kBound);
        return (v + kRound) - kRound;
    }
    F at{};
    for (int i = 0; i + 1 < t.count; ++i) at += select(v >= splat(t.midpoints[i]), splat(1.0f), F{});
    return at;
}

// One side of every column's group for W rows from `row` on; rows beyond the last repeat it.
LANE_FN F side(const float* values, int64_t groups, int64_t row, int64_t rows, int32_t group) {
    float found[W];
    for (int k = 0; k < W; ++k) found[k] = values[(row + k < rows ? row + k : rows - 1) * groups + group];
    return load(found);
}

// One column of a matrix for the same rows.
LANE_FN F column(const float* x, int cols, int64_t row, int live, int i) {
    float found[W];
    for (int k = 0; k < W; ++k) found[k] = x[(row + (k < live ? k : live - 1)) * cols + i];
    return load(found);
}

// Whether the values of one column are kept, not pruned.
LANE_FN I kept(const uint8_t* mask, int cols, int64_t row, int live, int i) {
    int32_t found[W];
    for (int k = 0; k < W; ++k) found[k] = mask[(row + (k < live ? k : live - 1)) * cols + i] ? -1 : 0;
    I v;
    __builtin_memcpy(&v, found, sizeof v);
    return v;
}

void sweep_rows(const Sweep& s, int64_t first, int64_t last) {
    float tile[kStretch][W];
    const int n = s.cols;
    const Levels& t = s.levels;
    const F top = splat((float)(t.count - 1));
    for (int64_t row = first; row < last; row += W) {
        const int live = last - row < W ? (int)(last - row) : W;
        for (int k = 0; k < W; ++k) {
            const float* from = s.w + (row + (k < live ? k : live - 1)) * n;
            for (int i = 0; i < n; ++i) tile[i][k] = from[i];
        }
        for (int i = 0; i < n; ++i) {
            const F diagonal = splat(s.upper[i * n + i]), old = s.old ? column(s.old, n, row, live, i) : F{};
            const F x = s.old ? old + load(tile[i]) / diagonal : load(tile[i]);
            const F scale = side(s.scale, s.groups, row, s.rows, s.group[i]);
            const F zero = s.zero ? side(s.zero, s.groups, row, s.rows, s.group[i]) : F{};
            const F offset = s.offset ? side(s.offset, s.groups, row, s.rows, s.group[i]) : F{};
            const I none = scale == F{};
            F y = s.offset ? x + offset : x;
            y = select(none, F{}, y / select(none, splat(1.0f), scale));
            if (s.kept) y = select(kept(s.kept, n, row, live, i), y, F{});
            F at = position_of(y, t), q;
            if (t.values) {
                float places[W], worth[W];
                store(places, at);
                for (int k = 0; k < W; ++k) worth[k] = t.values[(int)places[k]];
                q = load(worth);
            } else {
                q = min_of(splat(t.low) + top, max_of(splat(t.low), s.zero ? at + zero : at));
                at = q - t.low;
            }
            if (s.zero) q = q - zero;
            q = q * scale;
            if (s.offset) q = q - offset;
            const F e = s.old ? q - old : (x - q) / diagonal;
            float places[W], errors[W];
            store(places, at);
            store(errors, e);
            for (int k = 0; k < live; ++k) {
                s.position[(row + k) * n + i] = (uint8_t)places[k];
                s.error[(row + k) * n + i] = errors[k];
            }
            const float* spread = s.upper + i * n;
            for (int j = i + 1; j < n; ++j) store(tile[j], load(tile[j]) - e * spread[j]);
        }
    }
}

}  // namespace
}  // namespace lconvert::LCONVERT_ISA
