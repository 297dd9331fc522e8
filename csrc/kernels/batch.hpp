// Many rows of up to a chunk, a batch at a time, so that no row waits for the chain of its own
// maximum, sum and reciprocal or logarithm: these are taken for all rows of a batch at once, a row
// per lane. While the terms of a batch are summed, the results of the one before leave.
//
// The kernels see tiles (rows/stage_rows.hpp): what they compute depends neither on the storage of
// x and y, nor on their layout, nor on options. The bits are those of rows/sum.hpp. A row that
// needs more than a batch does for it (NaN, infinite, far from 0, steep, one element) is computed
// alone.
#pragma once

#include "kernels/log_softmax.hpp"
#include "kernels/stablemax.hpp"
#include "rows/columns.hpp"
#include "rows/stage_rows.hpp"

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

// What the sums of a batch's rows have been folded to, a row per lane.
template <class V>
struct BatchSums {
  InLanes<V> sum, error;
  V reference;

  // Rows whose sums cannot be trusted are to be computed alone.
  void check(V value, bool (&alone)[V::lanes]) const {
    if (all_usable(reference, value)) return;
    typename V::elem r[V::lanes], v[V::lanes];
    store(r, reference);
    store(v, value);
    for (int i = 0; i < V::lanes; ++i) alone[i] |= !SOFTMAX_ISA::usable(r[i], v[i]);
  }
};

// Lanes of a row, a vector of rows each, as sum_lanes() folds those of one vector; what is missing
// to all of them is +0.
template <class V>
SOFTMAXLIB_INLINE InLanes<V> fold_lanes(const typename V::elem* lanes, int count) {
  const auto at = [=](int i) SOFTMAXLIB_INLINE_LAMBDA {
    return InLanes<V>::of(load(lanes + i * V::lanes));
  };
  InLanes<V> eight[8];
  for (int i = 0; i < 8; ++i) {
    eight[i] = i < count ? at(i) : in_all(0, V());
    if (i + 8 < count) eight[i] = eight[i] + at(i + 8);
  }
  return fold_eight(eight);
}

// Up to four exponentials, in step where they are four.
template <class F, class X, class V = typename F::V>
SOFTMAXLIB_INLINE void evaluate_up_to_four(const F& f, const X* x, int some, V magic, V floor,
                                           V* t) {
  if constexpr (!F::kFollows) {
    for (int k = 0; k < some; ++k) f.template evaluate<1>(x + k, t + k);
  } else if (some == 4) {
    for (int k = 0; k < 4; k += kInStep) f.template evaluate<kInStep>(x + k, magic, floor, t + k);
  } else {
    for (int k = 0; k < some; ++k) f.template evaluate<1>(x + k, magic, floor, t + k);
  }
}

// The element that each row holds out of its sum: a column per lane of the row.
template <class V>
struct BatchHeld {
  V hi, lo;
  InLanes<V> others;  // f of what the other lanes hold, summed

  // take_largest() of rows/terms.hpp for a vector of rows, which hold one element in each of so
  // many lanes.
  template <class F, class X>
  BatchHeld(const F& f, const X* held, int lanes, V magic, V floor) {
    using T = typename V::elem;
    const V none = V::set1(static_cast<T>(-INFINITY)), zero = V::set1(0);
    V place = zero;
    hi = high(held[0]);
    lo = to_pair(held[0]).lo;
    for (int i = 1; i < lanes; ++i) {
      const Pair<V> x = to_pair(held[i]);
      const auto larger = gt(x.hi, hi);
      hi = select(larger, x.hi, hi);
      lo = select(larger, x.lo, lo);
      place = select(larger, V::set1(static_cast<T>(i)), place);
    }
    alignas(64) T terms[V::lanes * V::lanes];
    for (int i = 0; i < lanes; i += 4) {
      const int some = lanes - i < 4 ? lanes - i : 4;
      X x[4];
      V t[4];
      for (int k = 0; k < some; ++k) {
        const auto is_it = eq(place, V::set1(static_cast<T>(i + k)));
        const Pair<V> one = to_pair(held[i + k]);
        from_pair(Pair<V>{select(is_it, none, one.hi), select(is_it, zero, one.lo)}, x[k]);
      }
      evaluate_up_to_four(f, x, some, magic, floor, t);
      for (int k = 0; k < some; ++k) store(terms + (i + k) * V::lanes, t[k]);
    }
    others = fold_lanes<V>(terms, lanes);
  }
};

