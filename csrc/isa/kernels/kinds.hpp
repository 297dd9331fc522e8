// What is computed of many short rows at once, a row per lane: the kinds of kernels/batch.hpp and
// kernels/lanes.hpp.
#pragma once

#include <type_traits>

#include "isa/kernels/log_softmax.hpp"
#include "isa/kernels/stablemax.hpp"
#include "isa/stage/stage_rows.hpp"
#include "isa/sum/columns.hpp"

namespace softmaxlib {
namespace SOFTMAX_ISA {
namespace {

// What the sums of a batch's rows have been folded to, a row per lane. A sum of floats is a double;
// one of doubles has what additions rounded away beside it.
template <class V>
struct LaneTotals;
template <>
struct LaneTotals<f32x16> {
  InLanes<f32x16> sum = in_all(0, f32x16());

  void add(InLanes<f32x16> x) { sum = sum + x; }
  InLanes<f32x16> value() const { return sum; }
  InLanes<f32x16> reciprocals() const { return inverse(sum); }
};
template <>
struct LaneTotals<f64x8> {
  InLanes<f64x8> sum = in_all(0, f64x8()), error = in_all(0, f64x8());

  void add(InLanes<f64x8> x) { two_sum(sum.all, error.all, x.all); }
  InLanes<f64x8> value() const { return sum + error; }
  InLanes<f64x8> reciprocals() const { return SOFTMAX_ISA::reciprocals<f64x8>(sum, error); }
};

template <class V>
struct BatchSums : LaneTotals<V> {
  V reference = V::set1(0);

  // Rows whose sums cannot be trusted are to be computed alone.
  void check(V value, bool (&alone)[V::lanes]) const {
    if (!all_usable(reference, value)) check_each(value, alone);
  }

 private:
  SOFTMAXLIB_NOINLINE void check_each(V value, bool (&alone)[V::lanes]) const {
    typename V::elem r[V::lanes], v[V::lanes];
    store(r, reference);
    store(v, value);
    SOFTMAXLIB_NO_UNROLL
    for (int i = 0; i < V::lanes; ++i) alone[i] |= !SOFTMAX_ISA::usable(r[i], v[i]);
  }
};

// Lanes of a row, a vector of rows each, as sum_lanes() folds those of one vector; what is missing
// to all of them is +0, which would change nothing.
template <class V>
SOFTMAXLIB_INLINE InLanes<V> fold_lanes(const typename V::elem* lanes, int count) {
  const auto one = [=](int i) SOFTMAXLIB_INLINE_LAMBDA {
    return InLanes<V>::of(load(lanes + i * V::lanes));
  };
  const auto two = [=](int i) SOFTMAXLIB_INLINE_LAMBDA {
    return i + 8 < count ? one(i) + one(i + 8) : one(i);
  };
  const auto four = [=](int i) SOFTMAXLIB_INLINE_LAMBDA {
    return i + 4 < count ? two(i) + two(i + 4) : two(i);
  };
  const auto eight = [=](int i) SOFTMAXLIB_INLINE_LAMBDA {
    return i + 2 < count ? four(i) + four(i + 2) : four(i);
  };
  return count > 1 ? eight(0) + eight(1) : eight(0);
}

// Terms of some arguments of each row, under the rows' references where F follows them.
template <int N, class F, class X, class V = typename F::V>
SOFTMAXLIB_INLINE void make_terms(const F& f, const X* x, V magic, V floor, V* t) {
  constexpr int kStep = kInStep < N ? kInStep : N;
  for (int k = 0; k < N; k += kStep)
    if constexpr (F::kFollows) f.template evaluate<kStep>(x + k, magic, floor, t + k);
    else f.template evaluate<kStep>(x + k, t + k);
}

// Arguments of a vector of rows, a column for each element: X is V, or a Pair of them.
template <class X>
struct ArgumentsOfRows {
  using V = decltype(high(X()));
  const typename V::elem *hi, *lo;
  int64_t stride;  // from one column to the next

