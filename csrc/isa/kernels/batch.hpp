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
  void fold(InLanes<V>& sum, InLanes<V>& error) const {
    f64x8 a[8], b[8];
    load_columns(sums_[0][0], 8, a);
    load_columns(sums_[1][0], 8, b);
    error = in_all(0, V());
    fold(a, b, sum, error);
  }
  InLanes<V> total() const {
    InLanes<V> sum, error;
    fold(sum, error);
    return sum + error;
  }

 private:
  // Floats: eight rows' sums, then the others'. Doubles: sums, then errors.
  SOFTMAXLIB_INLINE void keep(int r, const Lanes<f32x16>& lanes, f32x16) {
    store(sums_[r / 8][r % 8], lanes.sum);
  }
  SOFTMAXLIB_INLINE void keep(int r, const Lanes<f64x8>& lanes, f64x8) {
    store(sums_[0][r], lanes.sum);
    store(sums_[1][r], lanes.error);
  }
  static void fold(const f64x8 (&a)[8], const f64x8 (&b)[8], InLanes<f32x16>& sum,
                   InLanes<f32x16>&) {
    sum = {fold_eight(a), fold_eight(b)};
  }
  static void fold(const f64x8 (&a)[8], const f64x8 (&b)[8], InLanes<f64x8>& sum,
                   InLanes<f64x8>& error) {
    sum.all = a[0];
    for (int i = 1; i < 8; ++i) two_sum(sum.all, error.all, a[i]);
    error.all = error.all + fold_eight(b);
  }

  alignas(64) double sums_[2][8][8];
};

// One element of memory that may not be aligned.
template <class T>
inline T element_at(const T* p, int64_t i) {
  T x;
  memcpy(&x, p + i, sizeof(x));
  return x;
}

// Rows of a batch and their terms, as a function of arguments has them. X: V, or Pair<V> for
// arguments of two parts. kHold: each lane holds its largest argument out of its sum.
template <class Function, class X, bool kHold>
class BatchTerms {
 public:
  using F = Function;
  using V = typename F::V;
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
  BatchTerms(int64_t n, T* room, bool in_place)
      : n_(n),
        pitch_((n + kLanes - 1) / kLanes * kLanes),
        most_(room || (kHold && in_place) || kRoom / pitch_ >= kLanes
                  ? kLanes
                  : static_cast<int>(kRoom / pitch_)),
        e_((room ? room : room_) + kLanes) {}

  int most() const { return most_; }
  int rows() const { return rows_; }

  // Rows from `first` on, all at one distance from each other: as they are, where there is no
  // stager, or through the tile. one_is_one: those of one element are computed alone.
  SOFTMAXLIB_NOINLINE void begin(const RowRun& run, int64_t first, int rows, bool one_is_one,
                                 Stager<V>* stager, T* low) {
    first_ = first, rows_ = rows;
    y_ = run.job.base[kOut] + run.place.offset[kOut], y_stride_ = run.step.stride[kOut];
    is_staged_ = stager != nullptr;
    x_ = run.job.base[kX] + run.place.offset[kX], stride_ = run.step.stride[kX];
    int visible[kLanes];
    for (int& v : visible) v = n_ == 1 ? 1 : 2;
    if (stager) {
      x_ = reinterpret_cast<const char*>(e_), low_ = low;
      stride_ = pitch_ * static_cast<int64_t>(sizeof(T));
      if (pitch_ == n_ && stager->is_even(run)) stager->fetch_even(run, rows, e_, low, visible);
      else stager->fetch(run, rows, e_, low, pitch_, visible);
    }
    for (int r = 0; r < rows; ++r) alone_[r] = one_is_one && visible[r] == 1;
    start();
  }