// ---- What is computed of a row. Each has the function of an element F; finish(), which makes what
// follows the sums, a row per lane; the rows' results where terms are not kept; and says:
struct KindOfBatch {
  static constexpr bool kHolds = false;     // each lane holds its largest argument out of the sum
  static constexpr bool kReduces = false;   // rows have no results of their elements
  static constexpr bool kOneIsOne = false;  // a row of one element is 1, whatever p 1/p is
  static constexpr bool kTargets = false;   // finish() reads elements one by one, and writes
};

// f / sum of f: softmax and stablemax.
template <class Function>
struct BatchOfRatio : KindOfBatch {
  using F = Function;
  using V = typename F::V;
  using T = typename V::elem;
  static constexpr bool kOneIsOne = true;

  alignas(64) T scale[V::lanes];

  void finish(const BatchSums<V>& sums, bool (&alone)[V::lanes]) {
    const V r = reciprocals<V>(sums.sum, sums.error).value();
    store(scale, r);
    if constexpr (F::kFollows) {
      sums.check(r, alone);
    } else {  // nothing is wrong with a sum that needs no other reference
      double sum[V::lanes];
      store_lanes(sum, sums.sum);
      for (int i = 0; i < V::lanes; ++i)
        alone[i] |= !positive_finite(sum[i]) || stable_reference<V>(sum[i]) != 0;
    }
  }
};
template <class V>
using BatchOfSoftmax = BatchOfRatio<Exp<V>>;
template <class V>
using BatchOfStablemax = BatchOfRatio<Stable<V>>;

// log1p(rest / e^held), as log1p_pair() gives it.
template <class V>
struct LogRest {
  InLanes<V> hi, lo;
  InLanes<V> of_held, ratio;  // e^held in units of 2^(reference - kBias) of double; rest / e^held

  LogRest(const BatchSums<V>& sums, const BatchHeld<V>& held) {
    constexpr int kBias = Exp<V, Use::kLogarithms>::kBias;
    const InLanes<V> reference = InLanes<V>::of(sums.reference), value = sums.sum + sums.error;
    const InLanes<V> held_hi = InLanes<V>::of(held.hi), held_lo = InLanes<V>::of(held.lo);
    of(held_hi, held_lo, reference, value, power_of_two(Exp<f64x8>::kBias - kBias));
  }

 private:
  using C = LogConstants<f64x8>;

  struct One {
    f64x8 hi, lo, of_held, ratio;
  };
  static One of(f64x8 held_hi, f64x8 held_lo, f64x8 reference, f64x8 value, double unit) {
    const ExpInLanes<f64x8> exp((InLanes<f64x8>{reference}));
    const f64x8 held = exp(Pair<f64x8>{held_hi, held_lo});
    const f64x8 ratio = value * f64x8::set1(unit) / held;
    const auto parts = log1p_parts(ratio, f64x8::set1(0));
    return {parts.exponent * f64x8::set1(C::kLn2Hi),
            parts.mantissa + parts.exponent * f64x8::set1(C::kLn2Lo), held, ratio};
  }
  void of(InLanes<f32x16> h, InLanes<f32x16> l, InLanes<f32x16> r, InLanes<f32x16> v, double unit) {
    const One a = of(h.low, l.low, r.low, v.low, unit);
    const One b = of(h.high, l.high, r.high, v.high, unit);
    hi = {a.hi, b.hi};
    lo = {a.lo, b.lo};
    of_held = {a.of_held, b.of_held};
    ratio = {a.ratio, b.ratio};
  }
  void of(InLanes<f64x8> h, InLanes<f64x8> l, InLanes<f64x8> r, InLanes<f64x8> v, double unit) {
    const One a = of(h.all, l.all, r.all, v.all, unit);
    hi = {a.hi};
    lo = {a.lo};
    of_held = {a.of_held};
    ratio = {a.ratio};
  }
};

