// Vector-Jacobian products. With z = x scale, G the gradient that comes in, y the result:
//
//   softmax        y (G - sum of y G) scale
//   log_softmax    (G - e^log_y sum of G) scale
//   logsumexp      G e^(z - result) scale, without a sum
//   stablemax      y (G - sum of y G) scale / (1 + |z|), as d log s / dz = 1 / (1 + |z|)
//   log_stablemax  (G - e^log_y sum of G) scale / (1 + |z|)
//
// Exactly 0 where y is 0 (log_y -inf) or `where` is false: such elements are not in the sum either,
// whatever G holds there. Sums and products are in double, rounded once; log_softmax of floats
// without temperature subtracts in float: what cancels does so exactly.
#pragma once

#include "kernels/batch.hpp"
#include "kernels/softmax_pipelined.hpp"
#include "kernels/state.hpp"

namespace softmaxlib {
namespace SOFTMAX_ISA {
namespace {

template <softmaxlib_function kFunction>
struct GradientOf {
  static constexpr bool kReduces = kFunction == SOFTMAXLIB_LOGSUMEXP;
  static constexpr bool kLog =
      kFunction == SOFTMAXLIB_LOG_SOFTMAX || kFunction == SOFTMAXLIB_LOG_STABLEMAX;
  static constexpr bool kStable =
      kFunction == SOFTMAXLIB_STABLEMAX || kFunction == SOFTMAXLIB_LOG_STABLEMAX;
  static constexpr bool kReadsX = kStable || kReduces;
};

// a b 2^exponent = value more; more is a power of two, and 1 where value alone is in range.
struct WideProduct {
  double value, more;

  WideProduct(double a, double b, int exponent) {
    constexpr int kMost = 1000;
    int of_a, of_b;
    const double m = split_exponent(a, &of_a) * split_exponent(b, &of_b);
    const int k = of_a + of_b + exponent;
    const int first = k > kMost ? kMost : k < -kMost ? -kMost : k;
    value = m * power_of_two(first);
    more = power_of_two(k - first > -kMost ? k - first : -kMost);
  }
};

// What Exp's results are multiplied by.
template <class V>
inline double exp_unit() {
  return power_of_two(-Exp<V, Use::kExact>::kBias);
}

// e^(hi + lo) in double, under a reference.
SOFTMAXLIB_INLINE InLanes<f32x16> exp_under(Pair<f32x16> x, int reference) {
  const Pair<f32x16> e = Exp<f32x16, Use::kExact>(reference)(x);
  const f64x8 unit = f64x8::set1(exp_unit<f32x16>() * power_of_two(reference));
  return {(widen_low(e.hi) + widen_low(e.lo)) * unit, (widen_high(e.hi) + widen_high(e.lo)) * unit};
}

// `usual`, but f(e^x) where x is so small that the exponential is about to leave the range of
// float: there it is taken under a reference of its own.
template <class X, class F>
SOFTMAXLIB_INLINE InLanes<f32x16> if_small(X x, InLanes<f32x16> usual, F f) {
  constexpr float kSmall = -80;
  constexpr int kReference = -160;
  if (!any(gt(f32x16::set1(kSmall), high(x)))) return usual;
  const InLanes<f32x16> small = f(exp_under(to_pair(x), kReference));
  const InLanes<f32x16> z = InLanes<f32x16>::of(high(x));
  const f64x8 limit = f64x8::set1(static_cast<double>(kSmall));
  return {select(gt(limit, z.low), small.low, usual.low),
          select(gt(limit, z.high), small.high, usual.high)};
}
SOFTMAXLIB_INLINE InLanes<f32x16> exp_wide(Pair<f32x16> x) {
  return if_small(x, exp_under(x, 0), [](InLanes<f32x16> of_small) { return of_small; });
}
SOFTMAXLIB_INLINE InLanes<f64x8> exp_wide(Pair<f64x8> x) {
  return {Exp<f64x8, Use::kExact>(0)(x) * f64x8::set1(exp_unit<f64x8>())};
}

// g - e^x total; e^x as a pair, so that near 1 what it lacks is not lost.
template <class V>
class LessExp;
template <>
class LessExp<f32x16> {
 public:
  explicit LessExp(InLanes<f32x16> total) : total_(total) {}

  SOFTMAXLIB_INLINE InLanes<f32x16> operator()(f32x16 g, f32x16 x) const {
    const Pair<f32x16> e = Exp<f32x16, Use::kExact>(0)(Pair<f32x16>{x, f32x16::set1(0)});
    const f64x8 unit = f64x8::set1(exp_unit<f32x16>());
    const f64x8 low = total_.low * unit, high = total_.high * unit;
    const InLanes<f32x16> d = {
        fnma(widen_low(e.lo), low, fnma(widen_low(e.hi), low, widen_low(g))),
        fnma(widen_high(e.lo), high, fnma(widen_high(e.hi), high, widen_high(g)))};
    return if_small(x, d, [&](InLanes<f32x16> of_small) {
      return InLanes<f32x16>{fnma(of_small.low, total_.low, widen_low(g)),
                             fnma(of_small.high, total_.high, widen_high(g))};
    });
  }

 private:
  InLanes<f32x16> total_;
};
template <>
class LessExp<f64x8> {
 public:
  // The unit of the exponential goes to whichever of the two it does not carry below the range.
  explicit LessExp(InLanes<f64x8> total) {
    const f64x8 unit = f64x8::set1(exp_unit<f64x8>()), one = f64x8::set1(1);
    const auto is_small = gt(f64x8::set1(0x1p-900), magnitude(total.all).hi);
    of_exp_ = select(is_small, unit, one);
    total_ = total.all * select(is_small, one, unit);
  }
  SOFTMAXLIB_INLINE InLanes<f64x8> operator()(f64x8 g, f64x8 x) const {
    const f64x8 e = Exp<f64x8>(0)(Pair<f64x8>{x, f64x8::set1(0)}) * of_exp_;
    return {fnma(e, total_, g)};
  }

 private:
  f64x8 of_exp_, total_;
};

// e^z times the gradient that comes in, which is one of the row, and the scale. Where e^z alone is
// below the range of double their product may be in it.
struct RowGradient {
  WideProduct of_double;
  double factor;

  RowGradient(double gradient, const Affine& a)
      : of_double(gradient, a.factor, a.exponent - Exp<f64x8>::kBias), factor(gradient) {}