  // The terms of row r of the batch, and their sums per lane.
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
  Pair<T> element(int r, int64_t j) const {
    return {element_at(row(r), j), kLow ? low_[r * pitch_ + j] : T(0)};
  }
  SOFTMAXLIB_NOINLINE BatchSums<V> sums() const {
    BatchSums<V> sums;
    sums.reference = load(reference_);
    lanes_.fold(sums.sum, sums.error);
    return sums;
  }
  SOFTMAXLIB_NOINLINE HeldSums<V> held_sums() const {
    X columns[kLanes];
    columns_of_held(columns);
    HeldSums<V> all = {sums(), {F(0), columns, kLanes, load(magic_), load(floor_)}};
    two_sum(all.sums.sum, all.sums.error, all.top.others);
    return all;
  }

  const int64_t n_, pitch_;
  const FetchAhead fetch_ = FetchAhead();
  const int most_;
  T* const e_;
  int64_t first_ = 0, stride_ = 0, y_stride_ = 0;
  int rows_ = 0;
  const char* x_ = nullptr;
  char* y_ = nullptr;
  const T* low_ = nullptr;
  bool alone_[kLanes], is_staged_ = false;

 private:
  // The terms of a row's first vector, all of which is held: 0, but a NaN is summed, not held.
  static SOFTMAXLIB_INLINE V nothing(X unheld) { return max(V::set1(0), high(unheld)); }
  template <int N>
  static SOFTMAXLIB_INLINE void evaluate(const F& f, const X* x, V magic, V floor, V* t) {
    if constexpr (F::kFollows) f.template evaluate<N>(x, magic, floor, t);
    else f.template evaluate<N>(x, t);
  }

  // The references of all rows, from the maximum of each first group.
  void start() {
    for (int r = rows_; r < kLanes; ++r) {  // lanes without a row
      alone_[r] = false;
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
      const InLanes<V> references = references_of(top);
      const ExpInLanes<V, F> exp(references);
      store(reference_, references.value());
      store(magic_, exp.magic());
      store(floor_, exp.floor());
      const auto limit = [](f64x8 r) { return (r + f64x8::set1(kSlack)) * f64x8::set1(kLn2Hi); };
      store(limit_, references.map(limit).value());
    } else {
      for (int r = 0; r < kLanes; ++r) reference_[r] = magic_[r] = floor_[r] = 0;
    }
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

  alignas(64) T room_[kLanes + kRoom + kLanes];  // an outbox reads around what it takes
  alignas(64) T reference_[kLanes], magic_[kLanes], floor_[kLanes], limit_[kLanes];
  LanesOfRows<V> lanes_;
  static constexpr bool kKeepsTops = kHold && F::kFollows;
  alignas(64) T tops_[kKeepsTops ? kLanes : 1][kLanes];  // of first groups, a vector of rows each
  alignas(64) T held_[kLanes][kLanes];
  alignas(64) T held_low_[kLow ? kLanes : 1][kLanes];
};

// What a kind computes of them.
template <class P, class X>
class Batch : public BatchTerms<typename P::F, X, P::kHolds> {
  using Terms = BatchTerms<typename P::F, X, P::kHolds>;
  using Terms::alone_;
  using Terms::e_;
  using Terms::n_;
  using Terms::pitch_;
  using Terms::rows_;
  using Terms::y_;
  using Terms::y_stride_;

 public:
  using Terms::kLanes;
  using Terms::kLow;
  using Terms::Terms;
  using typename Terms::F;
  using typename Terms::T;
  using typename Terms::V;

  void begin(const RowRun& run, int64_t first, int rows, Stager<V>* stager, T* low) {
    Terms::begin(run, first, rows, P::kOneIsOne, stager, low);
    if constexpr (P::kTargets) of_.begin(run, 0, rows);
  }

  SOFTMAXLIB_NOINLINE void finish(const Sender<V>& sender) {
    if constexpr (P::kHolds) {
      const HeldSums<V> all = this->held_sums();
      if constexpr (P::kTargets) {
        const auto element = [this](int r, int64_t j)
                                 SOFTMAXLIB_INLINE_LAMBDA { return this->element(r, j); };
        of_.finish(all.sums, all.top, alone_, element);
      } else {
        of_.finish(all.sums, all.top, alone_);
      }
      // Second parts do not wait: those of the next batch take their place.
      const bool collects = sender.collects();
      waits_ = !kLow && !collects;
      is_out_ = kLow && !collects;
      for (int r = 0; !P::kReduces && !waits_ && r < rows_; ++r) {
        if (alone_[r]) continue;
        if (is_out_) put_each(r, sender);
        else resolve(r);
      }
    } else {
      of_.finish(this->sums(), alone_);
    }
    any_alone_ = false;
    for (int r = 0; r < rows_; ++r) any_alone_ |= alone_[r];
  }

