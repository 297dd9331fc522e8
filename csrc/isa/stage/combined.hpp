// A row's arguments x scale + bias - shift, -inf where `where` is false, made as they are read: for
// rows whose x, bias and where lie contiguous in memory. Other rows are gathered first: stage.hpp.
#pragma once

#include "isa/math/in_lanes.hpp"
#include "isa/stage/stage.hpp"
#include "isa/stage/usual_rows.hpp"

namespace softmaxlib {
namespace SOFTMAX_ISA {
namespace {

constexpr double kCount[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// Of one row; all positions count from its first element.
template <class V>
struct Terms {
  using T = typename V::elem;

  const char* bias;  // NULL: none
  softmaxlib_dtype bias_dtype;
  bool bias_is_constant;
  double constant;
  T constant_hi, constant_lo;     // it in the row's own type
  const uint8_t* where;           // NULL: all
  int64_t bias_from, where_from;  // the positions that they begin with
  double slope;                   // of ALiBi
  double query, offset;           // and from where it counts
  Arguments<V> arguments;

  SOFTMAXLIB_NOINLINE Terms(const Job& job, const Place& place, const Arguments<V>& how)
      : bias(job.base[kBias] ? job.base[kBias] + place.offset[kBias] : nullptr),
        bias_dtype(job.dtype[kBias]),
        bias_is_constant(bias && job.inner[0].stride[kBias] == 0),
        constant(0),
        constant_hi(0),
        constant_lo(0),
        where(job.base[kWhere]
                  ? reinterpret_cast<const uint8_t*>(job.base[kWhere] + place.offset[kWhere])
                  : nullptr),
        bias_from(0),
        where_from(0),
        slope(row_operand(job, place, kSlope, 0)),
        query(static_cast<double>(place.offset[kQuery])),
        offset(static_cast<double>(job.causal_offset)),
        arguments(how) {
    if (bias_is_constant) set_constant(row_operand(job, place, kBias, 0));
  }

  SOFTMAXLIB_NOINLINE void set_constant(double value) {
    bias_is_constant = true;
    constant = value;
    split(value, &constant_hi, &constant_lo);
  }
  // A number of double as two of the row's own type.
  static void split(double value, T* hi, T* lo) {
    *hi = static_cast<T>(value);
    const bool finite = *hi - *hi == 0;
    *lo = finite ? static_cast<T>(value - static_cast<double>(*hi)) : T(0);
  }
};

inline void widen(f32x16 v, InLanes<f32x16>& to) { to = InLanes<f32x16>::of(v); }
inline void widen(f32x16 v, InLanes<f64x8>& to) { to.all = widen_low(v); }

// Elements [0, n) of p as doubles, 0 beyond; without n as many as V has lanes.
template <class V, class Source>
inline void load_wide(const Source* p, int n, InLanes<V>& to) {
  if constexpr (sizeof(Source) == 8 && V::lanes == 16) {
    to.low = load_n(p, n < 8 ? n : 8, 0);
    to.high = load_n(p + (n < 8 ? 0 : 8), n < 8 ? 0 : n - 8, 0);
  } else if constexpr (sizeof(Source) == 8) {
    to.all = load_n(p, n, 0);
  } else {
    widen(load_n(p, n, 0), to);
  }
}
template <class V, class Source>
inline void load_wide(const Source* p, InLanes<V>& to) {
  if constexpr (sizeof(Source) == 8) load_lanes(p, to);
  else if constexpr (V::lanes == 16) widen(load(p), to);
  else widen(load_n(p, 8, 0), to);
}

inline InLanes<f32x16> in_all(double x, f32x16) { return {f64x8::set1(x), f64x8::set1(x)}; }
inline InLanes<f64x8> in_all(double x, f64x8) { return {f64x8::set1(x)}; }

template <class D>
struct Combined {
  using V = typename vector_of<D>::type;
  using T = typename V::elem;
  using Value = Pair<V>;

  const D* x;
  const Terms<V>* terms;
  int64_t start;  // of x in the row
  FetchAhead fetch = FetchAhead();

  bool is_at(const void* y) const { return x == y; }
  SOFTMAXLIB_INLINE Value load(int64_t i) const {
    fetch(reinterpret_cast<const char*>(x + i) + kFetchAhead);
    return combined(SOFTMAX_ISA::load(x + i), i, V::lanes);
  }
  Value load_n(int64_t i, int n, T fill) const {
    const Value v = combined(SOFTMAX_ISA::load_n(x + i, n, T(0)), i, n);
    constexpr T kLane[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const auto there = gt(V::set1(static_cast<T>(n)), SOFTMAX_ISA::load(kLane));
    return {select(there, v.hi, V::set1(fill)), select(there, v.lo, V::set1(0))};
  }
  Combined at(int64_t i) const { return {x + i, terms, start + i}; }

  SOFTMAXLIB_NOINLINE InLanes<V> wide_bias(int64_t i, int n) const {
    const InLanes<V> bias = given_bias(i, n);
    if (terms->slope == 0) return bias;
    InLanes<V> count;
    load_lanes(kCount, count);
    const InLanes<V> position = in_all(static_cast<double>(start + i) - terms->query, V()) + count;
    return bias + in_all(terms->slope, V()) * (position - in_all(terms->offset, V()));
  }

 private:
  template <class Source>
  SOFTMAXLIB_INLINE InLanes<V> bias_from(int64_t i, int n) const {
    InLanes<V> bias;
    const Source* p = reinterpret_cast<const Source*>(terms->bias) + (start - terms->bias_from) + i;
    if (n == V::lanes) load_wide(p, bias);
    else load_wide(p, n, bias);
    return bias;
  }
  SOFTMAXLIB_INLINE InLanes<V> given_bias(int64_t i, int n) const {
    if (!terms->bias || terms->bias_is_constant) return in_all(terms->constant, V());
    switch (terms->bias_dtype) {
      case SOFTMAXLIB_F32: return bias_from<float>(i, n);
      case SOFTMAXLIB_F64: return bias_from<double>(i, n);
      case SOFTMAXLIB_F16: return bias_from<f16>(i, n);
      default: return bias_from<bf16>(i, n);
    }
  }
  // What a vector of the arithmetic holds, as most biases are, needs no double.
  SOFTMAXLIB_INLINE Value bias_at(int64_t i, int n) const {
    constexpr bool kFloats = sizeof(T) == 4;
    if (terms->slope != 0) return pair_of(wide_bias(i, n));
    if (terms->bias_is_constant) return {V::set1(terms->constant_hi), V::set1(terms->constant_lo)};
    if ((terms->bias_dtype == SOFTMAXLIB_F64) == kFloats) return pair_of(wide_bias(i, n));
    const int64_t at = (start - terms->bias_from + i) * float_item(terms->bias_dtype);
    return {load_some(terms->bias_dtype, terms->bias + at, n, V()), V::set1(0)};
  }

  SOFTMAXLIB_INLINE Value combined(V v, int64_t i, int n) const {
    const auto wide = [&] { return wide_bias(i, n); };
    const bool has_bias = terms->bias || terms->slope != 0;
    if (!terms->where) {
      if (!has_bias) return combine(v, terms->arguments, wide);
      return combine(v, bias_at(i, n), terms->arguments, wide);
    }
    // What is not seen may be anything, so it is made 0 first.
    const uint8_t* const where = terms->where + (start - terms->where_from) + i;
    const auto in = n == V::lanes ? load_mask(where, v) : partial_mask(where, n, v);
    const V zero = V::set1(0);
    Value z;
    if (!has_bias) {
      z = combine(select(in, v, zero), terms->arguments, wide);
    } else {
      const Value bias = bias_at(i, n);
      const Value seen = {select(in, bias.hi, zero), select(in, bias.lo, zero)};
      z = combine(select(in, v, zero), seen, terms->arguments, wide);
    }
    return {select(in, z.hi, V::set1(static_cast<T>(-INFINITY))), select(in, z.lo, zero)};
  }
  static typename V::Mask partial_mask(const uint8_t* p, int n, V like) {
    uint8_t bytes[V::lanes] = {};
    for (int j = 0; j < n; ++j) bytes[j] = p[j];
    return load_mask(bytes, like);
  }
};

// Whether the elements of a row follow each other in memory.
inline bool is_contiguous(const Job& job, Operand k, int64_t item) {
  return job.inner_ndim == 1 && (job.inner[0].size == 1 || job.inner[0].stride[k] == item);
}

// Where a part of a bias and a mask waits that is neither contiguous nor the same for all of a row.
template <class V>
class GatheredOptions {
 public:
  using T = typename V::elem;

  // Points terms to elements [start, start + n), gathered if they have to be.
  void gather_into(Terms<V>& terms, const Job& job, const Place& place, int64_t start, int64_t n) {
    const bool same_bias = terms.bias_is_constant && job.inner_ndim == 1;
    if (terms.bias && !same_bias && !is_contiguous(job, kBias, float_item(job.dtype[kBias]))) {
      gather_elements(job, place, kBias, start, n, bias_);
      terms.bias = reinterpret_cast<const char*>(bias_);
      terms.bias_dtype = SOFTMAXLIB_F64;
      terms.bias_is_constant = false;
      terms.bias_from = start;
    }
    if (terms.where && !is_contiguous(job, kWhere, 1)) {
      gather_visible(job, place, start, n, where_);
      terms.where = where_;
      terms.where_from = start;
    }
  }

  // Whether the bias, if there is one, is what T holds.
  static bool has_usual_bias(const Job& job) {
    return !job.base[kSlope] &&
           (!job.base[kBias] || sizeof(T) == 8 || job.dtype[kBias] != SOFTMAXLIB_F64);
  }
  // Whether elements of a float dtype can be read where they are.
  static bool is_in_place(const Job& job, Operand k) {
    return job.dtype[k] <= SOFTMAXLIB_BF16 &&
           (job.dtype[k] == SOFTMAXLIB_F64) == (sizeof(T) == 8) &&
           is_contiguous(job, k, float_item(job.dtype[k]));
  }
  // Whether bias and mask can.
  static bool are_in_place(const Job& job) {
    return (!job.base[kBias] || is_in_place(job, kBias)) &&
           (!job.base[kWhere] || is_contiguous(job, kWhere, 1));
  }
  // Points rows to those of the elements [start, start + n) of one, gathered if they have to be.
  void gather_into(UsualRows<T>& rows, const Job& job, const Place& place, int64_t start,
                   int64_t n) {
    if (job.base[kBias]) {
      const char* const bias = job.base[kBias] + place.offset[kBias];
      if (is_in_place(job, kBias)) {
        rows.bias.dtype = job.dtype[kBias];
        rows.bias.p = bias + start * float_item(job.dtype[kBias]);
      } else {
        // Rows may share one.
        if (bias != gathered_ || start != gathered_start_)
          gather_elements(job, place, kBias, start, n, own_bias_);
        gathered_ = bias, gathered_start_ = start;
        rows.bias.set(own_bias_);
      }
    }
    if (job.base[kWhere]) {
      rows.where =
          reinterpret_cast<const uint8_t*>(job.base[kWhere] + place.offset[kWhere]) + start;
      if (!is_contiguous(job, kWhere, 1)) {
        gather_visible(job, place, start, n, where_);
        rows.where = where_;
      }
    }
  }

 private:
  static constexpr int kChunk = kVectorsPerChunk * V::lanes;
  alignas(64) double bias_[kChunk];
  alignas(64) T own_bias_[kChunk];
  uint8_t where_[kChunk];
  const char* gathered_ = nullptr;  // what own_bias_ has, from which element on
  int64_t gathered_start_ = 0;
};

// The arguments of n elements, as hi + lo; whole vectors are written, with -inf beyond the end. lo
// may be NULL.
template <class T, class V = typename vector_of<T>::type>
SOFTMAXLIB_NOINLINE void combine_all(Combined<T> source, int64_t n, T* hi, T* lo) {
  for (int64_t i = 0; i < n; i += V::lanes) {
    const int64_t left = n - i;
    const Pair<V> z = left >= V::lanes
                          ? source.load(i)
                          : source.load_n(i, static_cast<int>(left), static_cast<T>(-INFINITY));
    store(hi + i, z.hi);
    if (lo) store(lo + i, z.lo);
  }
}

// A chunk of a row on its way in, as hi + lo, and out: for rows that are strided, of another dtype,
// or have options.
template <class T>
struct Stage {
  using V = typename vector_of<T>::type;
  static constexpr int kLanes = V::lanes, kChunk = kVectorsPerChunk * kLanes;

  alignas(64) T hi[kChunk];
  alignas(64) T lo[kChunk];
  alignas(64) T y[kChunk];

  // Elements [start, start + n) as they are.
  SOFTMAXLIB_NOINLINE void fetch(const Job& job, const Place& place, int64_t start, int n) {
    gather_elements(job, place, kX, start, n, hi);
  }
  // Their arguments. with_low: else hi is all that is read of them.
  SOFTMAXLIB_NOINLINE void fetch(const Job& job, const Place& place, int64_t start, int n,
                                 const Affine& affine, bool with_low) {
    const T* x = hi;
    const bool in_place = job.dtype[kX] == kOwnDtype<T> && is_contiguous(job, kX, sizeof(T));
    if (in_place) x = reinterpret_cast<const T*>(job.base[kX] + place.offset[kX]) + start;
    if (kHasManyRows && GatheredOptions<V>::has_usual_bias(job)) {
      const Arguments<V> arguments(affine);
      UsualRows<T> row;
      row.x.set(x);
      set_factor(row, arguments);
      if (arguments.is_usual) {
        if (GatheredOptions<V>::is_in_place(job, kX)) {
          row.x.dtype = job.dtype[kX];
          row.x.p = job.base[kX] + place.offset[kX] + start * float_item(job.dtype[kX]);
        } else {
          fetch(job, place, start, n);
        }
        options_.gather_into(row, job, place, start, n);
        if (usual_(row, 1, n, hi, with_low ? lo : nullptr, 0)) return;
      }
    }
    const Terms<V> terms = fetch_operands(job, place, start, n, affine);
    if (!in_place) fetch(job, place, start, n);
    combine_all<T>({x, &terms, start}, n, hi, lo);
  }

  // The larger of `top` and their maximum as an unevaluated sum, in the affine's unit: factor and
  // bias may carry them beyond T, and so far that what a double lacks of them is large.
  SOFTMAXLIB_NOINLINE Pair<double> largest(const Job& job, const Place& place, int64_t start, int n,
                                           const Affine& affine, Pair<double> top) {
    const Terms<V> terms = fetch_operands(job, place, start, n, affine);
    fetch(job, place, start, n);
    const Combined<T> source = {hi, &terms, start};
    for (int i = 0; i < n; i += kLanes) {
      const int count = n - i < kLanes ? n - i : kLanes;
      for (int j = 0; j < kLanes; ++j)
        if (j >= count || (terms.where && !terms.where[start - terms.where_from + i + j]))
          hi[i + j] = -static_cast<T>(INFINITY);
      InLanes<V>::of(load(hi + i)).with(source.wide_bias(i, count), [&](f64x8 x, f64x8 b) {
        double high[f64x8::lanes], low[f64x8::lanes];
        const Pair<f64x8> z = combine_in_double(x, b, affine);
        store(high, z.hi);
        store(low, z.lo);
        for (int j = 0; j < f64x8::lanes; ++j)
          if (high[j] > top.hi || (high[j] == top.hi && low[j] > top.lo)) top = {high[j], low[j]};
      });
    }
    return top;
  }

  // Brings y to out.
  SOFTMAXLIB_NOINLINE void put(const Job& job, const Place& place, int64_t start, int n) const {
    scatter_elements(job, place, start, n, y, job.streaming);
  }

 private:
  Terms<V> fetch_operands(const Job& job, const Place& place, int64_t start, int n,
                          const Affine& affine) {
    Terms<V> terms(job, place, Arguments<V>(affine));
    options_.gather_into(terms, job, place, start, n);
    return terms;
  }

  GatheredOptions<V> options_;
  UsualCombiner<V> usual_;
};

}  // namespace
}  // namespace SOFTMAX_ISA
}  // namespace softmaxlib
