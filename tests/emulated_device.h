// What tests ask of tests/emulated_device.cpp beside its kernels.
#pragma once

#include "cuda/kernel.h"

namespace fusedopt {
namespace cuda {

// "emulated"; "idle", which launches nothing; "outdated", which takes no kernels; or null.
const Kernels* emulated_kernels(const std::string& name);

// The elements [first, second) of a tile.
std::pair<int64_t, int64_t> elements_of_tile(int64_t numel, int64_t number);

// The number of the item that a unit belongs to, by where the items begin.
int64_t item_of_unit(const std::vector<int64_t>& begins, int64_t unit);

}  // namespace cuda
}  // namespace fusedopt
