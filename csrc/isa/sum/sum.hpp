// The one sum that every schedule runs, so that all return the same bits:
//   group   4 vectors: (v0 + v1) + (v2 + v3), then lanes i and i + 8 of a float vector, in double
//   chunk   16 groups, one after the other; then its lanes (float: folded 8-4-2-1, double: in
//   order) block   16 chunks: a total of its own; blocks are merged in order
// Sums of float thus round in float twice only; sums of double are compensated from groups on. The
// tail of a row adds exact zeros. Where the paper carries an exponent per lane, a block carries one
// reference exponent R, raised only when a group exceeds it by kSlack binades; rescaling by powers
// of two is exact.
#pragma once

#include <stdint.h>

#include "isa/macros.hpp"
#include "isa/math/exp.hpp"
#include "isa/stage/row.hpp"

namespace softmaxlib {
namespace SOFTMAX_ISA {
namespace {

// Up to one vector of the `left` elements from i on; -inf beyond.
template <class Source>
inline typename Source::Value load_up_to(Source x, int64_t i, int64_t left) {
  using V = typename Source::V;
  using T = typename V::elem;
  if (left >= V::lanes) return x.load(i);
  return x.load_n(i, left > 0 ? static_cast<int>(left) : 0, static_cast<T>(-INFINITY));
}

template <class V>
inline Pair<V> to_pair(Pair<V> x) {
  return x;
}
template <class V>
inline Pair<V> to_pair(V x) {
  return {x, V::set1(0)};
}
template <class V>
inline void from_pair(Pair<V> x, Pair<V>& out) {
  out = x;
}
template <class V>
inline void from_pair(Pair<V> x, V& out) {
  out = x.hi;
}

template <class V>
inline V max_of(V a, V b, V c, V d) {
  return max(max(a, b), max(c, d));
}

// Keeps the larger of held and x in held, returns the other; a NaN is never held.
template <class V>
SOFTMAXLIB_INLINE V hold(V& held, V x) {
  const V smaller = min(held, x);
  held = max(x, held);
  return smaller;
}
template <class V>
SOFTMAXLIB_INLINE Pair<V> hold(Pair<V>& held, Pair<V> x) {
  const auto larger = gt(x.hi, held.hi);
  const Pair<V> smaller = {select(larger, held.hi, x.hi), select(larger, held.lo, x.lo)};
  held = {select(larger, x.hi, held.hi), select(larger, x.lo, held.lo)};
  return smaller;
}

template <class Term>
inline Term zero() {
  using V = decltype(high(Term()));
  Term term;
  from_pair(Pair<V>{V::set1(0), V::set1(0)}, term);
  return term;
}

// Adds x to the unevaluated sum + error of V (Knuth's two-sum).
template <class V>
SOFTMAXLIB_INLINE void two_sum(V& sum, V& error, V x) {
  const V s = sum + x;
  const V tail = s - sum;
  error = error + ((sum - (s - tail)) + (x - tail));
  sum = s;
}

// A sum over groups of four terms, per lane. Of floats: double is enough.
template <class V>
struct Lanes {
  f64x8 sum = f64x8::set1(0);

  SOFTMAXLIB_INLINE void add(f64x8 x) { sum = sum + x; }
  template <class Down>
  void scale(Down down) {
    sum = down(sum);
  }
  // Not inline: once per chunk.
  SOFTMAXLIB_NOINLINE void fold_into(Total& total) const { total.add(sum_lanes(sum)); }
};

// Of doubles: what each of these additions rounds away is summed too.
template <>
struct Lanes<f64x8> {
  f64x8 sum = f64x8::set1(0), error = f64x8::set1(0);

