// Not in the paper: rows of less than a group, as many at a time as a vector has lanes. Every lane
// is a row; columns are loaded and stored through transposes in registers.
#pragma once

#include "rows/batch.hpp"

namespace softmaxlib {
namespace SOFTMAX_ISA {
namespace {

// Columns of several groups of rows, all n of each. They go through the phases one after the other:
// the chain of a single group's maximum, exponentials, sum and reciprocal would be too long.
template <class V>
class Columns {
 public:
  using T = typename V::elem;
  static constexpr int kLanes = V::lanes;
  static constexpr int kMost = 128;

  explicit Columns(int n)
      : n_(n),
        pitch_(n < 4    ? 4
               : n <= 8 ? n
                        : (n + kLanes - 1) / kLanes * kLanes) {
    // Sums of more than eight columns take whole vectors' worth.
    for (int g = 0; g < groups(); ++g)
      for (int j = n; j < pitch_; ++j) SOFTMAX_ISA::store(column(g, j), V::set1(0));
  }
  int groups() const { return kMost / pitch_; }

  // Reads blocks of columns, the last over the one before. Rows of less than four are read beyond
  // their end.
  SOFTMAXLIB_INLINE void load(int group, const T* x, int64_t stride) {
    V top = V::set1(static_cast<T>(-INFINITY));
    int j = 0;
    for (; j + 8 <= n_; j += 8) load_block<8>(column(group, j), x + j, stride, top);
    for (; j + 4 <= n_; j += 4) load_block<4>(column(group, j), x + j, stride, top);
    if (n_ < 4) {
      V block[4];
      load_columns(x, stride, block);
      for (int k = 0; k < 4; ++k) SOFTMAX_ISA::store(column(group, k), block[k]);
      top = n_ > 2 ? max(max(block[0], block[1]), block[2]) : max(block[0], block[1]);
    } else if (j < n_) {
      load_block<4>(column(group, n_ - 4), x + n_ - 4, stride, top);
    }
    SOFTMAX_ISA::store(scale_[group], top);
  }
  // Writes the results in the same blocks, rows of less than four beyond their end, in order.
  SOFTMAXLIB_INLINE void store(int group, T* y, int64_t stride) const {
    const V scale = SOFTMAX_ISA::load(scale_[group]);
    int j = 0;
    for (; j + 8 <= n_; j += 8) store_block<8>(column(group, j), scale, y + j, stride);
    for (; j + 4 <= n_; j += 4) store_block<4>(column(group, j), scale, y + j, stride);
    if (j < n_) {
      j = n_ < 4 ? 0 : n_ - 4;
      store_block<4>(column(group, j), scale, y + j, stride);
    }
  }

  // Turns arguments into exponentials and maxima into scales; false where a row is not usable().
  // Meanwhile x is prefetched, `step` bytes per column.
  SOFTMAXLIB_NOINLINE bool evaluate(int groups, const char* ahead, int64_t step) {
    for (int g = 0; g < groups; ++g) {
      const InLanes<V> references = references_of(SOFTMAX_ISA::load(scale_[g]));
      const ExpInLanes<V> exp(references);
      SOFTMAX_ISA::store(reference_[g], references.value());
      SOFTMAX_ISA::store(magic_[g], exp.magic());
      SOFTMAX_ISA::store(floor_[g], exp.floor());
    }
    const int64_t n = n_ * kLanes;
    const Exp<V> exp(0);
    for (int g = 0; g < groups; ++g) {
      T* const e = column(g, 0);
      const V magic = SOFTMAX_ISA::load(magic_[g]), floor = SOFTMAX_ISA::load(floor_[g]);
      for (int64_t i = 0; i < n; i += kLanes, ahead += step) {
        prefetch(ahead);
        SOFTMAX_ISA::store(e + i, exp.evaluate(SOFTMAX_ISA::load(e + i), magic, floor));
      }
    }
    if (n_ <= 8) return sum_up<0>(groups);
    switch (pitch_ / kLanes) {
      case 1: return sum_up<1>(groups);
      case 2: return sum_up<2>(groups);
      case 3: return sum_up<3>(groups);
      default: return sum_up<4>(groups);
    }
  }
  bool usable_row(int row) const {
    return usable(reference_[row / kLanes][row % kLanes], scale_[row / kLanes][row % kLanes]);
  }

