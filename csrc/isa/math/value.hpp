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

inline f64x8 widen_sum(f32x16 x) { return widen_low(x) + widen_high(x); }
inline f64x8 widen_sum(f64x8 x) { return x; }
template <class V>
inline f64x8 widen_sum(Pair<V> x) {
  return widen_sum(x.hi) + widen_sum(x.lo);
}

template <class V>
inline Pair<V> operator+(Pair<V> a, Pair<V> b) {
  return {a.hi + b.hi, a.lo + b.lo};
}

// A number of elements that the compiler knows.
template <int kCount>
struct Elements {
  constexpr operator int() const { return kCount; }
};

}  // namespace
}  // namespace SOFTMAX_ISA
}  // namespace softmaxlib
