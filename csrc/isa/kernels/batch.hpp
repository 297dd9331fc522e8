// Many rows of up to a chunk, a batch at a time, so that no row waits for the chain of its own
// maximum, sum and reciprocal or logarithm: these are taken for all rows of a batch at once, a row
// per lane. While the terms of a batch are summed, the results of the one before leave.
//
// The kernels see tiles (isa/stage/stage_rows.hpp): what they compute depends neither on the
// storage of x and y, nor on their layout, nor on options. The bits are those of isa/sum/sum.hpp. A
// row that needs more than a batch does for it (NaN, infinite, far from 0, steep, one element) is
// computed alone.
#pragma once

#include "isa/kernels/kinds.hpp"
#include "registry/registry.hpp"

namespace softmaxlib {
namespace SOFTMAX_ISA {
namespace {

// The sums of as many rows as a vector has lanes, each still in its Lanes.
template <class V>
class LanesOfRows {
 public:
  SOFTMAXLIB_INLINE void keep(int r, const Lanes<V>& lanes) { keep(r, lanes, V()); }
  // All of them, as Lanes::fold_into() makes them.
  LaneTotals<V> totals() const {
    f64x8 a[8], b[8];
    load_columns(sums_[0], 8, a);
    load_columns(sums_[8], 8, b);
    LaneTotals<V> totals;
    fold(a, b, totals);
    return totals;
  }

 private:
  // Floats: eight rows' sums, then the others'. Doubles: sums, then errors.
  SOFTMAXLIB_INLINE void keep(int r, const Lanes<f32x16>& lanes, f32x16) {
    store(sums_[r], lanes.sum);
  }
  SOFTMAXLIB_INLINE void keep(int r, const Lanes<f64x8>& lanes, f64x8) {
    store(sums_[r], lanes.sum);
    store(sums_[8 + r], lanes.error);
  }
  static void fold(const f64x8 (&a)[8], const f64x8 (&b)[8], LaneTotals<f32x16>& totals) {
    totals.sum = {fold_eight(a), fold_eight(b)};
  }
  static void fold(const f64x8 (&a)[8], const f64x8 (&b)[8], LaneTotals<f64x8>& totals) {
    totals.sum.all = a[0];
    for (int i = 1; i < 8; ++i) totals.add({a[i]});
    totals.error.all = totals.error.all + fold_eight(b);
  }

  alignas(64) double sums_[16][8];
};

// Rows of a batch, whatever is computed of them: run_batches() is compiled once for all kinds. X:
// V, or Pair<V> for arguments of two parts.
template <class Vector, class X>
class RowsOfBatch {
 public:
  using V = Vector;
  using T = typename V::elem;
  static constexpr int kLanes = V::lanes, kGroup = kVectorsPerGroup * kLanes;
  static constexpr bool kLow = sizeof(X) > sizeof(V);
  // A part of the first level cache. With second parts it is larger, although the second level
  // cache then serves some of it: what is done once per batch is shared by more rows.
  static constexpr int kRoom = kVectorsPerChunk * (kLow ? 6 : 3) * kLanes;

  // room: for as many rows as a vector has lanes (batch_room() of job.hpp), where a part of the
  // first level cache does not do: rows that are transposed come so many at a time. Or NULL.
  // in_place: x is read and results are written where they are, so that rows whose terms are not
  // stored need no room.
  void set_room(T* room, bool in_place) {
    const bool all = room || (kind_.holds && in_place) || kRoom / pitch_ >= kLanes;
    most_ = all ? kLanes : static_cast<int>(kRoom / pitch_);
    e_ = (room ? room : room_) + kLanes;
  }

  int most() const { return most_; }
  int rows() const { return rows_; }

