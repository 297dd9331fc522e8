// Rows that lie side by side and are longer than kernels/lanes.hpp takes: columns, of any function,
// with any options. Every lane is a row there, too, but a row's terms and arguments do not wait.
// Two passes instead, as in softmax_two_pass, over panels of some vectors of columns: a group of
// elements of each vector in turn, so that memory is read in pieces as wide as the panel.
#pragma once

#include "isa/kernels/lane_groups.hpp"

namespace softmaxlib {
namespace SOFTMAX_ISA {
namespace {

// What terms of a vector of columns are made with, under their references.
template <class F, class V = typename F::V>
inline Pair<V> magic_and_floor(V references) {
  if constexpr (F::kFollows) {
    const ExpInLanes<V, F> exp(references);
    return {exp.magic(), exp.floor()};
  } else {
    return {V::set1(0), V::set1(0)};
  }
}

// What a vector of columns has summed of a block, whatever the terms are.
template <class V>
struct alignas(64) BlockOfColumns : ColumnTotals<V> {
  using T = typename V::elem;
  static constexpr int kLanes = V::lanes;
  using ColumnTotals<V>::get;
  using ColumnTotals<V>::set;

  ColumnLanes<V> lanes;  // of the chunk
  T limit[kLanes];       // the largest arguments that need no other reference

  void begin(V references) {
    this->clear(references);
    store(limit, limits_of(references));
    lanes.clear();
  }
  void add(InLanes<V> x) {
    InLanes<V> total, lost;
    load_lanes(this->sum, total);
    load_lanes(this->error, lost);
    two_sum(total, lost, x);
    store_lanes(this->sum, total);
    store_lanes(this->error, lost);
  }
  SOFTMAXLIB_NOINLINE void end_chunk() {
    InLanes<V> total, lost;
    load_lanes(this->sum, total);
    load_lanes(this->error, lost);
    lanes.fold_into(total, lost);
    store_lanes(this->sum, total);
    store_lanes(this->error, lost);
    lanes.clear();
  }
  // Where arguments exceed the limits; false if that changes no reference.
  SOFTMAXLIB_NOINLINE bool raise(V top) {
    T tops[kLanes];
    double first[kLanes], second[kLanes];
    store(tops, top);
    bool raised = false;
    for (int i = 0; i < kLanes; ++i) {
      first[i] = second[i] = 1;
      if (!(tops[i] > limit[i])) continue;
      Total t = get(i);
      const int down = t.reference - reference_of<V>(tops[i]);
      if (down >= 0) continue;
      raised = true;
      first[i] = power_of_two(down > -1022 ? down : -1022);
      second[i] = power_of_two(down > -1022 ? 0 : down + 1022);
      t.raise(t.reference - down);
      set(i, t);
    }
    InLanes<V> factor;
    load_lanes(first, factor);
    lanes.scale(factor);
    load_lanes(second, factor);
    lanes.scale(factor);
    store(limit, limits_of(load(this->reference)));
    return raised;
  }
};

// The sums of a vector of columns, without what stays out of each where kHold.
template <class F, bool kHold>
struct alignas(64) SumsOfColumns : ColumnTotals<typename F::V> {
  using V = typename F::V;
  using T = typename V::elem;
  T held_hi[kHold ? V::lanes : 1], held_lo[kHold ? V::lanes : 1];