  SOFTMAXLIB_INLINE X operator()(int64_t j) const { return at(j * stride, X()); }
  // Those from element i on.
  ArgumentsOfRows from(int64_t i) const {
    return {hi + i * stride, lo ? lo + i * stride : nullptr, stride};
  }
  V largest(int count) const {
    V top = load(hi);
    SOFTMAXLIB_NO_UNROLL
    for (int j = 1; j < count; ++j) top = max(load(hi + j * stride), top);
    return top;
  }

 private:
  SOFTMAXLIB_INLINE V at(int64_t i, V) const { return load(hi + i); }
  SOFTMAXLIB_INLINE Pair<V> at(int64_t i, Pair<V>) const { return {load(hi + i), load(lo + i)}; }
};
// Those that an array has.
template <class V>
inline ArgumentsOfRows<V> arguments_in(const V* x) {
  const auto* hi = reinterpret_cast<const typename V::elem*>(x);
  return {hi, nullptr, V::lanes};
}
template <class V>
inline ArgumentsOfRows<Pair<V>> arguments_in(const Pair<V>* x) {
  const auto* hi = reinterpret_cast<const typename V::elem*>(x);
  return {hi, hi + V::lanes, 2 * V::lanes};
}

// A term as sums take it: those of a wide function are added in double.
template <class F>
using RestOf = typename std::conditional<F::kWide, InLanes<typename F::V>, typename F::V>::type;
template <class F, class V = typename F::V>
SOFTMAXLIB_INLINE RestOf<F> rest_of(V term) {
  if constexpr (F::kWide) return InLanes<V>::of(term);
  else return term;
}

// What lanes i to i + N - 1 of a vector of rows have of a group of `count` arguments, lane by lane:
// up to four terms each, from the `first` on; some lanes may have none. kHold: what a lane holds,
// which is its largest argument so far, stays out, and is what it holds from now on.
template <int N, bool kHold, class F, class X, class Rest = RestOf<F>, class V = typename F::V>
SOFTMAXLIB_INLINE void rests_of_lanes(const F& f, const ArgumentsOfRows<X>& argument, int count,
                                      int first, int i, V magic, V floor, const X* held,
                                      X* hold_now, Rest* rests, V* top = nullptr) {
  constexpr int kLanes = V::lanes;
  X holds[N];
  V t[4][N];
  for (int k = 0; kHold && k < N; ++k) holds[k] = held[i + k];
  for (int k = 0; first && k < N; ++k) t[0][k] = V::set1(0);
  const auto unheld = [&](int k, X x) SOFTMAXLIB_INLINE_LAMBDA {
    if (top) *top = max(high(x), *top);
    if constexpr (kHold) return hold(holds[k], x);
    else return x;
  };
  const auto add = [&](int q) SOFTMAXLIB_INLINE_LAMBDA {
    const int at = i + q * kLanes;
    if (SOFTMAXLIB_LIKELY(at + N <= count)) {
      X x[N];
      for (int k = 0; k < N; ++k) x[k] = unheld(k, argument(at + k));
      make_terms<N>(f, x, magic, floor, t[q]);
      return;
    }
    for (int k = 0; k < N; ++k) t[q][k] = V::set1(0);
    SOFTMAXLIB_NO_UNROLL
    for (int k = 0; k < N - 1; ++k) {
      if (at + k >= count) break;
      const X x[1] = {unheld(k, argument(at + k))};
      V one[1];
      make_terms<1>(f, x, magic, floor, one);
      t[q][k] = one[0];
    }
  };
  if constexpr (N == 1 && F::kFollows) {  // few enough to stay in registers
    if (first == 0) add(0);
    add(1), add(2), add(3);
  } else {
    SOFTMAXLIB_NO_UNROLL
    for (int q = first; q < 4; ++q) add(q);
  }
  for (int k = 0; k < N; ++k) {
    rests[i + k] =
        (rest_of<F>(t[0][k]) + rest_of<F>(t[1][k])) + (rest_of<F>(t[2][k]) + rest_of<F>(t[3][k]));
    if constexpr (kHold) hold_now[i + k] = holds[k];
  }
}
// So many lanes at once.
template <class F>
constexpr int kLanesAtOnce = !F::kFollows                       ? 1
                             : sizeof(typename F::V::elem) == 8 ? 4
                                                                : kInStep;

// What each row holds: one element in each of so many lanes, of which the first of the largest
// stays out of the sum, and the others' terms, folded. (A NaN is none: its term makes a NaN of the
// sum.) It is take_largest() of isa/sum/terms.hpp for a vector of rows; `largest` is that of each
// row.
template <class V>
struct Held {
  Pair<V> element;
  InLanes<V> others;