  // What is left to do once row r is summed; alone(row) computes one by itself.
  template <class Alone>
  SOFTMAXLIB_INLINE void put(const Job& job, int r, Sender<V>& sender, Alone alone) {
    if (SOFTMAXLIB_UNLIKELY(alone_[r])) {
      sender.finish();
      alone(job, this->first_ + r);
    } else if (P::kReduces || is_out_) {
      return;  // finish() has written it
    } else if (P::kHolds && waits_) {
      put_each(r, sender);
    } else if (!sender.sends_squares() || any_alone_) {
      sender.put(y_ + r * y_stride_, e_ + r * pitch_, scale(r));
    } else if (r == 0) {
      alignas(64) T scales[kLanes];
      for (int i = 0; i < rows_; ++i) scales[i] = scale(i);
      sender.put_squares(y_, e_, pitch_, rows_, scales);
    }
  }

 private:
  // The results of row r in the tile, for the sender;
  SOFTMAXLIB_INLINE void resolve(int r) {
    if constexpr (P::kHolds && !P::kReduces) {
      T* const e = e_ + r * pitch_;
      const auto result = of_.result(r);
      const auto x = this->arguments(r);
      for (int64_t i = 0, n = n_; i < n; i += kLanes) store(e + i, result(x(i, n - i)));
      if constexpr (P::kTargets) of_.put_target(r, e);
    }
  }
  // or where they go to.
  SOFTMAXLIB_INLINE void put_each(int r, const Sender<V>& sender) {
    if constexpr (P::kHolds && !P::kReduces) {
      sender.put_each(y_ + r * y_stride_,
                      [x = this->arguments(r), result = of_.result(r)](int64_t i, int64_t count)
                          SOFTMAXLIB_INLINE_LAMBDA { return result(x(i, count)); });
      if constexpr (P::kTargets) of_.put_target(r);
    }
  }
  T scale(int r) const {
    if constexpr (P::kHolds) return 1;
    else return of_.scale[r];
  }

  bool any_alone_ = false;
  // Results are yet to be made, when a row leaves; or they have left.
  bool waits_ = false, is_out_ = false;

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

// is_direct: x is read where it is.
template <class P, class X>
inline void run_batches(const Job& job, bool is_direct, int64_t row, int64_t stop, char* scratch,
                        void (*alone)(const Job& job, int64_t row)) {
  using B = Batch<P, X>;
  using V = typename B::V;
  const typename B::F f(0);
  Sender<V> sender(job);
  Stager<V> stager(job);
  using T = typename B::T;
  [[maybe_unused]] alignas(64) T some[B::kLow ? B::kRoom : 1];
  const auto room = [&](int i) {
    return job.tile ? reinterpret_cast<T*>(scratch + i * batch_room(job)) : nullptr;
  };
  T* const low = !B::kLow ? nullptr : job.tile ? room(2) : some;
  const bool in_place = is_direct && !sender.collects();
  B batches[2] = {B(job.n, room(0), in_place), B(job.n, room(1), in_place)};
  B *now = batches, *before = batches + 1;
  // While the rows of one are computed, those of the one before leave; behind the last there is
  // none.
  RowRun run(job, row);
  for (bool more = true; more;) {
    more = row < stop;
    int64_t rows = !more ? 0 : run.rows < stop - row ? run.rows : stop - row;
    if (rows > now->most()) rows = now->most();
    now->begin(run, row, static_cast<int>(rows), is_direct ? nullptr : &stager, low);
    for (int r = 0; r < now->rows() || r < before->rows(); ++r) {
      if (r < now->rows()) now->compute(f, r);
      if (r < before->rows()) before->put(job, r, sender, alone);
    }
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
