// Cross-entropy of rows; the formulas: cross_entropy_row.hpp. Short rows whose targets are classes
// are computed many at a time.
#pragma once

#include "isa/kernels/cross_entropy_row.hpp"
#include "isa/kernels/lanes.hpp"

namespace softmaxlib {
namespace SOFTMAX_ISA {
namespace {

// One row by itself.
template <class P, class D>
SOFTMAXLIB_NOINLINE void cross_entropy_of_row(const Job& job, const Row<D>& row, const Place& place,
                                              double weight_sum) {
  const double loss = CrossEntropyRow<P, D>(job, row, place, weight_sum).run();
  put_as(job.dtype[kLoss], job.base[kLoss] + place.offset[kLoss], loss);
}
template <class D>
SOFTMAXLIB_NOINLINE void cross_entropy_alone(const Job& job, int64_t row) {
  int32_t one_block[kVectorsPerBlock / kVectorsPerChunk];
  const Rows at(job, row);
  cross_entropy_of_row<SoftmaxOf<D>, D>(job, Row<D>(job, at.place, nullptr, one_block), at.place,
                                        0);
}

// The loss of a class with its gradient: rows as CrossEntropyRow::of_class() computes them.
template <class Vector>
class BatchOfCrossEntropy : public KindOfBatch {
 public:
  using V = Vector;
  using T = typename V::elem;
  using F = Exp<V, Use::kLogarithms>;
  static constexpr bool kHolds = true, kTargets = true;

  // Whether all rows of a job have such a gradient.
  static bool takes(const Job& job) {
    const WideProduct factor = factor_of(job);
    return !job.base[kScale] && factor.more == 1 && factor.value >= 0;
  }

  void begin(const RowRun& run, int first, int rows) { rows_.begin(run, first, rows); }

  SOFTMAXLIB_NOINLINE void finish(const HeldSums<V>& sums, bool (&alone)[V::lanes],
                                  const ElementsOfRows<T>& at) {
    const LogRest<V> rest = log_rest_of(sums);
    sums.check(sums.sum.value(), alone);
    const LabelsOfRows<V> labels(rows_, alone, at);
    store(target_, load(labels.target));
    set_gradient(rest, sums.held, sums.reference, labels.arguments(), labels.weight, alone);
    BatchOfLogSoftmax<V> log_softmax;
    log_softmax.set(rest, sums.held);
    labels.put_losses(rows_, log_softmax, alone);
  }

  // The gradient of row r, but for the class itself.
  auto result(int r) const {
    return [exp = Exp<V>(0), magic = V::set1(magic_[r]), floor = V::set1(floor_[r]),
            scale = V::set1(scale_[r])](auto x)
               SOFTMAXLIB_INLINE_LAMBDA { return exp.evaluate(x, magic, floor) * scale; };
  }
  void put_target(int r, T* row) const { row[static_cast<int64_t>(target_[r])] = of_target_[r]; }

  // A function of element j of every row, and of j.
  auto results() const {
    return [exp = Exp<V>(0), magic = load(magic_), floor = load(floor_), scale = load(scale_),
            target = load(target_), of_target = load(of_target_)](auto x, int j)
               SOFTMAXLIB_INLINE_LAMBDA {
                 const V p = exp.evaluate(x, magic, floor) * scale;
                 return select(eq(target, V::set1(static_cast<T>(j))), of_target, p);
               };
  }

 private:
  static WideProduct factor_of(const Job& job) {
    const Affine affine = affine_of(job, RowRun(job, 0).place, {0, 0});
    return {job.loss->scale, affine.factor, job.loss->exponent + affine.exponent};
  }

