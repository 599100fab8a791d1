// Python bindings of GPTQ's sweep (sweep.h): checks that arrays fit, then works without the GIL.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <cstdint>
#include <optional>
#include <stdexcept>

#include "native.h"

namespace nb = nanobind;

namespace {

using Floats = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using FloatsOut = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using BytesOut = nb::ndarray<uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Mask = nb::ndarray<const uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Table = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Index = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

template <class A>
void has(const A& a, size_t rows, size_t cols) {
    if (a.shape(0) != rows || a.shape(1) != cols) throw std::invalid_argument("arrays differ in shape");
}

void sweep(const std::string& isa, const Floats& w, const Floats& upper, float low, int count, const std::optional<Table>& values,
           const std::optional<Table>& midpoints, const Floats& scale, const std::optional<Floats>& zero,
           const std::optional<Floats>& offset, const Index& group, const std::optional<Floats>& old, const std::optional<Mask>& kept,
           const BytesOut& position,
           const FloatsOut& error, int64_t first, int64_t last) {
    const size_t rows = w.shape(0), n = w.shape(1);
    if (n == 0 || n > 256 || count < 2 || count > 256) throw std::invalid_argument("too many columns or levels");
    has(upper, n, n);
    has(position, rows, n);
    has(error, rows, n);
    if (old) has(*old, rows, n);
    if (kept) has(*kept, rows, n);
    if (scale.shape(0) != rows || group.shape(0) != n) throw std::invalid_argument("groups do not fit");
    if (zero) has(*zero, rows, scale.shape(1));
    if (offset) has(*offset, rows, scale.shape(1));
    if (values.has_value() != midpoints.has_value() || (values && values->shape(0) != (size_t)count) ||
        (midpoints && midpoints->shape(0) + 1 != (size_t)count))
        throw std::invalid_argument("levels do not fit");
    for (size_t i = 0; i < n; ++i)
        if (group.data()[i] < 0 || (size_t)group.data()[i] >= scale.shape(1)) throw std::invalid_argument("no such group");
    if (first < 0 || first > last || (size_t)last > rows) throw std::invalid_argument("no such rows");
    const auto data = [](const auto& a) { return a ? a->data() : nullptr; };
    const lconvert::Sweep job = {w.data(), upper.data(), {low, count, data(values), data(midpoints)}, scale.data(), data(zero), data(offset),
                                 group.data(), data(old), data(kept), position.data(), error.data(), (int64_t)rows,
                                 (int64_t)scale.shape(1), (int)n};
    const lconvert::Isa& found = lconvert::find_isa(isa);
    nb::gil_scoped_release unlocked;
    found.sweep(job, first, last);
}

}  // namespace

void bind_sweep(nb::module_& m) {
    m.def("sweep", &sweep, nb::arg("isa"), nb::arg("w"), nb::arg("upper"), nb::arg("low"), nb::arg("count"), nb::arg("values").none(),
          nb::arg("midpoints").none(), nb::arg("scale"), nb::arg("zero").none(), nb::arg("offset").none(), nb::arg("group"),
          nb::arg("old").none(), nb::arg("kept").none(), nb::arg("position"), nb::arg("error"), nb::arg("first"), nb::arg("last"),
          "Fills rows first..last of position and error (rows, n) for w (rows, n).");
}
