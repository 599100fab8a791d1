// The kernel table of one instruction set: every family header, one line per storage type.
//
// X(id, name) stands for quantize_<name> and dequantize_<name> with the signatures of Kernel in table.h.
#pragma once
#include "quant_float.h"
#include "quant_k.h"

#if __has_include("quant_legacy.h") && !defined(LCONVERT_SKIP_LEGACY)
#include "quant_legacy.h"
#define LCONVERT_LEGACY(X) X(2, q4_0) X(3, q4_1) X(6, q5_0) X(7, q5_1) X(8, q8_0)
#else
#define LCONVERT_LEGACY(X)
#endif

#if __has_include("quant_iq4.h") && !defined(LCONVERT_SKIP_IQ4)
#include "quant_iq4.h"
#define LCONVERT_IQ4(X) X(20, iq4_nl) X(23, iq4_xs)
#else
#define LCONVERT_IQ4(X)
#endif

#if __has_include("quant_ternary.h") && !defined(LCONVERT_SKIP_TERNARY)
#include "quant_ternary.h"
#define LCONVERT_TERNARY(X) X(34, tq1_0) X(35, tq2_0)
#else
#define LCONVERT_TERNARY(X)
#endif

#if __has_include("quant_fp4.h") && !defined(LCONVERT_SKIP_FP4)
#include "quant_fp4.h"
#define LCONVERT_FP4(X) X(39, mxfp4) X(40, nvfp4)
#else
#define LCONVERT_FP4(X)
#endif

#if __has_include("quant_iq.h") && !defined(LCONVERT_SKIP_IQ)
#include "quant_iq.h"
#define LCONVERT_IQ(X) \
    X(16, iq2_xxs) X(17, iq2_xs) X(18, iq3_xxs) X(19, iq1_s) X(21, iq3_s) X(22, iq2_s) X(29, iq1_m)
#else
#define LCONVERT_IQ(X)
#endif

namespace lconvert::LCONVERT_ISA {
namespace {

#define LCONVERT_ROW(id, name) Kernel{id, quantize_##name, dequantize_##name},

const Kernel kKernels[] = {
    LCONVERT_ROW(0, f32) LCONVERT_ROW(1, f16) LCONVERT_ROW(30, bf16)
    LCONVERT_ROW(10, q2_k) LCONVERT_ROW(11, q3_k) LCONVERT_ROW(12, q4_k) LCONVERT_ROW(13, q5_k) LCONVERT_ROW(14, q6_k)
    LCONVERT_LEGACY(LCONVERT_ROW)
    LCONVERT_IQ4(LCONVERT_ROW)
    LCONVERT_TERNARY(LCONVERT_ROW)
    LCONVERT_FP4(LCONVERT_ROW)
    LCONVERT_IQ(LCONVERT_ROW)
};

#undef LCONVERT_ROW

const Isa kIsa = {kKernels, sizeof kKernels / sizeof kKernels[0], widen_f16, widen_bf16, all_below};

}  // namespace
}  // namespace lconvert::LCONVERT_ISA
