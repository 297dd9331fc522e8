// Rows of up to a group, as many at a time as a vector has lanes: every lane is a row, so that a
// row's maximum, sum and logarithm take no shuffles. Rows that are contiguous are transposed on
// their way in and out; those along an axis that is not the last lie across vectors already. What
// is computed of a row is one of the kinds of kernels/batch.hpp, with the bits of rows/sum.hpp.
#pragma once

#include "kernels/batch.hpp"

namespace softmaxlib {
namespace SOFTMAX_ISA {
namespace {

// Columns of several groups of rows, all n of each: column j of a group holds element j of its
// rows. The groups go through the phases one after the other: the chain of a single group's
// maximum, exponentials, sum and reciprocal would be too long.
template <class P, class X>
class LaneGroups {
 public:
  using V = typename P::V;
  using T = typename V::elem;
  using F = typename P::F;
  static constexpr int kLanes = V::lanes;
  static constexpr bool kLow = sizeof(X) > sizeof(V);
  static constexpr int kMost = kLow ? 96 : 128;  // columns, a part of the first level cache

  // counts: a row may see but one of its elements, which takes all.
  LaneGroups(int n, bool counts)
      : n_(n), pitch_((n + 3) / 4 * 4), counts_(P::kOneIsOne && n > 1 && counts) {}

  int groups() const { return kMost / pitch_; }

  // What the rows of a run need beside their elements.
  void begin(const RowRun& run, int rows) {
    for (int g = 0; g * kLanes < rows; ++g)
      of_[g].begin(run, g * kLanes, rows - g * kLanes < kLanes ? rows - g * kLanes : kLanes);
  }

  // Element j of a group's rows.
  SOFTMAXLIB_INLINE void set(int group, int j, V x) { store(column(hi_, group, j), x); }
  SOFTMAXLIB_INLINE void set(int group, int j, Pair<V> x) {
    store(column(hi_, group, j), x.hi);
    store(column(lo_, group, j), x.lo);
  }
  // All elements of a group's rows, `stride` apart; of less than four, up to three beyond are read.
  SOFTMAXLIB_INLINE void load_rows(int group, const T* x, const T* low, int64_t stride) {
    transpose(hi_, group, x, stride);
    if constexpr (kLow)
      if (low) transpose(lo_, group, low, stride);
  }
  // Elements become arguments: times a factor per row, as combine() of rows/stage.hpp has it. False
  // where that is not enough for one.
  bool scale(int group, Pair<V> factor) {
    const V none = V::set1(static_cast<T>(-INFINITY)), zero = V::set1(0);
    const V limit = V::set1(static_cast<T>(kLargestLow<V>));
    V bad = zero;
    for (int j = 0; j < n_; ++j) {
      const V x = load(column(hi_, group, j)), hi = x * factor.hi;
      V lo = fma(x, factor.lo, fma(x, factor.hi, zero - hi));
      lo = select(eq(x, none), zero, lo);
      bad = select(gt(limit, max(lo, zero - lo)), bad, limit);
      set(group, j, Pair<V>{hi, lo});
    }
    return !any(gt(bad, zero));
  }

  // From arguments to sums and what follows from them. Meanwhile x is prefetched, `step` bytes per
  // column. False where some row has to be computed alone.
  SOFTMAXLIB_NOINLINE bool evaluate(int groups, const char* ahead, int64_t step) {
    const F f(0);
    V seen[kMost / 4];  // how many elements are not -inf
    for (int g = 0; g < groups; ++g) start(g);
    for (int g = 0; counts_ && g < groups; ++g) seen[g] = count(g);
    if constexpr (!P::kHolds)
      for (int g = 0; g < groups; ++g)
        for (int j = 0; j < n_; j += 4) {
          X x[4];
          V t[4];
          const int some = n_ - j < 4 ? n_ - j : 4;
          for (int k = 0; k < some; ++k, ahead += step) {
            prefetch(ahead);
            x[k] = argument(g, j + k);
          }
          evaluate(f, x, some, g, t);
          for (int k = 0; k < some; ++k) store(column(hi_, g, j + k), t[k]);
        }
    bool good = true;
    for (int g = 0; g < groups; ++g) {
      bool(&alone)[kLanes] = alone_[g];
      for (bool& a : alone) a = false;
      if constexpr (P::kHolds) {
        for (int j = 0; j < n_; ++j, ahead += step) prefetch(ahead);
        finish_held(f, g);
      } else {
        const BatchSums<V> sums = sum_of_terms(column(hi_, g, 0));
        of_[g].finish(with_reference(sums, g), alone);
        if constexpr (P::kOneIsOne)
          if (counts_ && any(eq(seen[g], V::set1(1)))) check_ones(g, seen[g]);
      }
      for (const bool a : alone) good &= !a;
    }
    return good;
  }
  // Of a row of one element, which p times the rounded 1 / p need not be.
  void set_to_one(int group) {
    store(hi_ + group * pitch_ * kLanes, V::set1(1));
    store(of_[group].scale, V::set1(1));
  }
  bool is_alone(int row) const { return alone_[row / kLanes][row % kLanes]; }