  template <class F, class X>
  SOFTMAXLIB_NOINLINE Held(const F& f, const ArgumentsOfRows<X>& in_lanes, int lanes, V largest,
                           V magic, V floor)
      : element{largest, V::set1(0)} {
    const V zero = V::set1(0), found = V::set1(static_cast<typename V::elem>(NAN));
    V sought = largest, lo = zero;
    alignas(64) typename V::elem terms[V::lanes * V::lanes];
    const auto add = [&](int i, auto count) SOFTMAXLIB_INLINE_LAMBDA {
      X x[count];
      V t[count];
      for (int k = 0; k < count; ++k) x[k] = in_lanes(i + k);
      make_terms<count>(f, x, magic, floor, t);
      for (int k = 0; k < count; ++k) {
        const auto is_it = eq(high(x[k]), sought);
        if constexpr (sizeof(X) > sizeof(V)) lo = select(is_it, to_pair(x[k]).lo, lo);
        sought = select(is_it, found, sought);
        store(terms + (i + k) * V::lanes, select(is_it, zero, t[k]));
      }
    };
    int i = 0;
    SOFTMAXLIB_NO_UNROLL
    for (; i + kInStep <= lanes; i += kInStep) add(i, Elements<kInStep>());
    if (kInStep > 2 && i + 2 <= lanes) add(i, Elements<2>()), i += 2;
    if (kInStep > 1 && i < lanes) add(i, Elements<1>());
    element.lo = lo;
    others = fold(terms, lanes);
  }

 private:
  static SOFTMAXLIB_NOINLINE InLanes<V> fold(const typename V::elem* terms, int lanes) {
    return fold_lanes<V>(terms, lanes);
  }
};
// The sums of rows without the element that each holds out of its own.
template <class V>
struct HeldSums : BatchSums<V> {
  Pair<V> held;

  HeldSums(const BatchSums<V>& sums, Pair<V> element) : BatchSums<V>(sums), held(element) {}
  HeldSums(const BatchSums<V>& rests, const Held<V>& of) : HeldSums(rests, of.element) {
    this->add(of.others);
  }
};

// What is computed of a row. Each kind has the function of an element F; finish(), which makes what
// follows the sums, a row per lane; the rows' results where terms are not kept; and says:
struct KindOfBatch {
  static constexpr bool kHolds = false;     // each lane holds its largest argument out of the sum
  static constexpr bool kReduces = false;   // rows have no results of their elements
  static constexpr bool kOneIsOne = false;  // a row of one element is 1, whatever p 1/p is
  static constexpr bool kTargets = false;   // finish() reads elements one by one, and writes

  // Makes the results of the row in this lane those of a row that sees nothing, its arguments being
  // -inf and its terms 0. False where it has to be computed alone.
  bool see_nothing(int) { return false; }
};
// What code that is compiled once for all kinds asks of one.
struct KindTraits {
  bool holds, reduces, one_is_one, targets;
};
template <class P>
constexpr KindTraits kind_of() {
  return {P::kHolds, P::kReduces, P::kOneIsOne, P::kTargets};
}

// f / sum of f: softmax and stablemax.
template <class Function>
struct BatchOfRatio : KindOfBatch {
  using F = Function;
  using V = typename F::V;
  using T = typename V::elem;
  static constexpr bool kOneIsOne = true;

  alignas(64) T scale[V::lanes];

