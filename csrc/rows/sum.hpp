// The one sum that every schedule runs, so that all return the same bits:
//   group   4 vectors: (v0 + v1) + (v2 + v3), then lanes i and i + 8 of a float vector, in double
//   chunk   16 groups, one after the other; then its lanes (float: folded 8-4-2-1, double: in
//   order) block   16 chunks: a total of its own; blocks are merged in order
// Sums of float thus round in float twice only; sums of double are compensated throughout. The tail
// of a row adds exact zeros. Where the paper carries an exponent per lane, a block carries one
// reference exponent R, raised only when a group exceeds it by kSlack binades; rescaling by powers
// of two is exact.
#pragma once

#include <stdint.h>

#include "macros.hpp"
#include "math/exp.hpp"
#include "rows/row.hpp"

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

// Of doubles: what each addition rounds away is summed too.
template <>
struct Lanes<f64x8> {
  f64x8 sum = f64x8::set1(0), error = f64x8::set1(0);

  SOFTMAXLIB_INLINE void add(f64x8 x) { two_sum(sum, error, x); }
  SOFTMAXLIB_INLINE void add(f64x8 a, f64x8 b, f64x8 c, f64x8 d) {
    two_sum(a, error, b);
    two_sum(c, error, d);
    two_sum(a, error, c);
    add(a);
  }
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

// Folds the terms of a piece of a block into `total`.
//
// Terms (terms.hpp) provide:
//   prepare(x0, x1, x2, x3, total)  true if what was summed and stored so far must be scaled down
//   by
//                                   2^down_by(); asked only where kRescales
//   operator()(x)                   the term of an argument
//   add_to(lanes, e0, e1, e2, e3)   adds four terms to the sum
template <bool kStore, class Terms, class Source, class D>
inline void sum_piece(Terms& terms, Source x, D* y, int64_t n, Total& total, int32_t* references) {
  using V = typename Source::V;
  using Value = typename Source::Value;
  using Term = typename Terms::Term;
  constexpr int64_t kLanes = V::lanes;
  constexpr int64_t kGroup = kVectorsPerGroup * kLanes;
  constexpr int64_t kChunk = kVectorsPerChunk * kLanes;

  for (int64_t start = 0; start < n; start += kChunk) {
    const int64_t stop = n - start < kChunk ? n : start + kChunk;
    int64_t i = start;
    Lanes<V> lanes;
    const auto prepare = [&](const Value(&v)[4]) SOFTMAXLIB_INLINE_LAMBDA {
      if constexpr (!Terms::kRescales) return;
      else if (SOFTMAXLIB_UNLIKELY(terms.prepare(v[0], v[1], v[2], v[3], total))) {
        lanes.scale(ScaleDown<f64x8>(terms.down_by()));
        if constexpr (kStore) {
          const ScaleDown<V> down(terms.down_by());
          for (int64_t j = start; j < i; j += kLanes) store(y + j, down(load(y + j)));
        }
      }
    };

    for (; stop - i >= kGroup; i += kGroup) {
      const Value v[4] = {x.load(i), x.load(i + kLanes), x.load(i + 2 * kLanes),
                          x.load(i + 3 * kLanes)};
      prepare(v);
      const Term e0 = terms(v[0]), e1 = terms(v[1]), e2 = terms(v[2]), e3 = terms(v[3]);
      if constexpr (kStore) {
        store(y + i, e0);
        store(y + i + kLanes, e1);
        store(y + i + 2 * kLanes, e2);
        store(y + i + 3 * kLanes, e3);
      }
      Terms::add_to(lanes, e0, e1, e2, e3);
    }
    if (i < stop) {
      Value v[4];
      for (int j = 0; j < 4; ++j) v[j] = load_up_to(x, i + j * kLanes, stop - i - j * kLanes);
      prepare(v);
      Term e[4];
      for (int j = 0; j < 4; ++j) {
        const int64_t left = stop - i - j * kLanes;
        if (left <= 0) {
          e[j] = Terms::zero();
          continue;
        }
        e[j] = terms(v[j]);
        if constexpr (kStore)
          store_n(y + i + j * kLanes, e[j], static_cast<int>(left < kLanes ? left : kLanes));
      }
      Terms::add_to(lanes, e[0], e[1], e[2], e[3]);
    }
    lanes.fold_into(total);
    if constexpr (kStore) references[start / kChunk] = total.reference;
  }
}

}  // namespace
}  // namespace SOFTMAX_ISA
}  // namespace softmaxlib
