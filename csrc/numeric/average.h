// Sums that forget: moving averages, and momentum. Included inside a back end's namespace. Readable
// spec: python/fusedopt/_numeric.py

template <class T>
constexpr T kLargest = std::numeric_limits<T>::max();
template <class T>
constexpr T kEpsilon = std::numeric_limits<T>::epsilon();  // what T resolves beside 1

// (1 - forget) * sum + x. Rounded, 1 - forget would have lost most digits of what little is
// forgotten, and the sum of a constant x would come to rest beside x / forget: so forget itself is
// what is rounded.
template <class V, class T>
FUSEDOPT_FN V accumulate(V sum, V x, T forget) {
  return sum - sum * forget + x;
}

// (1 - weight) * average + weight * g * g, which overflows only where that is itself too large; and
// an average that did counts as the largest number, so that it comes down again. It changes by one
// difference, rounded once as a part of it.
template <class V, class T>
FUSEDOPT_FN V average_square(V average, V g, T weight) {
  // With weight 1, all is forgotten, and no difference has to be taken to find that out.
  const V finite = min(average, weight < T(1) ? kLargest<T> : T(0));
  return finite + ((g * weight) * g - finite * weight);
}
