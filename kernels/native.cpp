// The Python module lconvert.kernels._native: picks an instruction set, feeds its kernels cache-sized chunks of rows.
//
// kernels/__init__.py validates shapes and sizes before it calls in here, and words the errors; no other caller exists.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cfenv>
#include <cstring>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "native.h"
#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace nb = nanobind;

void bind_packing(nb::module_& m);  // packing.cpp
void bind_rounding(nb::module_& m);   // rounding.cpp
void bind_sweep(nb::module_& m);      // sweep.cpp
void bind_trials(nb::module_& m);     // trials.cpp
void bind_transpose(nb::module_& m);  // transpose.cpp

namespace {

using lconvert::Isa;
using lconvert::Kernel;
using lconvert::find_isa;

using Source = nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu>;
using Weights = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Bytes = nb::ndarray<uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using ConstBytes = nb::ndarray<const uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

// Values per chunk: half a megabyte of floats, which stays in the second-level cache between check and quantisation.
constexpr int64_t kChunk = 1 << 17;

bool cpu_has_f16c() {
#if defined(__x86_64__)
    unsigned eax, ebx, ecx = 0, edx;
    return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
#else
    return false;
#endif
}

bool cpu_has_avx2() {
#if defined(__x86_64__)
    return __builtin_cpu_supports("avx2") && cpu_has_f16c();
#else
    return false;
#endif
}

bool cpu_has_avx512() {
#if defined(__x86_64__)
    return cpu_has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
    return false;
#endif
}

struct NamedIsa {
    std::string name;
    const Isa* isa;
};

// Runnable on this machine, widest last.
const std::vector<NamedIsa>& runnable() {
    static const std::vector<NamedIsa> list = [] {
        std::vector<NamedIsa> found;
        if (const Isa* isa = lconvert::isa_baseline()) found.push_back({"baseline", isa});
        if (const Isa* isa = lconvert::isa_neon()) found.push_back({"neon", isa});
        if (const Isa* isa = lconvert::isa_avx2(); isa && cpu_has_avx2()) found.push_back({"avx2", isa});
        if (const Isa* isa = lconvert::isa_avx512(); isa && cpu_has_avx512()) found.push_back({"avx512", isa});
        return found;
    }();
    return list;
}

const Kernel& find_kernel(const Isa& isa, int type) {
    for (size_t i = 0; i < isa.count; ++i)
        if (isa.kernels[i].type == type) return isa.kernels[i];
    throw std::invalid_argument("no compiled kernel for ggml type " + std::to_string(type));
}

// The process may have asked for flush-to-zero or another rounding mode (torch.set_flush_denormal does); the bytes
// must not depend on it.
struct DefaultFloatEnvironment {
    std::fenv_t saved;
    DefaultFloatEnvironment() {
        std::fegetenv(&saved);
        std::fesetenv(FE_DFL_ENV);
    }
    ~DefaultFloatEnvironment() { std::fesetenv(&saved); }
};

std::vector<std::string> isas() {
    std::vector<std::string> names;
    for (const NamedIsa& named : runnable()) names.push_back(named.name);
    return names;
}

std::vector<int> types(const std::string& isa_name) {
    const Isa& isa = find_isa(isa_name);
    std::vector<int> ids;
    for (size_t i = 0; i < isa.count; ++i) ids.push_back(isa.kernels[i].type);
    return ids;
}

int64_t first_not_below(const float* x, int64_t n, uint32_t limit) {
    for (int64_t i = 0; i < n; ++i) {
        uint32_t raw;
        std::memcpy(&raw, x + i, 4);
        if ((raw & 0x7fffffffu) >= limit) return i;
    }
    return -1;
}

int64_t quantize(const std::string& isa_name, int type, const Source& x, const std::optional<Weights>& weights,
                 uint32_t limit, const Bytes& out) {
    const Isa& isa = find_isa(isa_name);
    const Kernel& kernel = find_kernel(isa, type);
    if (x.ndim() != 2 || x.shape(0) != out.shape(0)) throw std::invalid_argument("x and out differ in rows");
    const int64_t nrows = (int64_t)x.shape(0), ncols = (int64_t)x.shape(1), row_bytes = (int64_t)out.shape(1);
    if (weights && (int64_t)weights->shape(0) != ncols) throw std::invalid_argument("weights are not one per column");
    const float* importance = weights ? weights->data() : nullptr;
    const auto* half = static_cast<const uint16_t*>(x.data());
    const auto* single = static_cast<const float*>(x.data());
    auto widen = x.dtype() == nb::dtype<float>()      ? nullptr
                 : x.dtype() == nb::dtype<uint16_t>() ? isa.widen_bf16
                                                      : isa.widen_f16;
    if (widen == isa.widen_f16 && x.dtype() != nb::dlpack::dtype{(uint8_t)nb::dlpack::dtype_code::Float, 16, 1})
        throw std::invalid_argument("x is neither float32, float16 nor uint16");
    uint8_t* dst = out.data();

    nb::gil_scoped_release unlocked;
    DefaultFloatEnvironment environment;
    const int64_t step = ncols >= kChunk ? 1 : kChunk / (ncols ? ncols : 1);
    std::unique_ptr<float[]> scratch(widen ? new float[(step < nrows ? step : nrows) * ncols] : nullptr);
    for (int64_t row = 0; row < nrows; row += step) {
        const int64_t count = row + step < nrows ? step : nrows - row, offset = row * ncols;
        if (widen) widen(half + offset, count * ncols, scratch.get());
        const float* values = widen ? scratch.get() : single + offset;
        if (!isa.all_below(values, count * ncols, limit))
            return offset + first_not_below(values, count * ncols, limit);
        kernel.quantize(values, count, ncols, importance, dst + row * row_bytes);
    }
    return -1;
}

void dequantize(const std::string& isa_name, int type, const ConstBytes& blocks, const Floats& out) {
    const Kernel& kernel = find_kernel(find_isa(isa_name), type);
    if (blocks.shape(0) != out.shape(0)) throw std::invalid_argument("blocks and out differ in rows");
    const int64_t nrows = (int64_t)blocks.shape(0), ncols = (int64_t)out.shape(1);
    const int64_t row_bytes = (int64_t)blocks.shape(1);
    const uint8_t* src = blocks.data();
    float* dst = out.data();

    nb::gil_scoped_release unlocked;
    DefaultFloatEnvironment environment;
    for (int64_t row = 0; row < nrows; ++row) kernel.dequantize(src + row * row_bytes, ncols, dst + row * ncols);
}

}  // namespace

const Isa& lconvert::find_isa(const std::string& name) {
    for (const NamedIsa& named : runnable())
        if (named.name == name) return *named.isa;
    throw std::invalid_argument("instruction set " + name + " cannot run here");
}

NB_MODULE(_native, m) {
    m.def("isas", &isas, "Instruction sets that run here, widest last.");
    m.def("types", &types, nb::arg("isa"), "ggml ids with a compiled kernel.");
    m.def("quantize", &quantize, nb::arg("isa"), nb::arg("type"), nb::arg("x"), nb::arg("weights").none(),
          nb::arg("limit"), nb::arg("out"),
          "Fills out (rows, row_bytes). Returns -1, or the flat index of the first value whose magnitude bits reach "
          "`limit`.");
    m.def("dequantize", &dequantize, nb::arg("isa"), nb::arg("type"), nb::arg("blocks"), nb::arg("out"),
          "Fills out (rows, cols) with the values of blocks (rows, row_bytes).");
    bind_packing(m);
    bind_rounding(m);
    bind_sweep(m);
    bind_trials(m);
    bind_transpose(m);
}