  bool see_nothing(int r) {
    scale[r] = 1;
    return true;
  }
  void finish(const BatchSums<V>& sums, bool (&alone)[V::lanes]) {
    finish(sums, sums.reciprocals(), alone);
  }
  void finish(const BatchSums<V>& sums, InLanes<V> reciprocals, bool (&alone)[V::lanes]) {
    const V r = reciprocals.value();
    store(scale, r);
    if constexpr (F::kFollows) {
      sums.check(r, alone);
    } else {  // nothing is wrong with a sum that needs no other reference
      double sum[V::lanes];
      store_lanes(sum, sums.sum);
      SOFTMAXLIB_NO_UNROLL
      for (int i = 0; i < V::lanes; ++i)
        alone[i] |= !positive_finite(sum[i]) || stable_reference<V>(sum[i]) != 0;
    }
  }
};
template <class V>
using BatchOfSoftmax = BatchOfRatio<Exp<V>>;
template <class V>
using BatchOfStablemax = BatchOfRatio<Stable<V>>;

// Of many rows.
template <class V>
SOFTMAXLIB_INLINE LogRest<V> log_rest_of(const HeldSums<V>& sums) {
  return LogRest<V>(sums.held, sums.value(), sums.reference);
}

template <class Vector>
struct BatchOfLogSoftmax : KindOfBatch {
  using V = Vector;
  using T = typename V::elem;
  using F = Exp<V, Use::kLogarithms>;
  static constexpr bool kHolds = true;

  void finish(const HeldSums<V>& sums, bool (&alone)[V::lanes]) {
    set(log_rest_of(sums), sums.held);
    sums.check(sums.sum.value(), alone);
  }
  void set(const LogRest<V>& rest, Pair<V> held) {
    store(hi_, held.hi);
    store(lo_, held.lo);
    store(log_rest_, rest.hi + rest.lo);
  }
  bool see_nothing(int r) {
    hi_[r] = lo_[r] = log_rest_[r] = 0;
    return true;
  }
  auto result(int r) const {
    return [hi = V::set1(hi_[r]), lo = V::set1(lo_[r]), log_rest = V::set1(log_rest_[r])](auto x)
               SOFTMAXLIB_INLINE_LAMBDA { return subtract(x, hi, lo) - log_rest; };
  }
  // A function of element j of every row, and of j.
  auto results() const {
    return [hi = load(hi_), lo = load(lo_), log_rest = load(log_rest_)](auto x, int)
               SOFTMAXLIB_INLINE_LAMBDA { return subtract(x, hi, lo) - log_rest; };
  }

 private:
  alignas(64) T hi_[V::lanes], lo_[V::lanes], log_rest_[V::lanes];
};

template <class Vector>
struct BatchOfLogStablemax : KindOfBatch {
  using V = Vector;
  using T = typename V::elem;
  using F = Stable<V>;
  static constexpr bool kHolds = true;

  void finish(const HeldSums<V>& sums, bool (&alone)[V::lanes]) {
    const Pair<V> held = sums.held;
    double hi[V::lanes], lo[V::lanes], rest[V::lanes], exponent[V::lanes], mantissa[V::lanes];
    double of_largest[V::lanes], sum[V::lanes];
    store_lanes(hi, InLanes<V>::of(held.hi));
    store_lanes(lo, InLanes<V>::of(held.lo));
    store_lanes(rest, sums.value());
    store_lanes(sum, sums.sum);
    for (int i = 0; i < V::lanes; i += f64x8::lanes) {
      const Pair<f64x8> largest = normalized(Pair<f64x8>{load(hi + i), load(lo + i)});
      const f64x8 s = Stable<f64x8>(0)(Pair<f64x8>{load(hi + i), load(lo + i)});
      const LogSumsOfStable of(largest, load(rest + i) / s);
      store(exponent + i, of.exponent);
      store(mantissa + i, of.template mantissa_for<V>());
      store(of_largest + i, of.of_largest);
      store(sum + i, load(sum + i) + s);
    }
    SOFTMAXLIB_NO_UNROLL
    for (int i = 0; i < V::lanes; ++i) {
      alone[i] |= !positive_finite(sum[i]) || stable_reference<V>(sum[i]) != 0;
      exponent_[i] = static_cast<T>(exponent[i]);
      mantissa_[i] = static_cast<T>(mantissa[i]);
      of_largest_[i] = static_cast<T>(of_largest[i]);
    }
    store(largest_, held.hi);
  }
  auto result(int r) const {
    const LogSumOfStable<V> sum = {V::set1(exponent_[r]), V::set1(mantissa_[r]),
                                   V::set1(largest_[r]), V::set1(of_largest_[r])};
    return [sum](auto x) SOFTMAXLIB_INLINE_LAMBDA { return log_stablemax_of<V>(x, sum); };
  }
  // A function of element j of every row, and of j.
  auto results() const {
    const LogSumOfStable<V> sum = {load(exponent_), load(mantissa_), load(largest_),
                                   load(of_largest_)};
    return [sum](auto x, int) SOFTMAXLIB_INLINE_LAMBDA { return log_stablemax_of<V>(x, sum); };
  }

