// The C interface of losses.
#include "api/arrays.hpp"
#include "api/call.hpp"
#include "environment.hpp"

namespace softmaxlib {
namespace {

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
      for_each_element(target, [&](const char* p) {
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

// What can be told without the arrays.
softmaxlib_status check(const softmaxlib_loss_options& l) {
  if (!in_unit_interval(l.label_smoothing) || !is_finite(l.gradient_scale) || l.reduction < 0 ||
      l.reduction > SOFTMAXLIB_REDUCTION_MEAN)
    return SOFTMAXLIB_ERROR_LOSS;
  if (l.reduction == SOFTMAXLIB_REDUCTION_NONE) return SOFTMAXLIB_OK;
  if (!l.total || !l.total->data) return SOFTMAXLIB_ERROR_NULL;
  if (!has_one_element(*l.total)) return SOFTMAXLIB_ERROR_SHAPE;
  return is_float(l.total->dtype) ? SOFTMAXLIB_OK : SOFTMAXLIB_ERROR_DTYPE;
}

// A label's element is written again, behind its row: after streaming stores to the same line that
// takes as long as this much of a row.
constexpr int64_t kStreamedRow = 8192;

Schedule schedule_of(const Job& job, const softmaxlib_options& o) {
  Schedule schedule = share_rows(job, o, true);
  if (o.store == SOFTMAXLIB_STORE_AUTO && job.n * item_size(job.dtype[kOut]) < kStreamedRow)
    schedule.streaming = false;
  return schedule;
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
  const Versioned<softmaxlib_loss_options> versioned(loss_options, SOFTMAXLIB_LOSS_OPTIONS_INIT,
                                                     offsetof(softmaxlib_loss_options, reduction));
  const softmaxlib_loss_options& l = *versioned;
  const bool reduced = l.reduction != SOFTMAXLIB_REDUCTION_NONE;
  const bool probabilities = is_float(target->dtype);
  const bool stable = activation == SOFTMAXLIB_STABLEMAX;
  Call call(options);
  call.refuse_attention();
  call.require(stable || activation == SOFTMAXLIB_SOFTMAX, SOFTMAXLIB_ERROR_FUNCTION);
  call.require(versioned.valid(), SOFTMAXLIB_ERROR_STRUCT_SIZE);
  call.require_ok(check(l));
  call.require(has_axis(*x, axis), SOFTMAXLIB_ERROR_AXIS);
  const Given list[] = {
      {kX, x, Shape::kOfX, Dtypes::kAny, Access::kReadsUnder},
      {kOut, grad, Shape::kOfX, Dtypes::kFloats, Access::kWrites},
      {kLoss, losses, Shape::kPerRow, reduced ? Dtypes::kF64 : Dtypes::kFloats, Access::kWrites},
      {probabilities ? kTarget : kIndices, target, probabilities ? Shape::kOfX : Shape::kPerRow,
       probabilities ? Dtypes::kFloats : Dtypes::kI64, Access::kReadsUnder}};
  call.lay_out(activation, {1, &axis}, list, storage_of(x->dtype));
  call.check_data(list);
  if (!call.is_good()) return call.status();
  Job& job = call.job;
  call.require(!reduced || (!overlap(*l.total, *losses) && !(grad && overlap(*l.total, *grad))),
               SOFTMAXLIB_ERROR_OVERLAP);
  call.require_that([&] { return probabilities || are_classes(*target, job.n, l.ignore_index); },
                    SOFTMAXLIB_ERROR_TARGET);
  call.require_that([&] { return !l.weight || are_weights(l.weight, job.n); },
                    SOFTMAXLIB_ERROR_LOSS);
  if (!call.is_good()) return call.status();

  // With an empty gradient losses are all the results that there are.
  job.reduces |= job.n == 0;
  Loss loss = {probabilities,  !job.reduces, l.label_smoothing, l.weight,
               l.ignore_index, {1, 1},       l.gradient_scale,  0};
  Reduction reduction = {};
  if (reduced) reduction = reduction_of(*target, job.rows, job.n, l, &loss);
  job.loss = &loss;
  const registry::OtherCall kernel =
      stable ? registry::stablemax_cross_entropy : registry::cross_entropy;
  call.run(kernel_of(call.table(), kernel, job.dtype[kOut]), schedule_of(job, *call.options));
  if (call.is_good() && reduced) call.table().reduce_losses(job, reduction);
  return call.status();
}

softmaxlib_status softmaxlib_take_log_softmax(const softmaxlib_array* x,
                                              const softmaxlib_array* indices,
                                              const softmaxlib_array* out,
                                              const softmaxlib_array* logsumexp, int32_t axis,
                                              const softmaxlib_options* options) {
  using namespace softmaxlib;
  if (!x || !indices || !out) return SOFTMAXLIB_ERROR_NULL;
  Call call(options);
  call.refuse_attention();
  call.require(indices->dtype == SOFTMAXLIB_I64 && is_float(out->dtype) &&
                   (!logsumexp || logsumexp->dtype == out->dtype),
               SOFTMAXLIB_ERROR_DTYPE);
  call.require(has_axis(*x, axis), SOFTMAXLIB_ERROR_AXIS);
  WithoutAxis y, i;
  call.require(x->shape && out->ndim == x->ndim && indices->ndim == x->ndim && y.set(*out, axis) &&
                   i.set(*indices, axis) && y.size == i.size,
               SOFTMAXLIB_ERROR_SHAPE);
  if (!call.is_good()) return call.status();
  const TopK top = {y.size, y.stride, i.stride, false};
  Given list[] = {{kX, x, Shape::kOfX, Dtypes::kAny, Access::kReads},
                  {kOut, &y.array, Shape::kPerRow, Dtypes::kFloats, Access::kWrites},
                  {kIndices, &i.array, Shape::kPerRow, Dtypes::kI64, Access::kReads},
                  {kLogSum, logsumexp, Shape::kPerRow, Dtypes::kFloats, Access::kWrites}};
  call.lay_out(SOFTMAXLIB_LOG_SOFTMAX, {1, &axis}, list, out->dtype);
  if (!call.is_good() || (top.k == 0 && !logsumexp)) return call.status();
  if (top.k == 0) {  // of no elements there is no memory, wherever it is said to be
    list[1].array = list[2].array = nullptr;
    call.job.given &= ~(1u << kOut | 1u << kIndices);
  }
  call.check_data(list);
  call.require(!overlap(*out, *x) && !overlap(*out, *indices) &&
                   !(logsumexp && overlap(*logsumexp, *out)) &&
                   !(logsumexp && overlap(*logsumexp, *indices)),
               SOFTMAXLIB_ERROR_OVERLAP);
  call.require_that([&] { return are_indices(*indices, call.job.n); }, SOFTMAXLIB_ERROR_TARGET);
  if (!call.is_good()) return call.status();
  call.job.top = &top;
  return call.run(kernel_of(call.table(), registry::take_log_softmax, call.job.dtype[kOut]),
                  schedule_of(call.job, *call.options));
}

}  // extern "C"
