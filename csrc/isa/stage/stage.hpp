// Rows that a kernel cannot read in place (strided, of another dtype, with scale, bias or where)
// pass through a chunk of scratch: gathered, converted, combined in higher precision.
#pragma once

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "isa/macros.hpp"
#include "isa/math/exp.hpp"
#include "job.hpp"
#include "walk.hpp"

namespace softmaxlib {
namespace SOFTMAX_ISA {
namespace {

// make_table() sets it, once. Loops keep copies of what they use, since as far as the compiler
// knows their stores might change what has a name.
Tuning tuning = {};

// Fetches memory that is read while something else is computed or written, so many bytes ahead.
constexpr int64_t kFetchAhead = 8192;
class FetchAhead {
 public:
  // near: in any case into the first level.
  explicit FetchAhead(bool near = false) : second_level_(tuning.second_level && !near) {}
  SOFTMAXLIB_INLINE void operator()(const char* p) const {
    if (second_level_) SOFTMAXLIB_PREFETCH(p);
    else prefetch(p);
  }

 private:
  bool second_level_;
};

template <class To, class From>
inline void convert1(From x, To& to) {
  to = static_cast<To>(x);
}
// One lane through the leaf's own conversion.
template <class To>
inline void convert1(f16 x, To& to) {
  to = first(load_n(&x, 1, 0));
}
template <class To>
inline void convert1(bf16 x, To& to) {
  to = first(load_n(&x, 1, 0));
}

inline void store_as(float* to, f32x16 v) { store(to, v); }
inline void store_as(double* to, f32x16 v) {
  store(to, widen_low(v));
  store(to + 8, widen_high(v));
}

template <class From, class To>
inline void gather(const char* p, int64_t stride, int64_t count, To* to) {
  constexpr int64_t kItem = sizeof(From);
  int64_t i = 0;
  if constexpr (kItem == 2) {
    // Between two chunks of a row that are converted much is computed: what is to come is fetched.
    const FetchAhead fetch;
    for (; stride == kItem && i + 16 <= count; i += 16) {
      fetch(p + i * kItem + kFetchAhead);
      store_as(to + i, load(reinterpret_cast<const From*>(p) + i));
    }
  }
  for (; i < count; ++i) {
    From x;
    memcpy(&x, p + i * stride, sizeof(From));
    convert1(x, to[i]);
  }
}

// Elements of any dtype, so many bytes from each other.
template <class To>
SOFTMAXLIB_NOINLINE void gather_any(softmaxlib_dtype dtype, const char* p, int64_t stride,
                                    int64_t count, To* to) {
  switch (dtype) {
    case SOFTMAXLIB_F32: return gather<float>(p, stride, count, to);
    case SOFTMAXLIB_F64: return gather<double>(p, stride, count, to);
    case SOFTMAXLIB_F16: return gather<f16>(p, stride, count, to);
    case SOFTMAXLIB_BF16: return gather<bf16>(p, stride, count, to);
    default: return gather_integers(dtype, p, stride, count, to);
  }
}
// Elements [start, start + n) of a row's operand.
template <class To>
SOFTMAXLIB_NOINLINE void gather_elements(const Job& job, const Place& place, Operand operand,
                                         int64_t start, int64_t n, To* to) {
  const softmaxlib_dtype dtype = job.dtype[operand];
  if (job.inner_ndim == 1) {
    const int64_t stride = job.inner[0].stride[operand];
    const char* const p = job.base[operand] + place.offset[operand];
    return gather_any(dtype, p + start * stride, stride, n, to);
  }
  for (Stretches s(job, place, operand, start, n); s.count; s.next())
    gather_any(dtype, s.p, s.stride, s.count, to + s.done);
}

template <class D, class T>
inline D narrow_one(T x) {
  using V = typename vector_of<D>::type;
  D all[V::lanes];
  store(all, V::set1(x));
  return all[0];
}

// x in a dtype that is known at run time only, rounded to it.
SOFTMAXLIB_NOINLINE void put_as(softmaxlib_dtype dtype, char* to, double x) {
  const auto put = [to](auto value) { memcpy(to, &value, sizeof(value)); };
  const auto narrow = static_cast<float>(x);
  if (dtype == SOFTMAXLIB_F64) put(x);
  else if (dtype == SOFTMAXLIB_F32) put(narrow);
  else if (dtype == SOFTMAXLIB_F16) put(narrow_one<f16>(narrow));
  else put(narrow_one<bf16>(narrow));
}

// f(a pointer to a storage, which is NULL) for that of a dtype.
template <class F>
SOFTMAXLIB_INLINE void with_storage(softmaxlib_dtype dtype, f32x16, F f) {
  switch (dtype) {
    case SOFTMAXLIB_F16: return f(static_cast<f16*>(nullptr));
    case SOFTMAXLIB_BF16: return f(static_cast<bf16*>(nullptr));
    default: return f(static_cast<float*>(nullptr));
  }
}
template <class F>
SOFTMAXLIB_INLINE void with_storage(softmaxlib_dtype, f64x8, F f) {
  f(static_cast<double*>(nullptr));
}

// The dtype of the arithmetic's own type.
template <class T>
constexpr softmaxlib_dtype kOwnDtype = sizeof(T) == 4 ? SOFTMAXLIB_F32 : SOFTMAXLIB_F64;

inline int64_t float_item(softmaxlib_dtype dtype) {
  constexpr int64_t kSizes[] = {4, 8, 2, 2};
  return kSizes[dtype];
}

// Up to one vector of any float dtype.
template <class Storage, class V>
SOFTMAXLIB_INLINE V load_some(const char* p, int n, V) {
  const auto* const from = reinterpret_cast<const Storage*>(p);
  return n == V::lanes ? load(from) : load_n(from, n, 0);
}
SOFTMAXLIB_INLINE f32x16 load_some(softmaxlib_dtype dtype, const char* p, int n, f32x16 like) {
  switch (dtype) {
    case SOFTMAXLIB_F16: return load_some<f16>(p, n, like);
    case SOFTMAXLIB_BF16: return load_some<bf16>(p, n, like);
    default: return load_some<float>(p, n, like);
  }
}
SOFTMAXLIB_INLINE f64x8 load_some(softmaxlib_dtype, const char* p, int n, f64x8 like) {
  return load_some<double>(p, n, like);
}

// Elements of the arithmetic's type, times a scale, to memory of any float dtype.
template <class T>
SOFTMAXLIB_NOINLINE void store_all(softmaxlib_dtype dtype, char* p, int64_t stride, int64_t count,
                                   const T* from, bool streaming = false, T scale = 1) {
  using V = typename vector_of<T>::type;
  constexpr int64_t kLanes = V::lanes;
  with_storage(dtype, V(), [&](auto* storage) SOFTMAXLIB_INLINE_LAMBDA {
    constexpr int64_t kItem = sizeof(*storage);
    auto* const to = reinterpret_cast<decltype(storage)>(p);
    alignas(64) unsigned char room[kLanes * kItem];
    auto* const some = reinterpret_cast<decltype(storage)>(room);
    const V factor = V::set1(scale);
    const auto put_some = [&](int64_t i, int64_t n) {
      store(some, load_n(from + i, static_cast<int>(n), T(0)) * factor);
      for (int64_t j = 0; j < n; ++j) memcpy(p + (i + j) * stride, some + j, kItem);
    };
    int64_t i = 0;
    if (stride == kItem) {
      // Streamed from the first whole vector on.
      constexpr int64_t kVector = kLanes * kItem;
      const auto past = static_cast<int64_t>(reinterpret_cast<uintptr_t>(p) % kVector);
      const bool streams = streaming && past % kItem == 0;
      if (streams && past && count > kLanes) put_some(0, i = (kVector - past) / kItem);
      for (; i + kLanes <= count; i += kLanes)
        if (streams && (past == 0 || i != 0)) stream(to + i, load(from + i) * factor);
        else store(to + i, load(from + i) * factor);
    }
    for (; i < count; i += kLanes) put_some(i, count - i < kLanes ? count - i : kLanes);
  });
}

// Results [start, start + n) of a row.
template <class T>
SOFTMAXLIB_NOINLINE void scatter_elements(const Job& job, const Place& place, int64_t start,
                                          int64_t n, const T* from, bool streaming = false,
                                          T scale = 1) {
  const softmaxlib_dtype dtype = job.dtype[kOut];
  if (job.inner_ndim == 1) {
    const int64_t stride = job.inner[0].stride[kOut];
    char* const p = job.base[kOut] + place.offset[kOut] + start * stride;
    return store_all(dtype, p, stride, n, from, streaming, scale);
  }
  for (Stretches s(job, place, kOut, start, n); s.count; s.next())
    store_all(dtype, s.p, s.stride, s.count, from + s.done, streaming, scale);
}

inline double fma_scalar(double a, double b, double c) {
#if defined(__GNUC__)
  return __builtin_fma(a, b, c);
#else
  return ::fma(a, b, c);
#endif
}

// An infinite hi has no lo.
template <class V>
inline Pair<V> finite_pair(V hi, V lo) {
  return {hi, select(eq(hi - hi, V::set1(0)), lo, V::set1(0))};
}

// How the arguments of a row come out of x: times a factor, its scale or 1 / its temperature, plus
// bias, less a shift.
struct Affine {
  double factor, factor_lo;  // an unevaluated sum, far from the ends of the range
  int exponent;              // of the factor's power of two that is left: 0 but for extreme ones
  int coarse;  // the shift is in units of 2^coarse, for what leaves the range of double
  double shift, shift_lo;
  // The shift is that of a streaming state, which has room for one number: where that is large,
  // what it lacks would be left of all arguments, so these are rounded once, too.
  bool is_rough;

