// Python bindings of the packing kernels: checks that the arrays are as large as the kernels take them, then works
// without the GIL.
//
// All arrays are bytes, (rows, bytes per row). kernels/packing.py and kernels/__init__.py word the errors for users.
// What packs returns -1, or the flat index of the first code out of range.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "packing.h"
#include "packing_gguf.h"

namespace nb = nanobind;

namespace {

using namespace lconvert::packing;

using Out = nb::ndarray<uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using In = nb::ndarray<const uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

template <class Array>
int64_t rows_of(const Array& array) {
    return (int64_t)array.shape(0);
}
template <class Array>
int64_t cols_of(const Array& array) {
    return (int64_t)array.shape(1);
}

void require(bool good, const char* what) {
    if (!good) throw std::invalid_argument(what);
}

int64_t words_for(int64_t cols, int bits, bool stream) {
    return stream ? (cols * bits + 31) / 32 : (cols + 32 / bits - 1) / (32 / bits);
}

// run(std::integral_constant<int, bits>)
template <class Run>
void with_bits(int bits, Run run) {
    switch (bits) {
        case 1: return run(std::integral_constant<int, 1>());
        case 2: return run(std::integral_constant<int, 2>());
        case 3: return run(std::integral_constant<int, 3>());
        case 4: return run(std::integral_constant<int, 4>());
        case 5: return run(std::integral_constant<int, 5>());
        case 6: return run(std::integral_constant<int, 6>());
        case 7: return run(std::integral_constant<int, 7>());
        case 8: return run(std::integral_constant<int, 8>());
        default: throw std::invalid_argument("bits must be 1 to 8");
    }
}

int64_t first_bad(const uint8_t* codes, int64_t n, int bits, int offset) {
    for (int64_t i = 0; i < n; ++i)
        if ((uint8_t)(codes[i] + offset) >> bits) return i;
    return -1;
}

void py_unpack_rows(const In& packed, int bits, bool stream, int offset, const Out& codes) {
    const int64_t rows = rows_of(codes), n = cols_of(codes), nbytes = cols_of(packed);
    require(bits >= 1 && bits <= 8 && rows_of(packed) == rows && nbytes == 4 * words_for(n, bits, stream),
            "packed and codes do not fit");
    const uint8_t* src = packed.data();
    uint8_t* dst = codes.data();
    const uint64_t each = repeat((uint8_t)offset, 8);
    const bool dense = stream || 32 % bits == 0;
    nb::gil_scoped_release unlocked;
    with_bits(bits, [&](auto width) {
        for (int64_t row = 0; row < rows; ++row, src += nbytes, dst += n)
            if (dense)
                unpack_stream<width>(src, nbytes, n, each, dst);
            else
                unpack_words<width>(src, n, each, dst);
    });
}

int64_t py_pack_rows(const In& codes, int bits, bool stream, int offset, const Out& packed) {
    const int64_t rows = rows_of(codes), n = cols_of(codes), nbytes = cols_of(packed);
    require(bits >= 1 && bits <= 8 && rows_of(packed) == rows && nbytes == 4 * words_for(n, bits, stream),
            "codes and packed do not fit");
    const uint8_t* src = codes.data();
    uint8_t* dst = packed.data();
    const uint64_t each = repeat((uint8_t)offset, 8);
    const bool dense = stream || 32 % bits == 0;
    nb::gil_scoped_release unlocked;
    uint64_t bad = 0;
    with_bits(bits, [&](auto width) {
        for (int64_t row = 0; row < rows; ++row)
            bad |= dense ? pack_stream<width>(src + row * n, n, each, nbytes, dst + row * nbytes)
                         : pack_words<width>(src + row * n, n, each, dst + row * nbytes);
    });
    return bad ? first_bad(src, rows * n, bits, offset) : -1;
}

void py_unpack_nibbles(const In& packed, bool high_first, const Out& codes) {
    const int64_t rows = rows_of(codes), n = cols_of(codes), nbytes = cols_of(packed);
    require(rows_of(packed) == rows && nbytes == (n + 1) / 2, "packed and codes do not fit");
    const uint8_t* src = packed.data();
    uint8_t* dst = codes.data();
    nb::gil_scoped_release unlocked;
    const auto unpack = high_first ? unpack_stream<4, true> : unpack_stream<4, false>;
    for (int64_t row = 0; row < rows; ++row) unpack(src + row * nbytes, nbytes, n, 0, dst + row * n);
}

int64_t py_pack_nibbles(const In& codes, bool high_first, const Out& packed) {
    const int64_t rows = rows_of(codes), n = cols_of(codes), nbytes = cols_of(packed);
    require(rows_of(packed) == rows && nbytes == (n + 1) / 2, "codes and packed do not fit");
    const uint8_t* src = codes.data();
    uint8_t* dst = packed.data();
    nb::gil_scoped_release unlocked;
    const auto pack = high_first ? pack_stream<4, true> : pack_stream<4, false>;
    uint64_t bad = 0;
    for (int64_t row = 0; row < rows; ++row) bad |= pack(src + row * n, n, 0, nbytes, dst + row * nbytes);
    return bad ? first_bad(src, rows * n, 4, 0) : -1;
}

void py_unpack_columns(const In& packed, int bits, int offset, int64_t start, const Out& codes) {
    const int64_t nwords = rows_of(packed), stride = cols_of(packed) / 4, rows = rows_of(codes), n = cols_of(codes);
    require(bits >= 1 && bits <= 8 && nwords == words_for(n, bits, true) && start >= 0 && start + rows <= stride,
            "packed and codes do not fit");
    const uint8_t* src = packed.data() + 4 * start;
    uint8_t* dst = codes.data();
    nb::gil_scoped_release unlocked;
    with_bits(bits, [&](auto width) {
        unpack_columns<width>(src, nwords, stride, rows, n, repeat((uint8_t)offset, 8), dst);
    });
}

int64_t py_pack_columns(const In& codes, int bits, int offset, int64_t start, const Out& packed) {
    const int64_t nwords = rows_of(packed), stride = cols_of(packed) / 4, rows = rows_of(codes), n = cols_of(codes);
    require(bits >= 1 && bits <= 8 && nwords == words_for(n, bits, true) && start >= 0 && start + rows <= stride,
            "codes and packed do not fit");
    const uint8_t* src = codes.data();
    uint8_t* dst = packed.data() + 4 * start;
    nb::gil_scoped_release unlocked;
    uint64_t bad = 0;
    with_bits(bits, [&](auto width) {
        bad = pack_columns<width>(src, rows, n, repeat((uint8_t)offset, 8), nwords, stride, dst);
    });
    return bad ? first_bad(src, rows * n, bits, offset) : -1;
}

void py_unpack_awq(const In& packed, int64_t start, const Out& codes) {
    const int64_t n = rows_of(packed), stride = cols_of(packed) / 4, rows = rows_of(codes);
    require(start >= 0 && start % 8 == 0 && rows % 8 == 0 && start + rows <= 8 * stride && cols_of(codes) == n,
            "packed and codes do not fit");
    const uint8_t* src = packed.data() + start / 2;
    uint8_t* dst = codes.data();
    nb::gil_scoped_release unlocked;
    unpack_awq(src, n, stride, rows / 8, dst);
}

int64_t py_pack_awq(const In& codes, int64_t start, const Out& packed) {
    const int64_t rows = rows_of(codes), n = cols_of(codes), stride = cols_of(packed) / 4;
    require(start >= 0 && start % 8 == 0 && rows % 8 == 0 && start + rows <= 8 * stride && rows_of(packed) == n,
            "codes and packed do not fit");
    const uint8_t* src = codes.data();
    uint8_t* dst = packed.data() + start / 2;
    nb::gil_scoped_release unlocked;
    return pack_awq(src, rows / 8, n, stride, dst) ? first_bad(src, rows * n, 4, 0) : -1;
}

void py_unpack_row_pairs(const In& packed, const Out& codes) {
    const int64_t pairs = rows_of(packed), n = cols_of(packed);
    require(rows_of(codes) == 2 * pairs && cols_of(codes) == n, "packed and codes do not fit");
    const uint8_t* src = packed.data();
    uint8_t* dst = codes.data();
    nb::gil_scoped_release unlocked;
    for (int64_t i = 0; i < pairs; ++i) unpack_row_pair(src + i * n, n, dst + 2 * i * n, dst + (2 * i + 1) * n);
}

int64_t py_pack_row_pairs(const In& codes, const Out& packed) {
    const int64_t pairs = rows_of(packed), n = cols_of(packed);
    require(rows_of(codes) == 2 * pairs && cols_of(codes) == n, "codes and packed do not fit");
    const uint8_t* src = codes.data();
    uint8_t* dst = packed.data();
    nb::gil_scoped_release unlocked;
    uint64_t bad = 0;
    for (int64_t i = 0; i < pairs; ++i) bad |= pack_row_pair(src + 2 * i * n, src + (2 * i + 1) * n, n, dst + i * n);
    return bad ? first_bad(src, 2 * pairs * n, 4, 8) : -1;
}

const BlockKernel& block_kernel_of(int type) {
    for (const BlockKernel& kernel : kBlockKernels)
        if (kernel.type == type) return kernel;
    throw std::invalid_argument("no packing kernel for ggml type " + std::to_string(type));
}

// Number of blocks, after a check that every array holds that many.
template <class Blocks, class Codes, class Side, class MaybeSide>
int64_t block_count(const BlockKernel& kernel, const Blocks& blocks, const Codes& codes, const Side& scale,
                    const MaybeSide& offset) {
    const int64_t rows = rows_of(blocks), per_row = cols_of(blocks) / kernel.bytes;
    const auto fits = [&](const auto& array, int bytes) {
        return rows_of(array) == rows && cols_of(array) == per_row * bytes;
    };
    require(fits(blocks, kernel.bytes) && fits(codes, kernel.codes) && fits(scale, kernel.scale_bytes) &&
                offset.has_value() == kernel.has_offset && (!offset || fits(*offset, 2)),
            "blocks and parts do not fit");
    return rows * per_row;
}

bool py_pack_blocks(int type, const In& codes, const In& scale, const std::optional<In>& offset, const Out& blocks) {
    const BlockKernel& kernel = block_kernel_of(type);
    const int64_t count = block_count(kernel, blocks, codes, scale, offset);
    const uint8_t* minimum = offset ? offset->data() : nullptr;
    nb::gil_scoped_release unlocked;
    return kernel.pack(codes.data(), scale.data(), minimum, count, blocks.data()) == 0;
}

void py_unpack_blocks(int type, const In& blocks, const Out& codes, const Out& scale,
                      const std::optional<Out>& offset) {
    const BlockKernel& kernel = block_kernel_of(type);
    const int64_t count = block_count(kernel, blocks, codes, scale, offset);
    uint8_t* minimum = offset ? offset->data() : nullptr;
    nb::gil_scoped_release unlocked;
    kernel.unpack(blocks.data(), count, codes.data(), scale.data(), minimum);
}

}  // namespace

