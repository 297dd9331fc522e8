// Arrays as some entries of the C interface see them.
#pragma once

#include "rows/layout.hpp"

namespace softmaxlib {

// An array without one of its axes.
struct WithoutAxis {
  int64_t shape[SOFTMAXLIB_MAX_NDIM], strides[SOFTMAXLIB_MAX_NDIM];
  int64_t size, stride;  // of the axis
  softmaxlib_array array;

  // item: bytes of an element. false: no such axis, or no array.
  bool set(const softmaxlib_array& from, int32_t axis, int64_t item) {
    if (from.ndim < 1 || from.ndim > SOFTMAXLIB_MAX_NDIM || !from.shape) return false;
    if (axis < 0) axis += from.ndim;
    if (axis < 0 || axis >= from.ndim) return false;
    int64_t step = item;
    int32_t to = from.ndim - 1;
    for (int32_t d = from.ndim - 1; d >= 0; --d) {
      const int64_t along = from.strides ? from.strides[d] : step;
      if (from.shape[d] < 0 || step > INT64_MAX / (from.shape[d] ? from.shape[d] : 1)) return false;
      step *= from.shape[d] ? from.shape[d] : 1;
      if (d == axis) {
        size = from.shape[d], stride = along;
      } else {
        --to;
        shape[to] = from.shape[d], strides[to] = along;
      }
    }
    array = {from.data, from.dtype, from.ndim - 1, shape, strides};
    return true;
  }
};

// f(address) for the elements of a valid array until one returns false.
template <class F>
inline void for_each_element(const softmaxlib_array& array, int64_t item, F f) {
  int64_t index[SOFTMAXLIB_MAX_NDIM] = {}, size = 1;
  for (int32_t d = 0; d < array.ndim; ++d) size *= array.shape[d];
  const char* p = static_cast<const char*>(array.data);
  for (int64_t i = 0; i < size && f(p); ++i) {
    int64_t packed = item;
    for (int32_t d = array.ndim - 1; d >= 0; --d) {
      const int64_t stride = array.strides ? array.strides[d] : packed;
      packed *= array.shape[d];
      p += stride;
      if (++index[d] < array.shape[d]) break;
      p -= stride * array.shape[d];
      index[d] = 0;
    }
  }
}

}  // namespace softmaxlib