  // Rows from `first` on, all at one distance from each other: as they are, where there is no
  // stager, or through the tile.
  SOFTMAXLIB_NOINLINE void begin(const RowRun& run, int64_t first, int rows, Stager<V>* stager,
                                 T* low) {
    first_ = first, rows_ = rows;
    y_ = run.job.base[kOut] + run.place.offset[kOut], y_stride_ = run.step.stride[kOut];
    is_staged_ = stager != nullptr;
    x_ = run.job.base[kX] + run.place.offset[kX], stride_ = run.step.stride[kX];
    int visible[kLanes] = {};
    if (stager) {
      x_ = reinterpret_cast<const char*>(e_), low_ = low;
      stride_ = pitch_ * static_cast<int64_t>(sizeof(T));
      if (pitch_ == n_ && stager->is_even(run)) stager->fetch_even(run, rows, e_, low, visible);
      else stager->fetch(run, rows, e_, low, pitch_, visible);
    }
    memset(alone_, 0, sizeof(alone_));
    if (kind_.one_is_one && stager)  // rows that see one element are alone
      for (int r = 0; r < rows; ++r) alone_[r] = visible[r] == 1;
    start(run);
  }
  using Alone = void (*)(const Job& job, int64_t row);
  // The terms of all rows and their sums per lane, while the rows of the batch before leave.
  virtual void compute(const Job& job, RowsOfBatch& before, Sender<V>& sender, Alone alone) = 0;
  // Once all rows are summed.
  SOFTMAXLIB_NOINLINE void finish(const Sender<V>& sender) {
    follow();
    bool any_alone = false;
    for (int r = 0; r < rows_; ++r) any_alone |= alone_[r];
    const bool kept = !kind_.holds, collects = sender.collects();
    // Second parts do not wait: those of the next batch take their place.
    if (kind_.reduces || (!kept && kLow && !collects)) leave_ = Leave::kOut;
    else if (!kept && !collects) leave_ = Leave::kResolved;
    else leave_ = sender.sends_squares() && !any_alone ? Leave::kTogether : Leave::kByRow;
    if (kept || kind_.reduces || leave_ == Leave::kResolved) return;
    for (int r = 0; r < rows_; ++r)
      if (!alone_[r]) resolve(r, collects ? e_ + r * pitch_ : place_of(r));
  }
  // What is left to do once row r is summed; alone(row) computes one by itself.
  SOFTMAXLIB_INLINE void put(const Job& job, int r, Sender<V>& sender, Alone alone) {
    if (SOFTMAXLIB_UNLIKELY(alone_[r])) {
      sender.finish();
      alone(job, first_ + r);
    } else if (leave_ == Leave::kByRow) {
      sender.put(y_ + r * y_stride_, e_ + r * pitch_, scales_ ? scales_[r] : 1);
    } else if (leave_ == Leave::kResolved) {
      resolve(r, place_of(r));
    } else if (leave_ == Leave::kTogether && r == 0) {
      sender.put_squares(y_, e_, pitch_, rows_, scales_);
    }
  }

 protected:
  RowsOfBatch(int64_t n, KindTraits kind)
      : n_(n), pitch_((n + kLanes - 1) / kLanes * kLanes), kind_(kind) {}

  // The references of all rows.
  virtual void start(const RowRun& run) = 0;
  // What follows from the sums.
  virtual void follow() = 0;
  // The results of row r, where terms are not kept.
  virtual void resolve(int r, T* y) const = 0;

  const T* row(int r) const { return reinterpret_cast<const T*>(x_ + r * stride_); }
  // The elements of a row: up to a vector from i on, -inf beyond. A copy of where they are, which
  // no store can change.
  struct ArgumentsOfRow {
    const T *hi, *lo;
    bool is_staged;  // a tile has elements up to the pitch

    SOFTMAXLIB_INLINE X operator()(int64_t i, int64_t count) const {
      if (kLow || count >= kLanes || is_staged) return at(i, X());
      X some;
      const V x = load_n(hi + i, static_cast<int>(count), static_cast<T>(-INFINITY));
      from_pair(Pair<V>{x, V::set1(0)}, some);
      return some;
    }

   private:
    SOFTMAXLIB_INLINE V at(int64_t i, V) const { return load(hi + i); }
    SOFTMAXLIB_INLINE Pair<V> at(int64_t i, Pair<V>) const { return {load(hi + i), load(lo + i)}; }
  };
  SOFTMAXLIB_INLINE ArgumentsOfRow arguments(int r) const {
    return {row(r), kLow ? low_ + r * pitch_ : nullptr, is_staged_};
  }
  // What comes later, while x is read for the first time.
  SOFTMAXLIB_INLINE void fetch(const T* x) const {
    if constexpr (!kLow) fetch_(reinterpret_cast<const char*>(x) + kBatchPrefetchBytes);
  }
  ElementsOfRows<T> elements() const {
    constexpr int64_t kItem = sizeof(T);
    return {x_, stride_, kItem, reinterpret_cast<const char*>(kLow ? low_ : nullptr),
            pitch_ * kItem};
  }
  const int64_t n_, pitch_;
  const KindTraits kind_;
  const FetchAhead fetch_ = FetchAhead();
  int most_ = 0;
  T* e_ = nullptr;
  int64_t first_ = 0, stride_ = 0, y_stride_ = 0;
  int rows_ = 0;
  const char* x_ = nullptr;
  char* y_ = nullptr;
  const T* low_ = nullptr;
  bool alone_[kLanes], is_staged_ = false;
  const T* scales_ = nullptr;  // of each row; NULL: 1