  SOFTMAXLIB_INLINE InLanes<f32x16> times_exp(Pair<f32x16> z, double scale) const {
    return exp_wide(z) * in_all(factor, f32x16()) * in_all(scale, f32x16());
  }
  SOFTMAXLIB_INLINE InLanes<f64x8> times_exp(Pair<f64x8> z, double) const {
    const f64x8 e = Exp<f64x8>(0)(z);
    return {e * f64x8::set1(of_double.value) * f64x8::set1(of_double.more)};
  }
};

inline void add_products(Lanes<f32x16>& lanes, f32x16 a, f32x16 b) {
  lanes.add(widen_low(a) * widen_low(b) + widen_high(a) * widen_high(b));
}
inline void add_products(Lanes<f64x8>& lanes, f64x8 a, f64x8 b) {
  const f64x8 product = a * b;
  lanes.error = lanes.error + fma(a, b, f64x8::set1(0) - product);
  lanes.add(product);
}
inline void add_values(Lanes<f32x16>& lanes, f32x16 a) { lanes.add(widen_low(a) + widen_high(a)); }
inline void add_values(Lanes<f64x8>& lanes, f64x8 a) { lanes.add(a); }

// What gradients are multiplied by: the same in all rows, but where each has its own temperature.
struct GradientScale {
  Affine affine;
  double unit;  // of the gradient that comes in, and so of its sum
  WideProduct factor;
  // Of doubles, the power of two in a factor above 1 goes to y first, exactly: that product is in
  // range, the one with the rest may not be. Products of floats are in the range of double anyhow.
  double early;

  explicit GradientScale(const Affine& a, double of_gradient = 1)
      : affine(a), unit(of_gradient), factor(a.factor, 1 / unit, a.exponent) {
    int exponent;
    split_exponent(factor.value, &exponent);
    early = exponent < 1 ? 1 : power_of_two(exponent - 1);
  }

  bool is_one() const { return affine.factor == 1 && affine.exponent == 0; }
};

// Sums of floats are of groups of four in float, those in double (quick_sum() below). Whether that is
// enough: no element was beyond the range of float, and none that counts below it.
template <class V>
SOFTMAXLIB_INLINE typename V::Mask is_trusted(InLanes<V> sum) {
  using T = typename V::elem;
  const V size = magnitude(sum.value()).hi;
  const V below = select(gt(V::set1(static_cast<T>(0x1p56)), size), size, V::set1(0));
  return gt(below, V::set1(static_cast<T>(0x1p-64)));
}
template <class V>
SOFTMAXLIB_INLINE bool all_trusted(InLanes<V> sum) {
  return sizeof(typename V::elem) == 8 ||
         !any(gt(select(is_trusted(sum), V::set1(0), V::set1(1)), V::set1(0)));
}

// Of doubles the sum, or what it is subtracted from, may leave the range where the result does not.
// Then all of the row is computed in a smaller unit.
constexpr double kSmallUnit = 0x1p-64, kLargeSum = 0x1p960;
inline bool needs_smaller_unit(double sum) {
  const double size = sum < 0 ? -sum : sum;
  return !(size <= kLargeSum);
}

// d scale / (1 + |x scale|), d being in the row's unit.
template <class V>
class StableSlope {
 public:
  explicit StableSlope(const GradientScale& s) {
    const double scale = s.affine.rounded();
    if (scale >= 0x1p-900) {  // d / (1 / scale + |x|), where neither product can leave the range
      const double half = s.unit == 1 ? 1 : 0x1p32;
      before_ = after_ = half;
      plus_ = 1 / scale;
      times_ = 1;
    } else {
      before_ = scale / s.unit;
      plus_ = after_ = 1;
      times_ = scale;
    }
  }
  InLanes<f32x16> operator()(InLanes<f32x16> d, InLanes<f32x16> x) const {
    return {of(d.low, x.low), of(d.high, x.high)};
  }
  InLanes<f64x8> operator()(InLanes<f64x8> d, InLanes<f64x8> x) const { return {of(d.all, x.all)}; }

 private:
  f64x8 of(f64x8 d, f64x8 x) const {
    const f64x8 slope = f64x8::set1(plus_) + magnitude(x).hi * f64x8::set1(times_);
    return d * f64x8::set1(before_) / slope * f64x8::set1(after_);
  }

  double before_, plus_, times_, after_;
};

// The gradient of an element, from the sum of its row: one row's, or that of a row per lane.
template <softmaxlib_function kFunction, class Vector>
class ElementGradient {
 public:
  using Of = GradientOf<kFunction>;
  using V = Vector;
  using T = typename V::elem;

  ElementGradient() = default;
  // sum: for logsumexp the gradient that comes in, and `result` its result.
  ElementGradient(const GradientScale& scale, InLanes<V> sum, double result = 0)
      : scale_(&scale), sum_(sum), result_(result) {
    if constexpr (kMayBePlain) {
      hi_ = sum.value();
      lo_ = (sum - InLanes<V>::of(hi_)).value();
      if (Of::kLog) hi_ = hi_ * V::set1(kUnit), lo_ = lo_ * V::set1(kUnit);
      is_plain_ = scale.is_one() && all_trusted(sum);
    }
  }

  SOFTMAXLIB_INLINE V operator()(V g, V result, V z) const {
    if constexpr (kMayBePlain)
      if (is_plain_) return in_floats(g, result);
    V d = in_doubles(g, result, z);
    if constexpr (kMayBePlain)
      if (scale_->is_one()) d = select(is_trusted(sum_), in_floats(g, result), d);
    return number(d);
  }
  // f(what computes an element): for loops, which have the choice behind them.
  template <class F>
  SOFTMAXLIB_INLINE void with(F f) const {
    if constexpr (kMayBePlain)
      if (is_plain_) return f(InFloats{hi_, lo_});
    f(*this);
  }
  // All rows at once.
  bool is_plain() const { return is_plain_; }
  InLanes<V> sums() const { return sum_; }
  const GradientScale& scale() const { return *scale_; }
  V hi() const { return hi_; }
  V lo() const { return lo_; }

  // The sum in two parts; of logarithms in units of an exponential.
  struct InFloats {
    V hi, lo;
    SOFTMAXLIB_INLINE V operator()(V g, V result, V) const {
      return in_floats(g, result, hi, lo);
    }
  };

  // Floats will do where there is nothing to multiply by and the sum is trusted: what cancels does
  // so exactly.
  static constexpr bool kMayBePlain = sizeof(T) == 4 && !Of::kStable && !Of::kReduces;

 private:
  static constexpr bool kDouble = sizeof(T) == 8;
  static constexpr T kUnit = static_cast<T>(0x1p-60);

