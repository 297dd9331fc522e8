// The one sum that every schedule runs, so that all return the same bits:
//   group   4 vectors: (v0 + v1) + (v2 + v3), added to accumulator (group mod 4)
//   chunk   16 groups: (A0 + A1) + (A2 + A3), lanes folded 8-4-2-1 in double, added to the total
//   block   64 chunks: a total of its own; blocks are merged in order
// The tail of a row adds exact zeros. Relative to the paper, which carries an exponent per lane, a
// block carries one reference exponent R, raised only when a group exceeds it by kSlack binades;
// rescaling by powers of two is exact.
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

// Folds the terms of a piece of a block into `total`.
//
// Terms (terms.hpp) provide:
//   prepare(x0, x1, x2, x3)  true if what was summed and stored so far must be rescaled by down();
//                            asked only where kRescales
//   operator()(x) -> V       the term of an argument; with kHold, of the smaller of the argument
//                            and the held maximum of its lane, which stays out of the sum
//   widen(V) -> Sum          to the type that is accumulated
template <bool kStore, class Terms, class Source, class D>
inline void sum_piece(Terms& terms, Source x, D* y, int64_t n, Total& total, int32_t* references) {
  using V = typename Source::V;
  using Value = typename Source::Value;
  using Sum = typename Terms::Sum;
  constexpr int64_t kLanes = V::lanes;
  constexpr int64_t kGroup = kVectorsPerGroup * kLanes;
  constexpr int64_t kChunk = kVectorsPerChunk * kLanes;

  for (int64_t start = 0; start < n; start += kChunk) {
    const int64_t stop = n - start < kChunk ? n : start + kChunk;
    int64_t i = start;
    Sum a = Sum::set1(0), b = a, c = a, d = a;
    // Groups take turns: the accumulators move up by one, so that `a` is always the next.
    const auto turn = [&](Sum next) SOFTMAXLIB_INLINE_LAMBDA { a = b, b = c, c = d, d = next; };
    const auto prepare = [&](const Value (&v)[4]) SOFTMAXLIB_INLINE_LAMBDA {
      if constexpr (!Terms::kRescales) return;
      else if (SOFTMAXLIB_UNLIKELY(terms.prepare(v[0], v[1], v[2], v[3], total))) {
        const auto down = terms.down();
        a = down(a), b = down(b), c = down(c), d = down(d);
        if constexpr (kStore)
          for (int64_t j = start; j < i; j += kLanes) store(y + j, down(load(y + j)));
      }
    };

    for (; stop - i >= kGroup; i += kGroup) {
      const Value v[4] = {x.load(i), x.load(i + kLanes), x.load(i + 2 * kLanes),
                          x.load(i + 3 * kLanes)};
      prepare(v);
      const V e0 = terms(v[0]), e1 = terms(v[1]), e2 = terms(v[2]), e3 = terms(v[3]);
      if constexpr (kStore) {
        store(y + i, e0);
        store(y + i + kLanes, e1);
        store(y + i + 2 * kLanes, e2);
        store(y + i + 3 * kLanes, e3);
      }
      turn(a + ((Terms::widen(e0) + Terms::widen(e1)) + (Terms::widen(e2) + Terms::widen(e3))));
    }
    int64_t groups = (i - start) / kGroup;
    if (i < stop) {
      Value v[4];
      for (int j = 0; j < 4; ++j) v[j] = load_up_to(x, i + j * kLanes, stop - i - j * kLanes);
      prepare(v);
      Sum e[4];
      for (int j = 0; j < 4; ++j) {
        const int64_t left = stop - i - j * kLanes;
        e[j] = Sum::set1(0);
        if (left <= 0) continue;
        const V term = terms(v[j]);
        if constexpr (kStore)
          store_n(y + i + j * kLanes, term, static_cast<int>(left < kLanes ? left : kLanes));
        e[j] = Terms::widen(term);
      }
      turn(a + ((e[0] + e[1]) + (e[2] + e[3])));
      ++groups;
    }
    for (; groups % 4; ++groups) turn(a);
    total.add(sum((a + b) + (c + d)));
    if constexpr (kStore) references[start / kChunk] = total.reference;
  }
}

}  // namespace
}  // namespace SOFTMAX_ISA
}  // namespace softmaxlib
