// Rows of up to a group, as many at a time as a vector has lanes: every lane is a row, so that a
// row's maximum, sum and logarithm take no shuffles. Rows that are contiguous are transposed on
// their way in and out; those along an axis that is not the last lie across vectors already, and of
// logarithms may have several groups. What is computed of a row is one of kernels/kinds.hpp.
#pragma once

#include "isa/kernels/columns.hpp"
#include "isa/kernels/single.hpp"

namespace softmaxlib {
namespace SOFTMAX_ISA {
namespace {

// The rows of a run from `first` on to a group, by way of rows.
template <class V>
SOFTMAXLIB_NOINLINE void fetch_rows(Stager<V>& stager, RowRun run, int first, int rows,
                                    LaneColumns<V, true>& to, int g) {
  constexpr int kPitch = kVectorsPerGroup * V::lanes;
  alignas(64) typename V::elem hi[(V::lanes + 1) * kPitch], lo[(V::lanes + 1) * kPitch];
  run.advance(first);
  stager.fetch(run, rows, hi, lo, kPitch, nullptr);
  to.load_rows(g, hi, lo, kPitch);
}

// The same of rows that lie side by side.
template <class V, bool kLow>
SOFTMAXLIB_NOINLINE void fetch_across(const Job& job, Stager<V>& stager, const RowRun& run,
                                      int first, int rows, LaneColumns<V, kLow>& to, int g) {
  const int n = static_cast<int>(job.n);
  auto* const hi = to.columns(g);
  if constexpr (kLow) {
    Pair<V> factor;
    const bool usual = !job.base[kScale] || stager.factors(run, first, rows, factor);
    if (!usual || !stager.fetch_strip(run, factor, first, rows, 0, n, hi, to.low_columns(g)))
      fetch_rows(stager, run, first, rows, to, g);
  } else {
    const char* const x = job.base[kX] + run.place.offset[kX] + first * run.step.stride[kX];
    stager.x().convert(x, rows, hi, n, job.inner[0].stride[kX], V::lanes);
  }
}

// Rows that lie side by side: vectors across them are read where they are. Groups may come from
// several runs.
template <class V, bool kLow>
class LanesAcross {
 public:
  // Whether all operands of elements lie so.
  static bool takes(const Job& job) {
    if (!Access(job, kX).across || job.causal) return false;
    return !kLow || Stager<V>(job).is_across(RowRun(job, 0));
  }

  LanesAcross(const Job& job, Groups<V, kLow>& groups)
      : job_(job),
        x_(job, kX),
        out_(job, kOut),
        columns_apart_(job.inner[0].stride[kX] / kItem),
        where_apart_(job.outer[job.outer_ndim - 1].stride[kWhere]),
        is_long_(job.n > kVectorsPerGroup * kLanes),
        fits_(job.n <= kGroupsInTile * kVectorsPerGroup * kLanes),
        in_place_(
            x_.item == kItem && job.inner[0].stride[kX] % kItem == 0 &&
            (is_long_ || !groups.kind.holds || groups.kind.reduces || !crowd_each_other(job))),
        // Columns at the same place of their pages would take each other's place in cache.
        fetches_y_(!groups.kind.reduces && out_.across && !job.in_place && !job.streaming &&
                   (job.n <= 16 || job.inner[0].stride[kOut] % 4096)),
        streams_(job.streaming && out_.across && out_.item == kItem &&
                 job.inner[0].stride[kOut] % 64 == 0),
        few_(few_rows()),
        groups_(groups),
        stager_(job),
        sender_(job) {}

  void compute(int64_t row, int64_t stop, void (*alone)(const Job& job, int64_t row)) {
    first_ = row;
    if (is_long_) compute_long(row, stop, alone);
    else if (!kLow && !in_place_) compute_in_blocks(row, stop, alone);
    else compute_in_steps(row, stop, alone);
    sender_.finish();
  }

 private:
  using T = typename V::elem;
  static constexpr int kLanes = V::lanes;
  static constexpr int64_t kItem = sizeof(T);
  static constexpr int kSlots = Groups<V, kLow>::kSlots;  // of groups under way
  static constexpr int64_t kLinesAhead = 512, kLongLinesAhead = 2048;