 private:
  alignas(64) T exponent_[V::lanes], mantissa_[V::lanes], largest_[V::lanes];
  alignas(64) T of_largest_[V::lanes];
};

// What rows of a batch or of lanes read and write beside their elements.
template <class V>
struct RowsBeside {
  using T = typename V::elem;
  const Job* job;
  Place place;  // of the first
  Dim step;     // to the next
  int rows;

  void begin(const RowRun& run, int first, int count) {
    job = &run.job;
    rows = count;
    step = run.step;
    for (int k = 0; k < kOperands; ++k)
      place.offset[k] = run.place.offset[k] + first * step.stride[k];
  }
  char* at(Operand k, int r) const { return job->base[k] + place.offset[k] + r * step.stride[k]; }
  int64_t index(int r, int64_t offset = 0) const {
    int64_t i;
    memcpy(&i, at(kIndices, r) + offset, sizeof(i));
    return i;
  }
  // A result per row, so far from an operand, but for those that are computed alone.
  SOFTMAXLIB_NOINLINE void put(Operand k, const T* values, const bool (&alone)[V::lanes],
                               int64_t offset = 0) const {
    // Where one is, its x may be in the same place.
    bool all = (job->dtype[k] == SOFTMAXLIB_F64) == (sizeof(T) == 8);
    for (int r = 0; r < rows; ++r) all &= !alone[r];
    if (all) return store_all(job->dtype[k], at(k, 0) + offset, step.stride[k], rows, values);
    for (int r = 0; r < rows; ++r)
      if (!alone[r]) put_as(job->dtype[k], at(k, r) + offset, static_cast<double>(values[r]));
  }
};

inline double product_or_zero(double q, double y) { return q == 0 ? 0 : q * y; }

// Single arguments of rows: the first of the first row, bytes from one row to the next and from one
// element to the next; of their second parts likewise, which are as far apart within a row.
template <class T>
struct ElementsOfRows {
  const char* hi;
  int64_t row, element;
  const char* lo;  // NULL: 0
  int64_t low_row;

  Pair<T> operator()(int r, int64_t j) const {
    Pair<T> x = {0, 0};  // memory that may not be aligned
    memcpy(&x.hi, hi + r * row + j * element, sizeof(T));
    if (lo) memcpy(&x.lo, lo + r * low_row + j * element, sizeof(T));
    return x;
  }
};

// The classes of rows, their arguments and weights.
template <class V>
struct LabelsOfRows {
  using T = typename V::elem;
  alignas(64) T hi[V::lanes] = {}, lo[V::lanes] = {}, target[V::lanes] = {};
  alignas(64) double weight[V::lanes] = {};

