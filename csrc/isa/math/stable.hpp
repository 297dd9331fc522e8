// StableMax's s(x) = x + 1 for x >= 0, 1 / (1 - x) for x < 0 (Prieto et al., 2025), in units of
// 2^reference, so that neither the largest nor the smallest s leaves the range of a float.
//
//   max error 1.5 ULP (two roundings for x < 0)
#pragma once

#include "isa/math/log.hpp"
#include "isa/math/value.hpp"

namespace softmaxlib {
namespace SOFTMAX_ISA {
namespace {

template <class V>
inline V sign_of(V x) {
  return from_bits(bits(x) & V::Int::set1(LogConstants<V>::kSignBit));
}
template <class V>
inline V with_sign_of(V magnitude, V x) {
  return from_bits(bits(magnitude) ^ bits(sign_of(x)));
}

// |x| as a vector and what it leaves: x's low part, turned along with it.
template <class V>
inline Pair<V> magnitude(V x) {
  return {with_sign_of(x, x), V::set1(0)};
}
template <class V>
inline Pair<V> magnitude(Pair<V> x) {
  return {with_sign_of(x.hi, x.hi), with_sign_of(x.lo, x.hi)};
}

// So that the sign of the high part is the sign of the sum: where temperature and bias cancel, the
// low part of an argument may be the larger one.
template <class V>
inline V normalized(V x) {
  return x;
}
template <class V>
inline Pair<V> normalized(Pair<V> x) {
  const V zero = V::set1(0), hi = x.hi + x.lo, tail = hi - x.hi;
  const V lo = (x.hi - (hi - tail)) + (x.lo - tail);
  return {hi, select(eq(hi - hi, zero), lo, zero)};
}

template <class Vector>
class Stable {
 public:
  using V = Vector;
  using Term = V;
  static constexpr bool kFollows = false;
  // Sums of four float terms may exceed float; of doubles, the reference sees to that.
  static constexpr bool kWide = sizeof(typename V::elem) == 4;

  explicit Stable(int reference) : unit_(static_cast<typename V::elem>(power_of_two(-reference))) {}

  template <class X>
  SOFTMAXLIB_INLINE V operator()(X argument) const {
    const X x = normalized(argument);
    const Pair<V> a = magnitude(x);
    const V u = (V::set1(1) + a.hi) + a.lo;
    return select(gt(V::set1(0), high(x)), V::set1(unit_) / u, V::set1(unit_) * u);
  }
  template <int N, class X>
  SOFTMAXLIB_INLINE void evaluate(const X* x, V* y) const {
    for (int j = 0; j < N; ++j) y[j] = (*this)(x[j]);
  }

 private:
  typename V::elem unit_;
};

}  // namespace
}  // namespace SOFTMAX_ISA
}  // namespace softmaxlib