  // In place the first strip's results would replace what the next one reads.
  int64_t few_rows() const {
    if (job_.in_place) return INT64_MAX;
    if (streams_) return 8 * kLanes;
    return x_.item == kItem && job_.inner[0].stride[kX] % 64 == 0 ? 32 * kLanes : INT64_MAX;
  }
  // The steps of a group wait for each other, so those of its neighbours come between them.
  void compute_in_steps(int64_t row, int64_t stop, void (*alone)(const Job& job, int64_t row)) {
    const auto slot = [](int64_t v) { return static_cast<int>(v % kSlots); };
    Cursor now(job_, row), later(job_, row);
    LinesAhead ahead;
    later.skip(groups_ahead(later) * kLanes);
    int64_t filled = 0, next = 0;
    for (int64_t v = 0; v < filled + 3 || row < stop; ++v) {
      if (row < stop) {
        if (v == next) next += fetch_ahead(later, ahead);
        row += fill(slot(v), now, row, stop);
        ++filled;
        groups_.start(slot(v));
        ahead.y = fetches_y_ ? strips_[slot(v)].y : nullptr;
      }
      if (v >= 1 && v - 1 < filled) groups_.make_terms(slot(v - 1), ahead);
      if (v >= 2 && v - 2 < filled) strips_[slot(v - 2)].is_good = groups_.finish(slot(v - 2));
      if (v >= 3) put(slot(v - 3), alone);
    }
  }
  // Elements that come to a tile do so some groups at a time, of which each column is read in one
  // piece.
  SOFTMAXLIB_NOINLINE void compute_in_blocks(int64_t row, int64_t stop,
                                             void (*alone)(const Job& job, int64_t row)) {
    Cursor now(job_, row), later(job_, row);
    LinesAhead ahead;
    later.skip(groups_ahead(later) * kLanes);
    int64_t fetched = 0;
    while (row < stop) {
      int count = fill_block(groups_.in_block(), now, row, stop);
      row += count * kLanes;
      if (count == 0) row += fill(count++, now, row, stop);
      for (int g = 0; g < count; ++g) groups_.start(g);
      for (int g = 0; g < count; ++g) {
        if (fetched-- == 0) fetched = fetch_ahead(later, ahead) - 1;
        ahead.y = fetches_y_ ? strips_[g].y : nullptr;
        groups_.make_terms(g, ahead);
      }
      for (int g = 0; g < count; ++g) strips_[g].is_good = groups_.finish(g);
      put_all(count, alone);
    }
  }
  SOFTMAXLIB_NOINLINE void put_all(int count, void (*alone)(const Job& job, int64_t row)) {
    for (int g = 0; g < count; ++g) put(g, alone);
  }
  // Rows of several groups have enough to do by themselves. Their results leave some vectors beside
  // each other at a time.
  void compute_long(int64_t row, int64_t stop, void (*alone)(const Job& job, int64_t row)) {
    Cursor now(job_, row), later(job_, row);
    LinesAhead ahead;
    later.skip(groups_ahead(later) * kLanes);
    // In place there are as many as their terms, if these wait, have room for.
    const int in_place =
        groups_.kind.holds || groups_.in_block() > kSlots ? kSlots : groups_.in_block();
    const int most = is_in_place() ? in_place : 1;
    int64_t fetched = 0;
    while (row < stop) {
      int count = 0;
      bool together = is_in_place() && groups_.kind.holds && !groups_.kind.reduces;
      for (; count < most && row < stop; ++count) {
        if (fetched-- == 0) fetched = fetch_ahead(later, ahead) - 1;
        const int64_t left = now.left < stop - row ? now.left : stop - row;
        const int64_t step = step_of_strip(now, left);
        row += fill_long(count, now, row, left < kLanes ? left : kLanes, step);
        Strip& strip = strips_[count];
        if (strip.is_good) {
          groups_.start(count);
          groups_.make_terms(count, ahead);
          strip.is_good = groups_.finish(count);
        }
        together = together && strip.is_good && strip.y == strips_[0].y + count * kLanes * kItem;
      }
      if (together && count == kSlots) groups_.send_all(sender_, strips_[0].y);
      else put_all(count, alone);
    }
  }