  // Result j of a group's rows.
  SOFTMAXLIB_INLINE V result(int group, int j) const {
    if constexpr (P::kHolds) return of_[group].results(argument(group, j), j);
    else return load(column(hi_, group, j)) * load(of_[group].scale);
  }
  // All of them. Of rows of less than four, up to three beyond are written, in order.
  SOFTMAXLIB_INLINE void store_rows(int group, T* y, int64_t stride) const {
    int j = 0;
    for (; j + 8 <= n_; j += 8) store_block<8>(group, j, y, stride);
    for (; j + 4 <= n_; j += 4) store_block<4>(group, j, y, stride);
    if (j < n_) store_block<4>(group, n_ < 4 ? 0 : n_ - 4, y, stride);
  }

 private:
  T* column(T* of, int group, int j) const { return of + (group * pitch_ + j) * kLanes; }
  const T* column(const T* of, int group, int j) const {
    return of + (group * pitch_ + j) * kLanes;
  }
  SOFTMAXLIB_INLINE void argument_of(int group, int j, V& x) const {
    x = load(column(hi_, group, j));
  }
  SOFTMAXLIB_INLINE void argument_of(int group, int j, Pair<V>& x) const {
    x = {load(column(hi_, group, j)), load(column(lo_, group, j))};
  }
  SOFTMAXLIB_INLINE X argument(int group, int j) const {
    X x;
    argument_of(group, j, x);
    return x;
  }

  SOFTMAXLIB_INLINE void transpose(T* to, int group, const T* x, int64_t stride) {
    int j = 0;
    for (; j + 8 <= n_; j += 8) load_block<8>(column(to, group, j), x + j, stride, 8);
    for (; j + 4 <= n_; j += 4) load_block<4>(column(to, group, j), x + j, stride, 4);
    if (j == n_) return;
    if (n_ < 4) load_block<4>(column(to, group, 0), x, stride, 4);
    else load_block<4>(column(to, group, n_ - 4), x + n_ - 4, stride, 4);
  }
  template <int kColumns>
  static SOFTMAXLIB_INLINE void load_block(T* to, const T* x, int64_t stride, int count) {
    V block[kColumns];
    load_columns(x, stride, block);
    for (int k = 0; k < count; ++k) store(to + k * kLanes, block[k]);
  }
  template <int kColumns>
  SOFTMAXLIB_INLINE void store_block(int group, int j, T* y, int64_t stride) const {
    V block[kColumns];
    for (int k = 0; k < kColumns; ++k) block[k] = result(group, j + k);
    store_columns(y + j, stride, block);
  }

  // A row that sees one element, which then is 1: whether others are -inf or not seen is for it to
  // say where p times the rounded 1 / p is not.
  SOFTMAXLIB_NOINLINE void check_ones(int g, V seen) {
    V top = V::set1(0);
    for (int j = 0; j < n_; ++j) top = max(top, result(g, j));
    T counts[kLanes], largest[kLanes];
    store(counts, seen);
    store(largest, top);
    for (int i = 0; i < kLanes; ++i) alone_[g][i] |= counts[i] == 1 && largest[i] != 1;
  }

  SOFTMAXLIB_INLINE V count(int g) const {
    V seen = V::set1(0);
    for (int j = 0; j < n_; ++j)
      seen = seen + select(eq(load(column(hi_, g, j)), V::set1(static_cast<T>(-INFINITY))),
                           V::set1(0), V::set1(1));
    return seen;
  }

