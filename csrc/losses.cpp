// The C interface of losses.
#include "call.hpp"
#include "rows/without_axis.hpp"

namespace softmaxlib {
namespace {

// Neither has a use here.
softmaxlib_status check_options(const softmaxlib_options& o) {
  if (const softmaxlib_status status = check(o)) return status;
  if (o.causal) return SOFTMAXLIB_ERROR_CAUSAL;
  if (o.alibi_slopes) return SOFTMAXLIB_ERROR_ALIBI;
  return o.sinks ? SOFTMAXLIB_ERROR_SINK : SOFTMAXLIB_OK;
}

// Whether every element of an I64 array is a class of [0, n), or `ignored`.
bool are_classes(const softmaxlib_array& array, int64_t n, int64_t ignored) {
  bool valid = true;
  for_each_element(array, item_size(SOFTMAXLIB_I64), [&](const char* p) {
    int64_t i;
    memcpy(&i, p, sizeof(i));
    valid = (i >= 0 && i < n) || i == ignored;
    return valid;
  });
  return valid;
}

// Finite and not negative, by their bits: see is_finite.
bool are_weights(const double* weight, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    uint64_t bits;
    memcpy(&bits, weight + i, sizeof(bits));
    if (!is_finite(weight[i]) || bits > uint64_t{1} << 63) return false;
  }
  return true;
}

// A label's element is written again, behind its row: after streaming stores to the same line that
// takes as long as this much of a row.
constexpr int64_t kStreamedRow = 8192;

softmaxlib_status finish(Call& call, Kernel kernel, const softmaxlib_options& o) {
  call.schedule = share_rows(call.job, o);
  if (o.store == SOFTMAXLIB_STORE_AUTO &&
      call.job.n * item_size(call.job.dtype[kOut]) < kStreamedRow)
    call.schedule.streaming = false;
  return run(call, kernel, {o.parallel_for, o.parallel_context, nullptr, nullptr, 0});
}

}  // namespace
}  // namespace softmaxlib