  static SOFTMAXLIB_INLINE V in_floats(V g, V result, V hi, V lo) {
    if constexpr (Of::kLog) {
      static_assert(Exp<f32x16, Use::kExact>::kBias == 60, "kUnit");
      const Pair<V> e = Exp<V, Use::kExact>(0)(Pair<V>{result, V::set1(0)});
      return number(fnma(e.hi, hi, g) - fma(e.lo, hi, e.hi * lo));
    } else {
      return number(result * ((g - hi) - lo));
    }
  }
  SOFTMAXLIB_INLINE V in_floats(V g, V result) const { return in_floats(g, result, hi_, lo_); }
  static SOFTMAXLIB_INLINE V number(V d) {  // the sign of a NaN is not ours
    return select(eq(d, d), d, V::set1(static_cast<T>(NAN)));
  }
  static SOFTMAXLIB_INLINE f32x16 in_unit(f32x16 g, double) { return g; }
  static SOFTMAXLIB_INLINE f64x8 in_unit(f64x8 g, double unit) { return g * f64x8::set1(unit); }
  SOFTMAXLIB_INLINE V in_doubles(V g, V result, V z) const {
    const GradientScale& s = *scale_;
    if constexpr (Of::kReduces) {
      Affine affine = s.affine;
      affine.shift = result_;
      const Pair<V> under = combine_wide(z, in_all(0, V()), affine);
      return RowGradient(low_of(sum_), affine).times_exp(under, affine.rounded()).value();
    } else {
      InLanes<V> d;
      g = in_unit(g, s.unit);
      const InLanes<V> y = InLanes<V>::of(result);
      if constexpr (Of::kLog) d = LessExp<V>(sum_)(g, result);
      else if constexpr (Of::kStable || !kDouble) d = y * (InLanes<V>::of(g) - sum_);
      else d = y * in_all(s.early, V()) * (InLanes<V>::of(g) - sum_);
      if constexpr (Of::kStable) return StableSlope<V>(s)(d, InLanes<V>::of(z)).value();
      const double early = !kDouble || Of::kLog ? 1 : s.early;
      d = d * in_all(s.factor.value / early, V());
      return kDouble ? (d * in_all(s.factor.more, V())).value() : d.value();
    }
  }
  static double low_of(InLanes<f32x16> x) { return first(x.low); }
  static double low_of(InLanes<f64x8> x) { return first(x.all); }

  const GradientScale* scale_;
  InLanes<V> sum_;
  double result_;
  V hi_, lo_;
  bool is_plain_ = false;
};

// What an element takes part with. Zeros where it takes none: where `where` is false or, but for
// logsumexp, its probability is 0.
template <softmaxlib_function kFunction, class V, class Mask>
SOFTMAXLIB_INLINE V of_visible(V v, V result, const Mask* in) {
  using T = typename V::elem;
  const V none = V::set1(static_cast<T>(GradientOf<kFunction>::kLog ? -INFINITY : 0));
  v = select(eq(result, none), V::set1(0), v);
  return in ? select(*in, v, V::set1(0)) : v;
}

// The sum of a group of elements and one more, in float. Where a probability is 0 and what comes in
// infinite or NaN the sum is NaN, and not trusted.
template <softmaxlib_function kFunction, class V>
SOFTMAXLIB_INLINE V plus_element(V group, bool is_first, V g, V result) {
  using T = typename V::elem;
  if constexpr (GradientOf<kFunction>::kLog) {
    g = select(eq(result, V::set1(static_cast<T>(-INFINITY))), V::set1(0), g);
    return is_first ? g : group + g;
  } else {
    return is_first ? g * result : fma(g, result, group);
  }
}

// Part of a row, all of whose operands are contiguous. kOver: up to a vector may be read beyond it.
template <softmaxlib_function kFunction, class Vector, bool kOver>
struct GradientPiece {
  using Of = GradientOf<kFunction>;
  using V = Vector;
  using T = typename V::elem;
  static constexpr int kLanes = V::lanes;
  static constexpr T kNone = static_cast<T>(Of::kLog ? -INFINITY : 0);

  const T *grad, *y, *x;  // those that the function has
  const uint8_t* where;   // NULL: all

  // Every product and sum in double.
  SOFTMAXLIB_NOINLINE Lanes<V> careful_sum(int64_t n, double unit) const {
    Lanes<V> lanes;
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
      prefetch_from(i);
      add_vector(lanes, i, kLanes, unit);
    }
    if (i < n) add_vector(lanes, i, static_cast<int>(n - i), unit);
    return lanes;
  }
  // Groups of four in float.
  SOFTMAXLIB_INLINE Lanes<V> quick_sum(int64_t n) const {
    Lanes<V> lanes;
    constexpr int64_t kGroup = kVectorsPerGroup * kLanes;
    int64_t i = 0;
    for (; i + kGroup <= n; i += kGroup) {
      V group = V::set1(0);
      for (int j = 0; j < kVectorsPerGroup; ++j) {
        prefetch_from(i + j * kLanes);
        group = plus_vector(group, j == 0, i + j * kLanes, kLanes);
      }
      lanes.add(widen_sum(group));
    }
    if (i == n) return lanes;
    V group = V::set1(0);
    for (int64_t j = i; j < n; j += kLanes) {
      prefetch_from(j);
      group = plus_vector(group, j == i, j, n - j < kLanes ? static_cast<int>(n - j) : kLanes);
    }
    lanes.add(widen_sum(group));
    return lanes;
  }
  SOFTMAXLIB_INLINE Lanes<V> sum(int64_t n) const {
    if constexpr (sizeof(T) == 4) return quick_sum(n);
    else return careful_sum(n, 1);
  }

  // The results of up to a vector of elements.
  template <class F>
  SOFTMAXLIB_INLINE V results(int64_t i, int count, const F& element) const {
    V g = V::set1(0), result = g, z = g;
    if constexpr (!Of::kReduces) {
      g = load_some(grad, i, count, 0);
      result = load_some(y, i, count, 0);
    }
    if constexpr (Of::kReadsX) z = load_some(x, i, count, 0);
    const V d = element(g, result, z);
    if constexpr (Of::kReduces) {
      const auto none = eq(z, V::set1(static_cast<T>(-INFINITY)));
      result = select(none, V::set1(0), V::set1(1));
    }
    return masked(d, result, i, count);
  }
  // out: n elements, streamed from the first aligned vector on; what is left at the ends: to edge.
  void write(T* out, int64_t n, const ElementGradient<kFunction, V>& element, Edge<T>* edge) const {
    element.with([&](auto f) SOFTMAXLIB_INLINE_LAMBDA { write_each(out, n, f, edge); });
  }

