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

template <class V>
inline InLanes<V> in_all_lanes(typename V::elem x) {
  return InLanes<V>::of(V::set1(x));
}

// Eight folded as sum_lanes() does.
template <class X>
SOFTMAXLIB_INLINE X fold_eight(const X (&x)[8]) {
  return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]));
}

// f(i, constant number of rows) for all rows: most at once.
template <int kRows>
struct Elements {
  constexpr operator int() const { return kRows; }
};
template <class F>
SOFTMAXLIB_INLINE void for_rows(int rows, F f) {
  int i = 0;
  for (; i + 8 <= rows; i += 8) f(i, Elements<8>());
  for (; i < rows; ++i) f(i, Elements<1>());
}

// What a group of `rows` > i terms, a vector each, adds to lane i of every column. Terms past the
// last would be zeros, which change nothing.
SOFTMAXLIB_INLINE InLanes<f32x16> lane_of_group(const float* terms, int rows, int i) {
  using V = f32x16;
  const auto one = [=](int j) SOFTMAXLIB_INLINE_LAMBDA { return load(terms + j * V::lanes); };
  const auto two = [=](int j) SOFTMAXLIB_INLINE_LAMBDA {
    return j + 16 < rows ? one(j) + one(j + 16) : one(j);
  };
  const auto four = [=](int j) SOFTMAXLIB_INLINE_LAMBDA {
    return j + 32 < rows ? two(j) + two(j + 32) : two(j);
  };
  if (i + 8 >= rows) return InLanes<V>::of(one(i));
  return InLanes<V>::of(four(i)) + InLanes<V>::of(four(i + 8));
}

// Lanes<V> of every column: the sums of a chunk's groups.
template <class V>
struct ColumnLanes {
  InLanes<V> sum[8];