  // Those of the next block join them.
  SOFTMAXLIB_NOINLINE void merge(const SumsOfColumns& block) {
    for (int i = 0; i < V::lanes; ++i) {
      typename std::conditional<kHold, RowRest<F>, RowSum<F>>::type of, other;
      static_cast<Total&>(of) = this->get(i);
      static_cast<Total&>(other) = block.get(i);
      if constexpr (kHold) {
        of.held_hi = static_cast<double>(held_hi[i]);
        of.held_lo = static_cast<double>(held_lo[i]);
        other.held_hi = static_cast<double>(block.held_hi[i]);
        other.held_lo = static_cast<double>(block.held_lo[i]);
      }
      of.merge(other);
      this->set(i, of);
      if constexpr (kHold) {
        held_hi[i] = static_cast<T>(of.held_hi);
        held_lo[i] = static_cast<T>(of.held_lo);
      }
    }
  }
};

// How they come about, group by group: what PieceSum and BlockState (isa/sum) are to a row.
template <class Function, bool kHold, class X>
class alignas(64) ColumnSums {
 public:
  using F = Function;
  using V = typename F::V;
  using T = typename V::elem;
  static constexpr int kLanes = V::lanes, kGroup = kVectorsPerGroup * kLanes;
  static constexpr int64_t kChunk = kVectorsPerChunk * kLanes, kBlock = kVectorsPerBlock * kLanes;

  const SumsOfColumns<F, kHold>& totals() const { return all_; }

  // Elements [i, i + count) of n, a group or what is left.
  SOFTMAXLIB_NOINLINE void add(const ArgumentsOfRows<X>& x, int64_t i, int count, int64_t n,
                               LinesAhead& ahead) {
    const bool begins = i % kBlock == 0;
    if (begins) begin_block(x, count);
    RestOf<F> rests[kLanes];
    while (add_up(x, count, kHold && begins, rests, ahead)) ahead.x = nullptr;
    hold_ ^= 1;
    SOFTMAXLIB_NO_UNROLL
    for (int k = 0; k < 8; ++k) {
      InLanes<V> sum = in_double(rests[k]);
      if constexpr (kLanes == 16) sum = sum + in_double(rests[k + 8]);
      block_.lanes.add(k, sum);
    }
    const int64_t next = i + count;
    if (next == n || next % kChunk == 0) block_.end_chunk();
    if (next == n || next % kBlock == 0) end_block(next <= kBlock);
  }

 private:
  // The reference comes from the first group; what lanes hold begins with their first elements.
  SOFTMAXLIB_INLINE void begin_block(const ArgumentsOfRows<X>& x, int count) {
    block_.begin(F::kFollows ? references_of(x.largest(count)) : V::set1(0));
    hold_ = 0;
    X none;
    from_pair(Pair<V>{V::set1(static_cast<T>(-INFINITY)), V::set1(0)}, none);
    SOFTMAXLIB_NO_UNROLL
    for (int k = 0; kHold && k < kLanes; ++k) held_[0][k] = k < count ? x(k) : none;
  }
  // What lanes have of a group. True where that raised a reference: it has to be added up again.
  SOFTMAXLIB_INLINE bool add_up(const ArgumentsOfRows<X>& x, int count, int first, RestOf<F>* rests,
                                LinesAhead& ahead) {
    constexpr int kAtOnce = kLanesAtOnce<F>;
    const F f(0);
    const Pair<V> with = magic_and_floor<F>(load(block_.reference));
    V top = V::set1(static_cast<T>(-INFINITY));
    SOFTMAXLIB_NO_UNROLL
    for (int k = 0; k < kLanes; k += kAtOnce) {
      rests_of_lanes<kAtOnce, kHold>(f, x, count, first, k, with.hi, with.lo, held_[hold_],
                                     held_[kHold ? hold_ ^ 1 : 0], rests,
                                     F::kFollows ? &top : nullptr);
      ahead.step(4 * kAtOnce);
    }
    if constexpr (F::kFollows)
      return SOFTMAXLIB_UNLIKELY(any(gt(top, load(block_.limit)))) && block_.raise(top);
    return false;
  }
  SOFTMAXLIB_NOINLINE void end_block(bool is_first) {
    SumsOfColumns<F, kHold> block;
    if constexpr (kHold) {
      const auto in_lanes = arguments_in(held_[hold_]);
      const Pair<V> with = magic_and_floor<F>(load(block_.reference));
      const Held<V> held(F(0), in_lanes, kLanes, in_lanes.largest(kLanes), with.hi, with.lo);
      block_.add(held.others);
      store(block.held_hi, held.element.hi);
      store(block.held_lo, held.element.lo);
    }
    static_cast<ColumnTotals<V>&>(block) = block_;
    if (is_first) all_ = block;
    else all_.merge(block);
  }

