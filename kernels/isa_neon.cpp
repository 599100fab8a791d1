// Four lanes on aarch64, through the vector extensions that compile to NEON.
#include "table.h"

#if defined(__aarch64__)
#define LCONVERT_ISA neon
#define LCONVERT_LANES 4
#include "families.h"

const lconvert::Isa* lconvert::isa_neon() { return &lconvert::neon::kIsa; }
#else
const lconvert::Isa* lconvert::isa_neon() { return nullptr; }
#endif