  SOFTMAXLIB_INLINE void add(f64x8 x) { two_sum(sum, error, x); }
  template <class Down>
  void scale(Down down) {
    sum = down(sum);
    error = down(error);
  }
  SOFTMAXLIB_NOINLINE void fold_into(Total& total) const {
    double lanes[f64x8::lanes];
    store(lanes, sum);
    for (const double lane : lanes) total.add(lane);
    total.error += sum_lanes(error);
  }
};

// The terms of a group in their order: two halves, then these.
template <class F, class Term>
SOFTMAXLIB_INLINE auto sum_of_two(Term a, Term b) {
  if constexpr (F::kWide) return widen_sum(a) + widen_sum(b);
  else return a + b;
}
template <class F, class Half>
SOFTMAXLIB_INLINE void add_halves(Lanes<typename F::V>& lanes, Half a, Half b) {
  if constexpr (F::kWide) lanes.add(a + b);
  else lanes.add(widen_sum(a + b));
}
template <class F, class Term>
SOFTMAXLIB_INLINE void add_terms(Lanes<typename F::V>& lanes, Term a, Term b, Term c, Term d) {
  add_halves<F>(lanes, sum_of_two<F>(a, b), sum_of_two<F>(c, d));
}

// A function F of an element (terms.hpp) under a reference exponent, and the largest argument that
// needs no other.
template <class F>
struct Under {
  using V = typename F::V;
  F f;
  typename V::elem limit;

  explicit Under(int reference)
      : f(reference), limit(static_cast<typename V::elem>(limit_of(reference))) {}

  template <class Value>
  SOFTMAXLIB_INLINE bool exceeded_by(const Value (&x)[4]) const {
    return any(gt(max_of(high(x[0]), high(x[1]), high(x[2]), high(x[3])), V::set1(limit)));
  }
};

// How chunks are summed, each way slower than the one before and right for more arguments: all of
// them in the window of exponents; some far below it, as where there is a mask; any. A block whose
// way was wrong for a chunk goes on in the next one.
enum class Way { kInWindow, kClamped, kCareful };

// What a block carries from one piece to the next.
template <class V>
struct BlockState {
  using T = typename V::elem;

  BlockState() = default;
  explicit BlockState(const Row<T>& row)
      : way(row.is_masked() ? Way::kClamped : Way::kInWindow), beside(row.beside()) {}

  Total total;
  Pair<V> held = {V::set1(static_cast<typename V::elem>(-INFINITY)), V::set1(0)};
  bool started = false;
  Way way = Way::kInWindow;
  Beside<T>* beside = nullptr;  // what is done beside, some groups at a time
};

// A group that exceeds the reference raises it: what was summed and stored so far is scaled down.
template <class F, class V, class T>
SOFTMAXLIB_NOINLINE void raise_reference(V top, Under<F>& under, Total& total, Lanes<V>& lanes,
                                         T* stored, int64_t n) {
  const int reference = reference_of<V>(max_lane(top));
  const int down_by = total.reference - reference;
  if (down_by >= 0) return;
  total.raise(reference);
  under = Under<F>(reference);
  lanes.scale(ScaleDown<f64x8>(down_by));
  const ScaleDown<V> down(down_by);
  for (int64_t i = 0; i < n; i += V::lanes) store(stored + i, down(load(stored + i)));
}

// Done beside the groups of a sum: nothing, but see softmax_pipelined.hpp.
struct NothingBeside {
  SOFTMAXLIB_INLINE void operator()(int64_t) const {}
};

// Folds f of a piece of a block into its total. kHold: each lane keeps its largest argument out of
// the sum. kStore: f(x) stays in y, under the reference that each chunk leaves in `references`.
template <class F, bool kHold, bool kStore, class Source>
class PieceSum {
 public:
  using V = typename F::V;
  using T = typename V::elem;
  using Value = typename Source::Value;
  using Term = typename F::Term;
  static constexpr int64_t kLanes = V::lanes;
  static constexpr int64_t kGroup = kVectorsPerGroup * kLanes;
  static constexpr int64_t kChunk = kVectorsPerChunk * kLanes;
  static constexpr int64_t kPart = 4 * kGroup;

  PieceSum(Source x, T* y, BlockState<V>& state)
      : x_(x), y_(y), state_(state), under_(state.total.reference) {
    from_pair(state.held, held_);
  }

