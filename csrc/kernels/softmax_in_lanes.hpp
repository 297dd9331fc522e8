// Not in the paper: rows of a few elements, as many at a time as a vector has lanes. Every lane is
// a row; columns are loaded and stored through transposes in registers.
#pragma once

#include "rows/batch.hpp"

namespace softmaxlib {
namespace SOFTMAX_ISA {
namespace {

constexpr int kMaxColumns = 64;

// The sums over columns e[0, n) of a group, n > 1, as Lanes (rows/sum.hpp) adds them up and folds.
template <class V>
struct GroupSums;

template <>
struct GroupSums<f32x16> {
  static SOFTMAXLIB_INLINE f32x16 reciprocals(const f32x16* e, int n) {
    InLanes<f32x16> sum;
    if (n <= 8) {
      sum = {fold([e](int i) { return widen_low(e[i]); }, n),
             fold([e](int i) { return widen_high(e[i]); }, n)};
    } else {
      f64x8 low[8], high[8];
      for (int l = 0; l < 8; ++l) {
        const f32x16 t = term(e + l, n - l);
        low[l] = widen_low(t);
        high[l] = widen_high(t);
        if (l + 8 < n) {
          const f32x16 u = term(e + l + 8, n - l - 8);
          low[l] = low[l] + widen_low(u);
          high[l] = high[l] + widen_high(u);
        }
      }
      sum = {fold([&](int i) { return low[i]; }, 8), fold([&](int i) { return high[i]; }, 8)};
    }
    return sum.map([](f64x8 s) { return f64x8::set1(1) / s; }).value();
  }

 private:
  static SOFTMAXLIB_INLINE f32x16 term(const f32x16* e, int left) {
    if (left <= 16) return e[0];
    if (left <= 32) return e[0] + e[16];
    return (e[0] + e[16]) + (left <= 48 ? e[32] : e[32] + e[48]);
  }
};

template <>
struct GroupSums<f64x8> {
  static SOFTMAXLIB_INLINE f64x8 reciprocals(const f64x8* e, int n) {
    EightTotals total = {e[0], f64x8::set1(0)};
    if (n > 8) total.sum = term(e, n);
    for (int l = 1; l < 8 && l < n; ++l) add(total, term(e + l, n - l));
    return reciprocal(total);
  }

 private:
  static SOFTMAXLIB_INLINE f64x8 term(const f64x8* e, int left) {
    if (left <= 8) return e[0];
    if (left <= 16) return e[0] + e[8];
    return (e[0] + e[8]) + (left <= 24 ? e[16] : e[16] + e[24]);
  }
};

// Groups of columns, all n at a time, in phases: one group's chain of maximum, exponentials, sum
// and reciprocal is too long to follow another's.
template <class V>
class Columns {
 public:
  using T = typename V::elem;

  explicit Columns(int n) : n_(n), pitch_(n < 4 ? 4 : n) {}
  int groups() const { return kMaxColumns / pitch_; }

  // Reads blocks of four columns; the last overlaps the one before.
  SOFTMAXLIB_INLINE void load(int group, const T* x, int64_t stride) {
    V* const to = e_ + group * pitch_;
    V block[4];
    load_columns(x, stride, block);
    V top = max(block[0], block[1]);
    if (n_ > 2) top = max(block[2], top);
    if (n_ > 3) top = max(block[3], top);
    for (int k = 0; k < 4; ++k) to[k] = block[k];
    for (int j = 4; j < n_; j += 4) {
      const int at = j + 4 <= n_ ? j : n_ - 4;
      load_columns(x + at, stride, block);
      for (int k = 0; k < 4; ++k) to[at + k] = block[k];
      top = max(max_of(block[0], block[1], block[2], block[3]), top);
    }
    scale_[group] = top;
  }
  // Turns arguments and maxima into exponentials and scales; false where a row needs more.
  SOFTMAXLIB_NOINLINE bool evaluate(int groups) {
    V references[kMaxColumns / 4], magic[kMaxColumns / 4], floor[kMaxColumns / 4];
    for (int g = 0; g < groups; ++g) {
      const InLanes<V> r = references_of(scale_[g]);
      const ExpInLanes<V> exp(r);
      references[g] = r.value();
      magic[g] = exp.magic();
      floor[g] = exp.floor();
    }
    const Exp<V> exp(0);
    for (int g = 0; g < groups; ++g) {
      V* const e = e_ + g * pitch_;
      const V m = magic[g], f = floor[g];
      int j = 0;
      for (; j + kInStep <= n_; j += kInStep) {
        V y[kInStep];
        exp.template evaluate<kInStep>(e + j, m, f, y);
        for (int k = 0; k < kInStep; ++k) e[j + k] = y[k];
      }
      for (; j < n_; ++j) e[j] = exp.evaluate(e[j], m, f);
    }
    bool good = true;
    for (int g = 0; g < groups; ++g) {
      scale_[g] = GroupSums<V>::reciprocals(e_ + g * pitch_, n_);
      good = good & all_usable(references[g], scale_[g]);
    }
    return good;
  }
  // Rows of less than four elements are written as four, so in ascending order.
  SOFTMAXLIB_INLINE void store(int group, T* y, int64_t stride) const {
    const V* const from = e_ + group * pitch_;
    const V by = scale_[group];
    for (int j = 0; j < n_; j += 4) {
      const int at = j + 4 <= n_ || n_ < 4 ? j : n_ - 4;
      V block[4];
      for (int k = 0; k < 4; ++k) block[k] = from[at + k] * by;
      store_columns(y + at, stride, block);
    }
  }

