// Python bindings of the search for scales (trials.h): checks that arrays fit, then works without the GIL.
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
using Table = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

template <class A>
void has(const A& a, size_t rows, size_t cols) {
    if (a.shape(0) != rows || a.shape(1) != cols) throw std::invalid_argument("arrays differ in shape");
}

void try_scales(const std::string& isa, const Floats& x, const Floats& h, float low, int count, const std::optional<Table>& values,
                const std::optional<Table>& midpoints, const Floats& scale, const std::optional<Floats>& offset, const FloatsOut& error,
                const std::optional<FloatsOut>& sums) {
    const size_t groups = x.shape(0), candidates = scale.shape(0);
    has(h, groups, x.shape(1));
    has(scale, candidates, groups);
    has(error, candidates, groups);
    if (offset) has(*offset, candidates, groups);
    if (sums) has(*sums, 3, groups);
    if (candidates < 1 || (sums && candidates != 1)) throw std::invalid_argument("too many candidates");
    if (count < 2 || values.has_value() != midpoints.has_value() || (values && values->shape(0) != (size_t)count) ||
        (midpoints && midpoints->shape(0) + 1 != (size_t)count))
        throw std::invalid_argument("levels do not fit");
    const auto data = [](const auto& a) { return a ? a->data() : nullptr; };
    const lconvert::Trials job = {x.data(), h.data(), {low, count, data(values), data(midpoints)}, scale.data(), data(offset),
                                  error.data(), data(sums), (int64_t)groups, (int64_t)x.shape(1), (int)candidates};
    const lconvert::Isa& found = lconvert::find_isa(isa);
    nb::gil_scoped_release unlocked;
    found.try_scales(job, 0, (int64_t)groups);
}

}  // namespace

void bind_trials(nb::module_& m) {
    m.def("try_scales", &try_scales, nb::arg("isa"), nb::arg("x"), nb::arg("h"), nb::arg("low"), nb::arg("count"),
          nb::arg("values").none(), nb::arg("midpoints").none(), nb::arg("scale"), nb::arg("offset").none(), nb::arg("error"),
          nb::arg("sums").none(), "Fills error (candidates, groups), and for one candidate sums (3, groups), of x (groups, size).");
}
