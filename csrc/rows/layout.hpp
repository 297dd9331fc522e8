// From arrays with axes to rows with strides.
#pragma once

#include "job.hpp"

namespace softmaxlib {

int64_t item_size(softmaxlib_dtype dtype);

// Checks arrays, axes and options, and fills in everything of the job but its schedule.
softmaxlib_status lay_out(softmaxlib_function function, const softmaxlib_array* x,
                          const softmaxlib_array* out, int32_t naxes, const int32_t* axes,
                          const softmaxlib_options& options, Job* job);

}  // namespace softmaxlib
