// softmax along an axis that is not the last: columns of x of more than a group (shorter ones:
// kernels/lanes.hpp), a vector of them at a time, without a transposed copy. Two passes as in
// softmax_two_pass, over panels of columns: wide enough for memory, which likes long pieces of a
// row, and narrow enough for what is kept per column.
#pragma once

#include "isa/kernels/softmax.hpp"
#include "isa/sum/columns.hpp"

namespace softmaxlib {
namespace SOFTMAX_ISA {
namespace {

template <class D>
class LongColumns {
 public:
  LongColumns(const Job& job, char* scratch)
      : n_(job.n),
        x_stride_(job.inner[0].stride[kX]),
        y_stride_(job.inner[0].stride[kOut]),
        streaming_(job.streaming),
        states_(reinterpret_cast<State*>(scratch)),
        arrays_(reinterpret_cast<T*>(scratch + kVectors * kColumnStateBytes)) {
    static_assert(sizeof(State) <= kColumnStateBytes, "job.hpp makes room for it");
  }

  // next: the panel to come.
  void run(const Panel<D>& panel, const Panel<D>& next) {
    panel_ = panel;
    sum<false>();
    const bool again = any_unusable();
    if (again) sum<true>();
    prepare_write();
    if (again) write<true>(next);
    else write<false>(next);
  }

 private:
  using V = typename vector_of<D>::type;
  using T = typename V::elem;
  static constexpr int kLanes = V::lanes, kGroup = kVectorsPerGroup * kLanes;
  static constexpr int64_t kChunk = kVectorsPerChunk * kLanes, kBlock = kVectorsPerBlock * kLanes;
  static constexpr int64_t kItem = sizeof(D);
  static constexpr int kVectors = kColumnVectors + 2;
  static constexpr int kRowsAhead = 16;  // in the second pass, which goes row by row

  struct alignas(64) State {
    ColumnSums<V> sums;
    V shift;
    bool again;  // not usable at the first attempt
  };

  // Per column, what the second pass needs.
  enum { kMagic, kFloor, kScale, kShift };
  T* array(int which) const {
    return arrays_ + which * kVectors * kLanes + (panel_.head ? kLanes - panel_.head : 0);
  }

  // `rows` elements from i on of a vector of columns.
  SOFTMAXLIB_INLINE Strip<D> strip(int64_t vector, int64_t i, int64_t rows, D* copy) const {
    const char* const row = panel_.x + i * x_stride_;
    if (panel_.columns < kLanes)
      return Strip<D>{row, x_stride_}.gathered(rows, panel_.columns, copy);
    return {row + panel_.first(vector) * kItem, x_stride_};
  }

  // Reads x: a group of every column, then the next. kAgain: only where it was not usable.
  template <bool kAgain>
  void sum() {
    alignas(64) D copy[kGroup * kLanes];
    alignas(64) T terms[kGroup * kLanes];
    Ahead<D> ahead = kAgain ? Ahead<D>() : Ahead<D>(panel_, x_stride_, kGroup, n_);
    for (int64_t i = 0; i < n_; i += kGroup) {
      const int64_t next = i + kGroup;
      const int rows = static_cast<int>(next < n_ ? kGroup : n_ - i);
      for (int64_t v = 0; v < panel_.vectors(); ++v) {
        State& state = states_[v];
        if (kAgain && !state.again) continue;
        const Strip<D> x = strip(v, i, rows, copy);
        if constexpr (kAgain) add(state.sums, x, i, rows, ShiftedBy<V>{state.shift}, terms, ahead);
        else add(state.sums, x, i, rows, Unshifted<V>(), terms, ahead);
        if (next >= n_ || next % kChunk == 0) state.sums.end_chunk();
        if (next >= n_ || next % kBlock == 0) state.sums.end_block(next <= kBlock);
      }
    }
  }

  template <class X>
  SOFTMAXLIB_INLINE void add(ColumnSums<V>& sums, const Strip<D>& x, int64_t i, int rows,
                             X argument, T* terms, Ahead<D>& ahead) const {
    if (i % kBlock == 0) sums.begin_block(x.max_of(rows, argument));
    V top;
    do top = x.terms_of(rows, argument, ExpInLanes<V>(sums.reference()), terms, ahead);
    while (sums.raise(top));
    sums.add(terms, rows);
  }

  // Columns outside of the safe range are to be computed less their maximum.
  bool any_unusable() {
    alignas(64) D copy[kGroup * kLanes];
    bool found = false;
    for (int64_t v = 0; v < panel_.vectors(); ++v) {
      State& state = states_[v];
      const V scale = state.sums.total().scales();
      state.shift = V::set1(0);
      state.again = any_nan(scale);
      if (!state.again) continue;
      found = true;
      V top = V::set1(static_cast<T>(-INFINITY));
      for (int64_t i = 0; i < n_; i += kGroup) {
        const int rows = static_cast<int>(kGroup < n_ - i ? kGroup : n_ - i);
        top = max(strip(v, i, rows, copy).max_of(rows, Unshifted<V>()), top);
      }
      state.shift = shift_of(scale, top);
    }
    return found;
  }

