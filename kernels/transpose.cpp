// Transposition of matrices that arrive in rows: numbers, widened where the result is float32, and codes that are packed on the way.
//
// A slab of rows (n, k) becomes columns start .. start + n of the result (k, N). Tiles fit the first-level cache, so that both sides
// are read and written in whole cache lines.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>

namespace nb = nanobind;

namespace {

using Rows = nb::ndarray<nb::ro, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Out = nb::ndarray<nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Codes = nb::ndarray<const uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Packed = nb::ndarray<uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

constexpr int64_t kTile = 64;

// Tiles of an (n, k) matrix, turned: use(columns, rows of the tile, first column, first row), columns[j] having the tile's column j.
// Rows of matrices lie at powers of two from each other, which share cache lines' places; the tile's own do not.
template <class To, class From, class Use>
void each_tile(const From* in, int64_t n, int64_t k, int shift, Use use) {
    constexpr int64_t stride = kTile + 64 / (int64_t)sizeof(To);
    alignas(64) To turned[kTile * stride];
    for (int64_t r = 0; r < n; r += kTile)
        for (int64_t c = 0; c < k; c += kTile) {
            const int64_t rows = n - r < kTile ? n - r : kTile, cols = k - c < kTile ? k - c : kTile;
            for (int64_t i = 0; i < rows; ++i) {
                const From* row = in + (r + i) * k + c;
                if (cols == kTile)
                    for (int64_t j = 0; j < kTile; ++j) turned[j * stride + i] = (To)((To)row[j] << shift);
                else
                    for (int64_t j = 0; j < cols; ++j) turned[j * stride + i] = (To)((To)row[j] << shift);
            }
            for (int64_t j = 0; j < cols; ++j) use(turned + j * stride, rows, c + j, r);
        }
}

// out[:, r] = row r; shift: of every element's bits.
template <class To, class From>
void transpose(const From* in, int64_t n, int64_t k, int shift, To* out, int64_t width) {
    each_tile<To>(in, n, k, shift, [&](const To* column, int64_t rows, int64_t j, int64_t r) {
        std::memcpy(out + j * width + r, column, (size_t)rows * sizeof(To));
    });
}

// Per codes of 8 / Per bits to a byte, the first in the low bits.
template <int Per>
void pack(const uint8_t* in, int64_t n, int64_t k, uint8_t* out, int64_t width) {
    constexpr int bits = 8 / Per;
    constexpr uint8_t mask = (1 << bits) - 1;
    each_tile<uint8_t>(in, n, k, 0, [&](const uint8_t* column, int64_t rows, int64_t j, int64_t r) {
        uint8_t* to = out + j * width + r / Per;
        for (int64_t i = 0; i < rows / Per; ++i) {
            uint8_t byte = 0;
            for (int p = 0; p < Per; ++p) byte |= (uint8_t)((column[i * Per + p] & mask) << (p * bits));
            to[i] = byte;
        }
    });
}

void require(bool good) {
    if (!good) throw std::invalid_argument("rows and out do not fit");
}

void transpose_rows(const Rows& rows, const Out& out, int64_t start) {
    const int64_t n = (int64_t)rows.shape(0), k = (int64_t)rows.shape(1), width = (int64_t)out.shape(1);
    require((int64_t)out.shape(0) == k && start >= 0 && start + n <= width);
    const int from = rows.dtype().bits, to = out.dtype().bits;
    require(from == to || (from == 16 && to == 32 && rows.dtype() == nb::dtype<uint16_t>()));
    const void* in = rows.data();
    uint8_t* at = static_cast<uint8_t*>(out.data()) + start * (to / 8);
    nb::gil_scoped_release unlocked;
    if (from != to)  // bfloat16 is the upper half of float32
        return transpose(static_cast<const uint16_t*>(in), n, k, 16, reinterpret_cast<uint32_t*>(at), width);
    switch (from) {
        case 8: return transpose(static_cast<const uint8_t*>(in), n, k, 0, at, width);
        case 16: return transpose(static_cast<const uint16_t*>(in), n, k, 0, reinterpret_cast<uint16_t*>(at), width);
        case 32: return transpose(static_cast<const uint32_t*>(in), n, k, 0, reinterpret_cast<uint32_t*>(at), width);
        default: throw std::invalid_argument("elements must have 8, 16 or 32 bits");
    }
}

void pack_transposed(const Codes& codes, int bits, const Packed& out, int64_t start) {
    const int64_t n = (int64_t)codes.shape(0), k = (int64_t)codes.shape(1), width = (int64_t)out.shape(1), per = 8 / bits;
    require((bits == 2 || bits == 4) && (int64_t)out.shape(0) == k && n % per == 0 && start >= 0 && start + n / per <= width);
    const uint8_t* in = codes.data();
    uint8_t* at = out.data() + start;
    nb::gil_scoped_release unlocked;
    return per == 2 ? pack<2>(in, n, k, at, width) : pack<4>(in, n, k, at, width);
}

}  // namespace

void bind_transpose(nb::module_& m) {
    m.def("transpose_rows", &transpose_rows, nb::arg("rows"), nb::arg("out"), nb::arg("start"),
          "out[:, start:start + n] = rows.T; of uint16 rows to 32 bits: bfloat16 widened.");
    m.def("pack_transposed", &pack_transposed, nb::arg("codes"), nb::arg("bits"), nb::arg("out"), nb::arg("start"),
          "Bytes start .. of out's rows = columns of codes, packed, the first in the low bits.");
}