  // Columns at the same place of their pages take each other's place in a first level cache of
  // eight ways, those of x and y together. Where x is read again for results, it is copied.
  static bool crowd_each_other(const Job& job) {
    const int64_t stride = job.inner[0].stride[kX], lowest = stride & -stride;
    return job.n * (lowest < 4096 ? lowest : 4096) > 16384;
  }

  // Where rows are: in a run, `left` from its end.
  struct Cursor {
    RowRun run;
    int64_t left;
    const char* x;
    char* y;

    Cursor(const Job& job, int64_t row) : run(job, row) { begin(); }
    int first() const { return static_cast<int>(run.rows - left); }
    // Up to so many rows of the run.
    SOFTMAXLIB_INLINE void skip(int64_t rows) {
      if (rows > left) rows = left;
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
    bool is_good;
    const char* where;
    bool is_ready = true;  // its arguments are there
  };

  // How far it is from a strip to the next, of so many rows that are left: as many as it has, or
  // those up to a line of memory, where from there on whole lines are streamed or read. Then some
  // of its rows are computed twice.
  SOFTMAXLIB_INLINE int64_t step_of_strip(const Cursor& now, int64_t rows) const {
    if (rows <= kLanes) return rows;
    if (SOFTMAXLIB_LIKELY(rows < few_)) return kLanes;
    const int64_t to_line = elements_to_line(streams_ ? now.y : now.x, kItem);
    return to_line ? to_line : kLanes;
  }
  // Returns how far it is to the next.
  SOFTMAXLIB_INLINE int64_t fill(int g, Cursor& now, int64_t row, int64_t stop) {
    int64_t rows = now.left < stop - row ? now.left : stop - row;
    const int64_t step = step_of_strip(now, rows);
    if (rows > kLanes) rows = kLanes;
    strips_[g] = {row, now.y, static_cast<int>(rows), true, nullptr};
    if (kLow && job_.base[kWhere])
      strips_[g].where = job_.base[kWhere] + now.run.place.offset[kWhere] +
                         now.first() * now.run.step.stride[kWhere];
    if (groups_.kind.targets) groups_.begin(g, now.run, now.first(), static_cast<int>(rows));
    if (is_in_place() && rows == kLanes)
      groups_.read_from(g, reinterpret_cast<const T*>(now.x), columns_apart_);
    else fetch_across(job_, stager_, now.run, now.first(), strips_[g].rows, groups_, g);
    now.skip(step);
    return step;
  }
  // Whole groups beside each other, of which each column is read in one piece. Returns how many.
  SOFTMAXLIB_NOINLINE int fill_block(int most, Cursor& now, int64_t row, int64_t stop) {
    const int64_t rows = now.left < stop - row ? now.left : stop - row, groups = rows / kLanes;
    if (groups && step_of_strip(now, rows) < kLanes) return 0;
    const int count = static_cast<int>(groups < most ? groups : most);
    if (count < 2) return 0;
    stager_.x().convert_side_by_side(now.x, count, groups_.columns(0), groups_.columns(1), job_.n);
    for (int g = 0; g < count; ++g) {
      strips_[g] = {row + g * kLanes, now.y, kLanes, true, nullptr};
      groups_.columns(g);
      if (groups_.kind.targets) groups_.begin(g, now.run, now.first(), kLanes);
      now.skip(kLanes);
    }
    return count;
  }
  // The same of rows of several groups, which are read in place, or in the first slot through a
  // tile. Where they are in place, the last rows of a run come with some that are computed again,
  // so that they are a vector: but not where these have other elements by now, or are another
  // task's.
  SOFTMAXLIB_NOINLINE int64_t fill_long(int g, Cursor& now, int64_t row, int64_t rows,
                                        int64_t step_on) {
    const int64_t again = kLanes - rows;
    const bool can =
        is_in_place() && now.first() >= again && row - again >= first_ && !job_.in_place;
    const int64_t back = can ? again : 0;
    const int first = static_cast<int>(now.first() - back), count = static_cast<int>(rows + back);
    const Dim& step = now.run.step;
    Strip& strip = strips_[g];
    strip = {row - back, now.y - back * step.stride[kOut], count, true, nullptr};
    if (kLow && job_.base[kWhere])
      strip.where = job_.base[kWhere] + now.run.place.offset[kWhere] + first * step.stride[kWhere];
    if (groups_.kind.targets) groups_.begin(g, now.run, first, count);
    const char* const x = now.x - back * step.stride[kX];
    if (is_in_place() && count == kLanes)
      groups_.read_from(g, reinterpret_cast<const T*>(x), columns_apart_);
    else strip.is_good = g == 0 && fits_ && fetch_long(now.run, first, count);
    strip.is_ready = strip.is_good;
    now.skip(step_on);
    return step_on;
  }
  // What has options is not, and their code is not made.
  bool is_in_place() const { return !kLow && in_place_; }
  bool fetch_long(const RowRun& run, int first, int rows) {
    const int n = static_cast<int>(job_.n);
    T* const hi = groups_.columns(0);
    if constexpr (kLow) {
      constexpr int kGroup = kVectorsPerGroup * kLanes;
      Pair<V> factor;
      bool usual = !job_.base[kScale] || stager_.factors(run, first, rows, factor);
      for (int j = 0; usual && j < n; j += kGroup)
        usual = stager_.fetch_strip(run, factor, first, rows, j, n - j < kGroup ? n - j : kGroup,
                                    hi + j * kLanes, groups_.low_columns(0) + j * kLanes);
      return usual;
    } else {
      const char* const x = job_.base[kX] + run.place.offset[kX] + first * run.step.stride[kX];
      stager_.x().convert(x, rows, hi, n, job_.inner[0].stride[kX], kLanes);
      return true;
    }
  }
  // How many groups of a run are fetched in one go.
  int64_t groups_ahead(const Cursor& at) const {
    int64_t width = kLinesAhead / job_.n > 16 ? kLinesAhead / job_.n : 16;
    if (is_long_) width = kLongLinesAhead / job_.n;
    const int64_t left = (at.left + kLanes - 1) / kLanes;
    return width < left ? width : left;
  }
  // Those at a cursor, which goes on; returns how many they are.
  int64_t fetch_ahead(Cursor& later, LinesAhead& ahead) const {
    const int64_t width = groups_ahead(later), line = kLanes * x_.item;
    ahead.x = later.x;
    ahead.line = line;
    ahead.column = job_.inner[0].stride[kX] - width * line;
    ahead.width = width;
    ahead.at = 0;
    ahead.y_column = job_.inner[0].stride[kOut];
    later.skip(width * kLanes);
    return width;
  }
  SOFTMAXLIB_INLINE void put(int g, void (*alone)(const Job& job, int64_t row)) {
    Strip& strip = strips_[g];
    if (kLow && !strip.is_good && strip.where && strip.is_ready)
      strip.is_good = groups_.settle(g, job_, strip.where, where_apart_, strip.rows);
    if (SOFTMAXLIB_UNLIKELY(!strip.is_good)) return put_each(g, alone);
    if (groups_.kind.reduces) return;
    if (!out_.across) return put_each(g, alone);
    groups_.send(g, sender_, strip.y, strip.rows);
  }
  SOFTMAXLIB_NOINLINE void put_each(int g, void (*alone)(const Job& job, int64_t row)) {
    const Strip& strip = strips_[g];
    const auto is_alone = [&](int r) { return groups_.is_alone(g * kLanes + r); };
    const bool all = is_long_ && !(groups_.kind.reduces && strip.is_ready);
    for (int r = 0; r < strip.rows; ++r)
      if (all || is_alone(r)) alone(job_, strip.row + r);
    if (all || groups_.kind.reduces) return;
    alignas(64) T results[(kVectorsPerGroup * kLanes + 2) * kLanes];
    groups_.store_results(g, results + kLanes, job_.n);
    const int64_t step = job_.outer[job_.outer_ndim - 1].stride[kOut];
    for (int r = 0; r < strip.rows; ++r)
      if (!is_alone(r)) sender_.put(strip.y + r * step, results + kLanes + r * job_.n, 1);
  }

