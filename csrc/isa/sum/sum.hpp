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
  template <class Term>
  SOFTMAXLIB_INLINE void add(Term a, Term b, Term c, Term d) {
    add(widen_sum((a + b) + (c + d)));
  }
  template <class Down>
  void scale(Down down) {
    sum = down(sum);
  }
  void fold_into(Total& total) const { total.add(sum_lanes(sum)); }
};

// Of doubles: what each of these additions rounds away is summed too.
template <>
struct Lanes<f64x8> {
  f64x8 sum = f64x8::set1(0), error = f64x8::set1(0);

  SOFTMAXLIB_INLINE void add(f64x8 x) { two_sum(sum, error, x); }
  SOFTMAXLIB_INLINE void add(f64x8 a, f64x8 b, f64x8 c, f64x8 d) { add((a + b) + (c + d)); }
  template <class Down>
  void scale(Down down) {
    sum = down(sum);
    error = down(error);
  }
  void fold_into(Total& total) const {
    double lanes[f64x8::lanes];
    store(lanes, sum);
    for (const double lane : lanes) total.add(lane);
    total.error += sum_lanes(error);
  }
};

template <class F, class Term>
SOFTMAXLIB_INLINE void add_terms(Lanes<typename F::V>& lanes, Term a, Term b, Term c, Term d) {
  if constexpr (F::kWide) lanes.add((widen_sum(a) + widen_sum(b)) + (widen_sum(c) + widen_sum(d)));
  else lanes.add(a, b, c, d);
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

// What a block carries from one piece to the next.
template <class V>
struct BlockState {
  Total total;
  Pair<V> held = {V::set1(static_cast<typename V::elem>(-INFINITY)), V::set1(0)};
  bool started = false;
};

// A group that exceeds the reference raises it: what was summed and stored so far is scaled down.
template <class F, class V, class T>
SOFTMAXLIB_NOINLINE void raise_reference(V top, Under<F>& under, Total& total, Lanes<V>& lanes,
                                         T* stored, int64_t n) {
  const int reference = reference_of(static_cast<double>(max_lane(top)));
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
// kChecked: a group may exceed the reference; without, the caller knows that none does.
template <class F, bool kHold, bool kStore, bool kChecked, class Source, class T, class Beside>
inline void sum_piece(Source x, T* y, int64_t n, BlockState<typename F::V>& state,
                      int32_t* references, Beside beside) {
  using V = typename F::V;
  using Value = typename Source::Value;
  using Term = typename F::Term;
  constexpr int64_t kLanes = V::lanes;
  constexpr int64_t kGroup = kVectorsPerGroup * kLanes;
  constexpr int64_t kChunk = kVectorsPerChunk * kLanes;

  Value held;
  from_pair(state.held, held);
  Under<F> under(state.total.reference);

  for (int64_t start = 0; start < n; start += kChunk) {
    const int64_t stop = n - start < kChunk ? n : start + kChunk;
    int64_t i = start;
    Lanes<V> lanes;
    const auto check = [&](const Value(&v)[4]) SOFTMAXLIB_INLINE_LAMBDA {
      if constexpr (kChecked)
        if (SOFTMAXLIB_UNLIKELY(under.exceeded_by(v)))
          raise_reference<F>(max_of(high(v[0]), high(v[1]), high(v[2]), high(v[3])), under,
                             state.total, lanes, kStore ? y + start : y, kStore ? i - start : 0);
    };

    while (stop - i >= kGroup) {
      Value v[4] = {x.load(i), x.load(i + kLanes), x.load(i + 2 * kLanes), x.load(i + 3 * kLanes)};
      check(v);
      const Under<F> here = under;  // in registers until a group exceeds it
      Lanes<V> sum = lanes;
      do {
        Term e[4];
        if constexpr (kHold)
          for (Value& argument : v) argument = hold(held, argument);
        for (int j = 0; j < 4; j += kInStep) here.f.template evaluate<kInStep>(v + j, e + j);
        beside(i);
        if constexpr (kStore)
          for (int j = 0; j < 4; ++j) store(y + i + j * kLanes, e[j]);
        add_terms<F>(sum, e[0], e[1], e[2], e[3]);
        i += kGroup;
        if (stop - i < kGroup) break;
        for (int j = 0; j < 4; ++j) v[j] = x.load(i + j * kLanes);
      } while (!kChecked || !here.exceeded_by(v));
      lanes = sum;
    }
    if (i < stop) {
      Value v[4];
      Term e[4];
      for (int j = 0; j < 4; ++j) v[j] = load_up_to(x, i + j * kLanes, stop - i - j * kLanes);
      check(v);
      beside(i);
      for (int j = 0; j < 4; ++j) {
        const int64_t left = stop - i - j * kLanes;
        e[j] = zero<Term>();
        if (left <= 0) continue;
        if constexpr (kHold) v[j] = hold(held, v[j]);
        e[j] = under.f(v[j]);
        if constexpr (kStore)
          store_n(y + i + j * kLanes, e[j], static_cast<int>(left < kLanes ? left : kLanes));
      }
      add_terms<F>(lanes, e[0], e[1], e[2], e[3]);
    }
    lanes.fold_into(state.total);
    if constexpr (kStore) references[start / kChunk] = state.total.reference;
  }
  state.held = to_pair(held);
}

}  // namespace
}  // namespace SOFTMAX_ISA
}  // namespace softmaxlib
