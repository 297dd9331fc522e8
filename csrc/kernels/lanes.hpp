// Rows of up to a group, as many at a time as a vector has lanes: every lane is a row, so that a
// row's maximum, sum and logarithm take no shuffles. Rows that are contiguous are transposed on
// their way in and out; those along an axis that is not the last lie across vectors already. What
// is computed of a row is one of kernels/kinds.hpp.
#pragma once

#include "kernels/lane_groups.hpp"

namespace softmaxlib {
namespace SOFTMAX_ISA {
namespace {

// Rows that lie side by side: vectors across them are read where they are. The groups of a batch
// may come from several runs.
template <class P, class X>
class LanesAcross {
 public:
  // Whether all operands of elements lie so.
  static bool takes(const Job& job) {
    if (!Access(job, kX).across || job.causal) return false;
    return !kLow || is_only_scaled(job) || Stager<V>(job).is_across(RowRun(job, 0));
  }

  explicit LanesAcross(const Job& job)
      : job_(job),
        x_(job, kX),
        out_(job, kOut),
        columns_apart_(job.inner[0].stride[kX] / kItem),
        in_place_(x_.item == kItem && job.inner[0].stride[kX] % kItem == 0),
        is_scaled_(kLow && is_only_scaled(job)),
        groups_(static_cast<int>(job.n), kLow && !is_scaled_),
        stager_(job),
        sender_(job) {}

  // The steps of a group wait for each other, so those of its neighbours come between them.
  void compute(int64_t row, int64_t stop, void (*alone)(const Job& job, int64_t row)) {
    const auto slot = [](int64_t v) { return static_cast<int>(v % kSlots); };
    const int64_t width = kLinesAhead / job_.n > 16 ? kLinesAhead / job_.n : 16;
    Cursor now(job_, row);
    LinesAhead ahead;
    int64_t filled = 0;
    for (int64_t v = 0; v < filled + 3 || row < stop; ++v) {
      if (row < stop) {
        if (v % width == 0) ahead = ahead_of(now, width);
        row += fill(slot(v), now, row, stop);
        ++filled;
        groups_.start(slot(v));
      }
      if (v >= 1 && v - 1 < filled) groups_.make_terms(slot(v - 1), ahead);
      if (v >= 2 && v - 2 < filled) strips_[slot(v - 2)].is_good = groups_.finish(slot(v - 2));
      if (v >= 3) put(slot(v - 3), alone);
    }
    sender_.finish();
  }

 private:
  using V = typename P::V;
  using T = typename V::elem;
  using Groups = LaneGroups<P, X>;
  static constexpr bool kLow = Groups::kLow;
  static constexpr int kLanes = V::lanes;
  static constexpr int64_t kItem = sizeof(T);
  static constexpr int kSlots = Groups::kSlots;  // of groups under way
  static constexpr int64_t kLinesAhead = 512;

  // Where rows are: in a run, `left` from its end.
  struct Cursor {
    RowRun run;
    int64_t left;
    const char* x;
    char* y;

    Cursor(const Job& job, int64_t row) : run(job, row) { begin(); }
    int first() const { return static_cast<int>(run.rows - left); }
    SOFTMAXLIB_INLINE void skip(int64_t rows) {
      left -= rows;
      x += rows * run.step.stride[kX];
      y += rows * run.step.stride[kOut];
      if (left > 0) return;
      run.advance(run.rows);
      begin();
    }

   private:
    void begin() {
      left = run.rows;
      x = run.job.base[kX] + run.place.offset[kX];
      y = run.job.base[kOut] + run.place.offset[kOut];
    }
  };

  // A group's rows, and where their results go.
  struct Strip {
    int64_t row;
    char* y;
    int rows;
    bool is_usual, is_good;
  };

  // Returns how many rows it is.
  SOFTMAXLIB_INLINE int64_t fill(int g, Cursor& now, int64_t row, int64_t stop) {
    int64_t rows = now.left < stop - row ? now.left : stop - row;
    if (rows > kLanes) rows = kLanes;
    strips_[g] = {row, now.y, static_cast<int>(rows), true, true};
    if constexpr (P::kTargets) groups_.begin(g, now.run, now.first(), static_cast<int>(rows));
    if (!kLow && rows == kLanes && in_place_)
      groups_.read_from(g, reinterpret_cast<const T*>(now.x), columns_apart_);
    else fetch(g, now, static_cast<int>(rows));
    now.skip(rows);
    return rows;
  }
  SOFTMAXLIB_NOINLINE void fetch(int g, const Cursor& at, int rows) {
    const int n = static_cast<int>(job_.n);
    if constexpr (kLow) {
      if (!is_scaled_) {
        Terms<V> terms = stager_.terms_across(at.run);
        for (int j = 0; j < n; ++j)
          groups_.set(g, j, stager_.across(at.run, terms, at.first(), rows, j));
        return;
      }
    }
    const char* x = at.x;
    T* const to = groups_.columns(g);
    for (int j = 0; j < n; ++j, x += job_.inner[0].stride[kX])
      store(to + j * kLanes, load_some(job_.dtype[kX], x, rows, V()));
    if constexpr (kLow) {
      Pair<V> factor;
      strips_[g].is_usual =
          stager_.factors(at.run, at.first(), rows, factor) && groups_.scale(g, factor);
    }
  }