 private:
  template <class F>
  SOFTMAXLIB_INLINE void write_each(T* out, int64_t n, F element, Edge<T>* edge) const {
    const auto at = [element, piece = *this](int64_t i, int count)
                        SOFTMAXLIB_INLINE_LAMBDA { return piece.results(i, count, element); };
    // A copy of at: the loop's own stays in registers only if its address goes nowhere.
    const auto some = [at](int64_t i, int64_t count)
                          SOFTMAXLIB_NOINLINE_LAMBDA { return at(i, static_cast<int>(count)); };
    const bool streaming = edge;
    int64_t i = 0;
    constexpr int64_t kItem = sizeof(T), kVector = kLanes * kItem;
    const int64_t past = static_cast<int64_t>(reinterpret_cast<uintptr_t>(out)) % kVector;
    if (streaming && past) {
      i = (kVector - past) / kItem;
      edge->end(out, some(0, i), static_cast<int>(i));
    }
    for (; i + kLanes <= n; i += kLanes) {
      const V d = at(i, kLanes);
      if (streaming) stream(out + i, d);
      else store(out + i, d);
    }
    if (i == n) return;
    const int count = static_cast<int>(n - i);
    if (streaming) edge->begin(out + i, some(i, count), count);
    else store_n(out + i, some(i, count), count);
  }
  static V load_some(const T* p, int64_t i, int n, T fill) {
    if (n == kLanes) return load(p + i);
    if constexpr (!kOver) return load_n(p + i, n, fill);
    constexpr T kLane[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return select(gt(V::set1(static_cast<T>(n)), load(kLane)), load(p + i), V::set1(fill));
  }
  SOFTMAXLIB_INLINE V masked(V v, V result, int64_t i, int n) const {
    using Mask = typename V::Mask;
    if (!where) return of_visible<kFunction>(v, result, static_cast<const Mask*>(nullptr));
    Mask in;
    if (kOver || n == kLanes) {
      in = load_mask(where + i, v);
    } else {
      uint8_t bytes[kLanes] = {};
      memcpy(bytes, where + i, static_cast<size_t>(n));
      in = load_mask(bytes, v);
    }
    return of_visible<kFunction>(v, result, &in);
  }
  static SOFTMAXLIB_INLINE f32x16 in_unit(f32x16 g, double) { return g; }
  static SOFTMAXLIB_INLINE f64x8 in_unit(f64x8 g, double unit) { return g * f64x8::set1(unit); }
  // Rows are written between two looks at memory.
  SOFTMAXLIB_INLINE void prefetch_from(int64_t i) const {
    constexpr int64_t kAhead = kPrefetchBytes / static_cast<int64_t>(sizeof(T));
    prefetch(y + i + kAhead);
    prefetch(grad + i + kAhead);
    if constexpr (Of::kReadsX) prefetch(x + i + kAhead);
  }
  SOFTMAXLIB_INLINE V plus_vector(V group, bool is_first, int64_t i, int n) const {
    const V g = load_some(grad, i, n, 0), result = load_some(y, i, n, kNone);
    return plus_element<kFunction>(group, is_first, where ? masked(g, result, i, n) : g, result);
  }
  SOFTMAXLIB_INLINE void add_vector(Lanes<V>& lanes, int64_t i, int n, double unit) const {
    const V result = load_some(y, i, n, kNone);
    const V g = masked(in_unit(load_some(grad, i, n, 0), unit), result, i, n);
    if constexpr (Of::kLog) add_values(lanes, g);
    else add_products(lanes, g, result);
  }
};

// ---- Rows longer than a chunk: one after the other, each being read while the one before is
// written.

// Where operands wait that cannot be read or written in place: a chunk, and what alignment adds.
template <class T>
struct GradientStage {
  static constexpr int kSize = (kVectorsPerChunk + 1) * vector_of<T>::type::lanes;
  alignas(64) T grad[kSize], y[kSize], x[kSize], out[kSize];
  uint8_t where[kSize];
};

template <softmaxlib_function kFunction, class T>
class GradientRow {
 public:
  using Of = GradientOf<kFunction>;
  using V = typename vector_of<T>::type;
  static constexpr int64_t kChunk = kVectorsPerChunk * V::lanes;

  GradientRow(const Job& job, const Place& place, GradientStage<T>* stage, Edge<T>* edge)
      : job_(&job), place_(place), stage_(stage), scale_(affine_of(job, place, {0, 0})) {
    const auto at = reinterpret_cast<uintptr_t>(job.base[kOut] + place.offset[kOut]);
    const int64_t past = static_cast<int64_t>(at) % kVector;
    if (!is_direct() || !job.streaming || job.n < V::lanes || past % kItem) return;
    edge_ = edge;
    head_ = past ? (kVector - past) / kItem : 0;
  }

  // Chunk by chunk, so that this row is read while the one before is written.
  void read_beside(const GradientRow* before) {
    if constexpr (Of::kReduces) {
      result_ = row_operand(*job_, place_, kResult, 0);
      sum_ = row_operand(*job_, place_, kGrad, 0);
    }
    sum_up(before, true);
    if constexpr (!Of::kReduces) {
      if (sizeof(T) == 8 && needs_smaller_unit(sum_))
        scale_ = GradientScale(scale_.affine, kSmallUnit);
      else if (all_trusted(in_all(sum_, V()))) return;
      sum_up(nullptr, false);
    }
  }
  void write() const {
    for (int64_t start = 0; start < job_->n; start += kChunk) write_chunk(start);
  }

 private:
  static constexpr int64_t kItem = sizeof(T), kVector = V::lanes * kItem;

  // Whether all operands are read and written where they are.
  bool is_direct() const {
    return job_->direct && job_->dtype[kOut] == (kItem == 4 ? SOFTMAXLIB_F32 : SOFTMAXLIB_F64);
  }

  void sum_up(const GradientRow* before, bool quick) {
    Total total;
    total.reference = 0;
    for (int64_t start = 0; start < job_->n; start += kChunk) {
      const int64_t n = job_->n - start < kChunk ? job_->n - start : kChunk;
      if constexpr (!Of::kReduces)
        (quick ? piece(start, n).sum(n) : piece(start, n).careful_sum(n, scale_.unit))
            .fold_into(total);
      if (before) before->write_chunk(start);
    }
    if constexpr (!Of::kReduces) sum_ = total.value();
  }

  void write_chunk(int64_t start) const {
    const int64_t end = start + kChunk + head_ < job_->n ? start + kChunk + head_ : job_->n;
    if (start) start += head_;
    const int64_t n = end - start;
    if (n <= 0) return;
    const ElementGradient<kFunction, V> element(scale_, in_all(sum_, V()), result_);
    if (is_direct()) return piece(start, n).write(at(kOut) + start, n, element, edge_);
    piece(start, n).write(stage_->out, n, element, nullptr);
    for_runs(*job_, place_, kOut, start, n,
             [&](char* p, int64_t stride, int64_t done, int64_t count) {
               store_all(job_->dtype[kOut], p, stride, count, stage_->out + done);
             });
  }

