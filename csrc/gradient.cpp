// The C interface of gradients.
#include <initializer_list>

#include "call.hpp"
#include "rows/without_axis.hpp"

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

// Whether every element of a floating array is 1, by its bits.
bool are_ones(const softmaxlib_array& array) {
  const uint64_t one = array.dtype == SOFTMAXLIB_F64   ? 0x3ff0000000000000u
                       : array.dtype == SOFTMAXLIB_F32 ? 0x3f800000u
                       : array.dtype == SOFTMAXLIB_F16 ? 0x3c00u
                                                       : 0x3f80u;
  const int64_t item = item_size(array.dtype);
  bool all = true;
  for_each_element(array, item, [&](const char* p) {
    uint64_t bits = 0;
    if (item == 8) memcpy(&bits, p, 8);
    uint32_t word = 0;
    if (item == 4) memcpy(&word, p, 4), bits = word;
    uint16_t half = 0;
    if (item == 2) memcpy(&half, p, 2), bits = half;
    return all = bits == one;
  });
  return all;
}

}  // namespace
}  // namespace softmaxlib

extern "C" {

softmaxlib_status softmaxlib_backward(softmaxlib_function function, const softmaxlib_array* grad,
                                      const softmaxlib_array* x, const softmaxlib_array* y,
                                      const softmaxlib_array* out, int32_t naxes,
                                      const int32_t* axes, const softmaxlib_options* options) {
  using namespace softmaxlib;
  const Options given(options);
  if (const softmaxlib_status status = check(given)) return status;
  softmaxlib_options o = *given;
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
  call.schedule = share_rows(call.job, o, false);
  return run(call, table_of(o.isa)->gradient[function][call.job.dtype[kOut]],
             {o.parallel_for, o.parallel_context, o.report, nullptr, 0});
}

softmaxlib_status softmaxlib_scale_rows(const softmaxlib_array* x, const softmaxlib_array* factors,
                                        const softmaxlib_array* out,
                                        const softmaxlib_options* options) {
  using namespace softmaxlib;
  if (!x || !factors || !out) return SOFTMAXLIB_ERROR_NULL;
  const Options given(options);
  if (const softmaxlib_status status = check(given)) return status;
  if (!is_float(factors->dtype)) return SOFTMAXLIB_ERROR_DTYPE;
  softmaxlib_options o = SOFTMAXLIB_OPTIONS_INIT;
  o.store = given->store;
  o.num_threads = given->num_threads;
  o.parallel_for = given->parallel_for;
  o.bias = factors;  // the operand that broadcasts to x
  Call call;
  const int32_t last = -1;
  const Request request = {SOFTMAXLIB_SOFTMAX, x, out, x->ndim > 0, &last, false};
  if (const softmaxlib_status status = lay_out(request, o, &call.job))
    return status == SOFTMAXLIB_ERROR_BIAS ? SOFTMAXLIB_ERROR_SHAPE : status;
  if (const softmaxlib_status status = check_data(&call.job)) return status;
  if (overlap(*out, *factors)) return SOFTMAXLIB_ERROR_OVERLAP;
  if (call.job.rows == 0 || call.job.n == 0) return SOFTMAXLIB_OK;
  if (call.job.in_place && are_ones(*factors)) return SOFTMAXLIB_OK;
  call.schedule = share_rows(call.job, o, false);
  return run(call, table_of(given->isa)->scale_rows[call.job.dtype[kOut]],
             {given->parallel_for, given->parallel_context, given->report, nullptr, 0});
}

}  // extern "C"