template <class Vector>
struct BatchOfLogSoftmax : KindOfBatch {
  using V = Vector;
  using T = typename V::elem;
  using F = Exp<V, Use::kLogarithms>;
  static constexpr bool kHolds = true;

  void finish(const BatchSums<V>& sums, const BatchHeld<V>& held, bool (&alone)[V::lanes]) {
    set(LogRest<V>(sums, held), held);
    sums.check(sums.sum.value(), alone);
  }
  void set(const LogRest<V>& rest, const BatchHeld<V>& held) {
    store(hi_, held.hi);
    store(lo_, held.lo);
    store(log_rest_, (rest.hi + rest.lo).value());
  }
  auto result(int r) const {
    return [hi = V::set1(hi_[r]), lo = V::set1(lo_[r]), log_rest = V::set1(log_rest_[r])](auto x)
               SOFTMAXLIB_INLINE_LAMBDA { return subtract(x, hi, lo) - log_rest; };
  }
  // Element j of every row.
  template <class X>
  SOFTMAXLIB_INLINE V results(X x, int) const {
    return subtract(x, load(hi_), load(lo_)) - load(log_rest_);
  }

 private:
  alignas(64) T hi_[V::lanes], lo_[V::lanes], log_rest_[V::lanes];
};

template <class Vector>
struct BatchOfLogsumexp : KindOfBatch {
  using V = Vector;
  using T = typename V::elem;
  using F = Exp<V, Use::kLogarithms>;
  static constexpr bool kHolds = true, kReduces = true;

  void finish(const BatchSums<V>& sums, const BatchHeld<V>& held, bool (&alone)[V::lanes]) {
    set(LogRest<V>(sums, held), held);
    sums.check(sums.sum.value(), alone);
  }
  void set(const LogRest<V>& rest, const BatchHeld<V>& held) {
    const InLanes<V> large = (in_all(0, V()) + InLanes<V>::of(held.hi)) + rest.hi;
    store(value_, (large + (InLanes<V>::of(held.lo) + rest.lo)).value());
  }
  T value(int r) const { return value_[r]; }
  const T* values() const { return value_; }

 private:
  alignas(64) T value_[V::lanes];
};

// ---- The batch. X: V, or Pair<V> for arguments of two parts. kStaged: x is in the tile.

template <class P, class X, bool kStaged>
class Batch {
 public:
  using V = typename P::V;
  using T = typename V::elem;
  using F = typename P::F;
  static constexpr int kLanes = V::lanes, kGroup = kVectorsPerGroup * kLanes;
  static constexpr bool kLow = sizeof(X) > sizeof(V);
  // A part of the first level cache.
  static constexpr int kRoom = kVectorsPerChunk * (kLow ? 2 : 3) * kLanes;

  // room: for as many rows as a vector has lanes (batch_room() of job.hpp), where a part of the
  // first level cache does not do: rows that are transposed come so many at a time. Or NULL.
  Batch(int64_t n, T* room)
      : n_(n),
        pitch_((n + kLanes - 1) / kLanes * kLanes),
        most_(room || kRoom / pitch_ >= kLanes ? kLanes : static_cast<int>(kRoom / pitch_)),
        e_((room ? room : room_) + kLanes) {}

  int most() const { return most_; }
  int rows() const { return rows_; }

