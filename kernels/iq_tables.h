// The lattices of IQ1, IQ2 and IQ3 and the neighbours of what is not on them, shared by all instruction sets.
//
// A group of levels is written as a "code": its digits (2 bits for IQ1 and IQ2, 3 for IQ3) are the levels, lowest
// first. Specification: reference/iq_tables.py.
#pragma once
#include <cstdint>

namespace lconvert {

enum class LatticeName { iq2_xxs, iq2_xs, iq2_s, iq1, iq3_xxs, iq3_s };

// Lists are padded to a multiple of this length.
constexpr int kListRead = 16;

struct Lattice {
    const uint16_t* points;  // code of every index
    const int8_t* values;    // what its levels stand for, one row of 4 or 8 per index
    const int32_t* place;    // of every code: its index, or ~offset of its list
    const uint16_t* lists;   // each a length, then the codes of the neighbours, the last one repeated
};

// Built at the first call (tens of milliseconds at most); threads may call it at once.
const Lattice& lattice(LatticeName name);

}  // namespace lconvert
