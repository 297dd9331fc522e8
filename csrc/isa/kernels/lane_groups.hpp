// Rows of up to a group, of logarithms some groups, a row per lane: what is computed of them, once
// their elements are columns of vectors. kernels/lanes.hpp brings them there and their results
// back. The bits are those of isa/sum/sum.hpp.
#pragma once

#include "isa/kernels/batch.hpp"

namespace softmaxlib {
namespace SOFTMAX_ISA {
namespace {

// Lines that are fetched while groups are computed: of elements to come, some of a column and then
// of the next, since hardware foresees lines that follow each other, but not where the next column
// is; and those that results of a group go to.
struct LinesAhead {
  const char* x = nullptr;       // NULL: none
  int64_t line = 0, column = 0;  // bytes from one line to the next, from the end of a column's
  int64_t width = 1, at = 0;     // lines of a column
  const char* y = nullptr;       // NULL: none
  int64_t y_column = 0;

  // Those of so many elements.
  SOFTMAXLIB_INLINE void step(int count) {
    LinesAhead next = *this;  // in registers
    for (int i = 0; x && i < count; ++i) {
      SOFTMAXLIB_PREFETCH(next.x);
      next.x += line;
      if (++next.at == width) next.at = 0, next.x += column;
    }
    for (int i = 0; y && i < count; ++i, next.y += y_column) prefetch(next.y);
    x = next.x, at = next.at, y = next.y;
  }
};

// Columns of several groups of rows: column j of a group holds element j of its rows, and later
// their results. kLow: elements have a second part.
template <class Vector, bool kLow>
class LaneColumns {
 public:
  using V = Vector;
  using T = typename V::elem;
  static constexpr int kLanes = V::lanes;
  // Columns: of a batch, a part of the first level cache; and what there is room for.
  static constexpr int kMost = kLow ? 96 : 128;
  static constexpr int kInBlock = 8, kSlots = 4, kRoom = kSlots * kVectorsPerGroup * kLanes;
  static_assert(kRoom >= kMost, "a batch fits");

  explicit LaneColumns(int n) : n_(n), pitch_((n + 3) / 4 * 4), groups_(kMost / pitch_) {}

  // Of a batch.
  int groups() const { return groups_; }
  // Of rows that lie side by side and come to a tile.
  int in_block() const { return kRoom / pitch_ < kInBlock ? kRoom / pitch_ : kInBlock; }

  // Where the elements of a group's rows are to go, a vector for each column;
  T* columns(int group) {
    read_from(group, column(hi_, group, 0), kLanes);
    return column(hi_, group, 0);
  }
  // or where they are, with so much from a column to the next.
  void read_from(int group, const T* elements, int64_t stride) {
    from_[group] = elements;
    stride_[group] = stride;
  }
  T* low_columns(int group) { return column(lo_, group, 0); }
  // Element j of a group's rows.
  SOFTMAXLIB_INLINE void set(int group, int j, Pair<V> x) {
    store(column(hi_, group, j), x.hi);
    store(column(lo_, group, j), x.lo);
  }
  // All elements of a group's rows, `stride` apart; of less than four, up to three beyond are read.
  void load_rows(int group, const T* x, const T* low, int64_t stride) {
    rows_to_columns<V>(x, stride, n_, columns(group), kLanes);
    if constexpr (kLow)
      if (low) rows_to_columns<V>(low, stride, n_, column(lo_, group, 0), kLanes);
  }
  // Elements become arguments: times a factor per row, as combine() of isa/stage/stage.hpp has it.
  // False where that is not enough for one.
  SOFTMAXLIB_NOINLINE bool scale(int group, Pair<V> factor) {
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
  // All columns times a factor per row, as rows. Of rows of less than four, up to three beyond are
  // written, in order.
  void store_rows(int group, V factor, T* y, int64_t stride) const {
    columns_to_rows<V>(column(hi_, group, 0), kLanes, n_, factor, y, stride);
  }

 protected:
  using X = typename OneOrPair<V, kLow>::type;

  T* column(T* of, int group, int j) const { return of + (group * pitch_ + j) * kLanes; }
  const T* column(const T* of, int group, int j) const {
    return of + (group * pitch_ + j) * kLanes;
  }
  // The elements of a group's rows: argument(j). A copy of where they are, which no store can
  // change.
  using Arguments = ArgumentsOfRows<X>;
  SOFTMAXLIB_INLINE Arguments arguments(int group) const {
    if constexpr (kLow) return {column(hi_, group, 0), column(lo_, group, 0), kLanes};
    else return {from_[group], nullptr, stride_[group]};
  }
  // Those of single rows.
  ElementsOfRows<T> elements(int group) const {
    constexpr int64_t kItem = sizeof(T);
    const T* const hi = kLow ? column(hi_, group, 0) : from_[group];
    const T* const lo = kLow ? column(lo_, group, 0) : nullptr;
    return {reinterpret_cast<const char*>(hi), kItem, (kLow ? kLanes : stride_[group]) * kItem,
            reinterpret_cast<const char*>(lo), kItem};
  }

  const int n_, pitch_, groups_;
  alignas(64) T hi_[kRoom * kLanes];

 private:
  const T* from_[kRoom / 4];   // the elements of each group, which may be in hi_
  int64_t stride_[kRoom / 4];  // from one column of them to the next
  alignas(64) T lo_[kLow ? kRoom * kLanes : 1];
};

// What is done with groups in turn, whatever is computed of them: kernels/lanes.hpp is compiled
// once for all kinds, and calls these once per group or batch.
template <class V, bool kLow>
class Groups : public LaneColumns<V, kLow> {
  using Columns = LaneColumns<V, kLow>;

