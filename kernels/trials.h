// What rounding groups with given scales and offsets would cost, for several candidates at once, and the sums of which their least-squares
// scales are made.
//
// Specification: lconvert.primitives.trials.in_torch, but for the order of sums: kAcross partial sums, the values of a group dealt out to them
// in turn, then halves added to halves. That is the same whatever the width of vectors, so results do not depend on the instruction set.
#pragma once
#include <vector>

#include "sweep.h"

namespace lconvert::LCONVERT_ISA {
namespace {

constexpr int kAcross = 16;          // partial sums
constexpr int kVectors = kAcross / W;  // that hold them
static_assert(kAcross % W == 0, "wider vectors need more partial sums");

// The level nearest to v.
LANE_FN F nearest_level(F v, const Levels& t) {
    if (!t.values) {
        v = clamp(v, -kBound, kBound);
        return min_of(splat(t.low + (float)(t.count - 1)), max_of(splat(t.low), (v + kRound) - kRound));
    }
    F at = splat(t.values[0]);
    for (int i = 0; i + 1 < t.count; ++i) at = select(v >= splat(t.midpoints[i]), splat(t.values[i + 1]), at);
    return at;
}

// Partial sums added up.
struct Sum {
    F part[kVectors] = {};
    float whole() const {
        float all[kAcross];
        for (int j = 0; j < kVectors; ++j) store(all + j * W, part[j]);
        for (int half = kAcross / 2; half > 0; half /= 2)
            for (int k = 0; k < half; ++k) all[k] += all[k + half];
        return all[0];
    }
};

// Values of one group, padded to a multiple of kAcross by values that weigh nothing.
LANE_FN const float* padded(const float* from, int64_t size, int64_t whole, std::vector<float>& room) {
    if (size == whole) return from;
    room.assign((size_t)whole, 0.0f);
    __builtin_memcpy(room.data(), from, (size_t)size * sizeof(float));
    return room.data();
}

template <bool kSums>
void try_group(const Trials& t, const float* x, const float* h, int64_t size, int64_t group) {
    for (int c = 0; c < t.candidates; ++c) {
        const int64_t at = c * t.groups + group;
        const bool none = t.scale[at] == 0.0f;
        const F scale = splat(t.scale[at]), inverse = splat(none ? 0.0f : 1.0f / t.scale[at]), offset = splat(t.offset ? t.offset[at] : 0.0f);
        Sum error, qq, q1, qx;
        for (int64_t a = 0; a < size; a += kAcross)
            for (int j = 0; j < kVectors; ++j) {
                const F v = load(x + a + j * W), weight = load(h + a + j * W);
                const F q = nearest_level((v + offset) * inverse, t.levels);
                const F d = v - (q * scale - offset);
                error.part[j] += d * d * weight;
                if (kSums) {
                    qq.part[j] += weight * q * q;
                    q1.part[j] += weight * q;
                    qx.part[j] += weight * q * v;
                }
            }
        t.error[at] = error.whole();
        if (kSums) {
            t.sums[group] = qq.whole();
            t.sums[t.groups + group] = q1.whole();
            t.sums[2 * t.groups + group] = qx.whole();
        }
    }
}

void try_scales(const Trials& t, int64_t first, int64_t last) {
    const int64_t whole = (t.size + kAcross - 1) / kAcross * kAcross;
    std::vector<float> values, weights;
    for (int64_t group = first; group < last; ++group) {
        const float* x = padded(t.x + group * t.size, t.size, whole, values);
        const float* h = padded(t.h + group * t.size, t.size, whole, weights);
        if (t.sums)
            try_group<true>(t, x, h, whole, group);
        else
            try_group<false>(t, x, h, whole, group);
    }
}

}  // namespace
}  // namespace lconvert::LCONVERT_ISA
