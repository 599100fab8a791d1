// Integer codes in 32-bit words: the layouts of quantized checkpoints.
//
// One code per byte on one side; on the other a dense bit stream per row (compressed-tensors) or per column (GPTQ),
// AWQ's shuffled nibbles, or pairs of rows (ModelOpt). Specification: reference/packing.py. Eight codes travel in a
// 64-bit integer, so no instruction set matters and no byte beyond a row is touched: threads may share arrays. Input
// and output are bytes because mapped files need not align their words. Packing returns whether every code was in
// range; what it wrote is of no use otherwise.
#pragma once
#include <cstdint>
#include <cstring>

namespace lconvert::packing {

inline uint64_t load8(const uint8_t* src) {
    uint64_t eight;
    std::memcpy(&eight, src, 8);
    return eight;
}
inline void store8(uint8_t* dst, uint64_t eight) { std::memcpy(dst, &eight, 8); }

// `pattern` in every `width` bits of 64.
constexpr uint64_t repeat(uint64_t pattern, int width) {
    uint64_t all = 0;
    for (int at = 0; at < 64; at += width) all |= pattern << at;
    return all;
}

// Every second field of `fields` bits moves so that the field starts of a pair are `to` instead of `fields` bits apart.
constexpr uint64_t widen_pairs(uint64_t x, int fields, int to) {
    const uint64_t low = repeat((uint64_t{1} << fields) - 1, 2 * to);
    return (x & low) | ((x << (to - fields)) & (low << to));
}
constexpr uint64_t narrow_pairs(uint64_t x, int fields, int from) {
    const uint64_t low = repeat((uint64_t{1} << fields) - 1, 2 * from);
    return (x & low) | ((x >> (from - fields)) & (low << fields));
}

// Eight fields of Bits bits, the lowest first, to one per byte, and back.
template <int Bits>
inline uint64_t spread(uint64_t x) {
    if constexpr (Bits < 8) x = widen_pairs(widen_pairs(widen_pairs(x, 4 * Bits, 32), 2 * Bits, 16), Bits, 8);
    return x;
}
template <int Bits>
inline uint64_t gather(uint64_t x) {
    if constexpr (Bits < 8) x = narrow_pairs(narrow_pairs(narrow_pairs(x, Bits, 8), 2 * Bits, 16), 4 * Bits, 32);
    return x;
}

// How stored values become codes: code = stored - offset, with offset 0 or 2^(Bits - 1) repeated in every byte. Both
// work on eight bytes with no carry from one to the next.
template <int Bits>
inline uint64_t codes_of(uint64_t stored, uint64_t offset) {
    constexpr uint64_t top = repeat(0x80, 8);
    if constexpr (Bits == 8) return stored ^ offset;
    return ((stored | top) - offset) ^ top;
}
template <int Bits>
inline uint64_t stored_of(uint64_t codes, uint64_t offset) {
    constexpr uint64_t top = repeat(0x80, 8);
    if constexpr (Bits == 8) return codes ^ offset;
    return ((codes & ~top) + offset) ^ (codes & top);
}

inline uint64_t swap_nibbles(uint64_t x) {
    constexpr uint64_t low = repeat(0x0f, 8);
    return ((x >> 4) & low) | ((x & low) << 4);
}

// ---- one row as a bit stream ----

// `n` codes of the stream in the `nbytes` bytes at src. HighFirst: the first of two nibbles is the high one.
template <int Bits, bool HighFirst = false>
inline void unpack_stream(const uint8_t* src, int64_t nbytes, int64_t n, uint64_t offset, uint8_t* dst) {
    const auto codes = [offset](uint64_t packed) {
        return codes_of<Bits>(spread<Bits>(HighFirst ? swap_nibbles(packed) : packed), offset);
    };
    const int64_t groups = n / 8;
    // Loads of 8 bytes where they stay inside the row; the widths that divide 8 load what they need.
    constexpr int kLoad = Bits == 1 || Bits == 2 || Bits == 4 ? Bits : 8;
    const int64_t wide = nbytes < kLoad ? 0 : (nbytes - kLoad) / Bits + 1, whole = groups < wide ? groups : wide;
    for (int64_t g = 0; g < whole; ++g) {
        uint64_t packed = 0;
        std::memcpy(&packed, src + g * Bits, kLoad);
        store8(dst + 8 * g, codes(packed));
    }
    for (int64_t g = whole; 8 * g < n; ++g) {
        uint64_t packed = 0;
        const int64_t left = nbytes - g * Bits, count = n - 8 * g;
        std::memcpy(&packed, src + g * Bits, left < Bits ? left : Bits);
        packed = codes(packed);
        std::memcpy(dst + 8 * g, &packed, count < 8 ? count : 8);
    }
}

// The inverse; fills all `nbytes` bytes at dst, unused bits with 0. Bits set in the result mark codes out of range.
template <int Bits, bool HighFirst = false>
inline uint64_t pack_stream(const uint8_t* src, int64_t n, uint64_t offset, int64_t nbytes, uint8_t* dst) {
    constexpr uint64_t above = repeat(0xff & (0xff << Bits), 8);
    uint64_t bad = 0;
    const auto packed = [offset, &bad](uint64_t codes) {
        const uint64_t stored = stored_of<Bits>(codes, offset);
        bad |= stored & above;
        const uint64_t fields = gather<Bits>(stored);
        return HighFirst ? swap_nibbles(fields) : fields;
    };
    constexpr int kStore = Bits == 1 || Bits == 2 || Bits == 4 ? Bits : 8;
    const int64_t groups = n / 8, wide = nbytes < kStore ? 0 : (nbytes - kStore) / Bits + 1;
    const int64_t whole = groups < wide ? groups : wide;
    for (int64_t g = 0; g < whole; ++g) {
        const uint64_t fields = packed(load8(src + 8 * g));
        std::memcpy(dst + g * Bits, &fields, kStore);
    }
    int64_t written = whole * Bits;
    for (int64_t g = whole; 8 * g < n; ++g) {
        uint64_t codes = codes_of<Bits>(0, offset);
        const int64_t count = n - 8 * g < 8 ? n - 8 * g : 8;
        const int64_t size = nbytes - written < Bits ? nbytes - written : Bits;
        std::memcpy(&codes, src + 8 * g, count);
        codes = packed(codes);
        std::memcpy(dst + written, &codes, size);
        written += size;
    }
    for (; written < nbytes; ++written) dst[written] = 0;
    return bad;
}

// ---- one row, 32 / Bits codes per word ----

template <int Bits>
inline void unpack_words(const uint8_t* src, int64_t n, uint64_t offset, uint8_t* dst) {
    constexpr int kPerWord = 32 / Bits;
    const auto shift = (uint8_t)offset;
    for (; n > 0; n -= kPerWord, src += 4, dst += kPerWord) {
        uint32_t word;
        std::memcpy(&word, src, 4);
        uint8_t codes[kPerWord];
        for (int j = 0; j < kPerWord; ++j) codes[j] = (uint8_t)((word >> Bits * j & ((1u << Bits) - 1)) - shift);
        std::memcpy(dst, codes, n < kPerWord ? n : kPerWord);
    }
}

template <int Bits>
inline uint64_t pack_words(const uint8_t* src, int64_t n, uint64_t offset, uint8_t* dst) {
    constexpr int kPerWord = 32 / Bits;
    const auto shift = (uint8_t)offset;
    uint32_t bad = 0;
    for (; n > 0; n -= kPerWord, src += kPerWord, dst += 4) {
        const int count = n < kPerWord ? (int)n : kPerWord;
        uint32_t word = 0;
        for (int j = 0; j < count; ++j) {
            const uint32_t stored = (uint8_t)(src[j] + shift);
            bad |= stored >> Bits;
            word |= stored << Bits * j;
        }
        std::memcpy(dst, &word, 4);
    }
    return bad;
}

// ---- columns: every column of the words is a stream ----

// A tile: kColumns columns of words (whole cache lines) by kGroups groups of Bits words, i.e. 32 codes each. Its
// transpose stays in the first-level cache.
constexpr int kColumns = 64;
constexpr int kGroups = 16;

// Calls run(first word, words, first column, columns) for every tile of nwords x ncols words.
template <int Words, class Tile>
inline void each_tile(int64_t nwords, int64_t ncols, Tile run) {
    for (int64_t col = 0; col < ncols; col += kColumns)
        for (int64_t word = 0; word < nwords; word += Words)
            run(word, nwords - word < Words ? nwords - word : Words, col,
                ncols - col < kColumns ? ncols - col : kColumns);
}

// Words (rows x cols, rows `stride` words apart) to tile[col][row] and back.
template <int Words>
inline void read_tile(const uint8_t* src, int64_t stride, int64_t rows, int64_t cols, uint32_t (*tile)[Words]) {
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t col = 0; col < cols; ++col) std::memcpy(&tile[col][row], src + 4 * (row * stride + col), 4);
}
template <int Words>
inline void write_tile(const uint32_t (*tile)[Words], int64_t rows, int64_t cols, int64_t stride, uint8_t* dst) {
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t col = 0; col < cols; ++col) std::memcpy(dst + 4 * (row * stride + col), &tile[col][row], 4);
}

