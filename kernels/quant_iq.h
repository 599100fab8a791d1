// IQ1, IQ2, IQ3: groups of 4 or 8 values snapped to a point of a lattice. Layouts and meaning: reference/iq.py.
#pragma once
#include "dequant_iq.h"
#include "quant_iq1.h"
#include "quant_iq23.h"