  // The references of a group, from the maxima of its rows.
  SOFTMAXLIB_INLINE void start(int g) {
    if constexpr (F::kFollows) {
      V a = V::set1(static_cast<T>(-INFINITY)), b = a;
      int j = 0;
      for (; j + 2 <= n_; j += 2) {
        a = max(load(column(hi_, g, j)), a);
        b = max(load(column(hi_, g, j + 1)), b);
      }
      if (j < n_) a = max(load(column(hi_, g, j)), a);
      const V references = references_of(max(a, b)).value();
      const ExpInLanes<V, F> exp(references);
      store(reference_[g], references);
      store(magic_[g], exp.magic());
      store(floor_[g], exp.floor());
    }
  }
  BatchSums<V> with_reference(BatchSums<V> sums, int g) const {
    sums.reference = F::kFollows ? load(reference_[g]) : V::set1(0);
    return sums;
  }
  SOFTMAXLIB_INLINE void evaluate(const F& f, const X* x, int some, int g, V* t) const {
    if constexpr (F::kFollows) evaluate_up_to_four(f, x, some, load(magic_[g]), load(floor_[g]), t);
    else evaluate_up_to_four(f, x, some, V::set1(0), V::set1(0), t);
  }

  // Terms of a whole row, a vector each, as Lanes adds them up and folds them into a Total.
  static void fold(const InLanes<f32x16> (&lane)[8], BatchSums<f32x16>& sums) {
    sums.sum = fold_eight(lane);
  }
  static void fold(const InLanes<f64x8> (&lane)[8], BatchSums<f64x8>& sums) {
    sums.sum = lane[0];
    for (int i = 1; i < 8; ++i) two_sum(sums.sum.all, sums.error.all, lane[i].all);
  }
  BatchSums<V> sum_of_terms(const T* terms) const {
    BatchSums<V> sums = {in_all(0, V()), in_all(0, V()), V::set1(0)};
    InLanes<V> lane[8];
    for (int i = 0; i < 8; ++i) lane[i] = i < n_ ? lane_of(terms, i) : in_all(0, V());
    fold(lane, sums);
    return sums;
  }
  SOFTMAXLIB_INLINE InLanes<V> lane_of(const T* terms, int i) const {
    const auto at = [&](int j) SOFTMAXLIB_INLINE_LAMBDA { return load(terms + j * kLanes); };
    if constexpr (F::kWide) {  // terms are added in double
      const auto some = [&](int j) SOFTMAXLIB_INLINE_LAMBDA {
        return j < n_ ? InLanes<V>::of(at(j)) : in_all(0, V());
      };
      const auto wide = [&](int j) SOFTMAXLIB_INLINE_LAMBDA {
        return j + kLanes / 2 < n_ ? some(j) + some(j + kLanes / 2) : some(j);
      };
      return (wide(i) + wide(i + kLanes)) + (wide(i + 2 * kLanes) + wide(i + 3 * kLanes));
    } else {
      const auto four = [&](int j) SOFTMAXLIB_INLINE_LAMBDA {
        V sum = at(j);
        if (j + kLanes < n_) sum = sum + at(j + kLanes);
        if (j + 3 * kLanes < n_) return sum + (at(j + 2 * kLanes) + at(j + 3 * kLanes));
        return j + 2 * kLanes < n_ ? sum + at(j + 2 * kLanes) : sum;
      };
      if (kLanes == 8 || i + kLanes / 2 >= n_) return InLanes<V>::of(four(i));
      return InLanes<V>::of(four(i)) + InLanes<V>::of(four(i + kLanes / 2));
    }
  }