 private:
  int n_, pitch_;
  V e_[kMaxColumns];
  V scale_[kMaxColumns / 4];  // at first, the maximum
};

// x, row after row, as the kernel's own elements without gaps.
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

template <class D>
inline void softmax_of_run(const Job& job, const Run<D>& run) {
  using V = typename vector_of<D>::type;
  using T = typename V::elem;
  constexpr bool kPlain = sizeof(D) == sizeof(T);
  constexpr int64_t kItem = sizeof(D);
  constexpr int kLanes = V::lanes;
  const int n = static_cast<int>(job.n);
  const bool adjacent = run.y_stride == n * kItem;
  const bool direct = kPlain && !job.streaming && n >= 4 && run.y_stride % kItem == 0;
  const bool posts = adjacent && !direct;

  Columns<V> columns(n);
  Outbox<D> outbox(job.streaming);
  T copy[(kMaxColumns + 2) * kLanes];
  T* const results = copy + kLanes;
  if (posts) outbox.start(run.y_row(0));

  const int most = columns.groups() * kLanes;
  for (int64_t row = 0; row < run.rows; row += most) {
    const int64_t left = run.rows - row;
    const int rows = static_cast<int>(left < most ? left : most);
    const int groups = (rows + kLanes - 1) / kLanes;
    for (int64_t i = 0; i < rows * n * kItem; i += 64)
      prefetch(run.x + row * run.x_stride + kPrefetchBytes + i);
    // Blocks of four columns read into the next row where a row has less.
    if (kPlain && rows == groups * kLanes && run.x_stride % kItem == 0 && (n >= 4 || left > rows)) {
      if constexpr (kPlain)
        for (int g = 0; g < groups; ++g)
          columns.load(g, run.x_row(row + g * kLanes), run.x_stride / kItem);
    } else {
      gather_rows(run, row, rows, n, copy);
      for (int i = rows * n; i < groups * kLanes * n + 4; ++i) copy[i] = 0;
      for (int g = 0; g < groups; ++g) columns.load(g, copy + g * kLanes * n, n);
    }
    if (!columns.evaluate(groups)) {
      if (posts) outbox.finish();
      softmax_alone(job, run, row, rows);
      if (posts) outbox.start(run.y_row(row + rows));
      continue;
    }
    if (direct && rows == groups * kLanes) {
      if constexpr (kPlain)
        for (int g = 0; g < groups; ++g)
          columns.store(g, run.y_row(row + g * kLanes), run.y_stride / kItem);
      continue;
    }
    for (int g = 0; g < groups; ++g) columns.store(g, results + g * kLanes * n, n);
    if (posts) {
      outbox.put(results, rows * n, [](V v) { return v; });
      continue;
    }
    for (int r = 0; r < rows; ++r)
      for (int j = 0; j < n; j += kLanes)
        store_n(run.y_row(row + r) + j, SOFTMAX_ISA::load(results + r * n + j),
                n - j < kLanes ? n - j : kLanes);
  }
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