 private:
  T* place_of(int r) const { return reinterpret_cast<T*>(y_ + r * y_stride_); }

  // How results leave: they are out already, each row's are made then, row by row, all at once.
  enum class Leave { kOut, kResolved, kByRow, kTogether };
  Leave leave_ = Leave::kOut;
  alignas(64) T room_[kLanes + kRoom + kLanes];  // an outbox reads around what it takes
};

// Their terms, as a function of arguments has them. kHold: each lane holds its largest argument out
// of its sum.
template <class Function, class X, bool kHold>
class BatchTerms : public RowsOfBatch<typename Function::V, X> {
 protected:
  using F = Function;
  using V = typename F::V;
  using T = typename V::elem;
  using Rows = RowsOfBatch<V, X>;
  using Rows::alone_;
  using Rows::arguments;
  using Rows::e_;
  using Rows::fetch;
  using Rows::kGroup;
  using Rows::kLanes;
  using Rows::kLow;
  using Rows::n_;
  using Rows::pitch_;
  using Rows::rows_;
  using typename Rows::ArgumentsOfRow;

 public:
  using Rows::Rows;

  void compute(const Job& job, Rows& before, Sender<V>& sender,
               typename Rows::Alone alone) override {
    const F f(0);
    for (int r = 0; r < rows_ || r < before.rows(); ++r) {
      if (r < rows_) compute(f, r);
      if (r < before.rows()) before.put(job, r, sender, alone);
    }
  }

 private:
  // Of row r.
  SOFTMAXLIB_INLINE void compute(const F& f, int r) {
    T* const e = e_ + r * pitch_;
    const V magic = V::set1(magic_[r]), floor = V::set1(floor_[r]);
    V top = V::set1(static_cast<T>(-INFINITY));
    X held;
    from_pair(Pair<V>{top, V::set1(0)}, held);
    Lanes<V> lanes;
    const ArgumentsOfRow x = arguments(r);
    int64_t i = 0;
    for (; i + kGroup <= n_; i += kGroup) {
      X v[4];
      V t[4];
      for (int j = 0; j < 4; ++j) {
        fetch(x.hi + i + j * kLanes);
        v[j] = x(i + j * kLanes, kLanes);
      }
      if (F::kFollows && !kHold && i > 0)
        top = max(max_of(high(v[0]), high(v[1]), high(v[2]), high(v[3])), top);
      if constexpr (kHold)
        for (int j = 0; j < 4; ++j) v[j] = hold(held, v[j]);
      for (int j = 0; j < 4; j += kInStep) {
        if (kHold && i == 0 && j == 0) {
          t[0] = nothing(v[0]);
          for (int k = 1; k < kInStep; ++k) evaluate<1>(f, v + k, magic, floor, t + k);
        } else {
          evaluate<kInStep>(f, v + j, magic, floor, t + j);
        }
      }
      if constexpr (!kHold)
        for (int j = 0; j < 4; ++j) store(e + i + j * kLanes, t[j]);
      add_terms<F>(lanes, t[0], t[1], t[2], t[3]);
    }
    if (i < n_) {
      const int64_t n = n_;
      V t[4];
      for (V& none : t) none = V::set1(0);
      SOFTMAXLIB_NO_UNROLL
      for (int j = 0; i < n; ++j, i += kLanes) {
        fetch(x.hi + i);
        X v = x(i, n - i);
        if constexpr (kHold) v = hold(held, v);
        else top = max(high(v), top);
        if (kHold && i == 0) t[j] = nothing(v);
        else evaluate<1>(f, &v, magic, floor, t + j);
        if constexpr (!kHold) store(e + i, t[j]);
      }
      add_terms<F>(lanes, t[0], t[1], t[2], t[3]);
    }
    // A later group may exceed the reference. What lanes hold is the largest of all.
    if constexpr (kHold) top = high(held);
    if (F::kFollows && n_ > kGroup) alone_[r] |= any(gt(top, V::set1(limit_[r])));
    if constexpr (kHold) {
      if (!holds_tops()) store(held_[r], high(held));
      if constexpr (kLow) store(held_low_[r], held.lo);
    }
    lanes_.keep(r, lanes);
  }