  // Sums with the largest element held out: each virtual lane of a row, which are elements so many
  // after each other, holds its largest argument, and the largest of all stays out of the sum.
  void finish_held(const F& f, int g) {
    const int lanes = n_ < kLanes ? n_ : kLanes;
    X held[kLanes];
    alignas(64) T terms[kLanes * kLanes];
    V invalid = V::set1(0);  // a NaN is summed, not held
    for (int i = 0; i < lanes; ++i) {
      X none;
      from_pair(Pair<V>{V::set1(static_cast<T>(-INFINITY)), V::set1(0)}, none);
      const X x = argument(g, i);
      invalid = select(eq(high(x), high(x)), invalid, high(x));
      hold(none, x);
      held[i] = none;
    }
    for (int i = 0; i < lanes && i + kLanes < n_; i += 4) {
      V t[3][4];
      for (int q = 0; q < 3; ++q) {
        const int from = i + (q + 1) * kLanes, some = n_ - from < 4 ? n_ - from : 4;
        X x[4];
        for (int k = 0; k < some; ++k) x[k] = hold(held[i + k], argument(g, from + k));
        if (some > 0) evaluate(f, x, some, g, t[q]);
        for (int k = some > 0 ? some : 0; k < 4; ++k) t[q][k] = V::set1(0);
      }
      for (int k = 0; k < 4; ++k) store(terms + (i + k) * kLanes, t[0][k] + (t[1][k] + t[2][k]));
    }
    BatchSums<V> sums = {in_all(0, V()), in_all(0, V()), load(reference_[g])};
    if (n_ > kLanes) sums = summed(terms, n_ - kLanes < kLanes ? n_ - kLanes : kLanes, sums);
    const BatchHeld<V> top(f, held, lanes, load(magic_[g]), load(floor_[g]));
    two_sum(sums.sum, sums.error, top.others);
    sums.sum = sums.sum + InLanes<V>::of(invalid);
    if constexpr (P::kTargets) {
      const auto element = [&](int r, int64_t j) SOFTMAXLIB_INLINE_LAMBDA {
        const int column = static_cast<int>(j);
        return Pair<T>{this->column(hi_, g, column)[r],
                       kLow ? this->column(lo_, g, column)[r] : T(0)};
      };
      of_[g].finish(sums, top, alone_[g], element);
    } else {
      of_[g].finish(sums, top, alone_[g]);
    }
  }
  static BatchSums<f32x16> summed(const float* lanes, int count, BatchSums<f32x16> sums) {
    sums.sum = fold_lanes<f32x16>(lanes, count);
    return sums;
  }
  static BatchSums<f64x8> summed(const double* lanes, int count, BatchSums<f64x8> sums) {
    for (int i = 0; i < count; ++i) two_sum(sums.sum.all, sums.error.all, load(lanes + i * 8));
    return sums;
  }

