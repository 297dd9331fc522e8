// The C interface of gradients.
#include "api/arrays.hpp"
#include "api/call.hpp"

namespace softmaxlib {
namespace {

// Whether every operand can be read and written where it is.
bool is_direct(const Job& job) {
  const int64_t item = item_size(job.dtype[kOut]);
  const Dim& row = job.inner[0];
  constexpr int kAll[] = {kX, kOut, kGrad, kResult};
  for (const int k : kAll) {
    if (job.per_row >> k & 1) continue;
    if (job.dtype[k] != job.dtype[kOut] || (row.size > 1 && row.stride[k] != item)) return false;
  }
  return job.inner_ndim == 1;
}

// Whether every element of a floating array is 1, by its bits.
bool are_ones(const softmaxlib_array& array) {
  switch (array.dtype) {
    case SOFTMAXLIB_F64: return all_of<double>(array, [](double x) { return is_one(x); });
    case SOFTMAXLIB_F32: return all_of<uint32_t>(array, [](uint32_t x) { return x == 0x3f800000; });
    case SOFTMAXLIB_F16: return all_of<uint16_t>(array, [](uint16_t x) { return x == 0x3c00; });
    default: return all_of<uint16_t>(array, [](uint16_t x) { return x == 0x3f80; });
  }
}

}  // namespace
}  // namespace softmaxlib

extern "C" {

softmaxlib_status softmaxlib_backward(softmaxlib_function function, const softmaxlib_array* grad,
                                      const softmaxlib_array* x, const softmaxlib_array* y,
                                      const softmaxlib_array* out, int32_t naxes,
                                      const int32_t* axes, const softmaxlib_options* options) {
  using namespace softmaxlib;
  Call call(options);
  call.require(is_function(function), SOFTMAXLIB_ERROR_FUNCTION);
  if (!call.is_good()) return call.status();
  const bool reads_x = gradient_reads_x(function);
  call.require(grad && y && out && (!reads_x || x), SOFTMAXLIB_ERROR_NULL);
  call.require(!reads_x || !call.options->bias, SOFTMAXLIB_ERROR_BIAS);
  // All that these did is in y.
  softmaxlib_options& o = call.options.change();
  o.bias = o.alibi_slopes = o.sinks = nullptr;
  o.causal = 0;

  const Shape of_y = reduces(function) ? Shape::kPerRow : Shape::kOfX;
  const Given list[] = {{kX, reads_x ? x : y, Shape::kOfX, Dtypes::kAny, Access::kReadsUnder},
                        {kOut, out, Shape::kOfX, Dtypes::kFloats, Access::kWrites},
                        {kGrad, grad, of_y, Dtypes::kFloats, Access::kReadsUnder},
                        {kResult, y, of_y, Dtypes::kFloats, Access::kReadsUnder}};
  call.lay_out(function, {naxes, axes}, list, SOFTMAXLIB_F32);
  call.check_data(list);
  if (!call.is_good()) return call.status();
  Job& job = call.job;
  job.direct = is_direct(job);
  job.in_place |= out->data == grad->data || out->data == y->data;  // no streaming stores
  return call.run(backward_of(call.table(), function, job.dtype[kOut]), share_rows(job, o, false));
}

softmaxlib_status softmaxlib_scale_rows(const softmaxlib_array* x, const softmaxlib_array* factors,
                                        const softmaxlib_array* out,
                                        const softmaxlib_options* options) {
  using namespace softmaxlib;
  if (!x || !factors || !out) return SOFTMAXLIB_ERROR_NULL;
  Call call(options);
  call.ignore_arithmetic();
  const int32_t last = -1;
  const Given list[] = {{kX, x, Shape::kOfX, Dtypes::kAny, Access::kReadsUnder},
                        {kOut, out, Shape::kOfX, Dtypes::kFloats, Access::kWrites},
                        {kFactor, factors, Shape::kBroadcast, Dtypes::kFloats, Access::kReads}};
  call.lay_out(SOFTMAXLIB_SOFTMAX, {x->ndim > 0, &last}, list, SOFTMAXLIB_F32);
  call.check_data(list);
  if (!call.is_good() || call.job.rows == 0 || call.job.n == 0) return call.status();
  if (call.job.in_place && are_ones(*factors)) return SOFTMAXLIB_OK;
  return call.run(kernel_of(call.table(), registry::scale_rows, call.job.dtype[kOut]),
                  share_rows(call.job, *call.options, false));
}

}  // extern "C"