extern "C" {

softmaxlib_status softmaxlib_cross_entropy(
    softmaxlib_function activation, const softmaxlib_array* x, const softmaxlib_array* target,
    const softmaxlib_array* losses, const softmaxlib_array* grad, int32_t axis,
    const softmaxlib_loss_options* loss_options, const softmaxlib_options* options) {
  using namespace softmaxlib;
  static constexpr softmaxlib_loss_options kDefaults = SOFTMAXLIB_LOSS_OPTIONS_INIT;
  if (!x || !target || !losses) return SOFTMAXLIB_ERROR_NULL;
  const Options given(options);
  if (const softmaxlib_status status = check_options(*given)) return status;
  if (activation != SOFTMAXLIB_SOFTMAX && activation != SOFTMAXLIB_STABLEMAX)
    return SOFTMAXLIB_ERROR_FUNCTION;
  const softmaxlib_loss_options& l = loss_options ? *loss_options : kDefaults;
  if (l.struct_size != sizeof(softmaxlib_loss_options)) return SOFTMAXLIB_ERROR_STRUCT_SIZE;
  if (!is_finite(l.label_smoothing) || l.label_smoothing < 0 || l.label_smoothing > 1 ||
      !is_finite(l.gradient_scale))
    return SOFTMAXLIB_ERROR_LOSS;
  const bool probabilities = is_float(target->dtype);
  if ((!probabilities && target->dtype != SOFTMAXLIB_I64) || losses->dtype != SOFTMAXLIB_F64)
    return SOFTMAXLIB_ERROR_DTYPE;
  if (x->ndim < 1 || axis < -x->ndim || axis >= x->ndim) return SOFTMAXLIB_ERROR_AXIS;
  if (!x->shape) return SOFTMAXLIB_ERROR_SHAPE;
  const int64_t n = x->shape[axis < 0 ? axis + x->ndim : axis];

  // Without a gradient, or with an empty one, the losses are all the results there are.
  softmaxlib_array out = *losses;
  out.dtype = is_float(x->dtype) ? x->dtype : SOFTMAXLIB_F64;
  Call call;
  if (grad && n == 0) {
    const Request empty = {activation, x, grad, 1, &axis, false};
    if (const softmaxlib_status status = lay_out(empty, *given, &call.job)) return status;
  }
  const bool writes = grad && n != 0;
  Request request = {activation, x, writes ? grad : &out, 1, &axis, !writes};
  request.extra = losses;
  request.extra_error = SOFTMAXLIB_ERROR_SHAPE;
  (probabilities ? request.target : request.indices) = target;
  if (const softmaxlib_status status = lay_out(request, *given, &call.job)) return status;
  if (const softmaxlib_status status = check_data(&call.job)) return status;
  if (call.job.rows == 0) return SOFTMAXLIB_OK;
  if (!probabilities && !are_classes(*target, n, l.ignore_index)) return SOFTMAXLIB_ERROR_TARGET;
  if (l.weight && !are_weights(l.weight, n)) return SOFTMAXLIB_ERROR_LOSS;
  const Loss loss = {probabilities,    writes,   l.label_smoothing,
                     l.gradient_scale, l.weight, l.ignore_index};
  call.job.loss = &loss;
  const auto& kernels = table_of(given->isa)->cross_entropy;
  return finish(call, kernels[activation == SOFTMAXLIB_STABLEMAX][call.job.dtype[kOut]], *given);
}

softmaxlib_status softmaxlib_take_log_softmax(const softmaxlib_array* x,
                                              const softmaxlib_array* indices,
                                              const softmaxlib_array* out,
                                              const softmaxlib_array* logsumexp, int32_t axis,
                                              const softmaxlib_options* options) {
  using namespace softmaxlib;
  if (!x || !indices || !out) return SOFTMAXLIB_ERROR_NULL;
  const Options given(options);
  if (const softmaxlib_status status = check_options(*given)) return status;
  if (indices->dtype != SOFTMAXLIB_I64 || !is_float(out->dtype) ||
      (logsumexp && logsumexp->dtype != out->dtype))
    return SOFTMAXLIB_ERROR_DTYPE;
  if (x->ndim < 1 || axis < -x->ndim || axis >= x->ndim) return SOFTMAXLIB_ERROR_AXIS;
  WithoutAxis y, i;
  if (!x->shape || out->ndim != x->ndim || indices->ndim != x->ndim ||
      !y.set(*out, axis, item_size(out->dtype)) ||
      !i.set(*indices, axis, item_size(SOFTMAXLIB_I64)) || y.size != i.size)
    return SOFTMAXLIB_ERROR_SHAPE;
  Call call;
  Request request = {SOFTMAXLIB_LOG_SOFTMAX, x, &y.array, 1, &axis, true};
  request.indices = &i.array;
  request.extra = logsumexp;
  request.extra_error = SOFTMAXLIB_ERROR_SHAPE;
  if (const softmaxlib_status status = lay_out(request, *given, &call.job)) return status;
  const TopK top = {y.size, y.stride, i.stride, false};
  if (top.k == 0 && !logsumexp) return SOFTMAXLIB_OK;  // no memory, so wherever that is
  if (top.k == 0) {
    call.job.base[kOut] = call.job.base[kIndices] = static_cast<char*>(logsumexp->data);
  }
  if (const softmaxlib_status status = check_data(&call.job)) return status;
  if (call.job.rows == 0) return SOFTMAXLIB_OK;
  if (top.k && !are_classes(*indices, call.job.n, 0)) return SOFTMAXLIB_ERROR_TARGET;
  if (top.k && call.job.n == 0) return SOFTMAXLIB_ERROR_TARGET;
  call.job.top = &top;
  return finish(call, table_of(given->isa)->take[call.job.dtype[kOut]], *given);
}

}  // extern "C"