  const Job& job_;
  const Access x_, out_;
  const int64_t columns_apart_, where_apart_;
  const bool is_long_, fits_;  // rows are of several groups, as logarithms are; and fit in a tile
  const bool in_place_, fetches_y_, streams_;
  const int64_t few_;  // so few rows of a run that lines do not matter
  Groups<V, kLow>& groups_;
  Stager<V> stager_;
  Sender<V> sender_;
  Strip strips_[Groups<V, kLow>::kInBlock];
  int64_t first_ = 0;  // row of all
};

// Brings rows that are contiguous, or lie anyhow, to columns.
template <class Vector, bool kLow>
class RowsToColumns {
 public:
  using V = Vector;
  using T = typename V::elem;
  using Columns = LaneColumns<V, kLow>;

  explicit RowsToColumns(const Job& job)
      : job_(job),
        n_(static_cast<int>(job.n)),
        pitch_((n_ + kLanes - 1) / kLanes * kLanes),
        x_(job, kX),
        only_scaled_(kLow && is_only_scaled(job)),
        as_they_are_((!kLow || only_scaled_) && !job.causal),
        stager_(job) {}

  // The first rows of a run, at most so many, to groups from 0 on; returns how many, and where
  // their like will be read.
  SOFTMAXLIB_NOINLINE int fill(const RowRun& run, int64_t left, Columns& to, const char** ahead) {
    const bool even = stager_.is_even(run);
    int rows = to.groups() * kLanes;
    if (!even && rows * pitch_ > kRoom) rows = static_cast<int>(kRoom / pitch_) / kLanes * kLanes;
    if (rows > run.rows) rows = static_cast<int>(run.rows);
    if (rows > left) rows = static_cast<int>(left);
    const int count = (rows + kLanes - 1) / kLanes;
    const char* const x = job_.base[kX] + run.place.offset[kX];
    const int64_t step = run.step.stride[kX];
    *ahead = nullptr;
    // A block of a row of less than four reaches into the next row.
    const bool can_reach = n_ >= 4 || (step == n_ * kItem && rows < run.rows);
    if (as_they_are_ && x_.along && x_.item == kItem && rows == count * kLanes &&
        step % kItem == 0 && can_reach) {
      for (int g = 0; g < count; ++g)
        to.load_rows(g, reinterpret_cast<const T*>(x + g * kLanes * step), nullptr, step / kItem);
      *ahead = x + kBatchPrefetchBytes;
    } else if (only_scaled_ && as_they_are_ && x_.fits) {
      transpose(rows, stager_.fetch_elements(run, rows, hi(), pitch_), false, to);
    } else {
      stage(run, rows, even, to);
      return rows;
    }
    if constexpr (kLow) {
      for (int g = 0; g < count; ++g) {
        Pair<V> factor;
        const int in_group = rows - g * kLanes < kLanes ? rows - g * kLanes : kLanes;
        if (stager_.factors(run, g * kLanes, in_group, factor) && to.scale(g, factor)) continue;
        stage(run, rows, even, to);
        break;
      }
    }
    return rows;
  }