 public:
  using Columns::kInBlock;
  using Columns::kLanes;
  using Columns::kRoom;
  using typename Columns::T;

  const KindTraits kind;

  // What the rows of a group need beside their elements: those of a run from `first` on.
  virtual void begin(int group, const RowRun& run, int first, int rows) = 0;
  // From arguments to terms, to sums and what follows from them, in steps: those of one group wait
  // for each other. False where some row has to be computed alone.
  SOFTMAXLIB_NOINLINE bool evaluate(int groups, LinesAhead ahead) {
    for (int g = 0; g < groups; ++g) start(g);
    for (int g = 0; g < groups; ++g) make_terms(g, ahead);
    bool good = true;
    for (int g = 0; g < groups; ++g) good &= finish(g);
    return good;
  }
  virtual void start(int g) = 0;
  virtual void make_terms(int g, LinesAhead& ahead) = 0;
  virtual bool finish(int g) = 0;
  // Once more, where some rows of a group would be computed alone: those that see nothing need not.
  // where: of the first row's first element.
  virtual bool settle(int g, const Job& job, const char* where, int64_t step, int rows) = 0;
  // All results of a group, as rows;
  virtual void store_results(int g, T* y, int64_t stride) = 0;
  // or to rows that lie side by side.
  virtual void send(int g, Sender<V>& sender, char* y, int rows) const = 0;
  // or those of groups in all slots, which follow each other.
  virtual void send_all(Sender<V>& sender, char* y) const = 0;

  bool is_alone(int row) const { return alone_[row / kLanes][row % kLanes]; }

 protected:
  Groups(int n, KindTraits of) : Columns(n), kind(of) {}

  bool is_any_alone(int group) const {
    uint64_t all[kLanes / 8], any = 0;
    static_assert(sizeof(all) == sizeof(alone_[0]), "a byte per lane");
    memcpy(all, alone_[group], sizeof(all));
    for (const uint64_t some : all) any |= some;
    return any != 0;
  }

  bool alone_[kRoom / 4][kLanes];
};

// Their terms and sums, as a function F of arguments has them.
template <class Function, bool kLow>
class LaneSums : public Groups<typename Function::V, kLow> {
 protected:
  using Columns = Groups<typename Function::V, kLow>;
  using Columns::arguments;
  using Columns::column;
  using Columns::hi_;
  using Columns::n_;
  using typename Columns::Arguments;
  using typename Columns::X;

 public:
  using F = Function;
  using V = typename F::V;
  using T = typename V::elem;
  using Columns::kLanes;
  using Columns::kRoom;
  static constexpr int kGroup = kVectorsPerGroup * kLanes;
  static constexpr bool kKeepsTerms = !std::is_same<F, Exp<V, Use::kLogarithms>>::value;

