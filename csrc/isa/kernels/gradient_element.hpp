// Vector-Jacobian products. With z = x scale, G the gradient that comes in, y the result:
//
//   softmax        y (G - sum of y G) scale
//   log_softmax    (G - e^log_y sum of G) scale
//   logsumexp      G e^(z - result) scale, without a sum
//   stablemax      y (G - sum of y G) scale / (1 + |z|), as d log s / dz = 1 / (1 + |z|)
//   log_stablemax  (G - e^log_y sum of G) scale / (1 + |z|)
//
// Exactly 0 where y is 0 (log_y -inf): such elements are not in the sum either, whatever G holds
// there. What `where` hides is given such a y when a row is staged (hide() below), for logsumexp
// such a z.
//
// Sums add groups of four elements in the arithmetic's own type. The groups are added in double,
// or, where that is the type, with what each addition rounds away. So an error is of a few
// roundings however long a row is. Rows of up to 16 elements, which are four groups, are summed in
// the arithmetic's own type altogether. A sum that may have left the type's range is taken again,
// element by element and in double. From there on gradients of softmax and log_softmax with a usual
// scale are computed in the type, of float with the sum in two parts, so that what cancels does so
// exactly; all others in double, rounded once.
//
// Rows that lie side by side in memory, and those of a few elements, are computed a row per lane
// (gradient_across.hpp), short ones some at a time through tiles (gradient_tiles.hpp), others one
// after the other (gradient_row.hpp). All have the same bits: quick_sum() and brief_sum() of a row
// are the definition.
#pragma once

#include "isa/kernels/batch.hpp"
#include "isa/kernels/softmax_pipelined.hpp"
#include "isa/kernels/state.hpp"

namespace softmaxlib {
namespace SOFTMAX_ISA {
namespace {

// What a function's gradient is made of. Whether results are logarithms is compiled, as kLog.
struct GradientKind {
  bool reduces = false;  // one result per row: its gradient is the row's x under that
  bool stable = false;
  bool is_log = false;

  GradientKind() = default;
  explicit GradientKind(softmaxlib_function function)
      : reduces(softmaxlib::reduces(function)),
        stable(is_stable(function)),
        is_log(kFunctionInfo[function].finish == Finish::logarithm) {}
  bool reads_x() const { return stable || reduces; }
};

// a b 2^exponent = value more; more is a power of two, and 1 where value alone is in range.
struct WideProduct {
  double value, more;