  BlockOfColumns<V> block_;
  SumsOfColumns<F, kHold> all_;  // of the blocks before
  // What lanes hold: before a group and after it, so that it can be added up again.
  alignas(64) X held_[kHold ? 2 : 1][kHold ? kLanes : 1];
  int hold_ = 0;
};

// What is done with the vectors of a panel, whatever is computed of them: ColumnPanels is compiled
// once for all kinds.
template <class V, bool kLow>
class Columns {
 public:
  using T = typename V::elem;
  using X = typename OneOrPair<V, kLow>::type;
  using Arguments = ArgumentsOfRows<X>;
  const bool reduces;

  // The v-th vector of a panel: rows of a run from `first` on.
  virtual void begin(int v, const RowRun& run, int first, int rows) = 0;
  virtual void add(int v, const Arguments& x, int64_t i, int count, LinesAhead& ahead) = 0;
  // What follows the sums. where: of the first row's first element, or NULL. False where one of the
  // rows has to be computed alone.
  virtual bool finish(int v, int rows, const char* where, int64_t step) = 0;
  // The results of some elements, whose first go to y;
  virtual void send(int v, const Arguments& x, int count, Sender<V>& sender, char* y, int rows,
                    LinesAhead& ahead) const = 0;
  // or those of one element of some vectors that follow each other, past the caches.
  virtual void stream_element(int v, int vectors, const T* x, T* y, LinesAhead& ahead) const = 0;

 protected:
  explicit Columns(bool one_result) : reduces(one_result) {}
};

template <class P, bool kLow>
class ColumnsOf final : public Columns<typename P::V, kLow> {
  using Base = Columns<typename P::V, kLow>;
  using F = typename P::F;
  using V = typename P::V;
  using T = typename V::elem;
  using typename Base::Arguments;
  using typename Base::X;
  static constexpr int kLanes = V::lanes;

 public:
  ColumnsOf(const Job& job, char* scratch)
      : Base(P::kReduces),
        job_(job),
        sums_(reinterpret_cast<Sums*>(scratch)),
        results_(reinterpret_cast<Results*>(scratch + kColumnStrips * kColumnSumsBytes)) {
    static_assert(sizeof(Sums) <= kColumnSumsBytes && sizeof(Results) <= kColumnResultsBytes,
                  "job.hpp makes room for them");
  }

  void begin(int v, const RowRun& run, int first, int rows) override {
    if constexpr (P::kTargets) results_[v].of.begin(run, first, rows);
  }
  void add(int v, const Arguments& x, int64_t i, int count, LinesAhead& ahead) override {
    sums_[v].add(x, i, count, job_.n, ahead);
  }
  bool finish(int v, int rows, const char* where, int64_t step) override {
    Results& results = results_[v];
    const auto& totals = sums_[v].totals();
    bool alone[kLanes] = {};
    InLanes<V> sum, error;
    load_lanes(totals.sum, sum);
    load_lanes(totals.error, error);
    BatchSums<V> sums;
    sums.reference = load(totals.reference);
    sums.sum = sum;
    if constexpr (P::kHolds) {
      sums.sum = sum + error;
      const HeldSums<V> held(sums, {load(totals.held_hi), load(totals.held_lo)});
      if constexpr (P::kTargets) results.of.finish(held, alone, {});
      else results.of.finish(held, alone);
    } else {
      results.of.finish(sums, reciprocals<V>(sum, error), alone);
      const Pair<V> with = magic_and_floor<F>(sums.reference);
      store(results.magic, with.hi);
      store(results.floor, with.lo);
    }
    if (where) see(results, rows, where, step, alone);
    bool any_alone = false;
    for (int r = 0; r < rows; ++r) any_alone |= alone[r];
    return !any_alone;
  }
  void send(int v, const Arguments& x, int count, Sender<V>& sender, char* y, int rows,
            LinesAhead& ahead) const override {
    if constexpr (!P::kReduces)
      sender.template put_strip<P::kHolds ? 1 : kInStep>(
          y, rows, count, [&, of = &results_[v]](int j, auto some, V* to) SOFTMAXLIB_INLINE_LAMBDA {
            X argument[some];
            for (int k = 0; k < some; ++k) argument[k] = x(j + k);
            make<some>(*of, argument, to);
            ahead.step(some);
          });
  }
  void stream_element(int v, int vectors, const T* x, T* y, LinesAhead& ahead) const override {
    if constexpr (!P::kReduces && !kLow) {
      const Results* of = &results_[v];
      for (int k = 0; k < vectors; ++k, x += kLanes, y += kLanes) {
        const X argument = load(x);
        V result;
        make<1>(of[k], &argument, &result);
        stream(y, result);
      }
      ahead.step(vectors);
    }
  }

