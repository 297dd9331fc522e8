// What the four schedules of softmax share: the repair of rows outside of the safe range.
#pragma once

#include "isa/sum/terms.hpp"

namespace softmaxlib {
namespace SOFTMAX_ISA {
namespace {

inline bool finite(double x) { return x - x == 0; }

// Whether a sum can be trusted: no NaN, and the row's maximum within kSafe of 0.
inline bool usable(const Total& total) {
  return total.sum == total.sum && total.reference > -kSafeReference &&
         total.reference < kSafeReference;
}

// Of all terms, the sink too; NaN where that is.
template <class D>
SOFTMAXLIB_NOINLINE Pair<double> exact_max_of(Row<D>& row) {
  Pair<double> top = {-INFINITY, 0};
  if (row.has_elements_of_x()) {
    top.hi = max_of_row(row);
  } else {
    top = row.staged_max();
    if (top.hi == INFINITY || top.hi == -INFINITY) {  // its arguments may have left the range
      row.go_far();
      top = row.staged_max();
    }
  }
  const double sink = row.far_sink();
  return sink > top.hi || sink != sink ? Pair<double>{sink, 0} : top;
}

// schedule(row) computes a row and returns true, or returns false, x still being intact but for
// NaN, if its sum is not usable. Such a row is computed again less its maximum.
template <class D>
SOFTMAXLIB_NOINLINE void run_softmax(Row<D> row, bool (*schedule)(const Row<D>&)) {
  using T = typename Row<D>::T;
  bool done = schedule(row);
  if (!done) {
    const Pair<double> top = exact_max_of(row);
    if (finite(top.hi)) {
      row.shift_by(top);
      done = schedule(row);
    }
  }
  if (!done) row.fill(static_cast<T>(NAN), 0);
  else if (row.terms() == 1) row.fill(1, 0);  // p times the rounded 1 / p need not be 1
}

// A row by its kernel: that of a function, or an algorithm of softmax. Not inline: rows one by one
// and those that are alone in a batch share it.
template <class T>
inline void run_any(const Row<T>& row, void (*kernel)(const Row<T>&)) {
  kernel(row);
}
template <class T>
inline void run_any(const Row<T>& row, bool (*kernel)(const Row<T>&)) {
  run_softmax(row, kernel);
}
template <class T, auto kKernel>
SOFTMAXLIB_NOINLINE void run_row(const Row<T>& row) {
  run_any<T>(row, kKernel);
}

}  // namespace
}  // namespace SOFTMAX_ISA
}  // namespace softmaxlib
