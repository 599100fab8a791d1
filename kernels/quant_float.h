// F32, F16 and BF16: casts between them, round to nearest even, and the check for values that do not fit.
//
// Plain loops that the compiler vectorises; F16 takes the hardware instruction where there is one, whose results
// for finite values are those of half_bits.
#pragma once
#include "simd.h"
#include "table.h"

namespace lconvert::LCONVERT_ISA {
namespace {

bool all_below(const float* x, int64_t n, uint32_t limit) {
    uint32_t bad = 0;
    for (int64_t i = 0; i < n; ++i) {
        uint32_t raw;
        __builtin_memcpy(&raw, x + i, 4);
        bad |= (raw & 0x7fffffffu) >= limit ? 1u : 0u;
    }
    return bad == 0;
}

LANE_FN I load_halfwords(const uint16_t* p) {
    typedef uint16_t H __attribute__((vector_size(W * 2)));
    H half;
    __builtin_memcpy(&half, p, sizeof half);
    return __builtin_convertvector(half, I);
}

LANE_FN void store_halfwords(uint8_t* p, I value) {
    typedef uint16_t H __attribute__((vector_size(W * 2)));
    const H half = __builtin_convertvector(value, H);
    __builtin_memcpy(p, &half, sizeof half);
}

LANE_FN F widen_half(const uint16_t* p) {
#if defined(__AVX512F__)
    return (F)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
    return (F)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#elif defined(__aarch64__)
    return (F)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)));
#else
    return half_value(load_halfwords(p));
#endif
}

LANE_FN void narrow_half(uint8_t* p, F v) {
#if defined(__AVX512F__)
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
    store_halfwords(p, half_bits(v));
#endif
}

LANE_FN void narrow_bfloat(uint8_t* p, F v) {
    const I raw = bits(v);
    store_halfwords(p, (raw + 0x7fff + ((raw >> 16) & 1)) >> 16);
}

// Runs step(i) for every W values; the last values run in a padded copy.
template <class In, class Out, class Step>
LANE_FN void each_lanes(const In* src, int64_t n, Out* dst, int out_per_value, Step step) {
    int64_t i = 0;
    for (; i + W <= n; i += W) step(src + i, dst + i * out_per_value);
    if (i == n) return;
    In in[W] = {};
    Out out[W * 4];
    __builtin_memcpy(in, src + i, (n - i) * sizeof(In));
    step(in, out);
    __builtin_memcpy(dst + i * out_per_value, out, (n - i) * out_per_value * sizeof(Out));
}

void widen_f16(const uint16_t* src, int64_t n, float* dst) {
    each_lanes(src, n, dst, 1, [](const uint16_t* in, float* out) { store(out, widen_half(in)); });
}

void widen_bf16(const uint16_t* src, int64_t n, float* dst) {
    each_lanes(src, n, dst, 1, [](const uint16_t* in, float* out) { store(out, from_bits(load_halfwords(in) << 16)); });
}

void quantize_f32(const float* x, int64_t nrows, int64_t ncols, const float*, uint8_t* dst) {
    __builtin_memcpy(dst, x, nrows * ncols * 4);
}

void quantize_f16(const float* x, int64_t nrows, int64_t ncols, const float*, uint8_t* dst) {
    each_lanes(x, nrows * ncols, dst, 2, [](const float* in, uint8_t* out) { narrow_half(out, load(in)); });
}

void quantize_bf16(const float* x, int64_t nrows, int64_t ncols, const float*, uint8_t* dst) {
    each_lanes(x, nrows * ncols, dst, 2, [](const float* in, uint8_t* out) { narrow_bfloat(out, load(in)); });
}

void dequantize_f32(const uint8_t* src, int64_t ncols, float* dst) { __builtin_memcpy(dst, src, ncols * 4); }

void dequantize_f16(const uint8_t* src, int64_t ncols, float* dst) { widen_f16((const uint16_t*)src, ncols, dst); }

void dequantize_bf16(const uint8_t* src, int64_t ncols, float* dst) { widen_bf16((const uint16_t*)src, ncols, dst); }

}  // namespace
}  // namespace lconvert::LCONVERT_ISA