 private:
  using Sums = ColumnSums<F, P::kHolds, X>;
  struct Results {
    P of;
    alignas(64) T magic[kLanes], floor[kLanes];
  };

  template <int N>
  static SOFTMAXLIB_INLINE void make(const Results& of, const X* x, V* y) {
    if constexpr (P::kHolds) {
      const auto result = of.of.results();
      for (int k = 0; k < N; ++k) y[k] = result(x[k], 0);
    } else {
      const V scale = load(of.of.scale);
      make_terms<N>(F(0), x, load(of.magic), load(of.floor), y);
      for (int k = 0; k < N; ++k) y[k] = y[k] * scale;
    }
  }

  // Rows of which a mask leaves nothing or one element.
  SOFTMAXLIB_NOINLINE void see(Results& results, int rows, const char* where, int64_t step,
                               bool (&alone)[kLanes]) const {
    const int64_t stride = job_.inner[0].stride[kWhere];
    for (int r = 0; r < rows; ++r, where += step) {
      int sees = 0;
      for (int64_t j = 0; j < job_.n && sees < 2; ++j) sees += where[j * stride] != 0;
      if (sees == 0) alone[r] = !results.of.see_nothing(r);
      if (sees == 1) alone[r] |= P::kOneIsOne;
    }
  }

  const Job& job_;
  Sums* const sums_;
  Results* const results_;
};

// Panel after panel.
template <class V, bool kLow>
class ColumnPanels {
 public:
  ColumnPanels(const Job& job, Columns<V, kLow>& columns)
      : job_(job),
        x_(job, kX),
        x_stride_(job.inner[0].stride[kX]),
        y_stride_(job.inner[0].stride[kOut]),
        in_place_(!kLow && x_.item == kItem && x_stride_ % kItem == 0),
        streams_(job.streaming && !job.reduces && y_stride_ % 64 == 0 &&
                 item_size(job.dtype[kOut]) == kItem),
        most_(static_cast<int>(job.tile / kLanes)),
        columns_(columns),
        stager_(job),
        sender_(job) {}

  void compute(int64_t row, int64_t stop, void (*alone)(const Job& job, int64_t row)) {
    const bool is_small = job_.n * most_ * kLine <= kNear;
    for (RowRun run(job_, row); row < stop;) {
      const int64_t rows = begin_panel(run, stop - row);
      // Of a panel that stays in cache the next is read while this one is written.
      for (int64_t i = 0; i < job_.n; i += kGroup) {
        LinesAhead ahead = lines_at(is_small && !columns_.reduces ? job_.n : i + kGroup, 0);
        for (int v = 0; v < count_; ++v)
          if (fetch(run, v, i)) columns_.add(v, arguments_, i, elements(i), ahead);
      }
      for (int v = 0; v < count_; ++v) finish(run, v);
      if (!columns_.reduces) write(run, rows, is_small);
      for (int v = 0; v < count_; ++v)
        for (int r = 0; !strips_[v].is_good && r < strips_[v].rows; ++r)
          alone(job_, row + strips_[v].first + r);
      row += rows;
      run.advance(rows);
    }
    sender_.finish();
  }

