// Doubles, one for every lane of a vector.
#pragma once

namespace softmaxlib {
namespace SOFTMAX_ISA {
namespace {

template <class V>
struct InLanes;
template <>
struct InLanes<f32x16> {
  f64x8 low, high;
  static InLanes of(f32x16 v) { return {widen_low(v), widen_high(v)}; }
  f32x16 value() const { return narrow(low, high); }
  template <class F>
  InLanes map(F f) const {
    return {f(low), f(high)};
  }
  template <class F>
  void with(InLanes other, F f) const {
    f(low, other.low);
    f(high, other.high);
  }
};
template <>
struct InLanes<f64x8> {
  f64x8 all;
  static InLanes of(f64x8 v) { return {v}; }
  f64x8 value() const { return all; }
  template <class F>
  InLanes map(F f) const {
    return {f(all)};
  }
  template <class F>
  void with(InLanes other, F f) const {
    f(all, other.all);
  }
};

inline InLanes<f32x16> operator+(InLanes<f32x16> a, InLanes<f32x16> b) {
  return {a.low + b.low, a.high + b.high};
}
inline InLanes<f32x16> operator-(InLanes<f32x16> a, InLanes<f32x16> b) {
  return {a.low - b.low, a.high - b.high};
}
inline InLanes<f32x16> operator*(InLanes<f32x16> a, InLanes<f32x16> b) {
  return {a.low * b.low, a.high * b.high};
}
inline InLanes<f64x8> operator+(InLanes<f64x8> a, InLanes<f64x8> b) { return {a.all + b.all}; }
inline InLanes<f64x8> operator-(InLanes<f64x8> a, InLanes<f64x8> b) { return {a.all - b.all}; }
inline InLanes<f64x8> operator*(InLanes<f64x8> a, InLanes<f64x8> b) { return {a.all * b.all}; }

inline InLanes<f32x16> operator/(InLanes<f32x16> a, InLanes<f32x16> b) {
  return {a.low / b.low, a.high / b.high};
}
inline InLanes<f64x8> operator/(InLanes<f64x8> a, InLanes<f64x8> b) { return {a.all / b.all}; }

template <class V>
SOFTMAXLIB_INLINE InLanes<V> in_double(V v) {
  return InLanes<V>::of(v);
}
template <class V>
SOFTMAXLIB_INLINE InLanes<V> in_double(InLanes<V> v) {
  return v;
}

inline double first(InLanes<f32x16> v) { return first(v.low); }
inline double first(InLanes<f64x8> v) { return first(v.all); }

inline void load_lanes(const double* p, InLanes<f32x16>& v) { v = {load(p), load(p + 8)}; }
inline void load_lanes(const double* p, InLanes<f64x8>& v) { v = {load(p)}; }
inline void store_lanes(double* p, InLanes<f32x16> v) {
  store(p, v.low);
  store(p + 8, v.high);
}
inline void store_lanes(double* p, InLanes<f64x8> v) { store(p, v.all); }

}  // namespace
}  // namespace SOFTMAX_ISA
}  // namespace softmaxlib
