// An argument of a kernel: a vector, or the unevaluated sum of two where temperature or bias must
// not cost bits.
#pragma once

namespace softmaxlib {
namespace SOFTMAX_ISA {
namespace {

template <class V>
struct Pair {
  V hi, lo;
};

template <class V>
inline V high(V x) {
  return x;
}
template <class V>
inline V high(Pair<V> x) {
  return x.hi;
}

// What is left of x beside y: zero for a plain vector.
template <class V>
inline V plus_low(V y, V) {
  return y;
}
template <class V>
inline V plus_low(V y, Pair<V> x) {
  return y + x.lo;
}

template <class V>
inline V select_value(typename V::Mask m, V a, V b) {
  return select(m, a, b);
}
template <class V>
inline Pair<V> select_value(typename V::Mask m, Pair<V> a, Pair<V> b) {
  return {select(m, a.hi, b.hi), select(m, a.lo, b.lo)};
}

}  // namespace
}  // namespace SOFTMAX_ISA
}  // namespace softmaxlib
