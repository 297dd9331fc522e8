// The C interface of the orthogonal gradient.
#include "api/call.hpp"

namespace softmaxlib {
namespace {

// Whether every operand can be read and written where it is.
bool is_direct(const Job& job) {
  const Dim& row = job.inner[0];
  return job.direct && job.dtype[kWeights] == job.dtype[kOut] &&
         (row.size == 1 || row.stride[kWeights] == item_size(job.dtype[kOut]));
}

}  // namespace
}  // namespace softmaxlib

extern "C" softmaxlib_status softmaxlib_orthogonal_gradient(const softmaxlib_array* grad,
                                                            const softmaxlib_array* weights,
                                                            const softmaxlib_array* out,
                                                            int32_t rescale,
                                                            const softmaxlib_options* options) {
  using namespace softmaxlib;
  if (!grad || !weights || !out) return SOFTMAXLIB_ERROR_NULL;
  Call call(options);
  call.ignore_arithmetic();
  call.require(out->dtype == SOFTMAXLIB_F64 ||
                   (grad->dtype != SOFTMAXLIB_F64 && weights->dtype != SOFTMAXLIB_F64),
               SOFTMAXLIB_ERROR_DTYPE);
  const Given list[] = {{kX, grad, Shape::kOfX, Dtypes::kFloats, Access::kReadsUnder},
                        {kOut, out, Shape::kOfX, Dtypes::kFloats, Access::kWrites},
                        {kWeights, weights, Shape::kOfX, Dtypes::kFloats, Access::kReads}};
  call.lay_out(SOFTMAXLIB_SOFTMAX, {0, nullptr}, list, SOFTMAXLIB_F32);
  call.check_data(list);
  if (!call.is_good()) return call.status();
  call.job.direct = is_direct(call.job);
  call.job.rescale = rescale != 0;
  return call.run(kernel_of(call.table(), registry::orthogonal_gradient, call.job.dtype[kOut]),
                  share_blocks(call.job, *call.options));
}