// Columns 0..nrows of words (nwords x stride) to codes (nrows x n).
template <int Bits>
inline void unpack_columns(const uint8_t* src, int64_t nwords, int64_t stride, int64_t nrows, int64_t n,
                           uint64_t offset, uint8_t* dst) {
    constexpr int kWords = kGroups * Bits;
    alignas(64) uint32_t tile[kColumns][kWords];
    each_tile<kWords>(nwords, nrows, [&](int64_t word, int64_t words, int64_t row, int64_t rows) {
        read_tile(src + 4 * (word * stride + row), stride, words, rows, tile);
        const int64_t first = word / Bits * 32, count = n - first < 32 * kGroups ? n - first : 32 * kGroups;
        for (int64_t k = 0; k < rows; ++k)
            unpack_stream<Bits>(reinterpret_cast<const uint8_t*>(tile[k]), 4 * words, count, offset,
                                dst + (row + k) * n + first);
    });
}

template <int Bits>
inline uint64_t pack_columns(const uint8_t* src, int64_t nrows, int64_t n, uint64_t offset, int64_t nwords,
                             int64_t stride, uint8_t* dst) {
    constexpr int kWords = kGroups * Bits;
    alignas(64) uint32_t tile[kColumns][kWords];
    uint64_t bad = 0;
    each_tile<kWords>(nwords, nrows, [&](int64_t word, int64_t words, int64_t row, int64_t rows) {
        const int64_t first = word / Bits * 32, count = n - first < 32 * kGroups ? n - first : 32 * kGroups;
        for (int64_t k = 0; k < rows; ++k)
            bad |= pack_stream<Bits>(src + (row + k) * n + first, count, offset, 4 * words,
                                     reinterpret_cast<uint8_t*>(tile[k]));
        write_tile(tile, words, rows, stride, dst + 4 * (word * stride + row));
    });
    return bad;
}