  SOFTMAXLIB_NOINLINE WideProduct(double a, double b, int exponent) {
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

// `usual`, but e^x in double where x is so large that the exponential leaves the range of float: a
// row's largest element may be far above its result, where that was rounded to a half. Beyond kMost
// whatever is multiplied by it leaves that range, too.
SOFTMAXLIB_NOINLINE InLanes<f32x16> exp_of_large(Pair<f32x16> x, InLanes<f32x16> usual) {
  constexpr double kLarge = 40, kMost = 600;
  const auto of = [=](f64x8 hi, f64x8 lo, f64x8 otherwise) {
    const Pair<f64x8> z = {min(hi, f64x8::set1(kMost)), lo};
    return select(gt(hi, f64x8::set1(kLarge)), exp_wide(z).all, otherwise);
  };
  return {of(widen_low(x.hi), widen_low(x.lo), usual.low),
          of(widen_high(x.hi), widen_high(x.lo), usual.high)};
}

// g - e^x total; e^x as a pair, so that near 1 what it lacks is not lost.
SOFTMAXLIB_INLINE InLanes<f32x16> less_exp(f32x16 g, f32x16 x, InLanes<f32x16> total) {
  const Pair<f32x16> e = Exp<f32x16, Use::kExact>(0)(Pair<f32x16>{x, f32x16::set1(0)});
  const f64x8 unit = f64x8::set1(exp_unit<f32x16>());
  const f64x8 low = total.low * unit, high = total.high * unit;
  const InLanes<f32x16> d = {
      fnma(widen_low(e.lo), low, fnma(widen_low(e.hi), low, widen_low(g))),
      fnma(widen_high(e.lo), high, fnma(widen_high(e.hi), high, widen_high(g)))};
  return if_small(x, d, [&](InLanes<f32x16> of_small) {
    return InLanes<f32x16>{fnma(of_small.low, total.low, widen_low(g)),
                           fnma(of_small.high, total.high, widen_high(g))};
  });
}

// e^z times the gradient that comes in, which is one of the row, and the scale. Where e^z alone is
// below the range of double their product may be in it.
struct RowGradient {
  double gradient, factor;
  int exponent;
  WideProduct of_double;

  RowGradient(double incoming, const Affine& a)
      : gradient(incoming),
        factor(a.factor),
        exponent(a.exponent - Exp<f64x8>::kBias),
        of_double(gradient, factor, exponent) {}

  SOFTMAXLIB_INLINE InLanes<f32x16> times_exp(Pair<f32x16> z, double scale) const {
    InLanes<f32x16> e = exp_wide(z);
    if (SOFTMAXLIB_UNLIKELY(any(gt(z.hi, f32x16::set1(40))))) e = exp_of_large(z, e);
    return e * in_all(gradient, f32x16()) * in_all(scale, f32x16());
  }
  SOFTMAXLIB_INLINE InLanes<f64x8> times_exp(Pair<f64x8> z, double) const {
    const f64x8 e = Exp<f64x8>(0)(z);
    const f64x8 usual = e * f64x8::set1(of_double.value) * f64x8::set1(of_double.more);
    if (SOFTMAXLIB_LIKELY(!any(gt(z.hi, f64x8::set1(kLarge))))) return {usual};
    return {select(gt(z.hi, f64x8::set1(kLarge)), times_large_exp(z), usual)};
  }

 private:
  static constexpr double kLarge = 600, kMost = 1490;
  static constexpr int kReference = 1200;
  // Where e^z alone is beyond the range of double: under a reference of its own. From kMost on the
  // product is beyond it, too.
  SOFTMAXLIB_NOINLINE f64x8 times_large_exp(Pair<f64x8> z) const {
    const WideProduct of(gradient, factor, exponent + kReference);
    const f64x8 e = Exp<f64x8>(kReference)(Pair<f64x8>{min(z.hi, f64x8::set1(kMost)), z.lo});
    return e * f64x8::set1(of.value) * f64x8::set1(of.more);
  }
};

inline void add_products(Lanes<f32x16>& lanes, f32x16 a, f32x16 b) {
  lanes.add(widen_low(a) * widen_low(b) + widen_high(a) * widen_high(b));
}
inline void add_products(Lanes<f64x8>& lanes, f64x8 a, f64x8 b) { lanes.add(a * b); }
inline void add_values(Lanes<f32x16>& lanes, f32x16 a) { lanes.add(widen_low(a) + widen_high(a)); }
inline void add_values(Lanes<f64x8>& lanes, f64x8 a) { lanes.add(a); }

// A usual scale, as it multiplies elements of the arithmetic's own type: nothing that it does there
// can leave the range. Of softmax it is a product: `part`, at most 1, multiplies the gradient that
// comes in, and `power`, a power of two, multiplies y, which is exact. Of log_softmax `part` is all
// of it and multiplies results, which it is small enough for where these are not normal.
struct UsualScale {
  double part, power = 1;
  bool is_usual;

  UsualScale(bool is_log, double scale) : part(scale) {
    is_usual = scale >= 0x1p-20 && scale <= (is_log ? 4 : 0x1p20);
    if (is_log || !is_usual || scale <= 1) return;
    int exponent;
    part = split_exponent(scale, &exponent);
    power = power_of_two(exponent);
  }
};
// The vector at lane i of sixteen.
SOFTMAXLIB_INLINE f32x16 narrow_pair(const f64x8 (&x)[2], int, f32x16) {
  return narrow(x[0], x[1]);
}
SOFTMAXLIB_INLINE f64x8 narrow_pair(const f64x8 (&x)[2], int i, f64x8) { return x[i / 8]; }

// Up to sixteen numbers, `stride` bytes apart, in double; behind them the first again.
SOFTMAXLIB_INLINE void load_numbers(softmaxlib_dtype dtype, const char* p, int64_t stride, int rows,
                                    f64x8* to) {
  if (dtype == SOFTMAXLIB_F32 && stride == sizeof(float) && rows == 16) {
    const f32x16 all = load(reinterpret_cast<const float*>(p));
    to[0] = widen_low(all), to[1] = widen_high(all);
    return;
  }
  double each[16];
  gather_any(dtype, p, stride, rows, each);
  for (int i = rows; i < 16; ++i) each[i] = each[0];
  to[0] = load(each), to[1] = load(each + 8);
}
// A UsualScale in each lane; whether all are.
SOFTMAXLIB_INLINE bool usual_scales(bool is_log, f64x8 scale, f64x8& part, f64x8& power,
                                    bool& has_power) {
  constexpr uint64_t kExponent = 0x7ff0000000000000, kOne = 0x3ff0000000000000;
  constexpr uint64_t kFirstOfExponent = 0x0010000000000000;
  using Int = f64x8::Int;
  const f64x8 one = f64x8::set1(1), most = f64x8::set1(is_log ? 4 : 0x1p20);
  const auto is_above = gt(scale, one);
  part = scale, power = one;
  if (!is_log && any(is_above)) {
    const Int exponent = bits(scale) & Int::set1(kExponent);
    const Int fraction = bits(scale) - exponent;  // part is at least 1/2 and below 1
    part = select(is_above, from_bits(fraction + Int::set1(kOne - kFirstOfExponent)), scale);
    power = select(is_above, from_bits(exponent + Int::set1(kFirstOfExponent)), one);
    has_power = true;
  }
  return all(eq(min(max(scale, f64x8::set1(0x1p-20)), most), scale));  // a NaN is not
}
// Those of rows that have their own, the first at `first`; false where one is not usual. Whole
// vectors are written. has_power: whether one may have a power other than 1.
template <class T>
SOFTMAXLIB_NOINLINE bool fetch_usual_scales(const Job& job, bool is_log, const char* first,
                                            int64_t stride, int rows, T* part, T* power,
                                            bool& has_power) {
  using V = typename vector_of<T>::type;
  bool usual = true;
  has_power = false;
  for (int r = 0; r < rows; r += 16) {
    f64x8 own[2], parts[2], powers[2];
    load_numbers(job.dtype[kScale], first + r * stride, stride, rows - r < 16 ? rows - r : 16, own);
    for (int i = 0; i < 2; ++i) {
      const f64x8 scale =
          job.divides ? f64x8::set1(job.scale) / own[i] : own[i] / f64x8::set1(job.temperature);
      usual &= usual_scales(is_log, scale, parts[i], powers[i], has_power);
    }
    for (int i = 0; i < 16 && r + i < rows; i += V::lanes) {
      store(part + r + i, narrow_pair(parts, i, V()));
      store(power + r + i, narrow_pair(powers, i, V()));
    }
  }
  return usual;
}

// What gradients are multiplied by: the same in all rows, but where each has its own temperature.
struct GradientScale {
  GradientKind kind;
  Affine affine;
  double unit;  // of the gradient that comes in, and so of its sum
  WideProduct factor;
  // Of doubles, the power of two in a factor above 1 goes to y first, exactly: that product is in
  // range, the one with the rest may not be. Products of floats are in the range of double anyhow.
  double early;
  UsualScale usual;

  SOFTMAXLIB_NOINLINE GradientScale(GradientKind of, const Affine& a, double of_gradient = 1)
      : kind(of),
        affine(a),
        unit(of_gradient),
        factor(a.factor, 1 / unit, a.exponent),
        usual(of.is_log, a.factor) {
    int exponent;
    split_exponent(factor.value, &exponent);
    early = exponent < 1 ? 1 : power_of_two(exponent - 1);
  }
};

// Whether groups of four in float (quick_sum() below) are enough: no element was beyond the range
// of float, and none that counts below it. Of doubles only all_in_unit() below has to be asked. Of
// log_softmax sums are also small enough that an exponential, which may be below the range of float
// where its product with the sum is not, loses less than counts.
template <bool kLog, class V>
SOFTMAXLIB_INLINE typename V::Mask is_trusted(V sum) {
  using T = typename V::elem;
  const V size = magnitude(sum).hi;
  const V below = keep(gt(V::set1(static_cast<T>(kLog ? 0x1p34 : 0x1p56)), size), size);
  return gt(below, V::set1(static_cast<T>(0x1p-64)));
}
template <bool kLog, class V>
SOFTMAXLIB_INLINE bool all_trusted(InLanes<V> sum) {
  return sizeof(typename V::elem) == 8 || all(is_trusted<kLog>(sum.value()));
}

// Of doubles the sum, or what it is subtracted from, may leave the range where the result does not.
// Then all of the row is computed in a smaller unit.
constexpr double kSmallUnit = 0x1p-64, kLargeSum = 0x1p960;
inline bool needs_smaller_unit(double sum) {
  const double size = sum < 0 ? -sum : sum;
  return !(size <= kLargeSum);
}

inline bool all_in_unit(InLanes<f32x16>) { return true; }
inline bool all_in_unit(InLanes<f64x8> sum) {
  return all(gt(f64x8::set1(kLargeSum), magnitude(sum.all).hi));  // a NaN is not
}

// d scale / (1 + |x scale|), d being in the row's unit.
template <class V>
class StableSlope {
 public:
  SOFTMAXLIB_NOINLINE explicit StableSlope(const GradientScale& s) {
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
template <bool kLog, class Vector>
class ElementGradient {
 public:
  using V = Vector;
  using T = typename V::elem;
  static constexpr bool kIsPlain = false;

  ElementGradient() = default;
  // sum: for logsumexp the gradient that comes in, and `result` its result. quick: it is that of
  // quick_sum(), or of doubles.
  ElementGradient(const GradientScale& scale, InLanes<V> sum, bool quick, double result = 0)
      : scale_(&scale),
        sum_(sum),
        result_(result),
        plain_(sum, V::set1(static_cast<T>(scale.usual.part)),
               V::set1(static_cast<T>(scale.usual.power))),
        may_be_plain_(may_be_plain(scale)),
        is_plain_(may_be_plain_ && quick && is_good(sum)),
        has_power_(scale.usual.power != 1) {}

  // Whether rows may be plain, and those of such sums are.
  static bool may_be_plain(const GradientScale& s) {
    return !s.kind.reads_x() && s.usual.is_usual && s.affine.exponent == 0 && s.unit == 1;
  }
  static SOFTMAXLIB_INLINE bool is_good(InLanes<V> sum) {
    return all_trusted<kLog>(sum) && all_in_unit(sum);
  }
  static SOFTMAXLIB_INLINE bool is_good(f32x16 sum) { return all(is_trusted<kLog>(sum)); }
  // A sum of the arithmetic's own type.
  static SOFTMAXLIB_INLINE f32x16 own(f32x16 sum) { return sum; }
  static SOFTMAXLIB_INLINE InLanes<f64x8> own(f64x8 sum) { return {sum}; }

  // Of softmax and log_softmax, where the scale is usual and the sum trusted: what cancels does so
  // exactly. hi, lo: what is subtracted, in two parts: of softmax the sum times `part`, of
  // log_softmax the sum. Where a sum is finite, so is every product that was added to it, and no
  // result is NaN.
  struct Plain {
    static constexpr bool kIsPlain = true;
    static constexpr bool kIsMasked = kLog;  // 0 where a probability is
    V hi, lo, part, power;
    Plain() = default;
    SOFTMAXLIB_INLINE Plain(V high, V low, V by_part, V by_power)
        : hi(high), lo(low), part(by_part), power(by_power) {}
    template <class Sum>
    SOFTMAXLIB_INLINE Plain(Sum sum, V by_part, V by_power) : part(by_part), power(by_power) {
      if constexpr (kLog) set_parts(sum, hi, lo);
      else set_product(sum, part, hi, lo);
    }
    SOFTMAXLIB_INLINE V operator()(V g, V result) const {
      if constexpr (kLog) return number(less_product(g, result, hi, lo) * part);
      else return fma(result, fms(g, part, hi) - lo, V::set1(0));  // of a y of 0 never -0
    }
  };
  // The same where scales have a power other than 1.
  struct WithPower : Plain {
    SOFTMAXLIB_INLINE explicit WithPower(const Plain& of) : Plain(of) {}
    SOFTMAXLIB_INLINE V operator()(V g, V result) const {
      if constexpr (kLog) return Plain::operator()(g, result);
      else return Plain::operator()(g, this->power * result);
    }
  };
  // Calls f with a function that turns a Plain into what computes elements: itself, or WithPower.
  template <class F>
  static SOFTMAXLIB_INLINE void with_plain(bool has_power, F f) {
    if (!kLog && has_power)
      f([](const Plain& of) SOFTMAXLIB_INLINE_LAMBDA { return WithPower(of); });
    else f([](const Plain& of) SOFTMAXLIB_INLINE_LAMBDA { return of; });
  }

  SOFTMAXLIB_INLINE V operator()(V g, V result, V z) const {
    const WithPower plain(plain_);
    if (is_plain_) return plain(g, result);
    if (kDouble && may_be_plain_) return number(plain(g, result));
    V d = in_doubles(g, result, z);
    if (!kDouble && may_be_plain_) d = select(is_trusted<kLog>(sum_.value()), plain(g, result), d);
    return number(d);
  }
  // f(what computes an element): for loops, which have the choice behind them.
  template <class F>
  SOFTMAXLIB_INLINE void with(F f) const {
    if (is_plain_ && !has_power_) f(plain_);
    else f(*this);
  }
  // The same where it is_plain().
  bool is_plain() const { return is_plain_; }
  template <class F>
  SOFTMAXLIB_INLINE void with_plain(F f) const {
    with_plain(has_power_, [&](auto made_of) SOFTMAXLIB_INLINE_LAMBDA { f(made_of(plain_)); });
  }

 private:
  static constexpr bool kDouble = sizeof(T) == 8;

  // Of floats: two floats, or the one that it is; of logarithms in units of an exponential.
  static constexpr float kUnit = 0x1p-60f;
  static_assert(Exp<f32x16, Use::kExact>::kBias == 60, "kUnit");
  static SOFTMAXLIB_INLINE void set_parts(InLanes<f32x16> sum, f32x16& hi, f32x16& lo) {
    hi = sum.value();
    lo = (sum - InLanes<V>::of(hi)).value();
    if (kLog) hi = hi * V::set1(kUnit), lo = lo * V::set1(kUnit);
  }
  static SOFTMAXLIB_INLINE void set_parts(f32x16 sum, f32x16& hi, f32x16& lo) {
    hi = kLog ? sum * V::set1(kUnit) : sum;
    lo = V::set1(0);
  }
  static SOFTMAXLIB_INLINE void set_product(InLanes<V> sum, V part, V& hi, V& lo) {
    set_parts(sum * InLanes<V>::of(part), hi, lo);
  }
  static SOFTMAXLIB_INLINE void set_product(f32x16 sum, f32x16 part, f32x16& hi, f32x16& lo) {
    hi = sum * part;
    lo = fms(sum, part, hi);
  }
  // Of doubles the sum itself. With a logarithm it is a product, of which the unit of the
  // exponential goes to whichever factor it does not carry below the range.
  static SOFTMAXLIB_INLINE void set_parts(InLanes<f64x8> sum, f64x8& hi, f64x8& lo) {
    hi = sum.all, lo = V::set1(0);
    if (!kLog) return;
    const V unit = V::set1(exp_unit<f64x8>()), one = V::set1(1);
    const auto is_small = gt(V::set1(0x1p-900), magnitude(sum.all).hi);
    hi = sum.all * select(is_small, one, unit);
    lo = select(is_small, unit, one);
  }
  static SOFTMAXLIB_INLINE f32x16 less_product(f32x16 g, f32x16 result, f32x16 hi, f32x16 lo) {
    const Pair<f32x16> e = Exp<f32x16, Use::kExact>(0)(Pair<f32x16>{result, f32x16::set1(0)});
    return fnma(e.hi, hi, g) - fma(e.lo, hi, e.hi * lo);
  }
  static SOFTMAXLIB_INLINE f64x8 less_product(f64x8 g, f64x8 result, f64x8 hi, f64x8 lo) {
    const f64x8 e = Exp<f64x8>(0)(Pair<f64x8>{result, f64x8::set1(0)});
    return fnma(e * lo, hi, g);
  }
  static SOFTMAXLIB_INLINE V number(V d) {  // the sign of a NaN is not ours
    return select(eq(d, d), d, V::set1(static_cast<T>(NAN)));
  }
  static SOFTMAXLIB_INLINE f32x16 in_unit(f32x16 g, double) { return g; }
  static SOFTMAXLIB_INLINE f64x8 in_unit(f64x8 g, double unit) { return g * f64x8::set1(unit); }
  SOFTMAXLIB_INLINE InLanes<f32x16> less_exp(f32x16 g, f32x16 x) const {
    return SOFTMAX_ISA::less_exp(g, x, sum_);
  }
  SOFTMAXLIB_INLINE InLanes<f64x8> less_exp(f64x8 g, f64x8 x) const {
    return {less_product(g, x, plain_.hi, plain_.lo)};
  }
  SOFTMAXLIB_NOINLINE V in_doubles(V g, V result, V z) const {
    const GradientScale& s = *scale_;
    if (!kLog && s.kind.reduces) {
      Affine affine = s.affine;
      affine.shift = result_;
      const Pair<V> under = combine_wide(z, in_all(0, V()), affine);
      return RowGradient(low_of(sum_), affine).times_exp(under, affine.rounded()).value();
    }
    g = in_unit(g, s.unit);
    if constexpr (kLog && kDouble)
      if (!s.kind.stable) return less_product_scaled(g, result);
    const double early = !kDouble || kLog || s.kind.stable ? 1 : s.early;
    InLanes<V> d;
    if constexpr (kLog) d = less_exp(g, result);
    else d = InLanes<V>::of(result) * in_all(early, V()) * (InLanes<V>::of(g) - sum_);
    if (s.kind.stable) return StableSlope<V>(s)(d, InLanes<V>::of(z)).value();
    d = d * in_all(s.factor.value / early, V());
    return kDouble ? (d * in_all(s.factor.more, V())).value() : d.value();
  }
  // (g - e^result sum) scale. Where scale is above 1 and both are small enough, the power of two in
  // it goes to them first: their difference may be below the range of normal numbers, the result in
  // it.
  V less_product_scaled(V g, V result) const {
    const GradientScale& s = *scale_;
    const V size = magnitude(g).hi + magnitude(sum_.all).hi;
    const V early = select(gt(V::set1(0x1p900 / s.early), size), V::set1(s.early), V::set1(1));
    const V d = less_product(g * early, result, plain_.hi * early, plain_.lo);
    return d * (V::set1(s.factor.value) / early) * V::set1(s.factor.more);
  }
  static double low_of(InLanes<f32x16> x) { return first(x.low); }
  static double low_of(InLanes<f64x8> x) { return first(x.all); }

  const GradientScale* scale_;
  InLanes<V> sum_;
  double result_;
  Plain plain_;
  bool may_be_plain_ = false, is_plain_ = false, has_power_ = false;
};

// Elements [0, n) of x to `to`, with `none` in place of those that `where` hides. Whole vectors are
// written, so up to a vector less one element beyond them.
template <class V, class T = typename V::elem>
SOFTMAXLIB_NOINLINE void hide(const uint8_t* where, int64_t n, const T* x, double none, T* to) {
  const V fill = V::set1(static_cast<T>(none));
  const FetchAhead fetch;
  int64_t i = 0;
  for (; i + V::lanes <= n; i += V::lanes) {
    fetch(reinterpret_cast<const char*>(x + i) + kFetchAhead);
    store(to + i, select(load_mask(where + i, fill), load(x + i), fill));
  }
  if (i == n) return;
  const int left = static_cast<int>(n - i);
  uint8_t bytes[V::lanes] = {};
  memcpy(bytes, where + i, static_cast<size_t>(left));
  store(to + i, select(load_mask(bytes, fill), load_n(x + i, left, 0), fill));
}

// What an element takes part with: 0 where its probability is 0.
template <bool kLog, class V>
SOFTMAXLIB_INLINE V of_visible(V v, V result) {
  using T = typename V::elem;
  return select(eq(result, V::set1(static_cast<T>(kLog ? -INFINITY : 0))), V::set1(0), v);
}

// The sum of a group of elements and one more. Where a probability is 0 and what comes in infinite
// or NaN the sum is NaN, and not trusted.
template <bool kLog, class V>
SOFTMAXLIB_INLINE V plus_element(V group, bool is_first, V g, V result) {
  using T = typename V::elem;
  if constexpr (kLog) {
    g = select(eq(result, V::set1(static_cast<T>(-INFINITY))), V::set1(0), g);
    return is_first ? g : group + g;
  } else {
    return is_first ? g * result : fma(g, result, group);
  }
}

// Whether a row is so short that its sum is one of four groups, each of every fourth element; and
// that sum.
inline bool is_brief(int64_t n) { return n <= 16; }
template <class X>
SOFTMAXLIB_INLINE X sum_of_groups(const X (&of)[4]) {
  return (of[0] + of[2]) + (of[1] + of[3]);
}

// Part of a row, all of whose operands are contiguous and of one storage. kOver: up to a vector may
// be read beyond it.
template <bool kLog, class Vector, bool kOver, class Storage = typename Vector::elem>
struct GradientPiece {
  using V = Vector;
  using T = typename V::elem;
  static constexpr int kLanes = V::lanes;
  // The result of what takes no part.
  static constexpr T kNone = static_cast<T>(kLog ? -INFINITY : 0);

  const Storage *grad, *y, *x;  // NULL: those that the function does not have
  FetchAhead fetch_ahead = FetchAhead();
  int64_t ahead = kFetchAhead;
  bool fetches = false;  // y and grad, while they are summed: what comes from memory

  // Every product and sum in double, of elements that take part.
  SOFTMAXLIB_NOINLINE Lanes<V> careful_sum(int64_t n, double unit) const {
    Lanes<V> lanes;
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
      if (fetches) prefetch_from(i);
      add_vector(lanes, i, kLanes, unit);
    }
    if (i < n) add_vector(lanes, i, static_cast<int>(n - i), unit);
    // A copy: what is returned lies in memory, and GCC would keep the loop's sums there, too.
    const Lanes<V> result = lanes;
    return result;
  }
  // Whether no element takes part.
  bool is_nothing(int64_t n) const {
    for (int64_t i = 0; i < n; i += kLanes) {
      const V result = load_some(y, i, n - i < kLanes ? static_cast<int>(n - i) : kLanes, kNone);
      if (!all(eq(result, V::set1(kNone)))) return false;
    }
    return true;
  }
  // Groups of four in the arithmetic's own type.
  SOFTMAXLIB_INLINE Lanes<V> quick_sum(int64_t n) const {
    return !kOver && fetches ? sum_groups<true>(n) : sum_groups<false>(n);
  }
  template <bool kFetches>
  SOFTMAXLIB_INLINE Lanes<V> sum_groups(int64_t n) const {
    Lanes<V> lanes;
    constexpr int64_t kGroup = kVectorsPerGroup * kLanes;
    int64_t i = 0;
    for (; i + kGroup <= n; i += kGroup) {
      V group = V::set1(0);
      for (int j = 0; j < kVectorsPerGroup; ++j) {
        if (kFetches) prefetch_from(i + j * kLanes);
        group = plus_vector(group, j == 0, i + j * kLanes, kLanes);
      }
      lanes.add(widen_sum(group));
    }
    if (i == n) return lanes;
    V group = V::set1(0);
    for (int64_t j = i; j < n; j += kLanes)
      group = plus_vector(group, j == i, j, n - j < kLanes ? static_cast<int>(n - j) : kLanes);
    lanes.add(widen_sum(group));
    return lanes;
  }

  // The same of a row of so many vectors, two to four; the last is partly filled.
  template <int kVectors>
  SOFTMAXLIB_INLINE Lanes<V> quick_sum(int64_t n) const {
    V group = V::set1(0);
    for (int j = 0; j < kVectors - 1; ++j) group = plus_vector(group, j == 0, j * kLanes, kLanes);
    const int64_t last = (kVectors - 1) * kLanes;
    group = plus_vector(group, false, last, static_cast<int>(n - last));
    Lanes<V> lanes;
    lanes.add(widen_sum(group));
    return lanes;
  }
  // The four groups of a short row to p. kRows: 2: of two rows of eight floats each, which are n
  // elements.
  template <int kRows = 1>
  SOFTMAXLIB_INLINE void store_groups(int64_t n, T* p) const {
    for (int64_t i = 0; i < n; i += kLanes) {
      const int count = n - i < kLanes ? static_cast<int>(n - i) : kLanes;
      V g = load_some(grad, i, count, 0), result = load_some(y, i, count, kNone);
      if constexpr (kLog) {
        g = of_visible<kLog>(g, result);
        result = V::set1(1);
      }
      if constexpr (sizeof(T) == 4) store_quads<kRows>(p, g, result);
      else store_quads(p, g, result, i == 0);
    }
  }
  SOFTMAXLIB_NOINLINE double brief_sum(int64_t n) const {
    T of[4];
    store_groups(n, of);
    return static_cast<double>(sum_of_groups(of));
  }

  // The results of up to a vector of elements.
  template <class F>
  SOFTMAXLIB_INLINE V results(int64_t i, int count, const F& element) const {
    if constexpr (F::kIsPlain) {
      const V result = load_some(y, i, count, 0);
      const V d = element(load_some(grad, i, count, 0), result);
      return F::kIsMasked ? of_visible<kLog>(d, result) : d;
    } else {
      V g = V::set1(0), result = g, z = g;
      if (y) g = load_some(grad, i, count, 0), result = load_some(y, i, count, 0);
      if (x) {
        fetch_ahead(reinterpret_cast<const char*>(x + i) + ahead);
        z = load_some(x, i, count, 0);
      }
      const V d = element(g, result, z);
      const auto none = eq(z, V::set1(static_cast<T>(-INFINITY)));
      if (!y) result = select(none, V::set1(0), V::set1(1));
      return of_visible<kLog>(d, result);
    }
  }
  // out: n elements, streamed from the first aligned vector on; what is left at the ends: to edge.
  // Those of another storage have to be plain.
  void write(Storage* out, int64_t n, const ElementGradient<kLog, V>& element,
             Edge<Storage>* edge) const {
    const auto write = [&](auto f) SOFTMAXLIB_INLINE_LAMBDA { write_each(out, n, f, edge); };
    if constexpr (sizeof(Storage) == sizeof(T)) element.with(write);
    else element.with_plain(write);
  }

 private:
  template <class F>
  SOFTMAXLIB_INLINE void write_each(Storage* out, int64_t n, F element, Edge<Storage>* edge) const {
    const auto at = [element, piece = *this](int64_t i, int count)
                        SOFTMAXLIB_INLINE_LAMBDA { return piece.results(i, count, element); };
    // A copy of at: the loop's own stays in registers only if its address goes nowhere.
    const auto some = [at](int64_t i, int64_t count)
                          SOFTMAXLIB_NOINLINE_LAMBDA { return at(i, static_cast<int>(count)); };
    const bool streaming = edge;
    int64_t i = 0;
    constexpr int64_t kItem = sizeof(Storage), kVector = kLanes * kItem;
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
  static V load_some(const Storage* p, int64_t i, int n, T fill) {
    if (n == kLanes) return load(p + i);
    if constexpr (!kOver) return load_n(p + i, n, fill);
    constexpr T kLane[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return select(gt(V::set1(static_cast<T>(n)), load(kLane)), load(p + i), V::set1(fill));
  }
  static SOFTMAXLIB_INLINE f32x16 in_unit(f32x16 g, double) { return g; }
  static SOFTMAXLIB_INLINE f64x8 in_unit(f64x8 g, double unit) { return g * f64x8::set1(unit); }
  SOFTMAXLIB_INLINE void prefetch_from(int64_t i) const {
    fetch_ahead(reinterpret_cast<const char*>(y + i) + ahead);
    fetch_ahead(reinterpret_cast<const char*>(grad + i) + ahead);
  }
  SOFTMAXLIB_INLINE V plus_vector(V group, bool is_first, int64_t i, int n) const {
    return plus_element<kLog>(group, is_first, load_some(grad, i, n, 0), load_some(y, i, n, kNone));
  }
  SOFTMAXLIB_INLINE void add_vector(Lanes<V>& lanes, int64_t i, int n, double unit) const {
    const V result = load_some(y, i, n, kNone);
    const V g = of_visible<kLog>(in_unit(load_some(grad, i, n, 0), unit), result);
    if constexpr (kLog) add_values(lanes, g);
    else add_products(lanes, g, result);
  }
};

}  // namespace
}  // namespace SOFTMAX_ISA
}  // namespace softmaxlib