  // Rows from `first` on, all at one distance from each other; as they are,
  void begin(const RowRun& run, int64_t first, int rows) {
    place(run, first, rows);
    x_ = run.job.base[kX] + run.place.offset[kX], stride_ = run.step.stride[kX];
    for (int r = 0; r < rows; ++r) alone_[r] = P::kOneIsOne && n_ == 1;
    start();
  }
  // or through the tile.
  void begin(const RowRun& run, int64_t first, int rows, Stager<V>& stager, T* low) {
    place(run, first, rows);
    x_ = reinterpret_cast<const char*>(e_), low_ = low;
    stride_ = pitch_ * static_cast<int64_t>(sizeof(T));
    int visible[kLanes];
    if (pitch_ == n_ && stager.is_even(run)) stager.fetch_even(run, rows, e_, low, visible);
    else stager.fetch(run, rows, e_, low, pitch_, visible);
    for (int r = 0; r < rows; ++r) alone_[r] = P::kOneIsOne && visible[r] == 1;
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
    int64_t i = 0;
    for (; i + kGroup <= n_; i += kGroup) {
      X v[4];
      V t[4];
      for (int j = 0; j < 4; ++j) v[j] = at(r, i + j * kLanes);
      if (F::kFollows && i > 0)
        top = max(max_of(high(v[0]), high(v[1]), high(v[2]), high(v[3])), top);
      if constexpr (P::kHolds)
        for (int j = 0; j < 4; ++j) v[j] = hold(held, v[j]);
      for (int j = 0; j < 4; j += kInStep) evaluate<kInStep>(f, v + j, magic, floor, t + j);
      if constexpr (!P::kHolds)
        for (int j = 0; j < 4; ++j) store(e + i + j * kLanes, t[j]);
      add_terms<F>(lanes, t[0], t[1], t[2], t[3]);
    }
    if (i < n_) {
      V t[4];
      for (int j = 0; j < 4; ++j, i += kLanes) {
        t[j] = V::set1(0);
        if (i >= n_) continue;
        X v = up_to_end(r, i);
        top = max(high(v), top);
        if constexpr (P::kHolds) v = hold(held, v);
        evaluate<1>(f, &v, magic, floor, t + j);
        if constexpr (!P::kHolds) store(e + i, t[j]);
      }
      add_terms<F>(lanes, t[0], t[1], t[2], t[3]);
    }
    // A later group may exceed the reference.
    if (F::kFollows && n_ > kGroup) alone_[r] |= any(gt(top, V::set1(limit_[r])));
    if constexpr (P::kHolds) {
      store(held_[r], high(held));
      if constexpr (kLow) store(held_low_[r], held.lo);
    }
    lanes_.keep(r, lanes);
  }

  // collects: the sender takes results from the tile alone.
  SOFTMAXLIB_NOINLINE void finish(bool collects) {
    BatchSums<V> sums;
    sums.reference = load(reference_);
    lanes_.fold(sums.sum, sums.error);
    if constexpr (P::kHolds) {
      const ExpInLanes<V, F> exp(load(reference_));
      X columns[kLanes];
      columns_of_held(columns);
      const BatchHeld<V> held(F(0), columns, kLanes, exp.magic(), exp.floor());
      BatchSums<V> all = sums;
      two_sum(all.sum, all.error, held.others);
      if constexpr (P::kTargets) {
        const auto element = [&](int r, int64_t j) SOFTMAXLIB_INLINE_LAMBDA {
          return Pair<T>{row(r)[j], kLow ? low_[r * pitch_ + j] : T(0)};
        };
        of_.finish(all, held, alone_, element);
      } else {
        of_.finish(all, held, alone_);
      }
      resolved_ = kLow || collects;
      for (int r = 0; !P::kReduces && resolved_ && r < rows_; ++r)
        if (!alone_[r]) resolve(r);
    } else {
      of_.finish(sums, alone_);
    }
    any_alone_ = false;
    for (int r = 0; r < rows_; ++r) any_alone_ |= alone_[r];
  }

