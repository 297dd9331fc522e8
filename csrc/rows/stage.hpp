// Rows that a kernel cannot read in place (strided, of another dtype, with temperature, bias or
// where) pass through a chunk of scratch: gathered, converted, combined in higher precision.
#pragma once

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "job.hpp"
#include "macros.hpp"
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

template <class From, class To>
inline void gather(const char* p, int64_t stride, int64_t count, To* to) {
  for (int64_t i = 0; i < count; ++i) {
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

// x / temperature + bias - shift as hi + lo. Float: in double, then split.
inline void combine(float x, double inverse, double, double bias, double shift, double& z,
                    float& hi, float& lo) {
  z = static_cast<double>(x) * inverse + bias;
  const double shifted = z - shift;
  hi = static_cast<float>(shifted);
  const float rest = static_cast<float>(shifted - static_cast<double>(hi));
  lo = rest == rest && hi - hi == 0 ? rest : 0.0f;
}

// Double: every operation with its error.
inline void combine(double x, double inverse, double inverse_lo, double bias, double shift,
                    double& z, double& hi, double& lo) {
  const double product = x * inverse;
  const double product_lo = fma_scalar(x, inverse, -product) + x * inverse_lo;
  z = product + bias;
  const double tail = z - product;
  const double sum_lo = (product - (z - tail)) + (bias - tail);
  hi = z - shift;
  const double rest = product_lo + sum_lo;
  lo = rest == rest && hi - hi == 0 ? rest : 0.0;
}

template <class D>
struct Stage {
  using V = typename vector_of<D>::type;
  using T = typename V::elem;
  static constexpr int kChunk = kVectorsPerChunk * V::lanes;

  alignas(64) T hi[kChunk];
  alignas(64) T lo[kChunk];
  alignas(64) D y[kChunk];
  T x[kChunk];
  double bias[kChunk];
  double z[kChunk];  // the argument before the shift, as far as a double holds it
  uint8_t where[kChunk];

  SOFTMAXLIB_NOINLINE void fetch(const Job& job, const Place& place, int64_t start, int n,
                                 double shift) {
    for_runs(job, place, kX, start, n,
             [&](const char* p, int64_t stride, int64_t done, int64_t count) {
               gather_any(job.dtype[kX], p, stride, count, x + done);
             });
    double temperature = job.temperature;
    if (job.base[kTemperature])
      gather_any(job.dtype[kTemperature], job.base[kTemperature] + place.offset[kTemperature], 0, 1,
                 &temperature);
    double inverse = 1.0 / temperature, inverse_lo = 0;
    if (inverse > DBL_MAX) inverse = DBL_MAX;  // 0 / temperature stays 0
    else inverse_lo = fma_scalar(-inverse, temperature, 1.0) / temperature;
    if (job.base[kBias]) {
      for_runs(job, place, kBias, start, n,
               [&](const char* p, int64_t stride, int64_t done, int64_t count) {
                 gather_any(job.dtype[kBias], p, stride, count, bias + done);
               });
      for (int i = 0; i < n; ++i)
        combine(x[i], inverse, inverse_lo, bias[i], shift, z[i], hi[i], lo[i]);
    } else {
      for (int i = 0; i < n; ++i)
        combine(x[i], inverse, inverse_lo, 0.0, shift, z[i], hi[i], lo[i]);
    }
    if (job.base[kWhere]) {
      for_runs(job, place, kWhere, start, n,
               [&](const char* p, int64_t stride, int64_t done, int64_t count) {
                 gather<uint8_t>(p, stride, count, where + done);
               });
      for (int i = 0; i < n; ++i) {
        if (where[i]) continue;
        z[i] = -INFINITY;
        hi[i] = -INFINITY;
        lo[i] = 0;
      }
    }
  }

  // Scatters y to out, with `masked` where the position takes no part.
  SOFTMAXLIB_NOINLINE void put(const Job& job, const Place& place, int64_t start, int n, D masked) {
    if (job.base[kWhere])
      for (int i = 0; i < n; ++i)
        if (!where[i]) y[i] = masked;
    for_runs(job, place, kOut, start, n, [&](char* p, int64_t stride, int64_t done, int64_t count) {
      for (int64_t i = 0; i < count; ++i) memcpy(p + i * stride, y + done + i, sizeof(D));
    });
  }
};

}  // namespace
}  // namespace SOFTMAX_ISA
}  // namespace softmaxlib