 private:
  static constexpr int kLanes = V::lanes, kRoom = Columns::kMost * kLanes;
  static constexpr int64_t kItem = sizeof(T);

  T* hi() { return room_[0] + kLanes; }
  T* lo() { return room_[kLow] + kLanes; }
  void stage(const RowRun& run, int rows, bool even, Columns& to) {
    if (even) stager_.fetch_even(run, rows, hi(), lo(), nullptr);
    else stager_.fetch(run, rows, hi(), lo(), pitch_, nullptr);
    transpose(rows, even ? n_ : pitch_, true, to);
  }
  void transpose(int rows, int64_t between, bool low, Columns& to) {
    const int count = (rows + kLanes - 1) / kLanes;
    for (int64_t i = rows * between; i < count * kLanes * between + 4; ++i) hi()[i] = lo()[i] = 0;
    for (int g = 0; g < count; ++g)
      to.load_rows(g, hi() + g * kLanes * between, low ? lo() + g * kLanes * between : nullptr,
                   between);
  }

  const Job& job_;
  const int n_;
  const int64_t pitch_;
  const Access x_;
  const bool only_scaled_, as_they_are_;
  Stager<V> stager_;
  alignas(64) T room_[kLow ? 2 : 1][kRoom + 2 * kLanes];
};

template <class V, bool kLow>
SOFTMAXLIB_NOINLINE void run_in_lanes(const Job& job, Groups<V, kLow>& groups, int64_t row,
                                      int64_t stop, void (*alone)(const Job& job, int64_t row)) {
  using T = typename V::elem;
  constexpr int kLanes = V::lanes, kRoom = Groups<V, kLow>::kMost * kLanes;
  constexpr int64_t kItem = sizeof(T);
  const int n = static_cast<int>(job.n);
  const Access out(job, kOut);
  RowsToColumns<V, kLow> filler(job);
  Sender<V> sender(job);
  // Results on their way out: those of a batch wait while the next is computed, since what was just
  // stored cannot be loaded in other pieces at once.
  alignas(64) T buffers[2][kRoom + 2 * kLanes];
  T *results = buffers[0] + kLanes, *before = buffers[1] + kLanes;
  char* waiting_for = nullptr;
  int64_t waiting = 0;
  const auto flush = [&] {
    if (waiting) sender.put_adjacent(waiting_for, before, waiting);
    waiting = 0;
  };

  for (RowRun run(job, row); row < stop;) {
    const char* ahead;
    const int rows = filler.fill(run, stop - row, groups, &ahead);
    const int count = (rows + kLanes - 1) / kLanes;
    if (groups.kind.targets)
      for (int g = 0; g < count; ++g)
        groups.begin(g, run, g * kLanes, rows - g * kLanes < kLanes ? rows - g * kLanes : kLanes);
    bool good = groups.evaluate(count, LinesAhead{ahead, kLanes * kItem});
    if (kLow && !good && job.base[kWhere] && job.inner_ndim == 1) {
      const char* where = job.base[kWhere] + run.place.offset[kWhere];
      good = true;
      for (int g = 0; g < count; ++g, where += kLanes * run.step.stride[kWhere])
        good &= groups.settle(g, job, where, run.step.stride[kWhere], rows - g * kLanes);
    }

    char* const y = job.base[kOut] + run.place.offset[kOut];
    const int64_t y_step = run.step.stride[kOut];
    if (groups.kind.reduces) {
      for (int r = 0; !good && r < rows; ++r)
        if (groups.is_alone(r)) alone(job, row + r);
    } else {
      const bool directly = good && rows == count * kLanes && n >= 4 && !job.streaming &&
                            out.along && out.item == kItem && y_step % kItem == 0;
      for (int g = 0; g < count; ++g) {
        if (directly)
          groups.store_results(g, reinterpret_cast<T*>(y + g * kLanes * y_step), y_step / kItem);
        else groups.store_results(g, results + g * kLanes * n, n);
      }
      if (!directly) flush();
      if (!directly && good && out.along && y_step == n * out.item) {
        waiting = rows * n;
        waiting_for = y;
        T* const free = before;
        before = results;
        results = free;
      } else if (!directly) {
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

template <class V, bool kLow>
SOFTMAXLIB_NOINLINE void run_groups(const Job& job, Groups<V, kLow>& groups, int64_t start,
                                    int64_t stop, void (*alone)(const Job& job, int64_t row)) {
  if (LanesAcross<V, kLow>::takes(job)) {
    LanesAcross<V, kLow>(job, groups).compute(start, stop, alone);
  } else if (job.n <= kVectorsPerGroup * V::lanes) {
    run_in_lanes(job, groups, start, stop, alone);
  } else {
    for (int64_t row = start; row < stop; ++row) alone(job, row);
  }
}
template <class P, bool kLow>
inline void run_any_in_lanes(const Job& job, int64_t start, int64_t stop,
                             void (*alone)(const Job& job, int64_t row)) {
  // Whether a row may see but one of its elements.
  const bool counts = (kLow && !is_only_scaled(job)) || job.causal;
  LaneGroups<P, kLow> groups(static_cast<int>(job.n), counts);
  run_groups(job, groups, start, stop, alone);
}
template <class P>
inline void run_any_in_lanes(const Job& job, int64_t start, int64_t stop,
                             void (*alone)(const Job& job, int64_t row)) {
  if (job.n == 1 && !P::kReduces && !P::kTargets) {
    if (!job.causal && !job.base[kSlope])
      return SingleElements<typename P::V>(job).compute(start, stop, alone);
    for (int64_t row = start; row < stop; ++row) alone(job, row);
    return;
  }
  if (job.elements_of_x) run_any_in_lanes<P, false>(job, start, stop, alone);
  else run_any_in_lanes<P, true>(job, start, stop, alone);
}

// Contiguous rows below so many elements are transposed to be in lanes, and back: 64 floats or 32
// doubles, which is a group; of floats on AVX2 56, from where batches are faster.
template <class T>
constexpr int64_t kInLanesBelow =
    (sizeof(T) == 4 && kInStep == 1 ? 7 : 8) * vector_of<T>::type::lanes / 2;
static_assert(kVectorsPerGroup == 4, "kInLanesBelow");

// Whether calls that have no schedule of their own compute rows many at a time, and how.
enum class Many { kNo, kInLanes, kBatched };
// reduces: to logarithms of sums.
template <class V>
inline Many many_rows(const Job& job, bool reduces) {
  constexpr int64_t kShare = 8;  // as host/schedule.cpp has it
  if (job.n == 0 || job.n > kVectorsPerChunk * V::lanes) return Many::kNo;
  const Access x(job, kX);
  constexpr int64_t kGroup = kVectorsPerGroup * V::lanes;
  int64_t below = x.across ? kGroup : kInLanesBelow<typename V::elem>;
  if (reduces && LanesAcross<V, true>::takes(job)) below = kGroupsInTile * kGroup + 1;
  if (reduces && x.across && job.plain && job.dtype[kX] == kOwnDtype<typename V::elem>)
    below = kGroupsInPlace * kGroup + 1;
  return job.n < below && job.rows * kShare >= job.n ? Many::kInLanes : Many::kBatched;
}
template <class Kind>
inline bool run_many(const Job& job, int64_t start, int64_t stop, char* scratch,
                     void (*alone)(const Job& job, int64_t row)) {
  if constexpr (kHasManyRows) {
    const Many many = many_rows<typename Kind::V>(job, Kind::kReduces);
    if (many == Many::kInLanes) run_any_in_lanes<Kind>(job, start, stop, alone);
    if (many == Many::kBatched) run_any_batches<Kind>(job, start, stop, scratch, alone);
    return many != Many::kNo;
  }
  return false;
}

// Each function in batches and in lanes, rows that are alone by their kernel of one row.
template <class T, auto kKernel>
void function_alone(const Job& job, int64_t row) {
  compute_alone<T>(job, row, run_row<T, kKernel>);
}

#define SOFTMAXLIB_MANY_ROWS(function, Kind)                                                       \
  template <class T>                                                                               \
  inline void function##_batched(const Job& job, int64_t start, int64_t stop, char* scratch) {     \
    run_any_batches<Kind<typename vector_of<T>::type>>(job, start, stop, scratch,                  \
                                                       function_alone<T, function##_two_pass<T>>); \
  }                                                                                                \
  template <class T>                                                                               \
  inline void function##_in_lanes(const Job& job, int64_t start, int64_t stop, char*) {            \
    run_any_in_lanes<Kind<typename vector_of<T>::type>>(                                           \
        job, start, stop, function_alone<T, function##_two_pass<T>>);                              \
  }                                                                                                \
  template <class T>                                                                               \
  inline void function##_columns(const Job& job, int64_t start, int64_t stop, char* scratch) {     \
    run_any_columns<Kind<typename vector_of<T>::type>>(job, start, stop, scratch,                  \
                                                       function_alone<T, function##_two_pass<T>>); \
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