// ---- AWQ: a word holds eight neighbouring rows of the weight, shuffled ----

constexpr int kAwqOrder[8] = {0, 2, 4, 6, 1, 3, 5, 7};  // AutoAWQ utils/packing_utils.py
constexpr int kAwqDepth = 64;                           // input columns per tile

// Word columns 0..nwords of words (n x stride) to codes (8 * nwords x n).
inline void unpack_awq(const uint8_t* src, int64_t n, int64_t stride, int64_t nwords, uint8_t* dst) {
    alignas(64) uint32_t tile[kColumns][kAwqDepth];
    each_tile<kAwqDepth>(n, nwords, [&](int64_t first, int64_t count, int64_t word, int64_t words) {
        read_tile(src + 4 * (first * stride + word), stride, count, words, tile);
        for (int64_t w = 0; w < words; ++w)
            for (int nibble = 0; nibble < 8; ++nibble) {
                uint8_t* out = dst + (8 * (word + w) + kAwqOrder[nibble]) * n + first;
                for (int64_t k = 0; k < count; ++k) out[k] = (uint8_t)(tile[w][k] >> 4 * nibble & 15);
            }
    });
}

inline uint64_t pack_awq(const uint8_t* src, int64_t nwords, int64_t n, int64_t stride, uint8_t* dst) {
    alignas(64) uint32_t tile[kColumns][kAwqDepth];
    uint8_t bytes[4][kAwqDepth], bad = 0;
    each_tile<kAwqDepth>(n, nwords, [&](int64_t first, int64_t count, int64_t word, int64_t words) {
        for (int64_t w = 0; w < words; ++w) {
            const uint8_t* rows = src + 8 * (word + w) * n + first;
            for (int b = 0; b < 4; ++b) {
                const uint8_t *low = rows + kAwqOrder[2 * b] * n, *high = rows + kAwqOrder[2 * b + 1] * n;
                for (int64_t k = 0; k < count; ++k) {
                    bad |= low[k] | high[k];
                    bytes[b][k] = (uint8_t)(low[k] | high[k] << 4);
                }
            }
            for (int64_t k = 0; k < count; ++k)
                tile[w][k] = bytes[0][k] | bytes[1][k] << 8 | bytes[2][k] << 16 | (uint32_t)bytes[3][k] << 24;
        }
        write_tile(tile, count, words, stride, dst + 4 * (first * stride + word));
    });
    return bad >> 4;
}

// ---- ModelOpt: a byte holds the two's complement nibbles of two neighbouring rows ----

inline void unpack_row_pair(const uint8_t* src, int64_t n, uint8_t* low, uint8_t* high) {
    for (int64_t k = 0; k < n; ++k) {
        low[k] = (uint8_t)(((src[k] & 15) ^ 8) - 8);
        high[k] = (uint8_t)((src[k] >> 4 ^ 8) - 8);
    }
}

inline uint64_t pack_row_pair(const uint8_t* low, const uint8_t* high, int64_t n, uint8_t* dst) {
    uint8_t bad = 0;
    for (int64_t k = 0; k < n; ++k) {
        bad |= (uint8_t)(low[k] + 8) | (uint8_t)(high[k] + 8);
        dst[k] = (uint8_t)((low[k] & 15) | high[k] << 4);
    }
    return bad >> 4;
}

}  // namespace lconvert::packing
