// The kernel table of one instruction set: every family header, and one row per storage type.
#pragma once
#include "quant_float.h"
#include "quant_fp4.h"
#include "quant_iq.h"
#include "quant_iq4.h"
#include "quant_k.h"
#include "quant_legacy.h"
#include "quant_ternary.h"
#include "rounding.h"
#include "sweep.h"
#include "trials.h"

namespace lconvert::LCONVERT_ISA {
namespace {

#define LCONVERT_ROW(id, name) {id, quantize_##name, dequantize_##name}

const Kernel kKernels[] = {
    LCONVERT_ROW(0, f32),      LCONVERT_ROW(1, f16),      LCONVERT_ROW(30, bf16),
    LCONVERT_ROW(2, q4_0),     LCONVERT_ROW(3, q4_1),     LCONVERT_ROW(6, q5_0),
    LCONVERT_ROW(7, q5_1),     LCONVERT_ROW(8, q8_0),     LCONVERT_ROW(10, q2_k),
    LCONVERT_ROW(11, q3_k),    LCONVERT_ROW(12, q4_k),    LCONVERT_ROW(13, q5_k),
    LCONVERT_ROW(14, q6_k),    LCONVERT_ROW(16, iq2_xxs), LCONVERT_ROW(17, iq2_xs),
    LCONVERT_ROW(18, iq3_xxs), LCONVERT_ROW(19, iq1_s),   LCONVERT_ROW(20, iq4_nl),
    LCONVERT_ROW(21, iq3_s),   LCONVERT_ROW(22, iq2_s),   LCONVERT_ROW(23, iq4_xs),
    LCONVERT_ROW(29, iq1_m),   LCONVERT_ROW(34, tq1_0),   LCONVERT_ROW(35, tq2_0),
    LCONVERT_ROW(39, mxfp4),   LCONVERT_ROW(40, nvfp4),
};

#undef LCONVERT_ROW

const Isa kIsa = {kKernels, sizeof kKernels / sizeof kKernels[0], widen_f16, widen_bf16, all_below,
                  kInGroups, sweep_rows, try_scales};

}  // namespace
}  // namespace lconvert::LCONVERT_ISA
