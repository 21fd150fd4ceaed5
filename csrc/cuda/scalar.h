// The functions of rules for one element; numeric/vec.h has them for a register. Included inside a
// back end's namespace, after FUSEDOPT_FN is defined.
#pragma once

FUSEDOPT_FN float sqrt(float x) { return ::sqrtf(x); }  // correctly rounded, on a device too
FUSEDOPT_FN double sqrt(double x) { return ::sqrt(x); }
FUSEDOPT_FN double pow(double x, double y) { return ::pow(x, y); }

template <class T>
FUSEDOPT_FN T max(T a, T b) {
  return a > b || a != a ? a : b;
}
template <class T>
FUSEDOPT_FN T min(T a, T b) {
  return a > b ? b : a;
}
template <class T>
FUSEDOPT_FN T sign(T x) {
  return x > 0 ? T(1) : (x < 0 ? T(-1) : T(0));
}