  // What is left to do once row r is summed; alone(row) computes one by itself.
  template <class Alone>
  SOFTMAXLIB_INLINE void put(const Job& job, int r, Sender<V>& sender, Alone alone) {
    if (SOFTMAXLIB_UNLIKELY(alone_[r])) {
      sender.finish();
      alone(job, first_ + r);
    } else if constexpr (P::kReduces && P::kTargets) {
    } else if constexpr (P::kReduces) {
      put_as(job.dtype[kOut], y_ + r * y_stride_, static_cast<double>(of_.value(r)));
    } else if (P::kHolds && !resolved_) {
      if constexpr (P::kHolds)
        sender.put_each(y_ + r * y_stride_,
                        [&, f = of_.result(r)](int64_t i)
                            SOFTMAXLIB_INLINE_LAMBDA { return f(up_to_end(r, i)); });
      if constexpr (P::kTargets) of_.put_target(r);
    } else if (!sender.sends_squares() || any_alone_) {
      sender.put(y_ + r * y_stride_, e_ + r * pitch_, scale(r));
    } else if (r == 0) {
      alignas(64) T scales[kLanes];
      for (int i = 0; i < rows_; ++i) scales[i] = scale(i);
      sender.put_square(y_, e_, pitch_, rows_, scales);
    }
  }

 private:
  void place(const RowRun& run, int64_t first, int rows) {
    first_ = first, rows_ = rows;
    y_ = run.job.base[kOut] + run.place.offset[kOut], y_stride_ = run.step.stride[kOut];
    if constexpr (P::kTargets) of_.begin(run, 0, rows);
  }
  const T* row(int r) const { return reinterpret_cast<const T*>(x_ + r * stride_); }
  SOFTMAXLIB_INLINE V joined(const T* hi, const T*, V) const { return load(hi); }
  SOFTMAXLIB_INLINE Pair<V> joined(const T* hi, const T* lo, Pair<V>) const {
    return {load(hi), load(lo)};
  }
  SOFTMAXLIB_INLINE X at(int r, int64_t i) const {
    const T* const x = row(r) + i;
    if constexpr (!kStaged) prefetch(reinterpret_cast<const char*>(x) + kBatchPrefetchBytes);
    return joined(x, kLow ? low_ + r * pitch_ + i : nullptr, X());
  }
  SOFTMAXLIB_INLINE X up_to_end(int r, int64_t i) const {
    if constexpr (kStaged) {
      return at(r, i);  // -inf up to the pitch
    } else {
      if (i + kLanes <= n_) return at(r, i);
      prefetch(reinterpret_cast<const char*>(row(r) + i) + kBatchPrefetchBytes);
      return load_n(row(r) + i, static_cast<int>(n_ - i), static_cast<T>(-INFINITY));
    }
  }
  template <int N>
  static SOFTMAXLIB_INLINE void evaluate(const F& f, const X* x, V magic, V floor, V* t) {
    if constexpr (F::kFollows) f.template evaluate<N>(x, magic, floor, t);
    else f.template evaluate<N>(x, t);
  }

