// The C interface of losses.
#include "call.hpp"
#include "environment.hpp"
#include "rows/without_axis.hpp"

namespace softmaxlib {
namespace {

// Neither has a use here.
softmaxlib_status check_options(const Options& options) {
  if (const softmaxlib_status status = check(options)) return status;
  const softmaxlib_options& o = *options;
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

bool are_weights(const double* weight, int64_t n) {
  for (int64_t i = 0; i < n; ++i)
    if (!is_finite_not_negative(weight[i])) return false;
  return true;
}

// x = m 2^exponent_of(x) with m in [1/2, 1); of 0: 0.
int exponent_of(double x) {
  int exponent = 0;
  frexp(x, &exponent);
  return exponent;
}

// The weights of the labels that count: their sum is sum 2^exponent, their largest has that
// exponent.
struct LabelWeights {
  double sum = 0;
  int exponent = 0;

  LabelWeights(const softmaxlib_array& target, int64_t n, const softmaxlib_loss_options& l) {
    const auto for_each = [&](auto f) {
      for_each_element(target, item_size(SOFTMAXLIB_I64), [&](const char* p) {
        int64_t i;
        memcpy(&i, p, sizeof(i));
        // Checked before, but the caller's memory may have changed since.
        if (i != l.ignore_index && i >= 0 && i < n) f(l.weight ? l.weight[i] : 1);
        return true;
      });
    };
    if (!l.weight) {
      int64_t count = 0;
      for_each([&](double) { ++count; });
      sum = static_cast<double>(count);
      return;
    }
    double largest = 0, error = 0;
    for_each([&](double w) { largest = w > largest ? w : largest; });
    exponent = exponent_of(largest);
    for_each([&](double w) {
      const double term = ldexp(w, -exponent), s = sum + term;
      error += sum >= term ? (sum - s) + term : (term - s) + sum;  // what that rounded away
      sum = s;
    });
    sum += error;
  }
};

bool has_one_element(const softmaxlib_array& array) {
  if (array.ndim < 0 || array.ndim > SOFTMAXLIB_MAX_NDIM || (array.ndim && !array.shape))
    return false;
  for (int32_t d = 0; d < array.ndim; ++d)
    if (array.shape[d] != 1) return false;
  return true;
}

// How the losses of rows become one, and in which unit their weights are. The unit cancels in a
// mean. That of the labels' largest weight keeps the divisor in range; but weights of other
// classes, which smoothing brings in, may exceed these by more than a double holds.
Reduction reduction_of(const softmaxlib_array& target, int64_t rows, int64_t n,
                       const softmaxlib_loss_options& l, Loss* loss) {
  Reduction reduction = {1, 0, l.total->dtype, l.total->data};
  if (l.reduction != SOFTMAXLIB_REDUCTION_MEAN) return reduction;
  const DefaultFloatingPoint environment;
  reduction.divisor = static_cast<double>(rows);
  if (!loss->probabilities) {
    constexpr int kRoom = 512;  // for weights above those of labels
    const LabelWeights labels(target, n, l);
    int unit = labels.exponent;
    if (l.weight && l.label_smoothing > 0) {
      double largest = 0;
      for (int64_t i = 0; i < n; ++i) largest = l.weight[i] > largest ? l.weight[i] : largest;
      const int least = exponent_of(largest) - kRoom;
      unit = least > unit ? least : unit;
    }
    reduction.divisor = labels.sum;
    reduction.exponent = unit - labels.exponent;
    loss->unit[0] = ldexp(1, -unit / 2);
    loss->unit[1] = ldexp(1, -unit - -unit / 2);
  }
  if (reduction.divisor > 0) {
    const int exponent = exponent_of(reduction.divisor);
    loss->scale = frexp(loss->scale, &loss->exponent) / ldexp(reduction.divisor, -exponent);
    loss->exponent += reduction.exponent - exponent;
  } else {
    loss->scale = NAN;
  }
  return reduction;
}

// A label's element is written again, behind its row: after streaming stores to the same line that
// takes as long as this much of a row.
constexpr int64_t kStreamedRow = 8192;

softmaxlib_status finish(Call& call, Kernel kernel, const softmaxlib_options& o) {
  call.schedule = share_rows(call.job, o, true);
  if (o.store == SOFTMAXLIB_STORE_AUTO &&
      call.job.n * item_size(call.job.dtype[kOut]) < kStreamedRow)
    call.schedule.streaming = false;
  return run(call, kernel,
             {o.parallel_for, o.parallel_context, o.report, o.scratch, o.scratch_size});
}

}  // namespace
}  // namespace softmaxlib

extern "C" {

softmaxlib_status softmaxlib_cross_entropy(
    softmaxlib_function activation, const softmaxlib_array* x, const softmaxlib_array* target,
    const softmaxlib_array* losses, const softmaxlib_array* grad, int32_t axis,
    const softmaxlib_loss_options* loss_options, const softmaxlib_options* options) {
  using namespace softmaxlib;
  if (!x || !target || !losses) return SOFTMAXLIB_ERROR_NULL;
  const Options given(options);
  if (const softmaxlib_status status = check_options(given)) return status;
  if (activation != SOFTMAXLIB_SOFTMAX && activation != SOFTMAXLIB_STABLEMAX)
    return SOFTMAXLIB_ERROR_FUNCTION;
  const Versioned<softmaxlib_loss_options> versioned(loss_options, SOFTMAXLIB_LOSS_OPTIONS_INIT,
                                                     offsetof(softmaxlib_loss_options, reduction));
  if (!versioned.valid()) return SOFTMAXLIB_ERROR_STRUCT_SIZE;
  const softmaxlib_loss_options& l = *versioned;
  const bool reduces = l.reduction != SOFTMAXLIB_REDUCTION_NONE;
  if (!in_unit_interval(l.label_smoothing) || !is_finite(l.gradient_scale) || l.reduction < 0 ||
      l.reduction > SOFTMAXLIB_REDUCTION_MEAN)
    return SOFTMAXLIB_ERROR_LOSS;
  if (reduces && (!l.total || !l.total->data)) return SOFTMAXLIB_ERROR_NULL;
  if (reduces && !has_one_element(*l.total)) return SOFTMAXLIB_ERROR_SHAPE;
  const bool probabilities = is_float(target->dtype);
  if ((!probabilities && target->dtype != SOFTMAXLIB_I64) || !is_float(losses->dtype) ||
      (reduces && (losses->dtype != SOFTMAXLIB_F64 || !is_float(l.total->dtype))))
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
  call.job.dense &= writes;  // what stands in for a gradient is not written to
  if (const softmaxlib_status status = check_data(&call.job)) return status;
  if (overlap(*losses, *x) || overlap(*losses, *target) ||
      (writes && (overlap(*losses, *grad) || overlap(*grad, *target, probabilities))) ||
      (reduces && (overlap(*l.total, *losses) || (writes && overlap(*l.total, *grad)))))
    return SOFTMAXLIB_ERROR_OVERLAP;
  if (!probabilities && !are_classes(*target, n, l.ignore_index)) return SOFTMAXLIB_ERROR_TARGET;
  if (l.weight && !are_weights(l.weight, n)) return SOFTMAXLIB_ERROR_LOSS;
  Loss loss = {probabilities,  writes, l.label_smoothing, l.weight,
               l.ignore_index, {1, 1}, l.gradient_scale,  0};
  Reduction reduction = {};
  if (reduces) reduction = reduction_of(*target, call.job.rows, n, l, &loss);
  call.job.loss = &loss;
  const KernelTable& table = *table_of(given->isa);
  const Kernel kernel =
      table.cross_entropy[activation == SOFTMAXLIB_STABLEMAX][call.job.dtype[kOut]];
  if (const softmaxlib_status status = finish(call, kernel, *given)) return status;
  if (reduces) table.reduce_losses(call.job, reduction);
  return SOFTMAXLIB_OK;
}

softmaxlib_status softmaxlib_take_log_softmax(const softmaxlib_array* x,
                                              const softmaxlib_array* indices,
                                              const softmaxlib_array* out,
                                              const softmaxlib_array* logsumexp, int32_t axis,
                                              const softmaxlib_options* options) {
  using namespace softmaxlib;
  if (!x || !indices || !out) return SOFTMAXLIB_ERROR_NULL;
  const Options given(options);
  if (const softmaxlib_status status = check_options(given)) return status;
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
  if (overlap(*out, *x) || overlap(*out, *indices) ||
      (logsumexp &&
       (overlap(*logsumexp, *x) || overlap(*logsumexp, *indices) || overlap(*logsumexp, *out))))
    return SOFTMAXLIB_ERROR_OVERLAP;
  if (top.k && !are_classes(*indices, call.job.n, 0)) return SOFTMAXLIB_ERROR_TARGET;
  if (top.k && call.job.n == 0) return SOFTMAXLIB_ERROR_TARGET;
  call.job.top = &top;
  return finish(call, table_of(given->isa)->take[call.job.dtype[kOut]], *given);
}

}  // extern "C"