  SOFTMAXLIB_INLINE void add(const float* terms, int rows) {
    for (int i = 0; i < 8 && i < rows; ++i) sum[i] = sum[i] + lane_of_group(terms, rows, i);
  }
  void clear() {
    for (InLanes<V>& s : sum) s = in_all_lanes<V>(0);
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

  SOFTMAXLIB_INLINE void add(const double* terms, int rows) {
    const auto one = [=](int j) SOFTMAXLIB_INLINE_LAMBDA { return load(terms + j * V::lanes); };
    for (int i = 0; i < 8 && i < rows; ++i) {
      V a = one(i);
      if (i + 8 < rows) a = a + one(i + 8);
      if (i + 16 < rows) a = a + (i + 24 < rows ? one(i + 16) + one(i + 24) : one(i + 16));
      two_sum(sum[i], error[i], a);
    }
  }
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
// The reciprocals of totals that are usable(), else NaN.
template <class V>
SOFTMAXLIB_INLINE V where_usable(InLanes<V> reciprocal, V reference) {
  using T = typename V::elem;
  constexpr T kSquare = static_cast<T>(double{kSafeReference} * kSafeReference);
  return select(gt(V::set1(kSquare), reference * reference), reciprocal.value(),
                V::set1(static_cast<T>(NAN)));
}
template <class V>
SOFTMAXLIB_INLINE bool any_nan(V x) {
  return !all(eq(x, x));
}

// What columns are less in a second attempt: 0, or their maximum where they were not usable.
template <class V>
inline V shift_of(V scale, V top) {
  const V finite_top = select(eq(top - top, V::set1(0)), top, V::set1(0));
  return select(eq(scale, scale), V::set1(0), finite_top);
}

// A Total per column.
template <class V>
struct alignas(64) ColumnTotals {
  using T = typename V::elem;
  double sum[V::lanes], error[V::lanes];
  T reference[V::lanes];

  void clear(V references) {
    store_lanes(sum, in_all_lanes<V>(0));
    store_lanes(error, in_all_lanes<V>(0));
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
  V scales() const {
    InLanes<V> s, e;
    load_lanes(sum, s);
    load_lanes(error, e);
    return where_usable<V>(reciprocals<V>(s, e), load(reference));
  }
};

// The sums of a vector of columns, group by group: what PieceSum is to a row.
template <class V>
class alignas(64) ColumnSums {
 public:
  using T = typename V::elem;

  void begin_block(V top) {
    block_.clear(references_of(top));
    set_limit();
    lanes_.clear();
  }
  V reference() const { return load(block_.reference); }

  // Raises references that a group's maxima exceed by too much; true if its terms have to be
  // computed again.
  SOFTMAXLIB_INLINE bool raise(V top) {
    return SOFTMAXLIB_UNLIKELY(any(gt(top, limit_))) && raise_some(top);
  }
  SOFTMAXLIB_INLINE void add(const T* terms, int rows) {
    constexpr int kGroup = kVectorsPerGroup * V::lanes;
    if (rows == kGroup) lanes_.add(terms, kGroup);
    else lanes_.add(terms, rows);
  }
  void end_chunk() {
    InLanes<V> sum, error;
    load_lanes(block_.sum, sum);
    load_lanes(block_.error, error);
    lanes_.fold_into(sum, error);
    store_lanes(block_.sum, sum);
    store_lanes(block_.error, error);
    lanes_.clear();
  }
  void end_block(bool first) {
    if (first) all_ = block_;
    else merge_block();
  }

  const ColumnTotals<V>& total() const { return all_; }

 private:
  void set_limit() { limit_ = limits_of(reference()); }

  SOFTMAXLIB_NOINLINE bool raise_some(V top) {
    T tops[V::lanes], limits[V::lanes];
    double first[V::lanes], second[V::lanes];
    store(tops, top);
    store(limits, limit_);
    bool raised = false;
    for (int i = 0; i < V::lanes; ++i) {
      first[i] = second[i] = 1;
      if (!(tops[i] > limits[i])) continue;
      Total t = block_.get(i);
      const int down = t.reference - reference_of<V>(tops[i]);
      if (down >= 0) continue;
      raised = true;
      first[i] = power_of_two(down > -1022 ? down : -1022);
      second[i] = power_of_two(down > -1022 ? 0 : down + 1022);
      t.raise(t.reference - down);
      block_.set(i, t);
    }
    InLanes<V> factor;
    load_lanes(first, factor);
    lanes_.scale(factor);
    load_lanes(second, factor);
    lanes_.scale(factor);
    set_limit();
    return raised;
  }

  SOFTMAXLIB_NOINLINE void merge_block() {
    for (int i = 0; i < V::lanes; ++i) {
      Total t = all_.get(i);
      t.merge(block_.get(i));
      all_.set(i, t);
    }
  }

  ColumnLanes<V> lanes_;         // of the chunk
  ColumnTotals<V> block_, all_;  // all: of the blocks before
  V limit_;
};

// What a column's elements are less: nothing, or its own maximum.
template <class V>
struct Unshifted {
  SOFTMAXLIB_INLINE V operator()(V x) const { return x; }
};
template <class V>
struct ShiftedBy {
  V shift;
  SOFTMAXLIB_INLINE V operator()(V x) const { return x - shift; }
};

template <class D>
constexpr int64_t kVectorBytes = int64_t{vector_of<D>::type::lanes} * int64_t{sizeof(D)};

// The elements up to an aligned address; 0 where there is none.
template <class D>
inline int64_t elements_to_aligned(const char* p) {
  constexpr int64_t kItem = sizeof(D);
  const int64_t past = static_cast<int64_t>(reinterpret_cast<uintptr_t>(p)) % kVectorBytes<D>;
  return past && past % kItem == 0 ? (kVectorBytes<D> - past) / kItem : 0;
}

// Columns that lie side by side: where they begin in x and y, and how many vectors they take. From
// the second vector on these are aligned, where the rows allow; the first and the last may overlap
// their neighbours, which does no harm.
template <class D>
struct Panel {
  static constexpr int64_t kLanes = vector_of<D>::type::lanes;
  const char* x = nullptr;
  char* y = nullptr;
  int64_t columns = 0, head = 0;

  int64_t vectors() const { return (head > 0) + (columns - head + kLanes - 1) / kLanes; }
  // The first column of a vector; negative if there are fewer columns than lanes.
  int64_t first(int64_t vector) const {
    int64_t i = head ? head - kLanes : 0;
    i += vector * kLanes;
    if (i < 0) i = 0;
    return i < columns - kLanes ? i : columns - kLanes;
  }
};

// The panel from row `row` of the job on, at most about as wide as it wants them.
template <class D>
inline Panel<D> panel_at(const Job& job, int64_t row, int64_t stop) {
  Panel<D> panel;
  if (row >= stop) return panel;
  const int64_t across = job.outer[job.outer_ndim - 1].size;
  panel.columns = across - row % across;
  if (panel.columns > stop - row) panel.columns = stop - row;
  panel.x = job.base[kX];
  panel.y = job.base[kOut];
  for (int d = job.outer_ndim - 1; d >= 0; --d) {
    const int64_t index = row % job.outer[d].size;
    row /= job.outer[d].size;
    panel.x += index * job.outer[d].stride[kX];
    panel.y += index * job.outer[d].stride[kOut];
  }
  // Not worth it for few columns.
  const int64_t few = Panel<D>::kLanes * (job.streaming ? 8 : 32);
  if (across >= few && panel.columns > Panel<D>::kLanes &&
      job.inner[0].stride[kX] % kVectorBytes<D> == 0)
    panel.head = elements_to_aligned<D>(panel.x);
  const int64_t widest = panel.head ? job.tile - Panel<D>::kLanes + panel.head : job.tile;
  if (panel.columns > widest) panel.columns = widest;
  return panel;
}

// Fetches rows of a panel into the second level cache, some vectors at a step, each row's piece at
// a time: hardware does not foresee where the next row begins.
template <class D>
class Ahead {
 public:
  Ahead() = default;
  Ahead(const Panel<D>& panel, int64_t stride, int64_t first, int64_t last)
      : p_(panel.x + first * stride),
        stride_(stride),
        width_(panel.columns * int64_t{sizeof(D)}),
        rows_(panel.columns ? last - first : 0) {}

  template <int kVectors>
  SOFTMAXLIB_INLINE void step() {
    if (rows_ <= 0) return;
    for (int i = 0; i < kVectors; ++i) SOFTMAXLIB_PREFETCH(p_ + at_ + i * kVectorBytes<D>);
    at_ += kVectors * kVectorBytes<D>;
    if (at_ < width_) return;
    at_ = 0;
    p_ += stride_;
    --rows_;
  }

 private:
  const char* p_ = nullptr;
  int64_t stride_ = 0, width_ = 0, rows_ = 0, at_ = 0;
};

// A vector of columns, `stride` bytes from an element to the next.
template <class D>
struct Strip {
  using V = typename vector_of<D>::type;
  using T = typename V::elem;
  const char* p;
  int64_t stride;

  // A copy of less than a vector's columns, with zeros beside them.
  Strip gathered(int64_t rows, int64_t columns, D* to) const {
    for (int64_t i = 0; i < rows; ++i) {
      const D* const from = reinterpret_cast<const D*>(p + i * stride);
      store(to + i * V::lanes, load_n(from, static_cast<int>(columns), 0));
    }
    return {reinterpret_cast<const char*>(to), kVectorBytes<D>};
  }

  SOFTMAXLIB_INLINE V operator[](int64_t i) const {
    return load(reinterpret_cast<const D*>(p + i * stride));
  }

  template <class X>
  SOFTMAXLIB_INLINE V max_of(int rows, X argument) const {
    V a = V::set1(static_cast<T>(-INFINITY)), b = a;
    for_rows(rows, [&](int i, auto count) SOFTMAXLIB_INLINE_LAMBDA {
      for (int j = 0; j < count; ++j) {
        V& top = j % 2 ? b : a;
        top = max(argument((*this)[i + j]), top);
      }
    });
    return max(a, b);
  }

  // Every term into `terms`, a vector each; returns the largest argument.
  template <class X>
  SOFTMAXLIB_INLINE V terms_of(int rows, X argument, const ExpInLanes<V>& exp, T* terms,
                               Ahead<D>& ahead) const {
    V top = V::set1(static_cast<T>(-INFINITY));
    for_rows(rows, [&](int i, auto count) SOFTMAXLIB_INLINE_LAMBDA {
      for (int j = 0; j < count; ++j) {
        const V x = argument((*this)[i + j]);
        top = max(x, top);
        store(terms + (i + j) * V::lanes, exp(x));
      }
      ahead.template step<count>();
    });
    return top;
  }
};

}  // namespace
}  // namespace SOFTMAX_ISA
}  // namespace softmaxlib
