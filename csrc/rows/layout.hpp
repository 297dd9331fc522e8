// From arrays with axes to rows with strides.
#pragma once

#include "job.hpp"

namespace softmaxlib {

int64_t item_size(softmaxlib_dtype dtype);

// What a caller asks for.
struct Request {
  softmaxlib_function function;
  const softmaxlib_array *x, *out;
  int32_t naxes;  // 0: all
  const int32_t* axes;
  bool reduces;  // out has no axes
  // Of the shape of x without the axes: see Operand.
  const softmaxlib_array *extra = nullptr, *indices = nullptr;
};

// Checks arrays, axes and options, and fills in everything of the job but its schedule and what
// check_data does. Data may be missing.
softmaxlib_status lay_out(const Request& request, const softmaxlib_options& options, Job* job);

// Whether all data is there, temperatures and scales are valid, and out is x or apart from it;
// finds in_place.
softmaxlib_status check_data(Job* job);

}  // namespace softmaxlib
