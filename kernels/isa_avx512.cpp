// Sixteen lanes: AVX-512 F, BW, DQ, VL.
#include "table.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define LCONVERT_ISA avx512
#define LCONVERT_LANES 16
#include "families.h"

const lconvert::Isa* lconvert::isa_avx512() { return &lconvert::avx512::kIsa; }
#else
const lconvert::Isa* lconvert::isa_avx512() { return nullptr; }
#endif