 protected:
  // From the maximum of each first group.
  SOFTMAXLIB_NOINLINE void set_references() {
    for (int r = rows_; r < kLanes; ++r) {  // lanes without a row
      Lanes<V> one;
      one.sum = f64x8::set1(1);
      lanes_.keep(r, one);
      store(held_[r], V::set1(0));
      if constexpr (kLow) store(held_low_[r], V::set1(0));
    }
    if constexpr (F::kFollows) {
      alignas(64) T tops[kLanes][kLanes];
      for (int r = 0; r < rows_; ++r) {
        V top = V::set1(static_cast<T>(-INFINITY));
        const ArgumentsOfRow x = arguments(r);
        if (n_ >= kGroup) {
          V v[4];
          for (int j = 0; j < 4; ++j) {
            fetch(x.hi + j * kLanes);
            v[j] = load(x.hi + j * kLanes);
          }
          top = max_of(v[0], v[1], v[2], v[3]);
        } else {
          for (int64_t i = 0, n = n_; i < n; i += kLanes) {
            fetch(x.hi + i);
            top = max(high(x(i, n - i)), top);
          }
        }
        store(tops[r], top);
      }
      for (int r = rows_; r < kLanes; ++r) store(tops[r], V::set1(0));
      V top = V::set1(static_cast<T>(-INFINITY));
      for (int j = 0; j < kLanes; j += 8) {
        V c[8];
        load_columns(tops[0] + j, kLanes, c);
        top = max(max(max_of(c[0], c[1], c[2], c[3]), max_of(c[4], c[5], c[6], c[7])), top);
        for (int k = 0; kKeepsTops && k < 8; ++k) store(tops_[j + k], c[k]);
      }
      const V references = references_of(top);
      const ExpInLanes<V, F> exp(references);
      store(reference_, references);
      store(magic_, exp.magic());
      store(floor_, exp.floor());
      store(limit_, limits_of(references));
    } else {
      for (int r = 0; r < kLanes; ++r) reference_[r] = magic_[r] = floor_[r] = 0;
    }
  }
  SOFTMAXLIB_NOINLINE BatchSums<V> sums() const { return {lanes_.totals(), load(reference_)}; }
  SOFTMAXLIB_NOINLINE HeldSums<V> held_sums() const {
    X columns[kLanes];
    columns_of_held(columns);
    const auto held = arguments_in(columns);
    const V largest = held.largest(kLanes);
    return {sums(), Held<V>(F(0), held, kLanes, largest, load(magic_), load(floor_))};
  }

 private:
  // The terms of a row's first vector, all of which is held: 0, but a NaN is summed, not held.
  static SOFTMAXLIB_INLINE V nothing(X unheld) { return max(V::set1(0), high(unheld)); }
  template <int N>
  static SOFTMAXLIB_INLINE void evaluate(const F& f, const X* x, V magic, V floor, V* t) {
    if constexpr (F::kFollows) f.template evaluate<N>(x, magic, floor, t);
    else f.template evaluate<N>(x, t);
  }

  // Whether what lanes hold in the end is known from the start, of rows of up to a group.
  bool holds_tops() const { return kKeepsTops && n_ <= kGroup; }
  // What the rows hold, a vector of rows for each lane.
  void columns_of_held(X (&column)[kLanes]) const {
    V low[8];
    for (int j = 0; j < kLanes; j += 8) {
      V hi[8];
      if (!holds_tops()) load_columns(held_[0] + j, kLanes, hi);
      for (int k = 0; holds_tops() && k < 8; ++k) hi[k] = load(tops_[j + k]);
      if constexpr (kLow) load_columns(held_low_[0] + j, kLanes, low);
      for (int k = 0; k < 8; ++k)
        from_pair(Pair<V>{hi[k], kLow ? low[k] : V::set1(0)}, column[j + k]);
    }
  }

  alignas(64) T reference_[kLanes], magic_[kLanes], floor_[kLanes], limit_[kLanes];
  LanesOfRows<V> lanes_;
  static constexpr bool kKeepsTops = kHold && F::kFollows;
  alignas(64) T tops_[kKeepsTops ? kLanes : 1][kLanes];  // of first groups, a vector of rows each
  alignas(64) T held_[kLanes][kLanes];
  alignas(64) T held_low_[kLow ? kLanes : 1][kLanes];
};

// What a kind computes of them.
template <class P, class X>
class Batch final : public BatchTerms<typename P::F, X, P::kHolds> {
  using Terms = BatchTerms<typename P::F, X, P::kHolds>;
  using Terms::alone_;
  using Terms::n_;
  using Terms::rows_;

 public:
  using Terms::kLanes;
  using typename Terms::T;
  using typename Terms::V;

  explicit Batch(int64_t n) : Terms(n, kind_of<P>()) {}

