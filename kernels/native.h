// What the bindings share: the kernels of an instruction set by name.
#pragma once
#include <string>

#include "table.h"

namespace lconvert {

// One that runs on this machine; std::invalid_argument for another name.
const Isa& find_isa(const std::string& name);

}  // namespace lconvert
