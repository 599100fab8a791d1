// Eight lanes: AVX2 and F16C.
#include "table.h"

#if defined(__AVX2__)
#define LCONVERT_ISA avx2
#define LCONVERT_LANES 8
#include "families.h"

const lconvert::Isa* lconvert::isa_avx2() { return &lconvert::avx2::kIsa; }
#else
const lconvert::Isa* lconvert::isa_avx2() { return nullptr; }
#endif