 private:
  T* column(int group, int j) { return e_ + (group * pitch_ + j) * kLanes; }
  const T* column(int group, int j) const { return e_ + (group * pitch_ + j) * kLanes; }

  template <int kColumns>
  static SOFTMAXLIB_INLINE void load_block(T* e, const T* x, int64_t stride, V& top) {
    V block[kColumns];
    load_columns(x, stride, block);
    for (int k = 0; k < kColumns; ++k) SOFTMAX_ISA::store(e + k * kLanes, block[k]);
    for (int k = 0; k < kColumns; k += 4)
      top = max(max_of(block[k], block[k + 1], block[k + 2], block[k + 3]), top);
  }
  template <int kColumns>
  static SOFTMAXLIB_INLINE void store_block(const T* e, V scale, T* y, int64_t stride) {
    V block[kColumns];
    for (int k = 0; k < kColumns; ++k) block[k] = SOFTMAX_ISA::load(e + k * kLanes) * scale;
    store_columns(y, stride, block);
  }

  // Sums as Lanes adds them up, in kVectors vectors per row; 0: of at most eight elements.
  template <int kVectors>
  SOFTMAXLIB_INLINE bool sum_up(int groups) {
    const int n = n_;
    bool good = true;
    for (int g = 0; g < groups; ++g) {
      const V scale = reciprocals<kVectors>(column(g, 0), n);
      SOFTMAX_ISA::store(scale_[g], scale);
      good &= all_usable(SOFTMAX_ISA::load(reference_[g]), scale);
    }
    return good;
  }
  template <int kVectors>
  static SOFTMAXLIB_INLINE V reciprocals(const T* e, int n) {
    const auto at = [e](int j) SOFTMAXLIB_INLINE_LAMBDA {
      V t = SOFTMAX_ISA::load(e + j * kLanes);
      const auto next = [&](int i) SOFTMAXLIB_INLINE_LAMBDA {
        return SOFTMAX_ISA::load(e + (j + i * kLanes) * kLanes);
      };
      if constexpr (kVectors > 1) t = t + next(1);
      if constexpr (kVectors == 3) t = t + next(2);
      if constexpr (kVectors == 4) t = t + (next(2) + next(3));
      return t;
    };
    if constexpr (kLanes == 8) {
      return reciprocals_of_doubles(at, f64x8::set1(0), kVectors ? 8 : n);
    } else if constexpr (kVectors == 0) {
      return reciprocals_of_floats([&](int j) { return widen_low(at(j)); },
                                   [&](int j) { return widen_high(at(j)); }, n);
    } else {
      f64x8 low[8], high[8];
      for (int j = 0; j < 8; ++j) {
        const V a = at(j), b = at(j + 8);
        low[j] = widen_low(a) + widen_low(b);
        high[j] = widen_high(a) + widen_high(b);
      }
      return reciprocals_of_floats([&](int j) { return low[j]; }, [&](int j) { return high[j]; },
                                   8);
    }
  }

