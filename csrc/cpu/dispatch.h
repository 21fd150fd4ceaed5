// cpu/: the kernels of each instruction set, one text compiled once for each, and the choice among
// them.
#pragma once

#include <string>
#include <vector>

#include "engine/kernels.h"

namespace fusedopt {

// The kernels that this machine can run, best first.
const std::vector<const Kernels*>& available_kernels();
// Those of the named instruction set; std::runtime_error lists the valid names for any other.
const Kernels& kernels_named(const std::string& isa);
// The named rule with these flags; std::runtime_error if there is none.
const Rule& find_rule(const Kernels& kernels, const std::string& name, int flags);

}  // namespace fusedopt