  // What of the factor a double holds; the last number where it holds none.
  double rounded() const {
    if (exponent == 0) return factor;
    return exponent > 0 ? DBL_MAX : 0x1p-1074;
  }
};

// The row's own value of an operand that is constant along the row.
SOFTMAXLIB_NOINLINE double row_operand(const Job& job, const Place& place, Operand operand,
                                       double missing) {
  double value = missing;
  if (job.base[operand])
    gather_any(job.dtype[operand], job.base[operand] + place.offset[operand], 0, 1, &value);
  return value;
}

// `far`: for a row whose arguments leave the range of double.
SOFTMAXLIB_NOINLINE Affine affine_of(const Job& job, const Place& place, Pair<double> shift,
                                     bool far = false) {
  constexpr int kMost = 1000;
  const double temperature =
      job.divides ? row_operand(job, place, kScale, job.temperature) : job.temperature;
  const double scale = job.divides ? job.scale : row_operand(job, place, kScale, job.scale);
  int above, below;
  const double m = split_exponent(scale, &above), t = split_exponent(temperature, &below);
  const double q = m / t, q_lo = fma_scalar(-q, t, m) / t;
  const int coarse = !far ? 0 : above > below ? above - below + 2 : 2;
  const int k = above - below - coarse;
  const int first = k > kMost ? kMost : k < -kMost ? -kMost : k;
  const double unit = power_of_two(first);
  return {q * unit, q_lo * unit, k - first, coarse, shift.hi, shift.lo, false};
}

// The same, and what the usual arithmetic takes of it.
template <class V>
struct Arguments : Affine {
  using T = typename V::elem;
  T hi, lo;  // the factor
  bool is_usual;