  using Columns::Columns;

  // Of rows of several groups: lanes in which a later one exceeds the reference of the first.
  void note_exceeded(int g, V largest, bool (&alone)[kLanes]) const {
    const V most = limits_of(load(reference_[g]));
    if (!any(gt(largest, most))) return;
    T x[kLanes], of[kLanes];
    store(x, largest);
    store(of, most);
    for (int i = 0; i < kLanes; ++i) alone[i] |= x[i] > of[i];
  }

  V largest(int g) const { return load(largest_[g]); }

  // The references of a group, from the maxima of its rows.
  void set_references(int g) {
    V a = V::set1(static_cast<T>(-INFINITY)), b = a;
    const Arguments argument = arguments(g);
    const int n = n_ < kGroup ? n_ : kGroup;  // of longer rows the first group's
    int j = 0;
    for (; j + 2 <= n; j += 2) {
      a = max(high(argument(j)), a);
      b = max(high(argument(j + 1)), b);
    }
    if (j < n) a = max(high(argument(j)), a);
    const V top = max(a, b), references = references_of(top);
    if (kKeepsTerms && n_ > kGroup) {  // by then terms will have taken the place of arguments
      V largest = top;
      for (j = n; j < n_; ++j) largest = max(high(argument(j)), largest);
      store(largest_[g], largest);
    }
    const ExpInLanes<V, F> exp(references);
    store(top_[g], top);
    store(reference_[g], references);
    store(magic_[g], exp.magic());
    store(floor_[g], exp.floor());
  }
  // Arguments become terms, while lines are fetched.
  void set_terms(int g, LinesAhead& ahead) {
    int j = 0;
    for (; j + kInStep <= n_; j += kInStep) {
      terms_of<kInStep>(g, j);
      ahead.step(kInStep);
    }
    if (kInStep > 2 && j + 2 <= n_) {
      terms_of<2>(g, j);
      ahead.step(2);
      j += 2;
    }
    for (; kInStep > 1 && j < n_; ++j) {
      terms_of<1>(g, j);
      ahead.step(1);
    }
  }
  // The sums of a group's rows, once their arguments are terms;
  BatchSums<V> sum(int g) const {
    BatchSums<V> sums = with_reference(g);
    add_terms(column(hi_, g, 0), sums);
    return sums;
  }
  // or those without what each row holds, and that. Each virtual lane of a row, which are elements
  // so many after each other, holds its largest argument, and the largest of all stays out of the
  // sum.
  SOFTMAXLIB_NOINLINE HeldSums<V> sum_held(int g) const {
    const F f(0);
    const int n = n_, lanes = n < kLanes ? n : kLanes;
    BatchSums<V> sums = with_reference(g);
    const auto without = [&](const Arguments& held, V largest) SOFTMAXLIB_INLINE_LAMBDA {
      return HeldSums<V>(sums, Held<V>(f, held, lanes, largest, magic(g), floor(g)));
    };
    const auto largest_of = [&](const Arguments& held) SOFTMAXLIB_INLINE_LAMBDA {
      return F::kFollows && n <= kGroup ? load(top_[g]) : held.largest(lanes);
    };
    const Arguments argument = arguments(g);
    if (n <= kLanes) return without(argument, largest_of(argument));
    X held[kLanes];
    RestOf<F> rests[kLanes];
    InLanes<V> part[8], lost[8];  // Lanes of isa/sum/sum.hpp, a vector of rows each
    SOFTMAXLIB_NO_UNROLL
    for (int i = 0; i < kLanes; ++i) held[i] = argument(i);
    for (InLanes<V>& none : part) none = in_all(0, V());
    for (InLanes<V>& none : lost) none = in_all(0, V());
    for (int from = 0; from < n; from += kGroup) {
      const int first = from == 0, count = n - from < kGroup ? n - from : kGroup;
      const int left = count - first * kLanes, more = left < kLanes ? left : kLanes;
      const Arguments group = argument.from(from);
      SOFTMAXLIB_NO_UNROLL
      for (int i = 0; i < more; i += kLanesAtOnce<F>)
        rests_of_lanes<kLanesAtOnce<F>, true>(f, group, count, first, i, magic(g), floor(g), held,
                                              held, rests);
      SOFTMAXLIB_NO_UNROLL
      for (int i = 0; i < 8 && i < more; ++i) {
        InLanes<V> x = in_double(rests[i]);
        if (i + 8 < more) x = x + in_double(rests[i + 8]);
        add_to_lane(part[i], lost[i], x);
      }
    }
    fold(part, sums);
    fold_lost(lost, sums);
    const auto in_lanes = arguments_in(held);
    return without(in_lanes, largest_of(in_lanes));
  }