 private:
  using T = typename V::elem;
  static constexpr int kLanes = V::lanes, kGroup = kVectorsPerGroup * kLanes;
  static constexpr int64_t kItem = sizeof(T), kLine = kLanes * kItem;
  // A panel of at most so many bytes is read again from the second level cache.
  static constexpr int64_t kNear = 3 << 17;
  static constexpr int64_t kFewStrips = 8;  // of a run, to which lines do not matter

  // A vector of columns: rows of a run from `first` on.
  struct Strip {
    int first, rows;
    const char* x;
    char* y;
    bool is_good, is_whole;
    Pair<V> factor;
  };

  int elements(int64_t i) const {
    return static_cast<int>(kGroup < job_.n - i ? kGroup : job_.n - i);
  }

  // Of the rows of a run, at most so many, those that are computed together. Returns how many.
  // Where vectors are to begin at a line of memory, the first begins before it and shares rows with
  // the next; and a last one that were less than a vector begins earlier. What is computed twice is
  // the same, but in place the second time would read results.
  int64_t begin_panel(const RowRun& run, int64_t most) {
    const int64_t rows = run.rows < most ? run.rows : most;
    int64_t first = 0;
    const auto has_room = [&] {
      return count_ < most_ || (count_ < most_ + 2 && rows - first < kLanes);
    };
    for (count_ = 0; first < rows && has_room(); ++count_) {
      Strip& strip = strips_[count_];
      const int64_t left = rows - first,
                    to_line = left > kFewStrips * kLanes ? to_line_at(run, first) : 0;
      const int64_t step = to_line ? to_line : left < kLanes ? left : kLanes;
      const bool is_again = !job_.in_place && rows >= kLanes;
      strip.rows = static_cast<int>(is_again ? kLanes : step);
      strip.first = static_cast<int>(left < strip.rows ? first + left - strip.rows : first);
      strip.x = job_.base[kX] + run.place.offset[kX] + strip.first * run.step.stride[kX];
      strip.y = job_.base[kOut] + run.place.offset[kOut] + strip.first * run.step.stride[kOut];
      strip.is_whole = strip.rows == kLanes;
      strip.is_good = !kLow || !job_.base[kScale] ||
                      stager_.factors(run, strip.first, strip.rows, strip.factor);
      columns_.begin(count_, run, strip.first, strip.rows);
      first += step;
    }
    return first;
  }
  // How many rows there are up to a line of what is streamed, or else of x.
  int64_t to_line_at(const RowRun& run, int64_t first) const {
    if (job_.in_place || (!streams_ && !in_place_)) return 0;
    const Operand k = streams_ ? kOut : kX;
    return elements_to_line(job_.base[k] + run.place.offset[k] + first * kItem, kItem);
  }
  // Reads x once more, and of a small panel the next.
  SOFTMAXLIB_NOINLINE void write(const RowRun& run, int64_t rows, bool is_small) {
    const bool reads_next = is_small && run.rows > rows;
    const auto ahead_of = [&](int64_t i) {
      return reads_next ? lines_at(i, rows) : lines_at(is_small ? job_.n : i + kGroup, 0);
    };
    // Whole vectors that are streamed leave element by element of all of them: memory likes that
    // best.
    int first = 0, last = 0;
    if (in_place_ && streams_) {
      while (first < count_ && !can_stream(strips_[first])) ++first;
      for (last = first; last < count_ && can_stream(strips_[last]);) ++last;
    }
    for (int64_t i = 0; i < job_.n; i += kGroup) {
      LinesAhead ahead = ahead_of(i);
      const int some = elements(i);
      for (int j = 0; j < some && first < last; ++j)
        columns_.stream_element(
            first, last - first, reinterpret_cast<const T*>(strips_[first].x + (i + j) * x_stride_),
            reinterpret_cast<T*>(strips_[first].y + (i + j) * y_stride_), ahead);
      for (int v = 0; v < count_; ++v)
        if ((v < first || v >= last) && fetch(run, v, i))
          columns_.send(v, arguments_, some, sender_, strips_[v].y + i * y_stride_, strips_[v].rows,
                        ahead);
    }
  }
  bool can_stream(const Strip& strip) const {
    return strip.is_good && strip.is_whole && reinterpret_cast<uintptr_t>(strip.y) % 64 == 0;
  }
  // The lines of x in a panel from element i on, so many rows further on.
  LinesAhead lines_at(int64_t i, int64_t rows) const {
    LinesAhead lines;
    if (!in_place_ || i >= job_.n) return lines;
    lines.x = strips_[0].x + i * x_stride_ + rows * kItem;
    lines.line = kLine;
    lines.width = count_;
    lines.column = x_stride_ - count_ * kLine;
    return lines;
  }

