// Rows that a kernel cannot read in place (strided, of another dtype, with scale, bias or where)
// pass through a chunk of scratch: gathered, converted, combined in higher precision.
#pragma once

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "job.hpp"
#include "macros.hpp"
#include "math/in_lanes.hpp"
#include "math/value.hpp"

namespace softmaxlib {
namespace SOFTMAX_ISA {
namespace {

// Byte offset of the current row in every operand.
struct Place {
  int64_t offset[kOperands];
};

// Calls f(pointer, stride, done, count) for every run of constant stride among elements
// [start, start + n) of a row.
template <class F>
inline void for_runs(const Job& job, const Place& place, Operand operand, int64_t start, int64_t n,
                     F f) {
  int64_t index[SOFTMAXLIB_MAX_NDIM];
  char* p = job.base[operand] + place.offset[operand];
  for (int d = job.inner_ndim - 1; d >= 0; --d) {
    index[d] = start % job.inner[d].size;
    start /= job.inner[d].size;
    p += index[d] * job.inner[d].stride[operand];
  }
  const int last = job.inner_ndim - 1;
  const int64_t stride = job.inner[last].stride[operand];
  for (int64_t done = 0; done < n;) {
    const int64_t room = job.inner[last].size - index[last];
    const int64_t count = room < n - done ? room : n - done;
    f(p, stride, done, count);
    done += count;
    p += count * stride;
    index[last] += count;
    for (int d = last; d > 0 && index[d] == job.inner[d].size; --d) {
      p += job.inner[d - 1].stride[operand] - job.inner[d].size * job.inner[d].stride[operand];
      index[d] = 0;
      ++index[d - 1];
    }
  }
}

template <class T>
constexpr bool kIsInteger = true;
template <>
constexpr bool kIsInteger<f16> = false;
template <>
constexpr bool kIsInteger<bf16> = false;

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
  if (stride == kItem) {
    if constexpr (sizeof(From) == 2 && sizeof(To) > 2 && !kIsInteger<From>)
      for (; i + 16 <= count; i += 16) store_as(to + i, load(reinterpret_cast<const From*>(p) + i));
    for (; i < count; ++i) {
      From x;
      memcpy(&x, p + i * kItem, sizeof(From));
      convert1(x, to[i]);
    }
  }
  for (; i < count; ++i) {
    From x;
    memcpy(&x, p + i * stride, sizeof(From));
    convert1(x, to[i]);
  }
}

template <class To>
SOFTMAXLIB_NOINLINE void gather_any(softmaxlib_dtype dtype, const char* p, int64_t stride,
                                    int64_t count, To* to) {
  switch (dtype) {
    case SOFTMAXLIB_F32: return gather<float>(p, stride, count, to);
    case SOFTMAXLIB_F64: return gather<double>(p, stride, count, to);
    case SOFTMAXLIB_F16: return gather<f16>(p, stride, count, to);
    case SOFTMAXLIB_BF16: return gather<bf16>(p, stride, count, to);
    case SOFTMAXLIB_BOOL:
    case SOFTMAXLIB_U8: return gather<uint8_t>(p, stride, count, to);
    case SOFTMAXLIB_I8: return gather<int8_t>(p, stride, count, to);
    case SOFTMAXLIB_I16: return gather<int16_t>(p, stride, count, to);
    case SOFTMAXLIB_I32: return gather<int32_t>(p, stride, count, to);
    case SOFTMAXLIB_I64: return gather<int64_t>(p, stride, count, to);
    case SOFTMAXLIB_U16: return gather<uint16_t>(p, stride, count, to);
    case SOFTMAXLIB_U32: return gather<uint32_t>(p, stride, count, to);
    case SOFTMAXLIB_U64: return gather<uint64_t>(p, stride, count, to);
    default: return;
  }
}

template <class D, class T>
inline D narrow_one(T x) {
  using V = typename vector_of<D>::type;
  D all[V::lanes];
  store(all, V::set1(x));
  return all[0];
}

inline double fma_scalar(double a, double b, double c) {
#if defined(__GNUC__)
  return __builtin_fma(a, b, c);
#else
  return ::fma(a, b, c);
#endif
}

// x scale + bias - shift, as hi + lo.
struct Affine {
  double scale, scale_lo;  // also 1 / temperature
  double shift;
};

// An infinite hi has no lo.
template <class V>
inline Pair<V> finite_pair(V hi, V lo) {
  return {hi, select(eq(hi - hi, V::set1(0)), lo, V::set1(0))};
}

// Float: in double, then split.
inline Pair<f32x16> combine(f32x16 x, InLanes<f32x16> bias, const Affine& a) {
  const f64x8 scale = f64x8::set1(a.scale), shift = f64x8::set1(a.shift);
  const f64x8 low = (widen_low(x) * scale + bias.low) - shift;
  const f64x8 high = (widen_high(x) * scale + bias.high) - shift;
  const f32x16 hi = narrow(low, high);
  return finite_pair(hi, narrow(low - widen_low(hi), high - widen_high(hi)));
}

// Double: every operation with its error; the shift is exact where it counts.
inline Pair<f64x8> combine(f64x8 x, InLanes<f64x8> bias, const Affine& a) {
  const f64x8 scale = f64x8::set1(a.scale), b = bias.all;
  const f64x8 product = x * scale;
  const f64x8 product_lo = fma(x, scale, f64x8::set1(0) - product) + x * f64x8::set1(a.scale_lo);
  const f64x8 z = product + b;
  const f64x8 tail = z - product;
  const f64x8 sum_lo = (product - (z - tail)) + (b - tail);
  const f64x8 hi = z - f64x8::set1(a.shift), lo = product_lo + sum_lo;
  // Beyond 2^67 an error has no exponential, nor has one that is infinite. Equal ones stay equal.
  const f64x8 none = f64x8::set1(0), size = max(lo, none - lo);
  const auto counts = gt(f64x8::set1(0x1p14), size);
  if (a.shift == 0) return {hi, select(counts, lo, none)};
  // Less its maximum, a large argument may be smaller than its error: their sum, then what is left.
  const auto as_is = gt(f64x8::set1(0x1p-4), size);
  const f64x8 sum = hi + lo, part = sum - hi;
  const f64x8 left = (hi - (sum - part)) + (lo - part);
  return {select(as_is, hi, select(counts, sum, hi)),
          select(as_is, lo, select(counts, left, none))};
}

// The row's own value of an operand that is constant along the row.
inline double row_operand(const Job& job, const Place& place, Operand operand, double missing) {
  double value = missing;
  if (job.base[operand])
    gather_any(job.dtype[operand], job.base[operand] + place.offset[operand], 0, 1, &value);
  return value;
}

inline Affine affine_of(const Job& job, const Place& place, double shift) {
  const double temperature =
      job.divides ? row_operand(job, place, kScale, job.temperature) : job.temperature;
  const double factor = job.divides ? job.scale : row_operand(job, place, kScale, job.scale);
  const double scale = factor / temperature;
  // What leaves the range of a double is its last number: 0 stays 0, and an infinity one.
  if (scale > DBL_MAX) return {DBL_MAX, 0, shift};
  if (scale == 0) return {0x1p-1074, 0, shift};
  return {scale, fma_scalar(-scale, temperature, factor) / temperature, shift};
}

template <class D>
struct Stage {
  using V = typename vector_of<D>::type;
  using T = typename V::elem;
  static constexpr int kChunk = kVectorsPerChunk * V::lanes;

