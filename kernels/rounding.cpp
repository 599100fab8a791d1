// Python bindings of rounding in groups (rounding.h): checks that arrays fit, then works without the GIL.
//
// kernels/rounding.py words the errors for users. Arrays in a storage type are widened in chunks that stay in the cache.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <stdexcept>
#include <utility>

#include "native.h"

namespace nb = nanobind;

namespace {

using lconvert::find_isa;
using lconvert::Isa;

using Source = nb::ndarray<nb::ro, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using FloatsOut = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Codes = nb::ndarray<const uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using CodesOut = nb::ndarray<int8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using BytesOut = nb::ndarray<uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

// Values per chunk: 128 KiB of floats, which stays in the second-level cache beside codes.
constexpr int64_t kChunk = 1 << 15;

template <class A, class B>
void same_shape(const A& a, const B& b) {
    if (a.shape(0) != b.shape(0) || a.shape(1) != b.shape(1)) throw std::invalid_argument("arrays differ in shape");
}

// Groups of a row, which must be as many as `sides` has columns.
template <class A, class B>
int64_t groups(const A& x, int64_t group, const B& sides) {
    const int64_t cols = (int64_t)x.shape(1);
    if (group <= 0 || cols % group || cols / group != (int64_t)sides.shape(1) || x.shape(0) != sides.shape(0))
        throw std::invalid_argument("groups do not fit");
    return (int64_t)x.shape(0) * (cols / group);
}

// A storage type's values as floats: of uint16 they are bfloat16.
class Widened {
   public:
    Widened(const Isa& isa, const Source& x) : data_(x.data()) {
        if (x.dtype() == nb::dtype<uint16_t>())
            widen_ = isa.widen_bf16;
        else if (x.dtype() == nb::dlpack::dtype{(uint8_t)nb::dlpack::dtype_code::Float, 16, 1})
            widen_ = isa.widen_f16;
        else if (x.dtype() != nb::dtype<float>())
            throw std::invalid_argument("x is neither float32, float16 nor uint16");
    }
    // n values from `start` on, until the next call.
    const float* read(int64_t start, int64_t n) {
        if (!widen_) return static_cast<const float*>(data_) + start;
        if (size_ < n) scratch_.reset(new float[size_ = n]);
        widen_(static_cast<const uint16_t*>(data_) + start, n, scratch_.get());
        return scratch_.get();
    }

   private:
    const void* data_;
    void (*widen_)(const uint16_t*, int64_t, float*) = nullptr;
    std::unique_ptr<float[]> scratch_;
    int64_t size_ = 0;
};

bool group_extent(const std::string& isa, const Floats& x, int64_t group, const FloatsOut& low, const FloatsOut& high) {
    const lconvert::Rounding& kernel = find_isa(isa).rounding;
    const int64_t count = groups(x, group, low);
    same_shape(low, high);
    const float* in = x.data();
    float *lo = low.data(), *hi = high.data();
    nb::gil_scoped_release unlocked;
    return kernel.extents(in, count, group, lo, hi);
}

void round_groups(const std::string& isa, const Floats& x, int64_t group, const Floats& scale,
                  const std::optional<Floats>& zero, float least, float most, const CodesOut& codes) {
    const lconvert::Rounding& kernel = find_isa(isa).rounding;
    const int64_t count = groups(x, group, scale);
    same_shape(x, codes);
    if (zero) same_shape(scale, *zero);
    const float *in = x.data(), *s = scale.data(), *z = zero ? zero->data() : nullptr;
    int8_t* out = codes.data();
    nb::gil_scoped_release unlocked;
    kernel.round(in, count, group, s, z, least, most, out);
}

bool nearest_groups(const std::string& name, const Source& x, int64_t group, int bits, bool signed_max, const CodesOut& codes,
                    const FloatsOut& scale, const std::optional<BytesOut>& zero) {
    const Isa& isa = find_isa(name);
    const int64_t count = groups(x, group, scale);
    same_shape(x, codes);
    if (zero) same_shape(scale, *zero);
    if (bits < 2 || bits > 8) throw std::invalid_argument("bits must be 2 to 8");
    Widened values(isa, x);
    int8_t* out = codes.data();
    float* s = scale.data();
    uint8_t* z = zero ? zero->data() : nullptr;
    nb::gil_scoped_release unlocked;
    const int64_t step = group < kChunk ? kChunk / group : 1;
    bool finite = true;
    for (int64_t g = 0; g < count; g += step) {
        const int64_t n = count - g < step ? count - g : step;
        const float* in = values.read(g * group, n * group);
        finite &= isa.rounding.nearest(in, n, group, bits, signed_max, out + g * group, s + g, z ? z + g : nullptr);
    }
    return finite;
}

void group_values(const std::string& isa, const Codes& codes, bool is_signed, int64_t group, const Floats& scale,
                  const std::optional<Floats>& zero, const FloatsOut& out) {
    const lconvert::Rounding& kernel = find_isa(isa).rounding;
    const int64_t count = groups(codes, group, scale);
    same_shape(codes, out);
    if (zero) same_shape(scale, *zero);
    const uint8_t* in = codes.data();
    const float *s = scale.data(), *z = zero ? zero->data() : nullptr;
    float* to = out.data();
    nb::gil_scoped_release unlocked;
    kernel.values(in, is_signed, count, group, s, z, to);
}

std::pair<double, double> squares(const std::string& name, const Source& x, const Floats& y) {
    const Isa& isa = find_isa(name);
    same_shape(x, y);
    Widened values(isa, x);
    const float* other = y.data();
    const int64_t total = (int64_t)x.shape(0) * (int64_t)x.shape(1);
    nb::gil_scoped_release unlocked;
    double sums[16] = {};
    for (int64_t at = 0; at < total; at += kChunk) {
        const int64_t n = total - at < kChunk ? total - at : kChunk;
        isa.rounding.add_squares(values.read(at, n), other + at, n, sums);
    }
    double error = 0, norm = 0;
    for (int k = 0; k < 8; ++k) error += sums[k], norm += sums[8 + k];
    return {error, norm};
}

}  // namespace

void bind_rounding(nb::module_& m) {
    m.def("group_extent", &group_extent, nb::arg("isa"), nb::arg("x"), nb::arg("group"), nb::arg("low"), nb::arg("high"),
          "Least and greatest value of every group; False if there is a NaN or an infinity.");
    m.def("round_groups", &round_groups, nb::arg("isa"), nb::arg("x"), nb::arg("group"), nb::arg("scale"),
          nb::arg("zero").none(), nb::arg("least"), nb::arg("most"), nb::arg("codes"),
          "codes = clamp(round(x / scale) + zero, least, most).");
    m.def("nearest_groups", &nearest_groups, nb::arg("isa"), nb::arg("x"), nb::arg("group"), nb::arg("bits"),
          nb::arg("signed_max"), nb::arg("codes"), nb::arg("scale"), nb::arg("zero").none(),
          "Scales by the extent of a group, zero points where there is room for them, and codes; False if there is a NaN or an "
          "infinity.");
    m.def("group_values", &group_values, nb::arg("isa"), nb::arg("codes"), nb::arg("is_signed"), nb::arg("group"),
          nb::arg("scale"), nb::arg("zero").none(), nb::arg("out"), "out = (codes - zero) * scale.");
    m.def("squares", &squares, nb::arg("isa"), nb::arg("x"), nb::arg("y"), "Sums of (x - y)^2 and of x^2.");
}
