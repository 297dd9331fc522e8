// Rows of one element. Where the argument is finite the result is known, 1 or its logarithm: so
// nothing is computed, and all that is looked at is whether it is.
#pragma once

#include "isa/kernels/batch.hpp"

namespace softmaxlib {
namespace SOFTMAX_ISA {
namespace {

template <class V>
class SingleElements {
 public:
  using T = typename V::elem;

  SOFTMAXLIB_NOINLINE explicit SingleElements(const Job& job)
      : job_(job), x_(job, kX), bias_(job, kBias), scale_(job, kScale) {}

  SOFTMAXLIB_NOINLINE void compute(int64_t row, int64_t stop,
                                   void (*alone)(const Job& job, int64_t row)) {
    const bool is_usual = has_usual_factor();
    for (RowRun run(job_, row); row < stop;) {
      int64_t rows = run.rows < stop - row ? run.rows : stop - row;
      if (rows > kRows) rows = kRows;
      for (int64_t i = 0; i < rows; i += V::lanes) store(good_ + i, V::set1(is_usual ? 1 : 0));
      look(x_, run, rows, -1);
      if (job_.base[kBias]) look(bias_, run, rows, -1);
      if (job_.base[kScale]) look(scale_, run, rows, 1 / kMost);
      char* const y = job_.base[kOut] + run.place.offset[kOut];
      const int64_t step = run.step.stride[kOut];
      if (set_results(run, rows)) {
        store_all(job_.dtype[kOut], y, step, rows, results_, job_.streaming);
      } else {
        for (int64_t r = 0; r < rows; ++r)
          if (good_[r] == 0) alone(job_, row + r);
          else put_as(job_.dtype[kOut], y + r * step, static_cast<double>(results_[r]));
      }
      row += rows;
      run.advance(rows);
    }
  }

 private:
  static constexpr int64_t kRows = kVectorsPerChunk * V::lanes;
  // Products of three numbers below it, and sums with another, are finite.
  static constexpr T kMost = static_cast<T>(sizeof(T) == 4 ? 0x1p40 : 0x1p300);

  // Of what multiplies all rows, beside what each may have of its own.
  bool has_usual_factor() const {
    constexpr double kLimit = static_cast<double>(kMost);
    const double other = job_.divides ? job_.scale : job_.temperature;
    if (job_.base[kScale]) return other > 1 / kLimit && other < kLimit;
    const Affine of_all = affine_of(job_, RowRun(job_, 0).place, {0, 0});
    return of_all.exponent == 0 && of_all.factor < kLimit;
  }

  // Rows are good as long as their numbers of an operand are usual: of a size above `least`.
  SOFTMAXLIB_NOINLINE void look(const Reader<V>& reader, const RowRun& run, int64_t rows, T least) {
    const Operand k = reader.operand();
    const char* const p = job_.base[k] + run.place.offset[k];
    if (reader.access().across) reader.convert(p, rows, numbers_);
    else if (run.step.stride[k] == 0) fill_numbers(k, p, rows);
    else gather_any(job_.dtype[k], p, run.step.stride[k], rows, numbers_);
    store(numbers_ + rows, V::set1(1));
    const V most = V::set1(kMost), low = V::set1(least), bad = V::set1(0);
    for (int64_t i = 0; i < rows; i += V::lanes) {
      const V size = magnitude(load(numbers_ + i)).hi, good = load(good_ + i);
      store(good_ + i, select(gt(most, size), select(gt(size, low), good, bad), bad));
    }
  }
  // With one for all rows.
  void fill_numbers(Operand k, const char* p, int64_t rows) {
    gather_any(job_.dtype[k], p, 0, 1, numbers_);
    const V all = V::set1(numbers_[0]);
    for (int64_t i = 0; i < rows; i += V::lanes) store(numbers_ + i, all);
  }
  // Of all rows; what a mask hides is good, whatever its numbers are. Returns whether all are.
  SOFTMAXLIB_NOINLINE bool set_results(const RowRun& run, int64_t rows) {
    const double none = masked_result(job_.function);
    const V one = V::set1(1), seen = V::set1(none == 0 ? 1 : 0);
    const V hidden = V::set1(static_cast<T>(none));
    const int64_t step = run.step.stride[kWhere];
    const char* const where =
        job_.base[kWhere] ? job_.base[kWhere] + run.place.offset[kWhere] : "\1";
    for (int64_t r = 0; r < rows; ++r) where_[r] = static_cast<uint8_t>(where[r * step]);
    memset(where_ + rows, 1, V::lanes);
    V all = one;
    for (int64_t i = 0; i < rows; i += V::lanes) {
      const auto is_seen = load_mask(where_ + i, one);
      const V good = select(is_seen, load(good_ + i), one);
      all = min(good, all);
      store(good_ + i, good);
      store(results_ + i, select(is_seen, seen, hidden));
    }
    return !any(gt(one, all));
  }

  const Job& job_;
  const Reader<V> x_, bias_, scale_;
  alignas(64) T numbers_[kRows + V::lanes], good_[kRows], results_[kRows];
  uint8_t where_[kRows + V::lanes];
};

}  // namespace
}  // namespace SOFTMAX_ISA
}  // namespace softmaxlib
