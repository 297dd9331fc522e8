// From arrays with axes to rows with strides.
#pragma once

#include "job.hpp"

namespace softmaxlib {

static inline bool is_float(softmaxlib_dtype dtype) {
  return dtype >= SOFTMAXLIB_F32 && dtype <= SOFTMAXLIB_BF16;
}

// In the order of softmaxlib_dtype, and 8 for what is none.
static inline int64_t item_size(softmaxlib_dtype dtype) {
  static constexpr int8_t kSizes[] = {4, 8, 2, 2, 1, 1, 2, 4, 8, 1, 2, 4, 8};
  return dtype >= SOFTMAXLIB_F32 && dtype <= SOFTMAXLIB_U64 ? kSizes[dtype] : 8;
}

// What a caller asks for.
struct Request {
  softmaxlib_function function;
  const softmaxlib_array *x, *out;
  int32_t naxes;  // 0: all
  const int32_t* axes;
  bool reduces;  // out has no axes
  // Of the shape of x without the axes: see Operand.
  const softmaxlib_array *extra = nullptr, *indices = nullptr;
  softmaxlib_status extra_error = SOFTMAXLIB_ERROR_UNIFORMS;
  // Of a gradient: with the axes, or for logsumexp without.
  const softmaxlib_array *grad = nullptr, *result = nullptr;
  // Of the shape of x.
  const softmaxlib_array* target = nullptr;
};

// Checks arrays, axes and options, and fills in everything of the job but its schedule and what
// check_data does. Data may be missing.
softmaxlib_status lay_out(const Request& request, const softmaxlib_options& options, Job* job);

// Whether all data is there, temperatures and scales are valid, and out is x or apart from it;
// finds in_place.
softmaxlib_status check_data(Job* job);

}  // namespace softmaxlib