 private:
  BatchSums<V> with_reference(int g) const {
    BatchSums<V> sums;
    if constexpr (F::kFollows) sums.reference = load(reference_[g]);
    return sums;
  }
  // Some at once.
  template <int N>
  SOFTMAXLIB_INLINE void terms_of(int g, int j) {
    X x[N];
    V t[N];
    const Arguments argument = arguments(g);
    for (int k = 0; k < N; ++k) x[k] = argument(j + k);
    SOFTMAX_ISA::make_terms<N>(F(0), x, magic(g), floor(g), t);
    for (int k = 0; k < N; ++k) store(column(hi_, g, j + k), t[k]);
  }

  // Terms of a whole row, a vector each, as Lanes adds them up and folds them into a Total.
  static void fold(const InLanes<f32x16> (&lane)[8], BatchSums<f32x16>& sums) {
    sums.sum = fold_eight(lane);
  }
  static void fold(const InLanes<f64x8> (&lane)[8], BatchSums<f64x8>& sums) {
    sums.sum = lane[0];
    for (int i = 1; i < 8; ++i) sums.add(lane[i]);
  }
  void add_terms(const T* terms, BatchSums<V>& sums) const {
    if (n_ > kGroup) return add_groups(terms, sums);
    if constexpr (!F::kWide && kLanes == 16)  // an element or two in each
      if (n_ <= kLanes) return void(sums.sum = fold_lanes<V>(terms, n_));
    InLanes<V> lane[8];
    SOFTMAXLIB_NO_UNROLL
    for (int i = 0; i < 8; ++i) lane[i] = i < n_ ? lane_of(terms, n_, i) : in_all(0, V());
    fold(lane, sums);
  }
  // Those of several groups.
  SOFTMAXLIB_NOINLINE void add_groups(const T* terms, BatchSums<V>& sums) const {
    InLanes<V> lane[8], lost[8];
    for (InLanes<V>& none : lost) none = in_all(0, V());
    SOFTMAXLIB_NO_UNROLL
    for (int i = 0; i < 8; ++i) lane[i] = lane_of(terms, kGroup, i);
    for (int from = kGroup; from < n_; from += kGroup) {
      const int count = n_ - from < kGroup ? n_ - from : kGroup;
      SOFTMAXLIB_NO_UNROLL
      for (int i = 0; i < 8 && i < count; ++i)
        add_to_lane(lane[i], lost[i], lane_of(terms + from * kLanes, count, i));
    }
    fold(lane, sums);
    fold_lost(lost, sums);
  }
  // What lane i has of a group of n terms.
  static SOFTMAXLIB_INLINE InLanes<V> lane_of(const T* terms, int n, int i) {
    const auto at = [=](int j) SOFTMAXLIB_INLINE_LAMBDA { return load(terms + j * kLanes); };
    if constexpr (F::kWide) {  // terms are added in double
      const auto some = [=](int j) SOFTMAXLIB_INLINE_LAMBDA {
        return j < n ? InLanes<V>::of(at(j)) : in_all(0, V());
      };
      const auto wide = [=](int j) SOFTMAXLIB_INLINE_LAMBDA {
        return j + kLanes / 2 < n ? some(j) + some(j + kLanes / 2) : some(j);
      };
      return (wide(i) + wide(i + kLanes)) + (wide(i + 2 * kLanes) + wide(i + 3 * kLanes));
    } else {
      const auto four = [=](int j) SOFTMAXLIB_INLINE_LAMBDA {
        V sum = at(j);
        if (j + kLanes < n) sum = sum + at(j + kLanes);
        if (j + 3 * kLanes < n) return sum + (at(j + 2 * kLanes) + at(j + 3 * kLanes));
        return j + 2 * kLanes < n ? sum + at(j + 2 * kLanes) : sum;
      };
      if (kLanes == 8 || i + kLanes / 2 >= n) return InLanes<V>::of(four(i));
      return InLanes<V>::of(four(i)) + InLanes<V>::of(four(i + kLanes / 2));
    }
  }

