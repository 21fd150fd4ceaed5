// The kernels' conversions between dtypes, held against the slow ones of elements.h.
#pragma once

#include <vector>

#include "elements.h"
#include "trial.h"

namespace machines {

// Pairs of elements of two dtypes, and their sums in the first one.
struct Sums {
  DType param, grad;
  std::vector<uint64_t> params, grads, expected;

  Sums(DType param, DType grad) : param(param), grad(grad) {}
  void add(uint64_t param_bits, uint64_t grad_bits) {
    params.push_back(param_bits);
    grads.push_back(grad_bits);
    double sum = value(param_bits, param) + value(grad_bits, grad);
    // In double precision, 16-bit elements go through float.
    if (grad == f64 && item_size(param) == 2) sum = value(nearest(sum, f32), f32);
    expected.push_back(nearest(sum, param));
  }
  // The element converted to the dtype of the parameter: -0 + x is x, of zeros too.
  void convert(uint64_t bits) { add(format(param).sign(), bits); }
};

// Every 16-bit element; and around every one of them, those on which rounding to 16 bits turns.
inline void add_sums_of_half(DType half, std::vector<Sums>& all) {
  Sums to_f32(f32, half), to_f64(f64, half), from_f32(half, f32), from_f64(half, f64);
  Sums in_half(half, half);
  const Format f = format(half);
  for (uint64_t bits = 0; bits < 65536; ++bits) {
    to_f32.convert(bits);
    to_f64.convert(bits);
    const uint64_t magnitude = bits & (f.sign() - 1);
    if (magnitude >= f.infinity()) continue;
    // Above the largest element, too, as if there were another: from there on it is infinity.
    const double x = value(bits, half);
    const double half_step = magnitude + 1 < f.infinity() ? (value(bits + 1, half) - x) / 2
                                                          : (x - value(bits - 1, half)) / 2;
    const uint64_t m32 = nearest(x + half_step, f32), m64 = nearest(x + half_step, f64);
    const uint64_t step = nearest(half_step, half);
    from_f32.convert(nearest(x, f32));
    for (const int64_t near : {-1, 0, 1}) {
      from_f32.convert(m32 + near);
      from_f64.convert(m64 + near);
      // (The smallest subnormals have no half.)
      if ((step & (f.sign() - 1)) > 1) in_half.add(bits, step + near);
    }
  }
  for (uint64_t i = 0; i < 50000; ++i) from_f32.convert(mix(i) >> 32);
  for (uint64_t i = 0; i < 20000; ++i) from_f64.convert(mix(i));
  all.insert(all.end(), {to_f32, to_f64, from_f32, from_f64, in_half});
}

inline std::vector<Sums> make_sums() {
  std::vector<Sums> all;
  add_sums_of_half(bf16, all);
  add_sums_of_half(f16, all);
  Sums to_f64(f64, f32), to_f32(f32, f64);
  for (uint64_t i = 0; i < 20000; ++i) {
    to_f64.convert(mix(i) >> 32);
    to_f32.convert(mix(i));
    // Half-way between two floats, and next to it.
    const uint64_t half_way = nearest(value(mix(i) >> 32, f32), f64) | 1u << 28;
    for (const int64_t near : {-1, 0, 1}) to_f32.convert(half_way + near);
  }
  all.insert(all.end(), {to_f64, to_f32});
  return all;
}

// The rule "sgd" with lr -1 adds the gradient to the parameter.
inline void check_sums(const Rule& sgd, const Sums& sums) {
  const int64_t n = static_cast<int64_t>(sums.params.size());
  Array param(sums.param, n, 0), grad(sums.grad, n, 1);
  for (int64_t i = 0; i < n; ++i) {
    param.set(i, sums.params[i]);
    grad.set(i, sums.grads[i]);
  }
  const double scalars[] = {/*weight_decay=*/0, /*lr=*/-1};
  const Stream streams[] = {{param.at(0), param.dtype()}, {grad.at(0), grad.dtype()}};
  const bool in_double = sums.param == f64 || sums.grad == f64;
  const void* const next[] = {param.at(0), grad.at(0)};
  (in_double ? sgd.update_f64 : sgd.update_f32)(scalars, 1, streams, {}, 0, n, next);
  for (int64_t i = 0; i < n; ++i) {
    const uint64_t got = canonical(param.get(i), param.dtype());
    if (got == sums.expected[i]) continue;
    fail("%s %llx + %s %llx is %llx, expected %llx", name(sums.param),
         static_cast<unsigned long long>(sums.params[i]), name(sums.grad),
         static_cast<unsigned long long>(sums.grads[i]), static_cast<unsigned long long>(got),
         static_cast<unsigned long long>(sums.expected[i]));
    return;
  }
}

}  // namespace machines