  LabelsOfRows(const RowsBeside<V>& rows, bool (&alone)[V::lanes], const ElementsOfRows<T>& at) {
    const Job& job = *rows.job;
    for (int r = 0; r < rows.rows; ++r) {
      const int64_t i = rows.index(r);
      // One that is ignored, or not seen: and the caller's memory may have changed since the check.
      bool usual = i != job.loss->ignore_index && i >= 0 && i < job.n;
      if (usual) {
        const Pair<T> z = at(r, i);
        usual = z.hi != static_cast<T>(-INFINITY);
        hi[r] = z.hi, lo[r] = z.lo;
        weight[r] = weight_of(*job.loss, i);
        target[r] = static_cast<T>(i);
      }
      alone[r] |= !usual;
    }
  }
  Pair<V> arguments() const { return {load(hi), load(lo)}; }
  void put_losses(const RowsBeside<V>& rows, const BatchOfLogSoftmax<V>& log_softmax,
                  const bool (&alone)[V::lanes]) const {
    T log_p[V::lanes], losses[V::lanes];
    store(log_p, log_softmax.results()(arguments(), 0));
    const bool is_wide = sizeof(T) == 4 && rows.job->dtype[kLoss] == SOFTMAXLIB_F64;
    for (int r = 0; r < rows.rows; ++r) {
      const double y = product_or_zero(weight[r], 0 - static_cast<double>(log_p[r]));
      const double loss = y == y ? y : static_cast<double>(NAN);
      losses[r] = static_cast<T>(loss);
      if (is_wide && !alone[r]) put_as(SOFTMAXLIB_F64, rows.at(kLoss, r), loss);
    }
    if (!is_wide) rows.put(kLoss, losses, alone);
  }
};

// What needs the logarithm of a row's sum and, at most, some of its elements: logsumexp, losses
// without a gradient, take_log_softmax.
template <class Vector>
class BatchOfLogSums : public KindOfBatch {
 public:
  using V = Vector;
  using T = typename V::elem;
  using F = Exp<V, Use::kLogarithms>;
  static constexpr bool kHolds = true, kReduces = true, kTargets = true;

  void begin(const RowRun& run, int first, int rows) { rows_.begin(run, first, rows); }

  SOFTMAXLIB_NOINLINE void finish(const HeldSums<V>& sums, bool (&alone)[V::lanes],
                                  const ElementsOfRows<T>& at) {
    const Job& job = *rows_.job;
    const LogRest<V> rest = log_rest_of(sums);
    sums.check(sums.sum.value(), alone);
    if (!job.loss && !job.top) return put_sums(kOut, rest, sums.held, alone);
    BatchOfLogSoftmax<V> log_softmax;
    log_softmax.set(rest, sums.held);
    if (job.loss) return LabelsOfRows<V>(rows_, alone, at).put_losses(rows_, log_softmax, alone);
    take(log_softmax, alone, at);
    if (job.base[kLogSum]) put_sums(kLogSum, rest, sums.held, alone);
  }
  bool see_nothing(int r) {
    const Job& job = *rows_.job;
    if (job.loss || job.top) return false;
    put_as(job.dtype[kOut], rows_.at(kOut, r), -INFINITY);
    return true;
  }

 private:
  void put_sums(Operand k, const LogRest<V>& rest, Pair<V> held,
                const bool (&alone)[V::lanes]) const {
    alignas(64) T values[V::lanes];
    const InLanes<V> large = (in_all(0, V()) + InLanes<V>::of(held.hi)) + InLanes<V>::of(rest.hi);
    store(values, (large + (InLanes<V>::of(held.lo) + InLanes<V>::of(rest.lo))).value());
    rows_.put(k, values, alone);
  }
  void take(const BatchOfLogSoftmax<V>& log_softmax, const bool (&alone)[V::lanes],
            const ElementsOfRows<T>& at) const {
    const Job& job = *rows_.job;
    for (int64_t i = 0; i < job.top->k; ++i) {
      alignas(64) T hi[V::lanes] = {}, lo[V::lanes] = {}, taken[V::lanes];
      for (int r = 0; r < rows_.rows; ++r) {
        const int64_t element = rows_.index(r, i * job.top->index_stride);
        const bool valid = element >= 0 && element < job.n;  // it may have changed since the check
        const Pair<T> z = valid ? at(r, element) : Pair<T>{static_cast<T>(NAN), 0};
        hi[r] = z.hi, lo[r] = z.lo;
      }
      store(taken, log_softmax.results()(Pair<V>{load(hi), load(lo)}, 0));
      rows_.put(kOut, taken, alone, i * job.top->weight_stride);
    }
  }

  RowsBeside<V> rows_;
};

}  // namespace
}  // namespace SOFTMAX_ISA
}  // namespace softmaxlib
