// Builds the lattices of IQ1, IQ2 and IQ3. Compiled once, for the plain architecture: no lanes here.
#include "iq_tables.h"

#include <iterator>
#include <vector>

namespace lconvert {
namespace {

#define GRID(name, ...) constexpr uint16_t name##_points[] = {__VA_ARGS__};
#include "iq_grids.inc"
#undef GRID

struct Spec {
    const uint16_t* points;
    int count, size, bits, levels;
    int shells;         // how many distinct distances count as near
    int8_t values[8];  // of the levels
};

// In the order of LatticeName.
constexpr Spec kSpecs[] = {
    {iq2_xxs_points, (int)std::size(iq2_xxs_points), 8, 2, 3, 2, {8, 25, 43}},
    {iq2_xs_points, (int)std::size(iq2_xs_points), 8, 2, 3, 2, {8, 25, 43}},
    {iq2_s_points, (int)std::size(iq2_s_points), 8, 2, 3, 1, {8, 25, 43}},
    {iq1_points, (int)std::size(iq1_points), 8, 2, 3, 3, {-1, 0, 1}},
    {iq3_xxs_points, (int)std::size(iq3_xxs_points), 4, 3, 8, 2, {4, 12, 20, 28, 36, 44, 52, 62}},
    {iq3_s_points, (int)std::size(iq3_s_points), 4, 3, 8, 3, {1, 3, 5, 7, 9, 11, 13, 15}},
};

struct Built {
    std::vector<int8_t> values;
    std::vector<int32_t> place;
    std::vector<uint16_t> lists;
    Lattice view;
};

int digit(const Spec& spec, int code, int k) { return code >> spec.bits * k & ((1 << spec.bits) - 1); }

// Squared distance of `code` to every point, all below 256. `digits` holds a row of points for each coordinate.
void measure(const Spec& spec, const std::vector<uint8_t>& digits, int code, std::vector<uint8_t>& distance) {
    distance.assign(spec.count, 0);
    for (int k = 0; k < spec.size; ++k) {
        const uint8_t* row = digits.data() + k * spec.count;
        const uint8_t own = (uint8_t)digit(spec, code, k);
        for (int i = 0; i < spec.count; ++i) {
            const uint8_t step = (uint8_t)(row[i] - own);
            distance[i] = (uint8_t)(distance[i] + step * step);
        }
    }
}

// The points in the nearest shells, by distance and then by index: a total order, as in the reference.
void append_near(const Spec& spec, const std::vector<uint8_t>& distance, std::vector<uint16_t>& lists) {
    bool seen[256] = {};
    for (const uint8_t d : distance) seen[d] = true;
    const size_t head = lists.size();
    lists.push_back(0);
    for (int d = 0, shells = 0; shells < spec.shells; ++d) {
        if (!seen[d]) continue;
        ++shells;
        for (int i = 0; i < spec.count; ++i)
            if (distance[i] == d) lists.push_back(spec.points[i]);
    }
    const size_t length = lists.size() - head - 1;
    lists[head] = (uint16_t)length;
    while ((lists.size() - head - 1) % kListRead) lists.push_back(lists.back());
}

Built build(const Spec& spec) {
    Built made;
    std::vector<uint8_t> digits;
    for (int k = 0; k < spec.size; ++k)
        for (int i = 0; i < spec.count; ++i) digits.push_back((uint8_t)digit(spec, spec.points[i], k));
    for (int i = 0; i < spec.count; ++i)
        for (int k = 0; k < spec.size; ++k) made.values.push_back(spec.values[digits[k * spec.count + i]]);

    std::vector<uint8_t> distance;
    const int codes = 1 << spec.size * spec.bits;
    made.place.assign(codes, 0);
    for (int code = 0, next = 0; code < codes; ++code) {
        bool occurs = true;
        for (int k = 0; k < spec.size; ++k) occurs &= digit(spec, code, k) < spec.levels;
        if (next < spec.count && spec.points[next] == code) {  // points ascend
            made.place[code] = next++;
        } else if (occurs) {
            made.place[code] = ~(int32_t)made.lists.size();
            measure(spec, digits, code, distance);
            append_near(spec, distance, made.lists);
        }
    }
    made.view = {spec.points, made.values.data(), made.place.data(), made.lists.data()};
    return made;
}

template <int Which>
const Lattice& once() {
    static const Built made = build(kSpecs[Which]);
    return made.view;
}

}  // namespace

const Lattice& lattice(LatticeName name) {
    constexpr const Lattice& (*kEach[])() = {once<0>, once<1>, once<2>, once<3>, once<4>, once<5>};
    return kEach[(int)name]();
}

}  // namespace lconvert
