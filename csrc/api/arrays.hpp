// Arrays as some entries of the C interface see them.
#pragma once

#include <string.h>

#include "bits.hpp"
#include "host/layout.hpp"

namespace softmaxlib {

// What results are computed for where no array takes them: what is not a float counts as double.
inline softmaxlib_dtype storage_of(softmaxlib_dtype x) { return is_float(x) ? x : SOFTMAXLIB_F64; }

inline bool has_axis(const softmaxlib_array& array, int32_t axis) {
  return array.ndim >= 1 && axis >= -array.ndim && axis < array.ndim;
}

// An array without one of its axes.
struct WithoutAxis {
  int64_t shape[SOFTMAXLIB_MAX_NDIM], strides[SOFTMAXLIB_MAX_NDIM];
  int64_t size, stride;  // of the axis
  softmaxlib_array array;

  // false: no such axis, or no array.
  bool set(const softmaxlib_array& from, int32_t axis) {
    if (!has_axis(from, axis) || from.ndim > SOFTMAXLIB_MAX_NDIM || !from.shape) return false;
    if (axis < 0) axis += from.ndim;
    int64_t step = item_size(from.dtype);
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
inline void for_each_element(const softmaxlib_array& array, F f) {
  int64_t index[SOFTMAXLIB_MAX_NDIM] = {}, size = 1;
  for (int32_t d = 0; d < array.ndim; ++d) size *= array.shape[d];
  const char* p = static_cast<const char*>(array.data);
  for (int64_t i = 0; i < size && f(p); ++i) {
    int64_t packed = item_size(array.dtype);
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

// Whether every element of an array of type T holds.
template <class T, class F>
inline bool all_of(const softmaxlib_array& array, F holds) {
  bool all = true;
  for_each_element(array, [&](const char* p) {
    T value;
    memcpy(&value, p, sizeof(value));
    return all = holds(value);
  });
  return all;
}
inline bool are_uniforms(const softmaxlib_array& array) {
  return all_of<double>(array, [](double u) { return in_unit_interval(u) && !is_one(u); });
}
inline bool are_indices(const softmaxlib_array& array, int64_t n) {
  return all_of<int64_t>(array, [=](int64_t i) { return i >= 0 && i < n; });
}
inline bool are_classes(const softmaxlib_array& array, int64_t n, int64_t ignored) {
  return all_of<int64_t>(array, [=](int64_t i) { return (i >= 0 && i < n) || i == ignored; });
}

}  // namespace softmaxlib