  // The arguments of a group from element i on; false where the rows are to be computed alone.
  SOFTMAXLIB_INLINE bool fetch(const RowRun& run, int v, int64_t i) {
    Strip& strip = strips_[v];
    if (!strip.is_good) return false;
    const char* const x = strip.x + i * x_stride_;
    if (in_place_ && strip.is_whole) {
      arguments_ = {reinterpret_cast<const T*>(x), nullptr, x_stride_ / kItem};
      return true;
    }
    arguments_ = {hi_, kLow ? lo_ : nullptr, kLanes};
    return stage(run, strip, x, i);
  }
  SOFTMAXLIB_NOINLINE bool stage(const RowRun& run, Strip& strip, const char* x, int64_t i) {
    if constexpr (kLow)
      strip.is_good =
          stager_.fetch_strip(run, strip.factor, strip.first, strip.rows, i, elements(i), hi_, lo_);
    else stager_.x().convert(x, strip.rows, hi_, elements(i), x_stride_, kLanes);
    return strip.is_good;
  }
  void finish(const RowRun& run, int v) {
    Strip& strip = strips_[v];
    const int64_t step = run.step.stride[kWhere];
    const char* const where =
        job_.base[kWhere] ? job_.base[kWhere] + run.place.offset[kWhere] + strip.first * step
                          : nullptr;
    strip.is_good = strip.is_good && columns_.finish(v, strip.rows, where, step);
  }

  const Job& job_;
  const Access x_;
  const int64_t x_stride_, y_stride_;
  const bool in_place_, streams_;
  const int most_;
  Columns<V, kLow>& columns_;
  Stager<V> stager_;
  Sender<V> sender_;
  int count_ = 0;
  Strip strips_[kColumnStrips];
  typename Columns<V, kLow>::Arguments arguments_;
  alignas(64) T hi_[kGroup * kLanes], lo_[kLow ? kGroup * kLanes : 1];
};

template <class V, bool kLow>
SOFTMAXLIB_NOINLINE void run_panels(const Job& job, Columns<V, kLow>& columns, int64_t start,
                                    int64_t stop, void (*alone)(const Job& job, int64_t row)) {
  ColumnPanels<V, kLow>(job, columns).compute(start, stop, alone);
}
template <class P>
inline void run_any_columns(const Job& job, int64_t start, int64_t stop, char* scratch,
                            void (*alone)(const Job& job, int64_t row)) {
  using V = typename P::V;
  if (job.elements_of_x) {
    ColumnsOf<P, false> columns(job, scratch);
    run_panels<V, false>(job, columns, start, stop, alone);
  } else {
    ColumnsOf<P, true> columns(job, scratch);
    run_panels<V, true>(job, columns, start, stop, alone);
  }
}

}  // namespace
}  // namespace SOFTMAX_ISA
}  // namespace softmaxlib
