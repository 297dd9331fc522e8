// The C interface of gradients.
#include <initializer_list>

#include "call.hpp"

namespace softmaxlib {
namespace {

// Whether every operand can be read and written where it is.
bool is_direct(const Job& job) {
  const int64_t item = item_size(job.dtype[kOut]);
  const Dim& row = job.inner[0];
  for (const int k : {kX, kOut, kGrad, kResult}) {
    const bool per_row = job.function == SOFTMAXLIB_LOGSUMEXP && (k == kGrad || k == kResult);
    if (per_row) continue;
    if (job.dtype[k] != job.dtype[kOut] || (row.size > 1 && row.stride[k] != item)) return false;
  }
  return job.inner_ndim == 1;
}

}  // namespace
}  // namespace softmaxlib

extern "C" softmaxlib_status softmaxlib_backward(
    softmaxlib_function function, const softmaxlib_array* grad, const softmaxlib_array* x,
    const softmaxlib_array* y, const softmaxlib_array* out, int32_t naxes, const int32_t* axes,
    const softmaxlib_options* options) {
  using namespace softmaxlib;
  const Options given(options);
  softmaxlib_options o = *given;
  if (const softmaxlib_status status = check(o)) return status;
  if (function < 0 || function >= kFunctions) return SOFTMAXLIB_ERROR_FUNCTION;
  const bool reads_x = function != SOFTMAXLIB_SOFTMAX && function != SOFTMAXLIB_LOG_SOFTMAX;
  if (!grad || !y || !out || (reads_x && !x)) return SOFTMAXLIB_ERROR_NULL;
  if (!is_float(grad->dtype) || !is_float(y->dtype)) return SOFTMAXLIB_ERROR_DTYPE;
  if (reads_x && o.bias) return SOFTMAXLIB_ERROR_BIAS;
  // All that these did is in y.
  o.bias = o.alibi_slopes = o.sinks = nullptr;
  o.causal = 0;

  Call call;
  Request request = {function, reads_x ? x : y, out, naxes, axes, false};
  request.grad = grad;
  request.result = y;
  if (const softmaxlib_status status = lay_out(request, o, &call.job)) return status;
  if (const softmaxlib_status status = check_data(&call.job)) return status;
  call.job.direct = is_direct(call.job);
  call.job.in_place |= out->data == grad->data || out->data == y->data;  // no streaming stores
  call.schedule = share_rows(call.job, o);
  return run(call, table_of(o.isa)->gradient[function][call.job.dtype[kOut]],
             {o.parallel_for, o.parallel_context, nullptr, nullptr, 0});
}