  T* at(Operand k) const { return reinterpret_cast<T*>(job_->base[k] + place_.offset[k]); }
  GradientPiece<kFunction, V, false> piece(int64_t start, int64_t n) const {
    GradientPiece<kFunction, V, false> piece = {};
    if (job_->base[kWhere]) {
      for_runs(*job_, place_, kWhere, start, n,
               [&](const char* p, int64_t stride, int64_t done, int64_t count) {
                 gather<uint8_t>(p, stride, count, stage_->where + done);
               });
      piece.where = stage_->where;
    }
    if constexpr (!Of::kReduces) {
      piece.grad = fetch(kGrad, start, n, stage_->grad);
      piece.y = fetch(kResult, start, n, stage_->y);
    }
    if constexpr (Of::kReadsX) piece.x = fetch(kX, start, n, stage_->x);
    return piece;
  }
  const T* fetch(Operand k, int64_t start, int64_t n, T* to) const {
    if (is_direct()) return at(k) + start;
    for_runs(*job_, place_, k, start, n,
             [&](const char* p, int64_t stride, int64_t done, int64_t count) {
               gather_any(job_->dtype[k], p, stride, count, to + done);
             });
    return to;
  }

  const Job* job_;
  Place place_;
  GradientStage<T>* stage_;
  Edge<T>* edge_ = nullptr;
  int64_t head_ = 0;
  GradientScale scale_;
  double sum_ = 0, result_ = 0;
};

// One row by itself.
template <softmaxlib_function kFunction, class T>
SOFTMAXLIB_NOINLINE void gradient_of_row(const Job& job, int64_t row) {
  GradientStage<T> stage;
  Edge<T> edge;
  GradientRow<kFunction, T> one(job, Rows(job, row).place(), &stage, &edge);
  one.read_beside(nullptr);
  one.write();
  edge.flush();
}

// ---- Rows of up to a chunk, some at a time through tiles.

template <softmaxlib_function kFunction, class T>
class GradientTiles {
 public:
  using Of = GradientOf<kFunction>;
  using V = typename vector_of<T>::type;
  using Element = ElementGradient<kFunction, V>;
  static constexpr int kLanes = V::lanes;

  explicit GradientTiles(const Job& job)
      : job_(job),
        pitch_((job.n + kLanes - 1) / kLanes * kLanes),
        grad_(job, kGrad),
        y_(job, kResult),
        x_(job, kX),
        where_along_(is_contiguous(job, kWhere, 1)),
        sender_(job),
        is_direct_(job.dtype[kOut] == (sizeof(T) == 4 ? SOFTMAXLIB_F32 : SOFTMAXLIB_F64) &&
                   !sender_.collects() && (job.n == pitch_ || !job.in_place)) {}

  void compute(int64_t row, int64_t stop) {
    const GradientScale of_all(affine_of(job_, RowRun(job_, 0).place, {0, 0}));
    for (RowRun run(job_, row); row < stop;) {
      const bool dense = is_dense(run);
      spacing_ = dense ? job_.n : pitch_;
      int64_t rows = run.rows < stop - row ? run.rows : stop - row;
      if (rows > kRoom / spacing_) rows = kRoom / spacing_;
      fetch(run, rows, dense);
      // Behind these rows nothing may be written.
      exact_from_ = dense ? rows - (kLanes + job_.n - 2) / job_.n : 0;
      for (first_ = 0; first_ < rows; first_ += kLanes) {
        rows_ = rows - first_ < kLanes ? static_cast<int>(rows - first_) : kLanes;
        finish(run, row, begin(of_all));
      }
      row += rows;
      run.advance(rows);
    }
    sender_.finish();
  }

 private:
  static constexpr int64_t kRoom = 2 * kVectorsPerChunk * kLanes;

  // An operand of some rows: in a tile, or where it is.
  struct Tile {
    Reader<V> reader;
    Operand operand;
    alignas(64) T elements[kRoom + kLanes];
    const char* first;
    int64_t stride;

    Tile(const Job& job, Operand k) : reader(job, k), operand(k) {}
    void fetch(const RowRun& run, int64_t rows, int64_t spacing, bool dense, bool in_place) {
      stride = spacing * static_cast<int64_t>(sizeof(T));
      first = reinterpret_cast<const char*>(elements);
      const char* const at = run.job.base[operand] + run.place.offset[operand];
      if (in_place && reader.is_in_place()) first = at, stride = run.step.stride[operand];
      else if (dense) reader.convert(at, rows * run.job.n, elements);
      else reader.copy(run, static_cast<int>(rows), elements, spacing);
    }
    const T* row(int64_t r) const { return reinterpret_cast<const T*>(first + r * stride); }
  };

  // Whether the rows of a run follow each other without gaps in all operands.
  bool is_dense(const RowRun& run) const {
    const auto follows = [&](const Access& a, Operand k) {
      return a.along && run.step.stride[k] == job_.n * a.item;
    };
    if (!Of::kReduces && !(follows(grad_.reader.access(), kGrad) &&
                           follows(y_.reader.access(), kResult)))
      return false;
    return (!Of::kReadsX || follows(x_.reader.access(), kX)) && follows(Access(job_, kOut), kOut) &&
           (!job_.base[kWhere] || (where_along_ && run.step.stride[kWhere] == job_.n));
  }
  void fetch(const RowRun& run, int64_t rows, bool dense) {
    // Of rows that do not end with a vector, what is behind them is read too.
    const bool in_place =
        job_.n == pitch_ || (dense && (run.rows - rows) * job_.n >= int64_t{kLanes});
    if constexpr (!Of::kReduces) {
      grad_.fetch(run, rows, spacing_, dense, in_place);
      y_.fetch(run, rows, spacing_, dense, in_place);
    }
    if constexpr (Of::kReadsX) x_.fetch(run, rows, spacing_, dense, in_place);
    where_ = nullptr;
    if (!job_.base[kWhere]) return;
    Place place = run.place;
    where_ = reinterpret_cast<const uint8_t*>(job_.base[kWhere] + place.offset[kWhere]);
    where_stride_ = run.step.stride[kWhere];
    if (where_along_ && in_place) return;
    for (int64_t r = 0; r < rows; ++r, place.offset[kWhere] += run.step.stride[kWhere])
      for_runs(job_, place, kWhere, 0, job_.n,
               [&](const char* p, int64_t stride, int64_t done, int64_t count) {
                 gather<uint8_t>(p, stride, count, wheres_ + r * spacing_ + done);
               });
    where_ = wheres_;
    where_stride_ = spacing_;
  }

  SOFTMAXLIB_INLINE GradientPiece<kFunction, V, true> piece(int64_t r) const {
    r += first_;
    const uint8_t* const where = where_ ? where_ + r * where_stride_ : nullptr;
    if constexpr (Of::kReduces) return {nullptr, nullptr, x_.row(r), where};
    else return {grad_.row(r), y_.row(r), Of::kReadsX ? x_.row(r) : nullptr, where};
  }

  // The sums of some rows, a row per lane.
  Element begin(const GradientScale& of_all) {
    InLanes<V> sums = in_all(0, V());
    if constexpr (!Of::kReduces) {
      for (int r = 0; r < rows_; ++r) lanes_.keep(r, piece(r).sum(job_.n));
      Lanes<V> one;  // of lanes without a row
      one.sum = f64x8::set1(1);
      for (int r = rows_; r < kLanes; ++r) lanes_.keep(r, one);
      sums = lanes_.total();
      if (SOFTMAXLIB_UNLIKELY(!all_trusted(sums))) sums = trusted(sums);
    }
    return Element(of_all, sums);
  }