  // The references of all rows, from the maximum of each first group.
  SOFTMAXLIB_NOINLINE void start() {
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
        V top = high(up_to_end(r, 0));
        for (int64_t i = kLanes; i < kGroup && i < n_; i += kLanes)
          top = max(top, high(up_to_end(r, i)));
        store(tops[r], top);
      }
      for (int r = rows_; r < kLanes; ++r) store(tops[r], V::set1(0));
      V top = V::set1(static_cast<T>(-INFINITY));
      for (int j = 0; j < kLanes; j += 8) {
        V c[8];
        load_columns(tops[0] + j, kLanes, c);
        top = max(max(max_of(c[0], c[1], c[2], c[3]), max_of(c[4], c[5], c[6], c[7])), top);
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

  // What the rows hold, a vector of rows for each lane.
  void columns_of_held(X (&column)[kLanes]) const {
    V low[8];
    for (int j = 0; j < kLanes; j += 8) {
      V hi[8];
      load_columns(held_[0] + j, kLanes, hi);
      if constexpr (kLow) load_columns(held_low_[0] + j, kLanes, low);
      for (int k = 0; k < 8; ++k)
        from_pair(Pair<V>{hi[k], kLow ? low[k] : V::set1(0)}, column[j + k]);
    }
  }

  // The results of row r, in the tile.
  SOFTMAXLIB_INLINE void resolve(int r) {
    T* const e = e_ + r * pitch_;
    if constexpr (P::kHolds && !P::kReduces) {
      const auto result = of_.result(r);
      for (int64_t i = 0; i < n_; i += kLanes) store(e + i, result(up_to_end(r, i)));
      if constexpr (P::kTargets) of_.put_target(r, e);
    }
  }
  T scale(int r) const {
    if constexpr (P::kHolds) return 1;
    else return of_.scale[r];
  }

  const int64_t n_, pitch_;
  const int most_;
  T* const e_;
  int64_t first_ = 0, stride_ = 0, y_stride_ = 0;
  int rows_ = 0;
  const char* x_ = nullptr;
  char* y_ = nullptr;
  const T* low_ = nullptr;
  alignas(64) T room_[kLanes + kRoom + kLanes];  // an outbox reads around what it takes
  alignas(64) T reference_[kLanes], magic_[kLanes], floor_[kLanes], limit_[kLanes];
  LanesOfRows<V> lanes_;
  alignas(64) T held_[kLanes][kLanes];
  alignas(64) T held_low_[kLow ? kLanes : 1][kLanes];
  bool alone_[kLanes], any_alone_ = false, resolved_ = false;
  P of_;
};

// By itself, as all rows can be computed; function(Row).
template <class D, class F>
SOFTMAXLIB_NOINLINE void compute_alone(const Job& job, int64_t row, F function, double masked) {
  int32_t one_block[kVectorsPerBlock / kVectorsPerChunk];
  const Rows at(job, row);
  const Row<D> alone(job, at.place(), nullptr, one_block);
  function(alone);
  if (job.causal && !job.reduces) alone.fill_beyond(static_cast<typename Row<D>::T>(masked));
}

template <class P, class X, bool kStaged>
inline void run_batches(const Job& job, int64_t row, int64_t stop, char* scratch,
                        void (*alone)(const Job& job, int64_t row)) {
  using B = Batch<P, X, kStaged>;
  using V = typename B::V;
  const typename B::F f(0);
  Sender<V> sender(job);
  [[maybe_unused]] Stager<V> stager(job);
  using T = typename B::T;
  [[maybe_unused]] alignas(64) T some[B::kLow ? B::kRoom : 1];
  const auto room = [&](int i) {
    return job.tile ? reinterpret_cast<T*>(scratch + i * batch_room(job)) : nullptr;
  };
  [[maybe_unused]] T* const low = job.tile ? room(2) : some;
  B batches[2] = {B(job.n, room(0)), B(job.n, room(1))};
  B *now = batches, *before = batches + 1;
  for (RowRun run(job, row); row < stop;) {
    int64_t rows = run.rows < stop - row ? run.rows : stop - row;
    if (rows > now->most()) rows = now->most();
    if constexpr (kStaged) now->begin(run, row, static_cast<int>(rows), stager, low);
    else now->begin(run, row, static_cast<int>(rows));
    for (int r = 0; r < now->rows() || r < before->rows(); ++r) {
      if (r < now->rows()) now->compute(f, r);
      if (r < before->rows()) before->put(job, r, sender, alone);
    }
    now->finish(sender.collects());
    row += rows;
    run.advance(rows);
    B* const next = before;
    before = now;
    now = next;
  }
  for (int r = 0; r < before->rows(); ++r) before->put(job, r, sender, alone);
  sender.finish();
}

template <class P>
inline void run_any_batches(const Job& job, int64_t start, int64_t stop, char* scratch,
                            void (*alone)(const Job& job, int64_t row)) {
  using V = typename P::V;
  const bool wide = job.dtype[kX] == SOFTMAXLIB_F32 || job.dtype[kX] == SOFTMAXLIB_F64;
  if (job.direct && wide && !job.causal) run_batches<P, V, false>(job, start, stop, scratch, alone);
  else if (job.elements_of_x) run_batches<P, V, true>(job, start, stop, scratch, alone);
  else run_batches<P, Pair<V>, true>(job, start, stop, scratch, alone);
}

}  // namespace
}  // namespace SOFTMAX_ISA
}  // namespace softmaxlib