  int n_, pitch_;
  alignas(64) T e_[kMost * kLanes];
  alignas(64) T scale_[kMost / 4][kLanes];  // at first, the maximum
  alignas(64) T reference_[kMost / 4][kLanes], magic_[kMost / 4][kLanes];
  alignas(64) T floor_[kMost / 4][kLanes];
};

// x, row after row without gaps, as the kernel's own elements. Writes up to a vector more.
template <class D, class T>
inline void gather_rows(const Run<D>& run, int64_t row, int64_t rows, int64_t n, T* to) {
  constexpr int kLanes = vector_of<D>::type::lanes;
  const bool adjacent = run.x_stride == n * static_cast<int64_t>(sizeof(D));
  const int64_t count = adjacent ? rows * n : n;
  for (int64_t r = row; r < row + rows; r += adjacent ? rows : 1, to += count) {
    const D* const x = run.x_row(r);
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(to + i, load(x + i));
    if (i < count) store(to + i, load_n(x + i, static_cast<int>(count - i), T(0)));
  }
}
template <class D, class T>
inline void scatter_row(const T* from, int64_t n, D* y) {
  constexpr int kLanes = vector_of<D>::type::lanes;
  for (int64_t i = 0; i < n; i += kLanes)
    store_n(y + i, load(from + i), static_cast<int>(n - i < kLanes ? n - i : kLanes));
}

template <class D>
inline void softmax_of_run(const Job& job, const Run<D>& run) {
  using V = typename vector_of<D>::type;
  using T = typename V::elem;
  constexpr bool kPlain = sizeof(D) == sizeof(T);
  constexpr int64_t kItem = sizeof(D);
  constexpr int kLanes = V::lanes, kRoom = Columns<V>::kMost * kLanes;
  const V one = V::set1(1);
  const int n = static_cast<int>(job.n);
  // Whole groups of rows go from x and to y directly where their elements allow it.
  const bool direct_x = kPlain && (n >= 4 ? run.x_stride % kItem == 0 : run.x_stride == n * kItem);
  const bool direct_y = kPlain && n >= 4 && run.y_stride % kItem == 0 && !job.streaming;
  const bool posts = !direct_y && Outbox<D>::takes(run.y_row(0), run.y_stride, n);

  Columns<V> columns(n);
  Outbox<D> outbox(job.streaming);
  if (posts) outbox.start(run.y_row(0));
  // A batch's results wait here while the next is computed; then they leave.
  alignas(64) T buffers[2][kRoom + 2 * kLanes];
  T *results = buffers[0] + kLanes, *before = buffers[1] + kLanes;
  int64_t waiting = 0;

  const int most = columns.groups() * kLanes;
  for (int64_t row = 0; row < run.rows; row += most) {
    const int64_t left = run.rows - row;
    const int rows = static_cast<int>(left < most ? left : most);
    const int groups = (rows + kLanes - 1) / kLanes;
    const bool whole = rows == groups * kLanes;
    // A block of a row of less than four reaches into the next row.
    if (direct_x && whole && (n >= 4 || rows < left)) {
      if constexpr (kPlain)
        for (int g = 0; g < groups; ++g)
          columns.load(g, run.x_row(row + g * kLanes), run.x_stride / kItem);
    } else {
      gather_rows(run, row, rows, n, results);
      for (int i = rows * n; i < groups * kLanes * n + 4; ++i) results[i] = 0;
      for (int g = 0; g < groups; ++g) columns.load(g, results + g * kLanes * n, n);
    }
    const bool good =
        columns.evaluate(groups, run.x + row * run.x_stride + kBatchPrefetchBytes, kLanes * kItem);
    if (good && direct_y && whole) {
      if constexpr (kPlain)
        for (int g = 0; g < groups; ++g)
          columns.store(g, run.y_row(row + g * kLanes), run.y_stride / kItem);
      continue;
    }

    for (int g = 0; g < groups; ++g) columns.store(g, results + g * kLanes * n, n);
    if (posts && waiting) outbox.put(before, waiting, one);
    waiting = 0;
    if (good && posts) {
      waiting = rows * n;
      T* const free = before;
      before = results;
      results = free;
      continue;
    }
    for (int r = 0; r < rows; ++r) {
      D* const y = run.y_row(row + r);
      if (!good && !columns.usable_row(r)) {
        if (posts) outbox.finish();
        softmax_alone(job, run, row + r);
        if (posts) outbox.start(y + n);
      } else if (posts) {
        outbox.put(results + r * n, n, one);
      } else {
        scatter_row(results + r * n, n, y);
      }
    }
  }
  if (waiting) outbox.put(before, waiting, one);
  if (posts) outbox.finish();
}

template <class D>
inline void softmax_in_lanes(const Job& job, int64_t start, int64_t stop, char*) {
  using V = typename vector_of<D>::type;
  using T = typename V::elem;
  constexpr int64_t kItem = sizeof(D);
  for_runs_of_rows<D>(job, start, stop, [&](const Run<D>& run) {
    if (job.n > 1) return softmax_of_run(job, run);
    // One element: 1 unless it is NaN or infinite.
    const bool adjacent = run.x_stride == kItem && run.y_stride == kItem;
    for (int64_t r = 0; r < run.rows; r += adjacent ? run.rows : 1)
      Row<D>::map_elements(
          Contiguous<D>{run.x_row(r)}, run.y_row(r), adjacent ? run.rows : 1, job.streaming,
          [](V x) { return select(eq(x - x, V::set1(0)), V::set1(1), V::set1(T(NAN))); });
  });
}

}  // namespace
}  // namespace SOFTMAX_ISA
}  // namespace softmaxlib