  // Of the groups behind the next `width`.
  LinesAhead ahead_of(const Cursor& next, int64_t width) const {
    const int64_t line = kLanes * x_.item;
    return {next.x + width * line, line, job_.inner[0].stride[kX] - width * line, width, 0};
  }
  SOFTMAXLIB_INLINE void put(int g, void (*alone)(const Job& job, int64_t row)) {
    const Strip& strip = strips_[g];
    if (SOFTMAXLIB_UNLIKELY(!(strip.is_good && strip.is_usual))) return put_each(g, alone);
    if constexpr (!P::kReduces) {
      if (!out_.across) return put_each(g, alone);
      sender_.put_strip(strip.y, strip.rows, groups_.results(g));
    }
  }
  SOFTMAXLIB_NOINLINE void put_each(int g, void (*alone)(const Job& job, int64_t row)) {
    const Strip& strip = strips_[g];
    const auto is_alone = [&](int r) {
      return !strip.is_usual || groups_.is_alone(g * kLanes + r);
    };
    for (int r = 0; r < strip.rows; ++r)
      if (is_alone(r)) alone(job_, strip.row + r);
    if constexpr (!P::kReduces) {
      alignas(64) T results[(kVectorsPerGroup * kLanes + 2) * kLanes];
      groups_.store_rows(g, results + kLanes, job_.n);
      const int64_t step = job_.outer[job_.outer_ndim - 1].stride[kOut];
      for (int r = 0; r < strip.rows; ++r)
        if (!is_alone(r)) sender_.put(strip.y + r * step, results + kLanes + r * job_.n, 1);
    }
  }

  const Job& job_;
  const Access x_, out_;
  const int64_t columns_apart_;
  const bool in_place_, is_scaled_;
  Groups groups_;
  Stager<V> stager_;
  Sender<V> sender_;
  Strip strips_[kSlots];
};

// Rows that are contiguous, or lie anyhow.
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
  const bool only_scaled = kLow && is_only_scaled(job);
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
    const char* ahead = nullptr;
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
    if (plain_x && whole && x_step % kItem == 0 &&
        (n >= 4 || (x_step == n * kItem && rows < run.rows))) {
      // A block of a row of less than four reaches into the next row.
      is_staged = !only_scaled;
      for (int g = 0; g < count; ++g)
        groups.load_rows(g, reinterpret_cast<const T*>(x + g * kLanes * x_step), nullptr,
                         x_step / kItem);
      ahead = x + kBatchPrefetchBytes;
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
    if constexpr (P::kTargets)
      for (int g = 0; g < count; ++g)
        groups.begin(g, run, g * kLanes, rows - g * kLanes < kLanes ? rows - g * kLanes : kLanes);
    const bool good = groups.evaluate(count, LinesAhead{ahead, kLanes * kItem});

    if constexpr (P::kReduces) {
      for (int r = 0; !good && r < rows; ++r)
        if (groups.is_alone(r)) alone(job, row + r);
    } else if (good && out.across) {
      for (int g = 0; g < count; ++g)
        sender.put_strip(y + g * kLanes * y_step,
                         rows - g * kLanes < kLanes ? rows - g * kLanes : kLanes,
                         groups.results(g));
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
  const auto run = [&](auto argument) {
    using X = decltype(argument);
    if (LanesAcross<P, X>::takes(job)) LanesAcross<P, X>(job).compute(start, stop, alone);
    else run_in_lanes<P, X>(job, start, stop, alone);
  };
  if (job.elements_of_x) run(V());
  else run(Pair<V>());
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
inline void log_stablemax_alone(const Job& job, int64_t row) {
  compute_alone<D>(job, row, log_stablemax_two_pass<D>, -INFINITY);
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
SOFTMAXLIB_MANY_ROWS(log_stablemax, BatchOfLogStablemax)
#undef SOFTMAXLIB_MANY_ROWS

}  // namespace
}  // namespace SOFTMAX_ISA
}  // namespace softmaxlib