  const int n_, pitch_;
  const bool counts_;
  alignas(64) T hi_[kMost * kLanes];
  alignas(64) T lo_[kLow ? kMost * kLanes : 1];
  alignas(64) T reference_[kMost / 4][kLanes], magic_[kMost / 4][kLanes];
  alignas(64) T floor_[kMost / 4][kLanes];
  bool alone_[kMost / 4][kLanes];
  P of_[kMost / 4];
};

template <class P, class X>
inline void run_in_lanes(const Job& job, int64_t row, int64_t stop,
                         void (*alone)(const Job& job, int64_t row)) {
  using V = typename P::V;
  using T = typename V::elem;
  using Groups = LaneGroups<P, X>;
  constexpr bool kLow = Groups::kLow;
  constexpr int kLanes = V::lanes, kRoom = Groups::kMost * kLanes;
  constexpr int64_t kItem = sizeof(T);
  const int n = static_cast<int>(job.n);
  const int64_t pitch = (n + kLanes - 1) / kLanes * kLanes;
  const Access in(job, kX), out(job, kOut);
  // Rows with options, or an end of their own, go through the stager.
  const bool only_scaled = kLow && !job.base[kBias] && !job.base[kWhere] && !job.base[kSlope];
  const bool as_they_are = (!kLow || only_scaled) && !job.causal;
  const bool plain_x = in.along && in.item == kItem && as_they_are;

  Groups groups(n, (kLow && !only_scaled) || job.causal);
  Stager<V> stager(job);
  Sender<V> sender(job);
  // Rows on their way in, and results on their way out: those of a batch wait while the next is
  // computed, since what was just stored cannot be loaded in other pieces at once.
  alignas(64) T room[kLow ? 2 : 1][kRoom + 2 * kLanes];
  alignas(64) T buffers[2][kRoom + 2 * kLanes];
  T *results = buffers[0] + kLanes, *before = buffers[1] + kLanes;
  char* waiting_for = nullptr;
  int64_t waiting = 0;
  const auto flush = [&] {
    if (waiting) sender.put_adjacent(waiting_for, before, waiting);
    waiting = 0;
  };

  for (RowRun run(job, row); row < stop;) {
    const bool even = stager.is_even(run);
    int rows = groups.groups() * kLanes;
    if (!even && rows * pitch > kRoom) rows = static_cast<int>(kRoom / pitch) / kLanes * kLanes;
    if (rows > run.rows) rows = static_cast<int>(run.rows);
    if (rows > stop - row) rows = static_cast<int>(stop - row);
    const int count = (rows + kLanes - 1) / kLanes;
    const bool whole = rows == count * kLanes;
    const char* const x = job.base[kX] + run.place.offset[kX];
    char* const y = job.base[kOut] + run.place.offset[kOut];
    const int64_t x_step = run.step.stride[kX], y_step = run.step.stride[kOut];
    const char* ahead = x;
    int64_t ahead_step = 0;
    T *const hi = room[0] + kLanes, *const lo = room[kLow] + kLanes;
    const auto transpose = [&](int64_t between, const T* low) {
      for (int64_t i = rows * between; i < count * kLanes * between + 4; ++i) hi[i] = lo[i] = 0;
      for (int g = 0; g < count; ++g)
        groups.load_rows(g, hi + g * kLanes * between, low ? low + g * kLanes * between : nullptr,
                         between);
    };
    const auto stage = [&] {
      if (even) stager.fetch_even(run, rows, hi, lo, nullptr);
      else stager.fetch(run, rows, hi, lo, pitch, nullptr);
      transpose(even ? n : pitch, lo);
    };
    bool is_staged = true;
    if (in.across && as_they_are) {
      is_staged = !only_scaled;
      const int64_t stride = job.inner[0].stride[kX];
      for (int g = 0; g < count; ++g) {
        const char* p = x + g * kLanes * in.item;
        const int in_group = rows - g * kLanes < kLanes ? rows - g * kLanes : kLanes;
        for (int j = 0; j < n; ++j, p += stride)
          groups.set(g, j, load_some(job.dtype[kX], p, in_group, V()));
      }
    } else if (kLow && stager.is_across(run)) {
      if constexpr (kLow) {
        Terms<V> terms = stager.terms_across(run);
        for (int g = 0; g < count; ++g) {
          const int in_group = rows - g * kLanes < kLanes ? rows - g * kLanes : kLanes;
          for (int j = 0; j < n; ++j)
            groups.set(g, j, stager.across(run, terms, g * kLanes, in_group, j));
        }
      }
    } else if (plain_x && whole && x_step % kItem == 0 &&
               (n >= 4 || (x_step == n * kItem && rows < run.rows))) {
      // A block of a row of less than four reaches into the next row.
      is_staged = !only_scaled;
      for (int g = 0; g < count; ++g)
        groups.load_rows(g, reinterpret_cast<const T*>(x + g * kLanes * x_step), nullptr,
                         x_step / kItem);
      ahead = x + kBatchPrefetchBytes;
      ahead_step = kLanes * kItem;
    } else if (only_scaled && as_they_are && in.fits) {
      is_staged = false;
      transpose(stager.fetch_elements(run, rows, hi, pitch), nullptr);
    } else {
      stage();
    }
    if constexpr (kLow) {
      for (int g = 0; !is_staged && g < count; ++g) {
        Pair<V> factor;
        const int in_group = rows - g * kLanes < kLanes ? rows - g * kLanes : kLanes;
        if (!stager.factors(run, g * kLanes, in_group, factor) || !groups.scale(g, factor)) {
          stage();
          is_staged = true;
        }
      }
    }
    if constexpr (P::kTargets) groups.begin(run, rows);
    const bool good = groups.evaluate(count, ahead, ahead_step);
    if constexpr (P::kOneIsOne)
      for (int g = 0; n == 1 && g < count; ++g) groups.set_to_one(g);

    if constexpr (P::kReduces) {
      for (int r = 0; !good && r < rows; ++r)
        if (groups.is_alone(r)) alone(job, row + r);
    } else if (good && out.across) {
      sender.put_columns(
          y, rows, [&](int g, int j) SOFTMAXLIB_INLINE_LAMBDA { return groups.result(g, j); });
    } else if (good && whole && n >= 4 && !job.streaming && out.along && out.item == kItem &&
               y_step % kItem == 0) {
      for (int g = 0; g < count; ++g)
        groups.store_rows(g, reinterpret_cast<T*>(y + g * kLanes * y_step), y_step / kItem);
    } else {
      for (int g = 0; g < count; ++g) groups.store_rows(g, results + g * kLanes * n, n);
      flush();
      if (good && out.along && y_step == n * out.item) {
        waiting = rows * n;
        waiting_for = y;
        T* const free = before;
        before = results;
        results = free;
      } else {
        for (int r = 0; r < rows; ++r) {
          if (groups.is_alone(r)) {
            sender.finish();
            alone(job, row + r);
          } else {
            sender.put(y + r * y_step, results + r * n, 1);
          }
        }
      }
    }
    row += rows;
    run.advance(rows);
  }
  flush();
  sender.finish();
}

template <class P>
inline void run_any_in_lanes(const Job& job, int64_t start, int64_t stop,
                             void (*alone)(const Job& job, int64_t row)) {
  using V = typename P::V;
  if (job.elements_of_x) run_in_lanes<P, V>(job, start, stop, alone);
  else run_in_lanes<P, Pair<V>>(job, start, stop, alone);
}

// Whether calls that have no schedule of their own compute rows many at a time, and how.
enum class Many { kNo, kInLanes, kBatched };
inline Many many_rows(const Job& job, int lanes) {
  constexpr int64_t kShare = 8;  // as rows/schedule.cpp has it
  if (job.n == 0 || job.n > kVectorsPerChunk * lanes) return Many::kNo;
  return job.n < kVectorsPerGroup * lanes && job.rows * kShare >= job.n ? Many::kInLanes
                                                                        : Many::kBatched;
}
template <class Kind>
inline bool run_many(const Job& job, int64_t start, int64_t stop, char* scratch,
                     void (*alone)(const Job& job, int64_t row)) {
  if constexpr (kHasManyRows) {
    const Many many = many_rows(job, Kind::V::lanes);
    if (many == Many::kInLanes) run_any_in_lanes<Kind>(job, start, stop, alone);
    if (many == Many::kBatched) run_any_batches<Kind>(job, start, stop, scratch, alone);
    return many != Many::kNo;
  }
  return false;
}

// Each function in batches and in lanes.

template <class D>
inline void softmax_alone(const Job& job, int64_t row) {
  compute_alone<D>(job, row, [](const Row<D>& r) { run_softmax(r, softmax_two_pass<D>); }, 0);
}
template <class D>
inline void log_softmax_alone(const Job& job, int64_t row) {
  compute_alone<D>(job, row, log_softmax_two_pass<D>, -INFINITY);
}
template <class D>
inline void logsumexp_alone(const Job& job, int64_t row) {
  compute_alone<D>(job, row, logsumexp_two_pass<D>, 0);
}
template <class D>
inline void stablemax_alone(const Job& job, int64_t row) {
  compute_alone<D>(job, row, stablemax_two_pass<D>, 0);
}

#define SOFTMAXLIB_MANY_ROWS(function, Kind)                                                   \
  template <class D>                                                                           \
  inline void function##_batched(const Job& job, int64_t start, int64_t stop, char* scratch) { \
    run_any_batches<Kind<typename vector_of<D>::type>>(                                        \
        job, start, stop, scratch, function##_alone<typename vector_of<D>::type::elem>);       \
  }                                                                                            \
  template <class D>                                                                           \
  inline void function##_in_lanes(const Job& job, int64_t start, int64_t stop, char*) {        \
    run_any_in_lanes<Kind<typename vector_of<D>::type>>(                                       \
        job, start, stop, function##_alone<typename vector_of<D>::type::elem>);                \
  }
SOFTMAXLIB_MANY_ROWS(softmax, BatchOfSoftmax)
SOFTMAXLIB_MANY_ROWS(log_softmax, BatchOfLogSoftmax)
SOFTMAXLIB_MANY_ROWS(logsumexp, BatchOfLogSums)
SOFTMAXLIB_MANY_ROWS(stablemax, BatchOfStablemax)
#undef SOFTMAXLIB_MANY_ROWS

}  // namespace
}  // namespace SOFTMAX_ISA
}  // namespace softmaxlib