  SOFTMAXLIB_NOINLINE InLanes<V> trusted(InLanes<V> sums) {
    double each[kLanes];
    store_lanes(each, sums);
    for (int r = 0; r < rows_; ++r) {
      if (all_trusted(in_all(each[r], V()))) continue;
      Total total;
      total.reference = 0;
      piece(r).careful_sum(job_.n, 1).fold_into(total);
      each[r] = total.value();
    }
    load_lanes(each, sums);
    return sums;
  }

  // And what follows from them.
  void finish(const RowRun& run, int64_t row, const Element& of_all) {
    T* const results = results_ + kLanes;
    const int64_t step = run.step.stride[kOut];
    char* const y = job_.base[kOut] + run.place.offset[kOut] + first_ * step;
    const auto out = [&](int64_t r) SOFTMAXLIB_INLINE_LAMBDA {
      return is_direct_ ? reinterpret_cast<T*>(y + r * step) : results + r * spacing_;
    };
    bool is_plain = false;
    if constexpr (Element::kMayBePlain) {
      is_plain = of_all.is_plain();
      T hi[kLanes], lo[kLanes];
      store(hi, of_all.hi());
      store(lo, of_all.lo());
      for (int r = 0; is_plain && r < rows_; ++r)
        write(r, out(r), typename Element::InFloats{V::set1(hi[r]), V::set1(lo[r])});
    }
    const bool all = is_plain || write_each(run, row, of_all, out);
    if (is_direct_) return;
    if (all && spacing_ == job_.n && sender_.takes_rows())
      return sender_.put_adjacent(y, results, rows_ * job_.n);
    if (all && sender_.sends_squares()) {
      alignas(64) T ones[kLanes];
      store(ones, V::set1(1));
      return sender_.put_square(y, results, pitch_, rows_, ones);
    }
    for (int r = 0; r < rows_; ++r)
      if (all || !alone_[r]) sender_.put(y + r * step, results + r * spacing_, 1);
  }
  template <class F>
  SOFTMAXLIB_INLINE void write(int64_t r, T* to, const F& element) const {
    const auto row = piece(r);
    const int64_t n = job_.n;
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(to + i, row.results(i, kLanes, element));
    if (i == n) return;
    const V last = row.results(i, kLanes, element);
    if (SOFTMAXLIB_UNLIKELY(is_direct_ && first_ + r >= exact_from_))
      store_n(to + i, last, static_cast<int>(n - i));
    else store(to + i, last);
  }
  // Row by row; false where one was computed alone.
  template <class Out>
  SOFTMAXLIB_NOINLINE bool write_each(const RowRun& run, int64_t row, const Element& of_all,
                                      Out out) {
    double sums[kLanes];
    store_lanes(sums, of_all.sums());
    Place place = run.place;
    for (int k = 0; k < kOperands; ++k) place.offset[k] += first_ * run.step.stride[k];
    bool all = true;
    for (int r = 0; r < rows_; ++r) {
      alone_[r] = !Of::kReduces && sizeof(T) == 8 && needs_smaller_unit(sums[r]);
      if (alone_[r]) {
        all = false;
        sender_.finish();
        gradient_of_row<kFunction, T>(job_, row + first_ + r);
      } else {
        double result = 0;
        if constexpr (Of::kReduces) {
          sums[r] = row_operand(job_, place, kGrad, 0);
          result = row_operand(job_, place, kResult, 0);
        }
        const auto write_under = [&](const GradientScale& scale) {
          write(r, out(r), Element(scale, in_all(sums[r], V()), result));
        };
        if (job_.base[kScale]) write_under(GradientScale(affine_of(job_, place, {0, 0})));
        else write_under(of_all.scale());
      }
      for (int k = 0; k < kOperands; ++k) place.offset[k] += run.step.stride[k];
    }
    return all;
  }

  const Job& job_;
  const int64_t pitch_;
  int64_t spacing_ = 0;  // of rows in tiles
  int64_t first_ = 0;    // of these, at which the present ones begin
  int64_t exact_from_ = 0;
  int rows_ = 0;
  Tile grad_, y_, x_;
  const bool where_along_;
  const uint8_t* where_ = nullptr;  // NULL: all take part
  int64_t where_stride_ = 0;
  Sender<V> sender_;
  const bool is_direct_;
  LanesOfRows<V> lanes_;
  bool alone_[kLanes];
  uint8_t wheres_[kRoom + kLanes];
  alignas(64) T results_[kLanes + kRoom + kLanes];  // an outbox reads around what it takes
};

// ---- Rows of any length that lie side by side in all operands: a row per lane.

template <softmaxlib_function kFunction, class T>
class GradientAcross {
 public:
  using Of = GradientOf<kFunction>;
  using V = typename vector_of<T>::type;
  static constexpr int kLanes = V::lanes;

  static bool takes(const Job& job) {
    if constexpr (Of::kReduces) return false;
    const auto crosses = [&](Operand k) { return Access(job, k).across; };
    return job.inner_ndim == 1 && crosses(kGrad) && crosses(kResult) && crosses(kOut) &&
           (!Of::kReadsX || crosses(kX)) && !job.base[kScale] &&
           (!job.base[kWhere] || job.outer[job.outer_ndim - 1].stride[kWhere] == 1);
  }

  explicit GradientAcross(const Job& job)
      : job_(job),
        scale_(affine_of(job, RowRun(job, 0).place, {0, 0})),
        grad_(job, kGrad),
        y_(job, kResult),
        x_(job, kX),
        out_(job, kOut) {
    // Panels that stay in the second level cache, if they do not get too narrow.
    constexpr int64_t kBytes = 1 << 19;
    most_ = kBytes / (job.n * (grad_.group + y_.group));
    most_ = (most_ < 4 ? kGroups : most_ > kGroups ? kGroups : most_) * kLanes;
  }

  void compute(int64_t row, int64_t stop) {
    for (RowRun run(job_, row); row < stop;) {
      int64_t rows = run.rows < stop - row ? run.rows : stop - row;
      if (rows > most_) rows = most_;
      place_ = run.place;
      grad_.first = job_.base[kGrad] + place_.offset[kGrad];
      y_.first = job_.base[kResult] + place_.offset[kResult];
      x_.first = job_.base[kX] + place_.offset[kX];
      out_.first = job_.base[kOut] + place_.offset[kOut];
      rows_ = static_cast<int>(rows);
      groups_ = (rows_ + kLanes - 1) / kLanes;
      if (sum_up()) {
        write();
      } else {
        for (int64_t r = 0; r < rows; ++r) gradient_of_row<kFunction, T>(job_, row + r);
      }
      row += rows;
      run.advance(rows);
    }
  }

