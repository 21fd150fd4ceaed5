// What kernel.cu offers; where it was not compiled, none.cpp does.
#pragma once

#include <string>
#include <vector>

#include "cuda/tables.h"

namespace fusedopt {
namespace cuda {

const Kernels* compiled_kernels();  // null if there are none
int driver_version();               // as 1000 * major + 10 * minor; 0 without a driver
std::vector<std::string> device_names();

}  // namespace cuda
}  // namespace fusedopt
