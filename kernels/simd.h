// Lanes: W floats that go through the same arithmetic, each on its own block.
//
// The kernels are written once, as scalar code on the types F (W floats) and I (W integers). Lane k of every
// value belongs to block k of a group of W blocks, so a reduction over a block is an ordinary loop in the
// reference's order and its rounding is the reference's too: speed comes from doing W blocks at once, never from
// reassociating. Masks are I with all bits set or clear.
//
// Everything lives in a namespace per instruction set (LCONVERT_ISA, LCONVERT_LANES are set by isa_*.cpp) and is
// built of the vector extensions that GCC and Clang share. No function template of the standard library may be
// used in kernel headers: the linker would merge its instances across instruction sets.
#pragma once
#include <cstdint>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define LANE_FN static inline __attribute__((always_inline))

namespace lconvert::LCONVERT_ISA {
namespace {

constexpr int W = LCONVERT_LANES;
typedef float F __attribute__((vector_size(W * 4)));
typedef int32_t I __attribute__((vector_size(W * 4)));

LANE_FN F splat(float v) { return v - F{}; }
LANE_FN I splat(int32_t v) { return v + I{}; }

LANE_FN I bits(F v) { return (I)v; }
LANE_FN F from_bits(I v) { return (F)v; }
LANE_FN F to_float(I v) { return __builtin_convertvector(v, F); }
LANE_FN I to_int(F v) { return __builtin_convertvector(v, I); }  // toward zero; v must fit

LANE_FN F select(I mask, F yes, F no) { return mask ? yes : no; }
LANE_FN I select(I mask, I yes, I no) { return mask ? yes : no; }
LANE_FN F abs(F v) { return from_bits(bits(v) & 0x7fffffff); }

LANE_FN F load(const float* p) {
    F v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}
LANE_FN void store(float* p, F v) { __builtin_memcpy(p, &v, sizeof v); }

// min_of(a, b) is `a < b ? a : b` and max_of(a, b) is `a > b ? a : b`: with NaN or equal zeros the result is b.
#if defined(__AVX512F__)
LANE_FN F min_of(F a, F b) { return (F)_mm512_min_ps((__m512)a, (__m512)b); }
LANE_FN F max_of(F a, F b) { return (F)_mm512_max_ps((__m512)a, (__m512)b); }
LANE_FN F sqrt(F v) { return (F)_mm512_sqrt_ps((__m512)v); }
LANE_FN bool any(I mask) { return _mm512_movepi32_mask((__m512i)mask) != 0; }
#elif defined(__AVX2__)
LANE_FN F min_of(F a, F b) { return (F)_mm256_min_ps((__m256)a, (__m256)b); }
LANE_FN F max_of(F a, F b) { return (F)_mm256_max_ps((__m256)a, (__m256)b); }
LANE_FN F sqrt(F v) { return (F)_mm256_sqrt_ps((__m256)v); }
LANE_FN bool any(I mask) { return _mm256_movemask_ps((__m256)mask) != 0; }
#elif defined(__x86_64__)
LANE_FN F min_of(F a, F b) { return (F)_mm_min_ps((__m128)a, (__m128)b); }
LANE_FN F max_of(F a, F b) { return (F)_mm_max_ps((__m128)a, (__m128)b); }
LANE_FN F sqrt(F v) { return (F)_mm_sqrt_ps((__m128)v); }
LANE_FN bool any(I mask) { return _mm_movemask_ps((__m128)mask) != 0; }
#else
LANE_FN F min_of(F a, F b) { return a < b ? a : b; }
LANE_FN F max_of(F a, F b) { return a > b ? a : b; }
LANE_FN F sqrt(F v) {
    for (int k = 0; k < W; ++k) v[k] = __builtin_sqrtf(v[k]);
    return v;
}
LANE_FN bool any(I mask) {
    int32_t all = 0;
    for (int k = 0; k < W; ++k) all |= mask[k];
    return all != 0;
}
#endif

LANE_FN F clamp(F v, float low, float high) { return max_of(splat(low), min_of(splat(high), v)); }

// ggml's nearest_int (ggml-quants.c) as a float lane: round half to even for |v| <= 4194303. Beyond that the
// reference reads mantissa bits of v + 1.5 * 2^23 whatever the exponent is (an infinity gives -4194304, NaN 0);
// forcing the exponent reproduces this, so that absurd inputs also give the reference's bytes.
LANE_FN F nearest(F v) {
    const I raw = bits(v + 12582912.0f);
#if defined(__AVX512F__)
    const __m512i forced = _mm512_ternarylogic_epi32((__m512i)raw, _mm512_set1_epi32(0x007fffff),
                                                     _mm512_set1_epi32(0x4b000000), 0xea);  // (a & b) | c
    return (F)forced - 12582912.0f;
#else
    return from_bits((raw & 0x007fffff) | 0x4b000000) - 12582912.0f;
#endif
}

// IEEE half precision, round to nearest even, infinity on overflow, in the low 16 bits of each lane. A NaN becomes
// sign | 0x7e00 as in ggml_compute_fp32_to_fp16.
LANE_FN I half_bits(F v) {
    const I raw = bits(v), sign = (raw >> 16) & 0x8000, magnitude = raw & 0x7fffffff;
    const I normal = (magnitude + 0xfff + ((magnitude >> 13) & 1) - (112 << 23)) >> 13;
    // Adding 0.5 puts the last bit of a half subnormal at the last bit of the sum.
    const I subnormal = bits(from_bits(magnitude) + 0.5f) - 0x3f000000;
    I half = select(magnitude < (113 << 23), subnormal, normal);
    half = select(magnitude >= 0x477ff000, splat(0x7c00), half);
#if defined(__aarch64__)
    const int32_t nan = 0xfe00;  // an invalid operation gives a positive NaN here, a negative one on x86-64
#else
    const int32_t nan = 0x7e00;
#endif
    return sign ^ select(magnitude > 0x7f800000, splat(nan), half);
}

LANE_FN F half_value(I half) {
    const I sign = (half & 0x8000) << 16, magnitude = half & 0x7fff;
    const I normal = (magnitude << 13) + (112 << 23);
    const F subnormal = to_float(magnitude) * 0x1p-24f;
    I raw = select(magnitude < 0x400, bits(subnormal), normal);
    raw = select(magnitude >= 0x7c00, (magnitude << 13) | 0x7f800000, raw);
    raw = select(magnitude > 0x7c00, raw | 0x00400000, raw);  // a NaN becomes quiet
    return from_bits(sign | raw);
}

// ---- moving blocks in and out of lanes ----

template <int... K>
struct Indices {};
template <int N, int... K>
struct MakeIndices : MakeIndices<N - 1, N - 1, K...> {};
template <int... K>
struct MakeIndices<0, K...> {
    typedef Indices<K...> type;
};

// Element k is a[k] for k < W, else b[k - W].
template <int... K>
LANE_FN F shuffle(F a, F b, Indices<K...>) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, K...);
#else
    return __builtin_shuffle(a, b, I{K...});  // __builtin_shufflevector only came with GCC 12
#endif
}