  // kSpared: the caller knows that no argument raises the reference.
  template <bool kSpared, class Beside>
  SOFTMAXLIB_INLINE void run(int64_t n, int32_t* references, Beside beside) {
    // In place what is stored could not be computed again.
    if (kStore && x_.is_at(y_)) state_.way = Way::kCareful;
    for (int64_t start = 0; start < n; start += kChunk) {
      const int64_t stop = n - start < kChunk ? n : start + kChunk;
      const int64_t whole = start + (stop - start) / kGroup * kGroup;
      Lanes<V> lanes;
      // Memory is written no faster than this: few enough at a time to wait in the core's buffers.
      const int64_t part = state_.beside ? kPart : kChunk;
      for (int64_t i = start, next; i < whole; i = next) {
        next = whole - i < part ? whole : i + part;
        if (state_.beside) state_.beside->go_on(next - i);
        if constexpr (kSpared) {
          add_groups(i, next, lanes, beside);
        } else if constexpr (kHasManyRows) {
          // The first group of a block has nothing to hold against.
          if (kHold && !state_.started) {
            beside(i);
            add_carefully(i, next = i + kGroup, lanes);
            state_.started = true;
          } else {
            add_by_way(i, next, lanes, beside);
          }
        } else {
          skip(i, next, beside);
          add_carefully(i, next, lanes);
        }
      }
      if (whole < stop && state_.beside) state_.beside->go_on(stop - whole);
      if (whole < stop) {
        beside(whole);
        add_last(whole, stop, lanes, start);
      }
      state_.started = true;
      lanes.fold_into(state_.total);
      if constexpr (kStore) references[start / kChunk] = state_.total.reference;
    }
    state_.held = to_pair(held_);
  }

 private:
  // What was done beside is not done again where the first way is wrong.
  template <class Beside>
  SOFTMAXLIB_INLINE void add_by_way(int64_t i, int64_t stop, Lanes<V>& lanes, Beside beside) {
    if (SOFTMAXLIB_LIKELY(state_.way == Way::kInWindow)) {
      if (SOFTMAXLIB_LIKELY(add_in_range<Range::kInWindow>(i, stop, lanes, beside))) return;
      state_.way = Way::kClamped;
    } else {
      skip(i, stop, beside);
    }
    add_or_clamp(i, stop, lanes);
  }
  SOFTMAXLIB_NOINLINE void add_or_clamp(int64_t i, int64_t stop, Lanes<V>& lanes) {
    if (state_.way == Way::kClamped) {
      if (add_in_range<Range::kBelowEnd>(i, stop, lanes, NothingBeside())) return;
      state_.way = Way::kCareful;
    }
    add_carefully(i, stop, lanes);
  }

  // Of functions whose reference does not follow the row.
  template <class Beside>
  SOFTMAXLIB_INLINE void add_groups(int64_t i, int64_t stop, Lanes<V>& lanes, Beside beside) {
    const F f = under_.f;
    const Source x = x_;
    T* const y = y_;
    Value held = held_;
    Lanes<V> sum = lanes;
    for (; i < stop; i += kGroup) {
      const auto evaluate = [&](const Value* v, Term* e)
                                SOFTMAXLIB_INLINE_LAMBDA { f.template evaluate<kInStep>(v, e); };
      add_group(x, y, i, held, sum, evaluate, beside);
    }
    held_ = held;
    lanes = sum;
  }
  // False, and nothing is changed but y, where an argument was not in the range.
  template <Range kRange, class Beside>
  SOFTMAXLIB_INLINE bool add_in_range(int64_t i, int64_t stop, Lanes<V>& lanes, Beside beside) {
    const F f(state_.total.reference, kRange);
    const Source x = x_;
    T* const y = y_;
    typename V::Seen seen;
    Value held = held_;
    Lanes<V> sum = lanes;
    for (; i < stop; i += kGroup) {
      const auto evaluate = [&](const Value* v, Term* e) SOFTMAXLIB_INLINE_LAMBDA {
        f.template evaluate_in_range<kRange, kInStep>(v, e, seen);
      };
      add_group(x, y, i, held, sum, evaluate, beside);
    }
    bool inside = F::template is_inside<kRange>(seen);
    // What is held was not evaluated, and raises the reference all the same.
    if constexpr (kHold) inside &= !any(gt(high(held), V::set1(under_.limit)));
    if (SOFTMAXLIB_UNLIKELY(!inside)) return false;
    held_ = held;
    lanes = sum;
    return true;
  }
  // A group, half by half where registers are few: of the first only the sum has to stay in one.
  template <class Evaluate, class Beside>
  static SOFTMAXLIB_INLINE void add_group(const Source& x, T* y, int64_t i, Value& held,
                                          Lanes<V>& lanes, Evaluate evaluate, Beside beside) {
    constexpr int kAtOnce = kInStep > 2 ? 4 : 2;
    decltype(sum_of_two<F>(Term(), Term())) halves[2];
    for (int first = 0; first < 4; first += kAtOnce) {
      Value v[kAtOnce];
      Term e[kAtOnce];
      const int64_t at = i + first * kLanes;
      for (int j = 0; j < kAtOnce; ++j) v[j] = x.load(at + j * kLanes);
      if constexpr (kHold)
        for (Value& argument : v) argument = hold(held, argument);
      for (int j = 0; j < kAtOnce; j += kInStep) evaluate(v + j, e + j);
      if (first == 0) beside(i);  // before anything is stored
      if constexpr (kStore)
        for (int j = 0; j < kAtOnce; ++j) store(y + at + j * kLanes, e[j]);
      for (int j = 0; j < kAtOnce; j += 2) halves[(first + j) / 2] = sum_of_two<F>(e[j], e[j + 1]);
    }
    add_halves<F>(lanes, halves[0], halves[1]);
  }
  // What is done beside groups, without these.
  template <class Beside>
  static SOFTMAXLIB_INLINE void skip(int64_t i, int64_t stop, Beside beside) {
    for (; i < stop; i += kGroup) beside(i);
  }

