// Rounding to integers in groups: the two loops over all weights of round-to-nearest, with Python bindings.
//
// Specification: reference/rounding.py. Division and rounding are IEEE single precision, to nearest, ties to even, so results do
// not depend on the instruction set. Choosing scales, one number per group, stays in Python.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include <cstdint>
#include <cstring>
#include <optional>
#include <stdexcept>

namespace nb = nanobind;

namespace {

using Floats = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using FloatsOut = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Codes = nb::ndarray<int8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

// 1.5 * 2^23: adding and subtracting it rounds what is below 2^22 in magnitude to an integer, ties to even.
constexpr float kRound = 12582912.0f, kBound = 4194303.0f;

// Least and greatest value of a group; false if one is NaN or infinite.
bool extent(const float* x, int64_t n, float* low, float* high) {
    float lo = x[0], hi = x[0];
    uint32_t bad = 0;
    for (int64_t i = 0; i < n; ++i) {
        const float v = x[i];
        uint32_t bits;
        std::memcpy(&bits, &v, 4);
        bad |= (bits & 0x7f800000u) == 0x7f800000u;
        lo = v < lo ? v : lo;
        hi = v > hi ? v : hi;
    }
    *low = lo;
    *high = hi;
    return bad == 0;
}

// clamp(round(x / scale) + zero, least, most); 0 + zero where the scale is 0.
void round_group(const float* x, int64_t n, float scale, float zero, float least, float most, int8_t* codes) {
    if (!(scale > 0)) {
        const float v = zero < least ? least : (zero > most ? most : zero);
        std::memset(codes, (int)v, (size_t)n);
        return;
    }
    for (int64_t i = 0; i < n; ++i) {
        float v = x[i] / scale;
        v = v < -kBound ? -kBound : (v > kBound ? kBound : v);
        v = (v + kRound) - kRound;
        v += zero;
        v = v < least ? least : (v > most ? most : v);
        codes[i] = (int8_t)(int32_t)v;
    }
}

int64_t groups_of(int64_t cols, int64_t group, int64_t count) {
    if (group <= 0 || cols % group || cols / group != count) throw std::invalid_argument("groups do not fit");
    return count;
}

bool py_group_extent(const Floats& x, int64_t group, const FloatsOut& low, const FloatsOut& high) {
    const int64_t rows = (int64_t)x.shape(0), cols = (int64_t)x.shape(1);
    const int64_t count = groups_of(cols, group, (int64_t)low.shape(1));
    if ((int64_t)low.shape(0) != rows || low.shape(0) != high.shape(0) || low.shape(1) != high.shape(1))
        throw std::invalid_argument("x, low and high do not fit");
    const float* in = x.data();
    float *lo = low.data(), *hi = high.data();
    nb::gil_scoped_release unlocked;
    bool finite = true;
    for (int64_t g = 0; g < rows * count; ++g) finite &= extent(in + g * group, group, lo + g, hi + g);
    return finite;
}

void py_round_groups(const Floats& x, int64_t group, const Floats& scale, const std::optional<Floats>& zero, float least,
                     float most, const Codes& codes) {
    const int64_t rows = (int64_t)x.shape(0), cols = (int64_t)x.shape(1);
    const int64_t count = groups_of(cols, group, (int64_t)scale.shape(1));
    const bool good = (int64_t)scale.shape(0) == rows && codes.shape(0) == x.shape(0) && codes.shape(1) == x.shape(1) &&
                      (!zero || (zero->shape(0) == scale.shape(0) && zero->shape(1) == scale.shape(1)));
    if (!good) throw std::invalid_argument("x, scale, zero and codes do not fit");
    const float *in = x.data(), *s = scale.data(), *z = zero ? zero->data() : nullptr;
    int8_t* out = codes.data();
    nb::gil_scoped_release unlocked;
    for (int64_t g = 0; g < rows * count; ++g)
        round_group(in + g * group, group, s[g], z ? z[g] : 0.0f, least, most, out + g * group);
}

}  // namespace

void bind_rounding(nb::module_& m) {
    m.def("group_extent", &py_group_extent, nb::arg("x"), nb::arg("group"), nb::arg("low"), nb::arg("high"),
          "Fills low and high (rows, groups). False if a value is NaN or infinite.");
    m.def("round_groups", &py_round_groups, nb::arg("x"), nb::arg("group"), nb::arg("scale"), nb::arg("zero").none(),
          nb::arg("least"), nb::arg("most"), nb::arg("codes"), "Fills codes (rows, cols).");
}
