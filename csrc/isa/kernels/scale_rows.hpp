// Rows times a factor each: the gradient that comes in, times one that is made already.
#pragma once

#include "isa/math/in_lanes.hpp"
#include "isa/stage/row.hpp"

namespace softmaxlib {
namespace SOFTMAX_ISA {
namespace {

// x times a factor, which is the operand kFactor; x itself where that is 0. The product is exact in
// double but for double itself, and rounded once.
template <class V>
SOFTMAXLIB_INLINE V scaled_element(V x, InLanes<V> factor) {
  const V product = (InLanes<V>::of(x) * factor).value();
  const V number =
      select(eq(product, product), product, V::set1(static_cast<typename V::elem>(NAN)));
  return select(eq(x, V::set1(0)), x, number);
}

template <class T>
void scale_rows(const Job& job, int64_t start, int64_t stop, char*) {
  using V = typename vector_of<T>::type;
  constexpr int64_t kChunk = kVectorsPerChunk * V::lanes;
  const DefaultFloatingPoint environment;
  alignas(64) T x[kChunk];
  alignas(64) double factors[kChunk];
  Rows rows(job, start);
  const bool one_factor = job.inner_ndim == 1 && (job.n == 1 || job.inner[0].stride[kFactor] == 0);
  const bool is_direct =
      one_factor && job.direct && job.dtype[kX] == kOwnDtype<T> && job.dtype[kOut] == kOwnDtype<T>;
  for (int64_t r = start; r < stop; ++r, rows.next()) {
    const Place& place = rows.place;
    InLanes<V> factor = in_all(1, V());
    if (one_factor) factor = in_all(row_operand(job, place, kFactor, 1), V());
    if (is_direct) {
      map_elements(Contiguous<T>{reinterpret_cast<const T*>(job.base[kX] + place.offset[kX])},
                   reinterpret_cast<T*>(job.base[kOut] + place.offset[kOut]), job.n, job.streaming,
                   [factor](V v) SOFTMAXLIB_INLINE_LAMBDA { return scaled_element(v, factor); });
      continue;
    }
    for (int64_t i = 0; i < job.n; i += kChunk) {
      const int64_t n = job.n - i < kChunk ? job.n - i : kChunk;
      gather_elements(job, place, kX, i, n, x);
      if (!one_factor) gather_elements(job, place, kFactor, i, n, factors);
      for (int64_t j = n; j % V::lanes; ++j) x[j] = 0, factors[j] = 0;
      for (int64_t j = 0; j < n; j += V::lanes) {
        if (!one_factor) load_lanes(factors + j, factor);
        store(x + j, scaled_element(load(x + j), factor));
      }
      scatter_elements(job, place, i, n, x, job.streaming);
    }
  }
  stream_fence();
}

}  // namespace
}  // namespace SOFTMAX_ISA
}  // namespace softmaxlib
