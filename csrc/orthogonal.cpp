// The C interface of the orthogonal gradient.
#include "call.hpp"

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
  const Options given(options);
  if (const softmaxlib_status status = check(given)) return status;
  if (!grad || !weights || !out) return SOFTMAXLIB_ERROR_NULL;
  const bool narrows = out->dtype != SOFTMAXLIB_F64 &&
                       (grad->dtype == SOFTMAXLIB_F64 || weights->dtype == SOFTMAXLIB_F64);
  if (!is_float(grad->dtype) || !is_float(weights->dtype) || narrows) return SOFTMAXLIB_ERROR_DTYPE;
  softmaxlib_options o = SOFTMAXLIB_OPTIONS_INIT;
  o.store = given->store;
  o.num_threads = given->num_threads;
  o.parallel_for = given->parallel_for;

  Call call;
  Request request = {SOFTMAXLIB_SOFTMAX, grad, out, 0, nullptr, false};
  request.result = weights;
  if (const softmaxlib_status status = lay_out(request, o, &call.job)) return status;
  if (const softmaxlib_status status = check_data(&call.job)) return status;
  call.job.direct = is_direct(call.job);
  call.job.rescale = rescale != 0;
  call.schedule = share_blocks(call.job, o);
  return run(call, table_of(given->isa)->orthogonal[call.job.dtype[kOut]],
             {given->parallel_for, given->parallel_context, given->report, nullptr, 0});
}
