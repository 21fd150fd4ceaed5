// What tests ask of tests/emulated_device.cpp beside its kernels.
#pragma once

#include "cuda/kernel.h"

namespace fusedopt {
namespace cuda {

// "emulated"; "idle", which launches nothing; "outdated", which takes no kernels; or null.
const Kernels* emulated_kernels(const std::string& name);

// The elements [first, second) of each group of a tile; `width` elements are a group.
std::vector<std::pair<int64_t, int64_t>> ranges_of_tile(uintptr_t address, DType dtype, int width,
                                                        int64_t numel, int64_t tile);

// The number of the item that a unit belongs to, by where the items begin.
int64_t item_of_unit(const std::vector<int64_t>& begins, int64_t unit);

}  // namespace cuda
}  // namespace fusedopt