template <int... K>
LANE_FN F zip_low(F a, F b, Indices<K...>) {
    return shuffle(a, b, Indices<(K / 2 + K % 2 * W)...>());
}
template <int... K>
LANE_FN F zip_high(F a, F b, Indices<K...>) {
    return shuffle(a, b, Indices<(W / 2 + K / 2 + K % 2 * W)...>());
}

// Transposes W x W values in place: log2(W) rounds of a perfect shuffle.
LANE_FN void transpose(F* rows) {
    typename MakeIndices<W>::type indices;
    for (int half = W / 2; half > 0; half /= 2) {
        F next[W];
        for (int k = 0; k < W / 2; ++k) {
            next[2 * k] = zip_low(rows[k], rows[k + W / 2], indices);
            next[2 * k + 1] = zip_high(rows[k], rows[k + W / 2], indices);
        }
        for (int k = 0; k < W; ++k) rows[k] = next[k];
    }
}

// W blocks that are quantised together. The last group of a slab repeats its last block in the spare lanes: they
// compute and write the same bytes again.
struct Group {
    const float* x[W];
    const float* weights[W];  // null without an importance matrix
    uint8_t* dst[W];
};

// out[i] = element i of every block, for N elements (a multiple of W) from `offset` on.
template <int N>
LANE_FN void load_elements(const float* const* blocks, int offset, F* out) {
    static_assert(N % W == 0);
    for (int i = 0; i < N; i += W) {
        F rows[W];
        for (int k = 0; k < W; ++k) rows[k] = load(blocks[k] + offset + i);
        transpose(rows);
        for (int k = 0; k < W; ++k) out[i + k] = rows[k];
    }
}

