// Columns: rows that lie side by side in memory, an element apart, so that a vector holds an
// element of V::lanes of them and every lane is a row of its own. A lane's arithmetic is that of
// isa/sum/sum.hpp: what are lanes of the virtual vector there are elements of the column here, 16
// (or 8) after each other, and nothing has to be shuffled.
#pragma once

#include <stdint.h>

#include "isa/macros.hpp"
#include "isa/math/exp.hpp"
#include "isa/sum/sum.hpp"
#include "job.hpp"

namespace softmaxlib {
namespace SOFTMAX_ISA {
namespace {

// Eight folded as sum_lanes() does.
template <class X>
SOFTMAXLIB_INLINE X fold_eight(const X (&x)[8]) {
  return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]));
}

// Lanes<V> of every column: the sums of a chunk's groups.
template <class V>
struct ColumnLanes {
  InLanes<V> sum[8];

  SOFTMAXLIB_INLINE void add(int i, InLanes<V> x) { sum[i] = sum[i] + x; }
  void clear() {
    for (InLanes<V>& s : sum) s = in_all(0, V());
  }
  void scale(InLanes<V> factor) {
    for (InLanes<V>& s : sum) s = s * factor;
  }
  SOFTMAXLIB_INLINE void fold_into(InLanes<V>& total, InLanes<V>& error) const {
    two_sum(total, error, fold_eight(sum));
  }
};

template <>
struct ColumnLanes<f64x8> {
  using V = f64x8;
  V sum[8], error[8];

  SOFTMAXLIB_INLINE void add(int i, InLanes<V> x) { two_sum(sum[i], error[i], x.all); }
  void clear() {
    for (V& s : sum) s = V::set1(0);
    for (V& e : error) e = V::set1(0);
  }
  void scale(InLanes<V> factor) {
    for (V& s : sum) s = s * factor.all;
    for (V& e : error) e = e * factor.all;
  }
  SOFTMAXLIB_INLINE void fold_into(InLanes<V>& total, InLanes<V>& total_error) const {
    for (const V& s : sum) two_sum(total.all, total_error.all, s);
    total_error.all = total_error.all + fold_eight(error);
  }
};

template <class X>
SOFTMAXLIB_INLINE X inverse(X x) {
  return x.map([](f64x8 v) SOFTMAXLIB_INLINE_LAMBDA { return f64x8::set1(1) / v; });
}

// reciprocal() of every column's total.
template <class V>
SOFTMAXLIB_INLINE InLanes<V> reciprocals(InLanes<V> sum, InLanes<V> error) {
  const InLanes<V> r = inverse(sum);
  return r - r * (r * error);
}

// A Total per column.
template <class V>
struct alignas(64) ColumnTotals {
  using T = typename V::elem;
  double sum[V::lanes], error[V::lanes];
  T reference[V::lanes];

  void clear(V references) {
    store_lanes(sum, in_all(0, V()));
    store_lanes(error, in_all(0, V()));
    store(reference, references);
  }
  Total get(int i) const {
    Total t;
    t.sum = sum[i], t.error = error[i], t.reference = static_cast<int>(reference[i]);
    return t;
  }
  void set(int i, const Total& t) {
    sum[i] = t.sum, error[i] = t.error, reference[i] = static_cast<T>(t.reference);
  }
};

}  // namespace
}  // namespace SOFTMAX_ISA
}  // namespace softmaxlib