  void prepare_write() {
    const int64_t columns = panel_.columns;
    for (int64_t v = 0; v < panel_.vectors(); ++v) {
      const State& state = states_[v];
      const ColumnTotals<V>& total = state.sums.total();
      const ExpInLanes<V> exp(load(total.reference));
      const int64_t at = columns < kLanes ? 0 : panel_.first(v);
      store(array(kMagic) + at, exp.magic());
      store(array(kFloor) + at, exp.floor());
      store(array(kScale) + at, total.scales());
      store(array(kShift) + at, state.shift);
    }
    // A vector may reach into the next row.
    for (int which = kMagic; which <= kShift; ++which)
      for (int64_t i = columns; i < columns + kLanes; ++i)
        array(which)[i] = array(which)[i - columns];
  }

  // Reads x, writes y: a row of the panel, then the next. Rows without a gap are one long row.
  template <bool kAgain>
  void write(const Panel<D>& next) const {
    const bool dense = x_stride_ == panel_.columns * kItem && y_stride_ == x_stride_;
    Ahead<D> ahead(panel_, x_stride_, kRowsAhead, n_);
    if (dense) return write_row<kAgain>(panel_.x, panel_.y, n_ * panel_.columns, ahead);
    for (int64_t i = 0; i < n_; ++i) {
      if (i == n_ - kGroup) ahead = Ahead<D>(next, x_stride_, 0, kGroup);
      write_row<kAgain>(panel_.x + i * x_stride_, panel_.y + i * y_stride_, panel_.columns, ahead);
    }
  }

  // The next `count` elements, column after column and around again.
  template <bool kAgain>
  void write_row(const char* x, char* y, int64_t count, Ahead<D>& fetched) const {
    const Exp<V> exp(0);
    const D* from = reinterpret_cast<const D*>(x);
    D* to = reinterpret_cast<D*>(y);
    // Copies that no store can change.
    Ahead<D> ahead = fetched;
    const T *const magic = array(kMagic), *const floor = array(kFloor);
    const T *const scale = array(kScale), *const shift = array(kShift);
    const int64_t columns = panel_.columns;
    int64_t column = 0;
    const auto result = [&](V v, int64_t n) SOFTMAXLIB_INLINE_LAMBDA {
      if constexpr (kAgain) v = v - load(shift + column);
      const V factor = load(scale + column);
      v = exp.evaluate(v, load(magic + column), load(floor + column)) * factor;
      if constexpr (kAgain) v = select(eq(factor, factor), v, V::set1(static_cast<T>(NAN)));
      column += n;
      while (column >= columns) column -= columns;
      return v;
    };
    const auto some = [&](int64_t n) SOFTMAXLIB_INLINE_LAMBDA {
      const int lanes = static_cast<int>(n);
      store_n(to, result(load_n(from, lanes, 0), n), lanes);
      from += n;
      to += n;
      count -= n;
    };
    const int64_t past = static_cast<int64_t>(reinterpret_cast<uintptr_t>(y)) % kVectorBytes<D>;
    const bool streaming = streaming_ && past % kItem == 0;
    const int64_t head = streaming ? elements_to_aligned<D>(y) : 0;
    if (head) some(head < count ? head : count);
    for (; count >= 2 * kLanes; count -= 2 * kLanes, from += 2 * kLanes, to += 2 * kLanes) {
      const V a = result(load(from), kLanes), b = result(load(from + kLanes), kLanes);
      ahead.template step<2>();
      if (streaming) {
        stream(to, a);
        stream(to + kLanes, b);
      } else {
        store(to, a);
        store(to + kLanes, b);
      }
    }
    while (count > 0) some(kLanes < count ? kLanes : count);
    fetched = ahead;
  }

  const int64_t n_, x_stride_, y_stride_;
  const bool streaming_;
  State* const states_;
  T* const arrays_;
  Panel<D> panel_;
};

template <class D>
inline void softmax_columns_as(D*, const Job& job, int64_t start, int64_t stop, char* scratch) {
  LongColumns<D> columns(job, scratch);
  Panel<D> panel = panel_at<D>(job, start, stop);
  for (int64_t row = start; row < stop;) {
    row += panel.columns;
    const Panel<D> next = panel_at<D>(job, row, stop);
    columns.run(panel, next);
    panel = next;
  }
}

template <class T>
inline void softmax_columns(const Job& job, int64_t start, int64_t stop, char* scratch) {
  with_storage(job.dtype[kOut], typename vector_of<T>::type(),
               [&](auto* storage) { softmax_columns_as(storage, job, start, stop, scratch); });
}

}  // namespace
}  // namespace SOFTMAX_ISA
}  // namespace softmaxlib
