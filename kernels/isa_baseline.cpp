// Four lanes with what every 64-bit target has (SSE2 on x86-64). aarch64 has isa_neon.cpp instead.
#include "table.h"

#if !defined(__aarch64__)
#define LCONVERT_ISA baseline
#define LCONVERT_LANES 4
#include "families.h"

const lconvert::Isa* lconvert::isa_baseline() { return &lconvert::baseline::kIsa; }
#else
const lconvert::Isa* lconvert::isa_baseline() { return nullptr; }
#endif