  // Any arguments: a group that exceeds the reference raises it.
  SOFTMAXLIB_NOINLINE void add_carefully(int64_t i, int64_t stop, Lanes<V>& lanes) {
    const int64_t start = i / kChunk * kChunk;
    Value held = held_;
    while (i < stop) {
      Value v[4];
      for (int j = 0; j < 4; ++j) v[j] = x_.load(i + j * kLanes);
      check(v, i, start, lanes);
      const Under<F> here = under_;  // in registers until a group exceeds it
      Lanes<V> sum = lanes;
      do {
        Term e[4];
        if constexpr (kHold)
          for (Value& argument : v) argument = hold(held, argument);
        for (int j = 0; j < 4; j += kInStep) here.f.template evaluate<kInStep>(v + j, e + j);
        if constexpr (kStore)
          for (int j = 0; j < 4; ++j) store(y_ + i + j * kLanes, e[j]);
        add_terms<F>(sum, e[0], e[1], e[2], e[3]);
        i += kGroup;
        if (i >= stop) break;
        for (int j = 0; j < 4; ++j) v[j] = x_.load(i + j * kLanes);
      } while (!here.exceeded_by(v));
      lanes = sum;
    }
    held_ = held;
  }
  // Less than a group, at the end of the row.
  SOFTMAXLIB_NOINLINE void add_last(int64_t i, int64_t stop, Lanes<V>& lanes, int64_t start) {
    Value v[4];
    Term e[4];
    SOFTMAXLIB_NO_UNROLL
    for (int j = 0; j < 4; ++j) v[j] = load_up_to(x_, i + j * kLanes, stop - i - j * kLanes);
    if constexpr (F::kFollows) check(v, i, start, lanes);
    SOFTMAXLIB_NO_UNROLL
    for (int j = 0; j < 4; ++j) {
      const int64_t left = stop - i - j * kLanes;
      e[j] = zero<Term>();
      if (left <= 0) continue;
      if constexpr (kHold) v[j] = hold(held_, v[j]);
      e[j] = under_.f(v[j]);
      if constexpr (kStore)
        store_n(y_ + i + j * kLanes, e[j], static_cast<int>(left < kLanes ? left : kLanes));
    }
    add_terms<F>(lanes, e[0], e[1], e[2], e[3]);
  }
  SOFTMAXLIB_INLINE void check(const Value (&v)[4], int64_t i, int64_t start, Lanes<V>& lanes) {
    if (SOFTMAXLIB_UNLIKELY(under_.exceeded_by(v)))
      raise_reference<F>(max_of(high(v[0]), high(v[1]), high(v[2]), high(v[3])), under_,
                         state_.total, lanes, kStore ? y_ + start : y_, kStore ? i - start : 0);
  }

  const Source x_;
  T* const y_;
  BlockState<V>& state_;
  Under<F> under_;
  Value held_;
};

}  // namespace
}  // namespace SOFTMAX_ISA
}  // namespace softmaxlib