void bind_packing(nb::module_& m) {
    m.def("unpack_rows", &py_unpack_rows, nb::arg("packed"), nb::arg("bits"), nb::arg("stream"), nb::arg("offset"),
          nb::arg("codes"));
    m.def("pack_rows", &py_pack_rows, nb::arg("codes"), nb::arg("bits"), nb::arg("stream"), nb::arg("offset"),
          nb::arg("packed"));
    m.def("unpack_nibbles", &py_unpack_nibbles, nb::arg("packed"), nb::arg("high_first"), nb::arg("codes"));
    m.def("pack_nibbles", &py_pack_nibbles, nb::arg("codes"), nb::arg("high_first"), nb::arg("packed"));
    m.def("unpack_columns", &py_unpack_columns, nb::arg("packed"), nb::arg("bits"), nb::arg("offset"),
          nb::arg("start"), nb::arg("codes"));
    m.def("pack_columns", &py_pack_columns, nb::arg("codes"), nb::arg("bits"), nb::arg("offset"),
          nb::arg("start"), nb::arg("packed"));
    m.def("unpack_awq", &py_unpack_awq, nb::arg("packed"), nb::arg("start"), nb::arg("codes"));
    m.def("pack_awq", &py_pack_awq, nb::arg("codes"), nb::arg("start"), nb::arg("packed"));
    m.def("unpack_row_pairs", &py_unpack_row_pairs, nb::arg("packed"), nb::arg("codes"));
    m.def("pack_row_pairs", &py_pack_row_pairs, nb::arg("codes"), nb::arg("packed"));
    m.def("pack_blocks", &py_pack_blocks, nb::arg("type"), nb::arg("codes"), nb::arg("scale"),
          nb::arg("offset").none(), nb::arg("blocks"),
          "Fills blocks (rows, row_bytes) of a ggml type from its parts. False if a code is out of range.");
    m.def("unpack_blocks", &py_unpack_blocks, nb::arg("type"), nb::arg("blocks"), nb::arg("codes"), nb::arg("scale"),
          nb::arg("offset").none(), "Fills the parts of blocks (rows, row_bytes) of a ggml type.");
}