  static SOFTMAXLIB_INLINE void add_to_lane(InLanes<f32x16>& sum, InLanes<f32x16>&,
                                            InLanes<f32x16> x) {
    sum = sum + x;
  }
  static SOFTMAXLIB_INLINE void add_to_lane(InLanes<f64x8>& sum, InLanes<f64x8>& lost,
                                            InLanes<f64x8> x) {
    two_sum(sum.all, lost.all, x.all);
  }
  static void fold_lost(const InLanes<f32x16> (&)[8], BatchSums<f32x16>&) {}
  static void fold_lost(const InLanes<f64x8> (&lost)[8], BatchSums<f64x8>& sums) {
    sums.error = sums.error + fold_eight(lost);
  }

  SOFTMAXLIB_INLINE V magic(int g) const { return F::kFollows ? load(magic_[g]) : V::set1(0); }
  SOFTMAXLIB_INLINE V floor(int g) const { return F::kFollows ? load(floor_[g]) : V::set1(0); }

  alignas(64) T reference_[kRoom / 4][kLanes], magic_[kRoom / 4][kLanes];
  alignas(64) T floor_[kRoom / 4][kLanes], top_[kRoom / 4][kLanes];
  alignas(64) T largest_[kKeepsTerms ? 4 : 1][kLanes];  // of rows of several groups
};

// What a kind computes of them. The groups go through the phases one after the other: the chain of
// a single group's maximum, exponentials, sum and reciprocal would be too long.
template <class P, bool kLow>
class LaneGroups final : public LaneSums<typename P::F, kLow> {
  using Sums = LaneSums<typename P::F, kLow>;
  using Sums::alone_;
  using Sums::arguments;
  using Sums::column;
  using Sums::hi_;
  using Sums::is_any_alone;
  using Sums::n_;

 public:
  using Sums::kLanes;
  using Sums::kRoom;
  using typename Sums::F;
  using typename Sums::T;
  using typename Sums::V;

  // counts: rows may have a single argument that is not -inf. Its result must be exactly 1, so
  // arguments are counted.
  LaneGroups(int n, bool counts) : Sums(n, kind_of<P>()), counts_(P::kOneIsOne && counts) {}