  explicit Arguments(const Affine& affine) : Affine(affine) {
    constexpr double kMost = sizeof(T) == 4 ? 0x1p60 : 0x1p500;
    is_usual = shift == 0 && coarse == 0 && exponent == 0 && factor < kMost && factor > 1 / kMost;
    hi = is_usual ? static_cast<T>(factor) : T(0);
    lo = is_usual ? static_cast<T>((factor - static_cast<double>(hi)) + factor_lo) : T(0);
  }
};

// Beyond this the low part of an argument would change what its exponential's polynomial sees, and
// round away what counts.
template <class V>
constexpr double kLargestLow = sizeof(typename V::elem) == 4 ? 0x1p-8 : 0x1p-20;

// 2^k, for k down to the least power of two of a normal double.
inline f64x8 vector_of_two(int k) { return f64x8::set1(power_of_two(k > -1022 ? k : -1022)); }

// x factor + bias - shift in double, where every operation keeps its error, in units of 2^coarse.
// hi + lo is normalized.
inline Pair<f64x8> combine_in_double(f64x8 x, f64x8 bias, const Affine& a) {
  const f64x8 factor = f64x8::set1(a.factor), none = f64x8::set1(0);
  f64x8 z = x * factor, error = fma(x, factor, none - z) + x * f64x8::set1(a.factor_lo);
  if (a.exponent) z = z * vector_of_two(a.exponent), error = error * vector_of_two(a.exponent);
  if (a.coarse) bias = bias * vector_of_two(-a.coarse);
  const f64x8 u = z + bias, of_u = u - z;
  error = error + ((z - (u - of_u)) + (bias - of_u));
  if (a.is_rough && (a.shift > 0x1p60 || a.shift < -0x1p60))
    return {select(eq(u - u, none), u + error, u) - f64x8::set1(a.shift), none};
  const f64x8 shift = f64x8::set1(a.shift), d = u - shift, of_d = d - u;
  error = (error - f64x8::set1(a.shift_lo)) + ((u - (d - of_d)) - (shift + of_d));
  const f64x8 hi = d + error, of_hi = hi - d;
  const f64x8 lo = (d - (hi - of_hi)) + (error - of_hi);
  const f64x8 sum = select(eq(d - d, none), hi, d);
  return finite_pair(sum, lo);
}
inline Pair<f64x8> in_unit_of_one(Pair<f64x8> z, int coarse) {
  for (; coarse > 0; coarse -= 1000) {
    const f64x8 unit = vector_of_two(coarse < 1000 ? coarse : 1000);
    z = {z.hi * unit, z.lo * unit};
  }
  return finite_pair(z.hi, z.lo);
}
SOFTMAXLIB_NOINLINE Pair<f32x16> combine_wide(f32x16 x, InLanes<f32x16> bias, const Affine& a) {
  const Pair<f64x8> low = in_unit_of_one(combine_in_double(widen_low(x), bias.low, a), a.coarse);
  const Pair<f64x8> high = in_unit_of_one(combine_in_double(widen_high(x), bias.high, a), a.coarse);
  const f32x16 hi = narrow(low.hi, high.hi);
  const f32x16 lo = narrow((low.hi - widen_low(hi)) + low.lo, (high.hi - widen_high(hi)) + high.lo);
  return finite_pair(hi, lo);
}
SOFTMAXLIB_NOINLINE Pair<f64x8> combine_wide(f64x8 x, InLanes<f64x8> bias, const Affine& a) {
  return in_unit_of_one(combine_in_double(x, bias.all, a), a.coarse);
}

// Where the usual arithmetic found `hi` and `lo`: what it may not be used for is computed again. An
// argument is -inf because x or its bias is, or it is none that left the range on its way.
template <class V>
SOFTMAXLIB_NOINLINE Pair<V> repair(V x, V bias, V hi, V lo, InLanes<V> wide_bias, const Affine& a) {
  using T = typename V::elem;
  const V zero = V::set1(0), none = V::set1(static_cast<T>(-INFINITY));
  const V limit = V::set1(static_cast<T>(kLargestLow<V>));
  lo = select(eq(select(eq(hi, none), min(x, bias), zero), none), zero, lo);
  const auto stands = gt(limit, max(lo, zero - lo));
  if (!any(gt(select(stands, zero, limit), zero))) return {hi, lo};
  const Pair<V> wide = combine_wide(x, wide_bias, a);
  return {select(stands, hi, wide.hi), select(stands, lo, wide.lo)};
}

// x factor + bias - shift, as an unevaluated sum, by error-free transforms in the row's own type
// (Knuth's two-sum; the product's error by an fma), or in double where that is not enough: a
// function of the element alone, so that all ways to get here agree. wide(): the bias in double.
template <class V, class WideBias>
SOFTMAXLIB_INLINE Pair<V> combine(V x, Pair<V> bias, const Arguments<V>& a, WideBias wide) {
  if (SOFTMAXLIB_UNLIKELY(!a.is_usual)) return combine_wide(x, wide(), a);
  const V limit = V::set1(static_cast<typename V::elem>(kLargestLow<V>));
  const V factor = V::set1(a.hi), zero = V::set1(0);
  const V z = x * factor, hi = z + bias.hi, tail = hi - z;
  const V of_product = fma(x, V::set1(a.lo), fma(x, factor, zero - z));
  const V lo = (of_product + ((z - (hi - tail)) + (bias.hi - tail))) + bias.lo;
  // min() passes its second operand on when one is NaN.
  if (SOFTMAXLIB_UNLIKELY(any(eq(min(max(lo, zero - lo), limit), limit))))
    return repair(x, bias.hi, hi, lo, wide(), a);
  return {hi, lo};
}
// Without a bias.
template <class V, class WideBias>
SOFTMAXLIB_INLINE Pair<V> combine(V x, const Arguments<V>& a, WideBias wide) {
  if (SOFTMAXLIB_UNLIKELY(!a.is_usual)) return combine_wide(x, wide(), a);
  const V limit = V::set1(static_cast<typename V::elem>(kLargestLow<V>));
  const V factor = V::set1(a.hi), zero = V::set1(0);
  const V hi = x * factor, lo = fma(x, V::set1(a.lo), fma(x, factor, zero - hi));
  if (SOFTMAXLIB_UNLIKELY(any(eq(min(max(lo, zero - lo), limit), limit))))
    return repair(x, zero, hi, lo, wide(), a);
  return {hi, lo};
}
// A bias in double as two of the row's type.
inline Pair<f32x16> pair_of(InLanes<f32x16> x) {
  const f32x16 hi = x.value();
  const f32x16 lo = narrow(x.low - widen_low(hi), x.high - widen_high(hi));
  return finite_pair(hi, lo);
}
inline Pair<f64x8> pair_of(InLanes<f64x8> x) { return {x.all, f64x8::set1(0)}; }

}  // namespace
}  // namespace SOFTMAX_ISA
}  // namespace softmaxlib