// Writes word i of every block (lane k to block k) to byte offset + 4 * i, little endian.
template <int N>
LANE_FN void store_words(uint8_t* const* blocks, int offset, const I* words) {
    constexpr int whole = N / W * W;
    for (int i = 0; i < whole; i += W) {
        F rows[W];
        for (int k = 0; k < W; ++k) rows[k] = from_bits(words[i + k]);
        transpose(rows);
        for (int k = 0; k < W; ++k) __builtin_memcpy(blocks[k] + offset + 4 * i, &rows[k], sizeof rows[k]);
    }
    for (int i = whole; i < N; ++i)
        for (int k = 0; k < W; ++k) {
            const int32_t word = words[i][k];
            __builtin_memcpy(blocks[k] + offset + 4 * i, &word, 4);
        }
}

LANE_FN void store_halfword(uint8_t* const* blocks, int offset, I value) {
    for (int k = 0; k < W; ++k) {
        const uint16_t half = (uint16_t)value[k];
        __builtin_memcpy(blocks[k] + offset, &half, 2);
    }
}

// Calls kernel(group) for the blocks of a slab (Elems values, Bytes bytes each), W at a time, in row-major order.
template <int Elems, int Bytes, class GroupKernel>
LANE_FN void each_group(const float* x, int64_t nrows, int64_t ncols, const float* weights, uint8_t* dst,
                        GroupKernel kernel) {
    const int64_t per_row = ncols / Elems, count = nrows * per_row;
    for (int64_t first = 0; first < count; first += W) {
        Group group;
        for (int k = 0; k < W; ++k) {
            const int64_t block = first + k < count ? first + k : count - 1;
            group.x[k] = x + block * Elems;
            group.weights[k] = weights ? weights + block % per_row * Elems : nullptr;
            group.dst[k] = dst + block * Bytes;
        }
        kernel(group);
    }
}

// ---- over a block ----

template <int N>
LANE_FN F largest_magnitude(const F* x) {
    F largest = splat(0.0f);
    for (int i = 0; i < N; ++i) largest = max_of(abs(x[i]), largest);
    return largest;
}

// 1/v, or 0 for v == 0 and where the reciprocal overflows. ggml converts the resulting infinities to integers, which C
// leaves undefined.
LANE_FN F inverse_or_zero(F v) {
    const F inverse = splat(1.0f) / v;
    return select(bits(abs(inverse)) < 0x7f800000, inverse, splat(0.0f));
}

// ---- scalars, for dequantisation ----

LANE_FN float half_at(const uint8_t* p) {
    uint16_t half;
    __builtin_memcpy(&half, p, 2);
#if defined(__F16C__)
    return _cvtsh_ss(half);
#else
    return half_value(splat((int32_t)half))[0];
#endif
}

}  // namespace
}  // namespace lconvert::LCONVERT_ISA