 private:
  static constexpr int kGroups = 8, kParts = 8;  // a sum has eight partial ones: Lanes of rows/sum.hpp

  int rows_of(int group) const {
    const int left = rows_ - group * kLanes;
    return left < kLanes ? left : kLanes;
  }
  // An operand: element j of every row is a contiguous strip.
  struct Strips {
    softmaxlib_dtype dtype;
    char* first;
    int64_t stride, group;

    Strips(const Job& job, Operand k)
        : dtype(job.dtype[k]),
          first(nullptr),
          stride(job.inner[0].stride[k]),
          group(kLanes * float_item(job.dtype[k])) {}
    int64_t item() const { return group / kLanes; }
    SOFTMAXLIB_INLINE V load(int g, int64_t j, int rows) const {
      return load_some(dtype, first + j * stride + g * group, rows, V());
    }
    // The rows after these often follow them.
    SOFTMAXLIB_INLINE void prefetch_next(int g, int64_t j, int64_t n) const {
      prefetch(first + (j + n) * stride + g * group);
    }
  };
  SOFTMAXLIB_INLINE V masked(V v, V result, int group, int64_t j) const {
    using Mask = typename V::Mask;
    if (!job_.base[kWhere]) return of_visible<kFunction>(v, result, static_cast<Mask*>(nullptr));
    const auto* const where = reinterpret_cast<const uint8_t*>(
        job_.base[kWhere] + place_.offset[kWhere] + j * job_.inner[0].stride[kWhere] +
        group * kLanes);
    Mask in;
    if (rows_of(group) == kLanes) {
      in = load_mask(where, v);
    } else {
      uint8_t bytes[kLanes] = {};
      memcpy(bytes, where, static_cast<size_t>(rows_of(group)));
      in = load_mask(bytes, v);
    }
    return of_visible<kFunction>(v, result, &in);
  }

  // What one element adds to a sum, and what that rounds away.
  SOFTMAXLIB_INLINE InLanes<V> term(int group, int64_t j, InLanes<V>& error) const {
    const V result = y_.load(group, j, rows_of(group));
    const V g = masked(grad_.load(group, j, rows_of(group)), result, group, j);
    if constexpr (Of::kLog) return InLanes<V>::of(g);
    else return product(g, result, error);
  }
  static SOFTMAXLIB_INLINE InLanes<f32x16> product(f32x16 a, f32x16 b, InLanes<f32x16>&) {
    return InLanes<f32x16>::of(a) * InLanes<f32x16>::of(b);
  }
  static SOFTMAXLIB_INLINE InLanes<f64x8> product(f64x8 a, f64x8 b, InLanes<f64x8>& error) {
    const f64x8 product = a * b;
    error = {error.all + fma(a, b, f64x8::set1(0) - product)};
    return {product};
  }
  // The same of a group, a vector of the row from each other.
  SOFTMAXLIB_INLINE InLanes<V> four(int group, int64_t j, int64_t stop) const {
    V sum = V::set1(0);
    for (int64_t i = j; i < stop && i < j + kVectorsPerGroup * kLanes; i += kLanes) {
      const V result = y_.load(group, i, rows_of(group));
      V g = grad_.load(group, i, rows_of(group));
      y_.prefetch_next(group, i, job_.n);
      grad_.prefetch_next(group, i, job_.n);
      if (job_.base[kWhere]) g = masked(g, result, group, i);
      sum = plus_element<kFunction>(sum, i == j, g, result);
    }
    return InLanes<V>::of(sum);
  }
  static SOFTMAXLIB_INLINE void add(InLanes<f32x16>& sum, InLanes<f32x16>&, InLanes<f32x16> x) {
    sum = sum + x;
  }
  static SOFTMAXLIB_INLINE void add(InLanes<f64x8>& sum, InLanes<f64x8>& error, InLanes<f64x8> x) {
    two_sum(sum.all, error.all, x.all);
  }

  // The sums of all rows; false where one needs a smaller unit.
  bool sum_up() {
    InLanes<V> sum[kGroups];
    if (sizeof(T) == 4 && job_.n <= kVectorsPerGroup * kLanes)
      for (int g = 0; g < groups_; ++g) sum[g] = sum_of_group(g);
    else add_up<sizeof(T) == 4>(sum);
    bool good = true;
    for (int g = 0; g < groups_; ++g) good &= all_trusted(in_rows(sum[g], g));
    if (SOFTMAXLIB_UNLIKELY(!good)) {
      InLanes<V> careful[kGroups];
      add_up<false>(careful);
      for (int g = 0; g < groups_; ++g) sum[g] = trusted(sum[g], careful[g]);
    }
    good = true;
    for (int g = 0; g < groups_; ++g) {
      element_[g] = ElementGradient<kFunction, V>(scale_, in_rows(sum[g], g));
      if constexpr (sizeof(T) == 8) {
        double each[kLanes];
        store_lanes(each, sum[g]);
        for (int i = 0; i < rows_of(g); ++i) good &= !needs_smaller_unit(each[i]);
      }
    }
    return good;
  }
  // 1 for lanes without a row.
  InLanes<V> in_rows(InLanes<V> sum, int group) const {
    if (rows_of(group) == kLanes) return sum;
    double each[kLanes];
    store_lanes(each, sum);
    for (int i = rows_of(group); i < kLanes; ++i) each[i] = 1;
    load_lanes(each, sum);
    return sum;
  }
  static InLanes<V> trusted(InLanes<V> sum, InLanes<V> careful) {
    double each[kLanes], better[kLanes];
    store_lanes(each, sum);
    store_lanes(better, careful);
    for (int i = 0; i < kLanes; ++i)
      if (!all_trusted(in_all(each[i], V()))) each[i] = better[i];
    load_lanes(each, sum);
    return sum;
  }
  // Rows of a single group of floats.
  InLanes<V> sum_of_group(int g) const {
    const int64_t n = job_.n;
    InLanes<V> part[kParts];
    for (int i = 0; i < kParts; ++i) {
      part[i] = in_all(0, V());
      if (i < n) part[i] = four(g, i, n);
      if (kLanes > kParts && i + kParts < n) part[i] = part[i] + four(g, i + kParts, n);
    }
    return fold_eight(part);
  }
  template <bool kQuick>
  SOFTMAXLIB_NOINLINE void add_up(InLanes<V> (&sum)[kGroups]) {
    constexpr int64_t kChunk = kVectorsPerChunk * kLanes;
    InLanes<V> error[kGroups];
    for (int g = 0; g < groups_; ++g) sum[g] = error[g] = in_all(0, V());
    for (int64_t start = 0; start < job_.n; start += kChunk) {
      const int64_t stop = job_.n - start < kChunk ? job_.n : start + kChunk;
      for (int g = 0; g < groups_; ++g)
        for (int i = 0; i < kParts; ++i) sums_[g][i] = errors_[g][i] = in_all(0, V());
      for (int64_t j = start; j < stop; j += kLanes * (kQuick ? kVectorsPerGroup : 1))
        for (int i = 0; i < kParts && j + i < stop; ++i)
          for (int g = 0; g < groups_; ++g) {
            const bool two = kLanes > kParts && j + i + kParts < stop;
            InLanes<V>& lost = errors_[g][i];
            InLanes<V> x = kQuick ? four(g, j + i, stop) : term(g, j + i, lost);
            if (two) x = x + (kQuick ? four(g, j + i + kParts, stop) : term(g, j + i + kParts, lost));
            add(sums_[g][i], lost, x);
          }
      for (int g = 0; g < groups_; ++g) fold(g, sum[g], error[g]);
    }
    for (int g = 0; g < groups_; ++g) sum[g] = sum[g] + error[g];
  }
  // As Lanes folds its own into a Total.
  void fold(int g, InLanes<f32x16>& sum, InLanes<f32x16>& error) const {
    const InLanes<f32x16> all = fold_eight(sums_[g]);
    two_sum(sum.low, error.low, all.low);
    two_sum(sum.high, error.high, all.high);
  }
  void fold(int g, InLanes<f64x8>& sum, InLanes<f64x8>& error) const {
    for (const InLanes<f64x8>& part : sums_[g]) two_sum(sum.all, error.all, part.all);
    error = error + fold_eight(errors_[g]);
  }