  alignas(64) T hi[kChunk];
  alignas(64) T lo[kChunk];
  alignas(64) D y[kChunk];
  alignas(64) T x[kChunk];
  alignas(64) double bias[kChunk];
  uint8_t where[kChunk];

  // hi + lo of elements [start, start + n).
  SOFTMAXLIB_NOINLINE void fetch(const Job& job, const Place& place, int64_t start, int n,
                                 double shift) {
    const Affine affine = gather_operands(job, place, start, n, shift);
    for (int i = 0; i < n; i += V::lanes) {
      InLanes<V> b;
      load_lanes(bias + i, b);
      const Pair<V> z = combine(load(x + i), b, affine);
      store(hi + i, z.hi);
      store(lo + i, z.lo);
    }
    if (!job.base[kWhere]) return;
    for (int i = 0; i < n; ++i) {
      hi[i] = where[i] ? hi[i] : -static_cast<T>(INFINITY);
      lo[i] = where[i] ? lo[i] : 0;
    }
  }

  // Their maximum, as far as a double holds it: scale and bias may carry them beyond T.
  SOFTMAXLIB_NOINLINE double max(const Job& job, const Place& place, int64_t start, int n) {
    const Affine affine = gather_operands(job, place, start, n, 0);
    double top = -INFINITY;
    for (int i = 0; i < n; ++i) {
      const double z = static_cast<double>(x[i]) * affine.scale + bias[i];
      if ((!job.base[kWhere] || where[i]) && z > top) top = z;
    }
    return top;
  }

  // Scatters y to out, with `masked` where the position takes no part.
  SOFTMAXLIB_NOINLINE void put(const Job& job, const Place& place, int64_t start, int n, D masked) {
    if (job.base[kWhere])
      for (int i = 0; i < n; ++i) y[i] = where[i] ? y[i] : masked;
    for_runs(job, place, kOut, start, n, [&](char* p, int64_t stride, int64_t done, int64_t count) {
      constexpr int64_t kItem = sizeof(D);
      if (stride == kItem) memcpy(p, y + done, static_cast<size_t>(count * kItem));
      else
        for (int64_t i = 0; i < count; ++i) memcpy(p + i * stride, y + done + i, sizeof(D));
    });
  }

 private:
  Affine gather_operands(const Job& job, const Place& place, int64_t start, int n, double shift) {
    for_runs(job, place, kX, start, n,
             [&](const char* p, int64_t stride, int64_t done, int64_t count) {
               gather_any(job.dtype[kX], p, stride, count, x + done);
             });
    if (job.base[kBias])
      for_runs(job, place, kBias, start, n,
               [&](const char* p, int64_t stride, int64_t done, int64_t count) {
                 gather_any(job.dtype[kBias], p, stride, count, bias + done);
               });
    if (job.base[kWhere])
      for_runs(job, place, kWhere, start, n,
               [&](const char* p, int64_t stride, int64_t done, int64_t count) {
                 gather<uint8_t>(p, stride, count, where + done);
               });
    // combine() takes whole vectors.
    const int padded = (n + V::lanes - 1) / V::lanes * V::lanes;
    for (int i = n; i < padded; ++i) x[i] = 0;
    for (int i = job.base[kBias] ? n : 0; i < padded; ++i) bias[i] = 0;

    if (job.base[kSlope]) {
      const double slope = row_operand(job, place, kSlope, 0);
      const double position = static_cast<double>(start - place.offset[kQuery]);
      for (int i = 0; i < n; ++i)
        bias[i] += slope * (position + i - static_cast<double>(job.causal_offset));
    }
    return affine_of(job, place, shift);
  }
};

}  // namespace
}  // namespace SOFTMAX_ISA
}  // namespace softmaxlib