  void set_gradient(const LogRest<V>& rest, Pair<V> held, V reference, Pair<V> z,
                    const double (&weight)[V::lanes], bool (&alone)[V::lanes]) {
    using One = SoftmaxOf<T>;
    const double factor = factor_of(*rows_.job).value;
    const ExpInLanes<V> exp(reference);
    store(magic_, exp.magic());
    store(floor_, exp.floor());
    const InLanes<V> relative =
        exp_wide(less_held(z, InLanes<V>::of(held.hi), InLanes<V>::of(held.lo)));
    const V is_held =
        select(eq(z.hi, held.hi), select(eq(z.lo, held.lo), V::set1(1), V::set1(0)), V::set1(0));
    double in_held[V::lanes], of_held[V::lanes], ratio[V::lanes], others[V::lanes];
    double scale[V::lanes], of_target[V::lanes];
    store_lanes(in_held, InLanes<V>::of(is_held));
    store_lanes(of_held, rest.of_held);
    store_lanes(ratio, rest.ratio);
    store_lanes(others, relative);
    const f64x8 one = f64x8::set1(1), none = f64x8::set1(0), by = f64x8::set1(factor);
    for (int i = 0; i < V::lanes; i += f64x8::lanes) {
      const f64x8 r = load(ratio + i), w = load(weight + i), all = one + r;
      store(scale + i, f64x8::set1(One::kUnit) / (load(of_held + i) * all) * (w * by));
      const f64x8 share = select(eq(load(in_held + i), one), r, all - load(others + i)) / all;
      store(of_target + i, none - share * w * by);
    }
    SOFTMAXLIB_NO_UNROLL
    for (int r = 0; r < V::lanes; ++r) {
      alone[r] |= !One::fits(weight[r] * factor, scale[r]);
      scale_[r] = static_cast<T>(scale[r]);
      of_target_[r] = static_cast<T>(of_target[r]);
    }
  }

  RowsBeside<V> rows_;
  alignas(64) T target_[V::lanes] = {}, of_target_[V::lanes], scale_[V::lanes];
  alignas(64) T magic_[V::lanes], floor_[V::lanes];
};

template <class D>
inline bool cross_entropy_of_many(const Job& job, int64_t start, int64_t stop, char* scratch) {
  using V = typename vector_of<D>::type;
  const Loss& loss = *job.loss;
  if (loss.probabilities || loss.smoothing != 0) return false;
  const auto alone = cross_entropy_alone<D>;
  if (!loss.writes) return run_many<BatchOfLogSums<V>>(job, start, stop, scratch, alone);
  using Kind = BatchOfCrossEntropy<V>;
  return Kind::takes(job) && run_many<Kind>(job, start, stop, scratch, alone);
}

template <template <class> class P>
constexpr bool kIsSoftmax = false;
template <>
constexpr bool kIsSoftmax<SoftmaxOf> = true;

template <template <class> class P, class D>
void cross_entropy_of_rows(const Job& job, int64_t start, int64_t stop, char* scratch) {
  const DefaultFloatingPoint environment;
  if constexpr (kIsSoftmax<P>) {
    if (cross_entropy_of_many<D>(job, start, stop, scratch)) return stream_fence();
  }
  const double weight_sum = job.loss->smoothing > 0 ? sum_of_weights(job) : 0;
  for_each_row<D>(job, start, stop, scratch, [&](const Row<D>& row, const Place& place) {
    cross_entropy_of_row<P<D>, D>(job, row, place, weight_sum);
  });
}

template <class T>
void cross_entropy_of_softmax(const Job& job, int64_t start, int64_t stop, char* scratch) {
  cross_entropy_of_rows<SoftmaxOf, T>(job, start, stop, scratch);
}
template <class T>
void cross_entropy_of_stablemax(const Job& job, int64_t start, int64_t stop, char* scratch) {
  cross_entropy_of_rows<StablemaxOf, T>(job, start, stop, scratch);
}

// The rows' losses, which are doubles, as one; in their order, whichever thread made which.
inline void reduce_losses(const Job& job, const Reduction& reduction) {
  const DefaultFloatingPoint environment;
  const int64_t run = job.outer_ndim ? job.outer[job.outer_ndim - 1].size : 1;
  const int64_t stride = job.outer_ndim ? job.outer[job.outer_ndim - 1].stride[kLoss] : 0;
  // A sum that leaves the range is taken again in a smaller unit: a mean may be back inside.
  double sum = 0, unit = 1;
  for (int attempt = 0; attempt < 2; ++attempt) {
    Total total;
    total.reference = 0;
    for (int64_t r = 0; r < job.rows; r += run) {
      const char* p = job.base[kLoss] + Rows(job, r).place.offset[kLoss];
      for (int64_t i = 0; i < run; ++i) {
        double loss;
        memcpy(&loss, p + i * stride, sizeof(loss));
        total.add(loss * unit);
      }
    }
    sum = finite(total.sum) ? total.value() : total.sum;
    if (finite(sum)) break;
    unit = 0x1p-64;
  }
  const double quotient = reduction.divisor > 0 ? sum / reduction.divisor : NAN;
  const WideProduct result(quotient, 1 / unit, reduction.exponent);
  put_as(reduction.dtype, static_cast<char*>(reduction.total), result.value * result.more);
}

}  // namespace
}  // namespace SOFTMAX_ISA
}  // namespace softmaxlib