  void write() const {
    constexpr softmaxlib_dtype kOwn = sizeof(T) == 4 ? SOFTMAXLIB_F32 : SOFTMAXLIB_F64;
    alignas(64) T results[kGroups * kLanes];
    for (int64_t j = 0; j < job_.n; ++j) {
      char* const out = out_.first + j * out_.stride;
      for (int g = 0; g < groups_; ++g) {
        const int rows = rows_of(g);
        const V y = y_.load(g, j, rows), x = Of::kReadsX ? x_.load(g, j, rows) : V::set1(0);
        const V d = masked(element_[g](grad_.load(g, j, rows), y, x), y, g, j);
        if (out_.dtype == kOwn && rows == kLanes) store(reinterpret_cast<T*>(out) + g * kLanes, d);
        else store(results + g * kLanes, d);
      }
      const int done = out_.dtype == kOwn ? rows_ / kLanes * kLanes : 0;
      if (done < rows_)
        store_all(out_.dtype, out + done * out_.item(), out_.item(), rows_ - done, results + done);
    }
  }

  const Job& job_;
  const GradientScale scale_;
  int64_t most_;
  Strips grad_, y_, x_, out_;
  Place place_;
  int rows_ = 0, groups_ = 0;
  InLanes<V> sums_[kGroups][kParts], errors_[kGroups][kParts];
  ElementGradient<kFunction, V> element_[kGroups];
};

template <softmaxlib_function kFunction, class T>
void gradient_rows(const Job& job, int64_t start, int64_t stop, char*) {
  using V = typename vector_of<T>::type;
  const DefaultFloatingPoint environment;
  if (start == stop || job.n == 0) return;
  if (GradientAcross<kFunction, T>::takes(job)) {
    GradientAcross<kFunction, T>(job).compute(start, stop);
  } else if (job.n <= kVectorsPerChunk * V::lanes) {
    GradientTiles<kFunction, T>(job).compute(start, stop);
  } else {
    using Row = GradientRow<kFunction, T>;
    GradientStage<T> stage;
    Edge<T> edge;
    Rows rows(job, start);
    Row before(job, rows.place(), &stage, &edge);
    before.read_beside(nullptr);
    for (int64_t r = start + 1; r < stop; ++r) {
      rows.next();
      Row row(job, rows.place(), &stage, &edge);
      row.read_beside(&before);
      before = row;
    }
    before.write();
    edge.flush();
  }
  stream_fence();
}

// x times a factor, which is the operand kBias; x itself where that is 0. The product is exact in
// double but for double itself, and rounded once.
template <class V>
SOFTMAXLIB_INLINE V scaled_element(V x, InLanes<V> factor) {
  const V product = (InLanes<V>::of(x) * factor).value();
  const V number =
      select(eq(product, product), product, V::set1(static_cast<typename V::elem>(NAN)));
  return select(eq(x, V::set1(0)), x, number);
}

template <class D>
void scale_rows(const Job& job, int64_t start, int64_t stop, char*) {
  using V = typename vector_of<D>::type;
  using T = typename V::elem;
  constexpr int64_t kChunk = kVectorsPerChunk * V::lanes;
  const DefaultFloatingPoint environment;
  alignas(64) T x[kChunk];
  alignas(64) double factors[kChunk];
  alignas(64) D y[kChunk];
  Rows rows(job, start);
  const bool even = job.linear && (job.n == 1 || job.inner[0].stride[kBias] == 0);
  for (int64_t r = start; r < stop; ++r, rows.next()) {
    const Place& place = rows.place();
    if (even) {  // one factor for a contiguous row
      const InLanes<V> factor = in_all(row_operand(job, place, kBias, 1), V());
      map_elements(Contiguous<D>{reinterpret_cast<const D*>(job.base[kX] + place.offset[kX])},
                   reinterpret_cast<D*>(job.base[kOut] + place.offset[kOut]), job.n, job.streaming,
                   [factor](V v) SOFTMAXLIB_INLINE_LAMBDA { return scaled_element(v, factor); });
      continue;
    }
    for (int64_t i = 0; i < job.n; i += kChunk) {
      const int64_t n = job.n - i < kChunk ? job.n - i : kChunk;
      for_runs(job, place, kX, i, n,
               [&](const char* p, int64_t stride, int64_t done, int64_t count) {
                 gather_any(job.dtype[kX], p, stride, count, x + done);
               });
      for_runs(job, place, kBias, i, n,
               [&](const char* p, int64_t stride, int64_t done, int64_t count) {
                 gather_any(job.dtype[kBias], p, stride, count, factors + done);
               });
      for (int64_t j = n; j % V::lanes; ++j) x[j] = 0, factors[j] = 0;
      for (int64_t j = 0; j < n; j += V::lanes) {
        InLanes<V> factor;
        load_lanes(factors + j, factor);
        store(y + j, scaled_element(load(x + j), factor));
      }
      for_runs(job, place, kOut, i, n, [&](char* p, int64_t stride, int64_t done, int64_t count) {
        for (int64_t j = 0; j < count; ++j) memcpy(p + j * stride, y + done + j, sizeof(D));
      });
    }
  }
  stream_fence();
}

}  // namespace
}  // namespace SOFTMAX_ISA
}  // namespace softmaxlib