 private:
  void start(const RowRun& run) override {
    if constexpr (P::kTargets) of_.begin(run, 0, rows_);
    this->set_references();
  }
  void follow() override {
    if constexpr (P::kTargets) {
      of_.finish(this->held_sums(), alone_, this->elements());
    } else if constexpr (P::kHolds) {
      of_.finish(this->held_sums(), alone_);
    } else {
      of_.finish(this->sums(), alone_);
      this->scales_ = of_.scale;
    }
  }
  void resolve(int r, T* y) const override {
    if constexpr (P::kHolds && !P::kReduces) {
      const auto result = of_.result(r);
      const auto x = this->arguments(r);
      const int64_t n = n_;
      int64_t i = 0;
      for (; i + kLanes <= n; i += kLanes) store(y + i, result(x(i, kLanes)));
      if (i < n && y == this->e_ + r * this->pitch_) store(y + i, result(x(i, n - i)));
      else if (i < n) store_n(y + i, result(x(i, n - i)), static_cast<int>(n - i));
      if constexpr (P::kTargets) of_.put_target(r, y);
    }
  }

  P of_;
};

// By itself, as all rows can be computed.
template <class D>
SOFTMAXLIB_NOINLINE void compute_alone(const Job& job, int64_t row,
                                       void (*function)(const Row<D>&)) {
  int32_t one_block[kVectorsPerBlock / kVectorsPerChunk];
  const Rows at(job, row);
  const Row<D> alone(job, at.place, nullptr, one_block);
  const auto masked = static_cast<typename Row<D>::T>(masked_result(job.function));
  if (job.base[kWhere] && count_visible(job, at.place, job.n, 1) == 0) {
    if (job.reduces) return alone.put_first(masked);
    return alone.fill_from(0, masked, job.n);
  }
  function(alone);
  if (job.causal && !job.reduces) alone.fill_beyond(masked);
}

// is_direct: x is read where it is. now, before: of one kind.
template <class V, class X>
SOFTMAXLIB_NOINLINE void run_batches(const Job& job, RowsOfBatch<V, X>* now,
                                     RowsOfBatch<V, X>* before, bool is_direct, int64_t row,
                                     int64_t stop, char* scratch,
                                     void (*alone)(const Job& job, int64_t row)) {
  using B = RowsOfBatch<V, X>;
  using T = typename V::elem;
  Sender<V> sender(job);
  Stager<V> stager(job);
  [[maybe_unused]] alignas(64) T some[B::kLow ? B::kRoom : 1];
  const auto room = [&](int i) {
    return job.tile ? reinterpret_cast<T*>(scratch + i * batch_room(job)) : nullptr;
  };
  T* const low = !B::kLow ? nullptr : job.tile ? room(2) : some;
  const bool in_place = is_direct && !sender.collects();
  now->set_room(room(0), in_place);
  before->set_room(room(1), in_place);
  // While the rows of one are computed, those of the one before leave; behind the last there is
  // none.
  RowRun run(job, row);
  for (bool more = true; more;) {
    more = row < stop;
    int64_t rows = !more ? 0 : run.rows < stop - row ? run.rows : stop - row;
    if (rows > now->most()) rows = now->most();
    now->begin(run, row, static_cast<int>(rows), is_direct ? nullptr : &stager, low);
    now->compute(job, *before, sender, alone);
    if (more) {
      now->finish(sender);
      row += rows;
      run.advance(rows);
    }
    B* const next = before;
    before = now;
    now = next;
  }
  sender.finish();
}

template <class P, class X>
inline void run_batches(const Job& job, bool is_direct, int64_t start, int64_t stop, char* scratch,
                        void (*alone)(const Job& job, int64_t row)) {
  Batch<P, X> one(job.n), other(job.n);
  run_batches<typename P::V, X>(job, &one, &other, is_direct, start, stop, scratch, alone);
}
template <class P>
inline void run_any_batches(const Job& job, int64_t start, int64_t stop, char* scratch,
                            void (*alone)(const Job& job, int64_t row)) {
  using V = typename P::V;
  const bool wide = job.dtype[kX] == SOFTMAXLIB_F32 || job.dtype[kX] == SOFTMAXLIB_F64;
  const bool is_direct = job.direct && wide && !job.causal;
  if (!job.has_low) run_batches<P, V>(job, is_direct, start, stop, scratch, alone);
  else run_batches<P, Pair<V>>(job, false, start, stop, scratch, alone);
}

}  // namespace
}  // namespace SOFTMAX_ISA
}  // namespace softmaxlib