  void begin(int group, const RowRun& run, int first, int rows) override {
    if constexpr (P::kTargets) of_[group].begin(run, first, rows);
  }
  void start(int g) override {
    if constexpr (F::kFollows) this->set_references(g);
    if constexpr (P::kOneIsOne)
      if (counts_) store(seen_[g], count(g));
  }
  void make_terms(int g, LinesAhead& ahead) override {
    if constexpr (P::kHolds) ahead.step(n_);
    else this->set_terms(g, ahead);
  }
  bool finish(int g) override {
    memset(alone_[g], 0, sizeof(alone_[g]));
    if constexpr (P::kHolds) {
      const HeldSums<V> sums = this->sum_held(g);
      if constexpr (F::kFollows)
        if (n_ > Sums::kGroup) this->note_exceeded(g, sums.held.hi, alone_[g]);
      if constexpr (P::kTargets) of_[g].finish(sums, alone_[g], this->elements(g));
      else of_[g].finish(sums, alone_[g]);
    } else {
      if constexpr (F::kFollows)
        if (n_ > Sums::kGroup) this->note_exceeded(g, this->largest(g), alone_[g]);
      of_[g].finish(this->sum(g), alone_[g]);
      if constexpr (P::kOneIsOne) {
        if (counts_) memset(may_be_one_[g], 0, sizeof(may_be_one_[g]));
        if (counts_ && any(eq(load(seen_[g]), V::set1(1)))) check_ones(g, load(seen_[g]));
      }
    }
    return !is_any_alone(g);
  }
  bool settle(int g, const Job& job, const char* where, int64_t step, int rows) override {
    const int64_t stride = job.inner[0].stride[kWhere];
    for (int r = 0; r < rows && r < kLanes; ++r, where += step) {
      if (!alone_[g][r]) continue;
      int sees = 0, last = 0;
      for (int j = 0; j < n_ && sees < 2; ++j)
        if (where[j * stride]) ++sees, last = j;
      if constexpr (P::kOneIsOne)
        if (sees == 1 && may_be_one_[g][r]) {
          column(hi_, g, last)[r] = of_[g].scale[r] = 1;
          alone_[g][r] = false;
        }
      if (sees || !of_[g].see_nothing(r)) continue;
      if constexpr (P::kOneIsOne)  // that of one element may be 1 by now
        column(hi_, g, 0)[r] = 0;
      alone_[g][r] = false;
    }
    return !is_any_alone(g);
  }
  void store_results(int group, T* y, int64_t stride) override {
    if constexpr (P::kReduces) {
      return;
    } else if constexpr (P::kHolds) {
      resolve(group);
      this->store_rows(group, V::set1(1), y, stride);
    } else {
      this->store_rows(group, load(of_[group].scale), y, stride);
    }
  }
  void send(int g, Sender<V>& sender, char* y, int rows) const override {
    if constexpr (!P::kReduces)
      sender.template put_strip<1>(
          y, rows, n_, [result = results(g)](int j, auto some, V* to) SOFTMAXLIB_INLINE_LAMBDA {
            for (int k = 0; k < some; ++k) to[k] = result(j + k);
          });
  }
  void send_all(Sender<V>& sender, char* y) const override {
    if constexpr (P::kHolds && F::kFollows && !P::kReduces && !P::kTargets && !kLow)
      sender.put_strips(y, results(0), results(1), results(2), results(3));
  }

 private:
  // A function of j: result j of a group's rows.
  SOFTMAXLIB_INLINE auto results(int group) const {
    if constexpr (P::kHolds) {
      return [argument = arguments(group), result = of_[group].results()](int j)
                 SOFTMAXLIB_INLINE_LAMBDA { return result(argument(j), j); };
    } else {
      return [terms = column(hi_, group, 0), scale = load(of_[group].scale)](int j)
                 SOFTMAXLIB_INLINE_LAMBDA { return load(terms + j * kLanes) * scale; };
    }
  }
  // Results take the place of arguments.
  SOFTMAXLIB_NOINLINE void resolve(int group) {
    const auto result = results(group);
    T* const to = column(hi_, group, 0);
    for (int j = 0, n = n_; j < n; ++j) store(to + j * kLanes, result(j));
  }

  // A row that sees one element, which then is 1: whether others are -inf or not seen has to be
  // looked up where p times the rounded 1 / p is not.
  SOFTMAXLIB_NOINLINE void check_ones(int g, V seen) {
    V top = V::set1(0);
    const auto result = results(g);
    for (int j = 0; j < n_; ++j) top = max(top, result(j));
    T counts[kLanes], largest[kLanes];
    store(counts, seen);
    store(largest, top);
    SOFTMAXLIB_NO_UNROLL
    for (int i = 0; i < kLanes; ++i) {
      may_be_one_[g][i] = counts[i] == 1 && largest[i] != 1 && !alone_[g][i];
      alone_[g][i] |= may_be_one_[g][i];
    }
  }

  SOFTMAXLIB_NOINLINE V count(int g) const {
    V seen = V::set1(0);
    for (int j = 0; j < n_; ++j)
      seen = seen + select(eq(high(arguments(g)(j)), V::set1(static_cast<T>(-INFINITY))),
                           V::set1(0), V::set1(1));
    return seen;
  }

  const bool counts_;
  alignas(64) T seen_[kRoom / 4][kLanes];    // how many elements of a row are not -inf
  bool may_be_one_[kRoom / 4][kLanes] = {};  // only one is not, and nothing else is wrong
  P of_[kRoom / 4];
};

}  // namespace
}  // namespace SOFTMAX_ISA
}  // namespace softmaxlib
