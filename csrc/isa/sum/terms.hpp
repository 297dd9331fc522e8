// The passes that algorithms are made of, for any function F of an element: Exp (math/exp.hpp) or
// Stable (math/stable.hpp), which give their results in units of 2^(reference - bias).
#pragma once

#include <type_traits>

#include "isa/sum/sum.hpp"

namespace softmaxlib {
namespace SOFTMAX_ISA {
namespace {

// f(hi + lo) under a reference.
template <class F>
SOFTMAXLIB_NOINLINE double one_term(typename F::V::elem hi, typename F::V::elem lo, int reference) {
  using V = typename F::V;
  typename V::elem hi_lanes[V::lanes], lo_lanes[V::lanes] = {};
  for (auto& lane : hi_lanes) lane = static_cast<typename V::elem>(-INFINITY);
  hi_lanes[0] = hi;
  lo_lanes[0] = lo;
  const Pair<V> x = {load(hi_lanes), load(lo_lanes)};
  return sum_lanes(widen_sum(F(reference)(x)));
}

// The sum of a row or block.
template <class F>
struct RowSum : Total {
  using T = typename F::V::elem;

  void merge(const RowSum& other) { Total::merge(other); }
  static RowSum of_term(T hi, T lo, int reference) {
    RowSum s;
    s.reference = reference;
    s.sum = one_term<F>(hi, lo, reference);
    return s;
  }
  BlockResult pack() const { return {sum, error, 0, 0, reference, {}}; }
  static RowSum unpack(const BlockResult& r) {
    RowSum s;
    s.sum = r.sum, s.error = r.error, s.reference = r.reference;
    return s;
  }
};

// The same with its largest argument left out: f(held) + sum.
template <class F>
struct RowRest : Total {
  double held_hi = -INFINITY, held_lo = 0;

  using T = typename F::V::elem;

  void add_term(double hi, double lo) {
    add(one_term<F>(static_cast<T>(hi), static_cast<T>(lo), reference));
  }
  // A NaN is summed, not held.
  static RowRest of_term(T hi, T lo, int reference) {
    RowRest s;
    s.reference = reference;
    if (hi != hi) s.sum = static_cast<double>(hi);
    else s.held_hi = static_cast<double>(hi), s.held_lo = static_cast<double>(lo);
    return s;
  }
  void merge(RowRest other) {
    if (other.held_hi > held_hi) {
      const RowRest mine = *this;
      *this = other;
      other = mine;
    }
    Total::merge(other);
    add_term(other.held_hi, other.held_lo);
  }
  BlockResult pack() const { return {sum, error, held_hi, held_lo, reference, {}}; }
  static RowRest unpack(const BlockResult& r) {
    RowRest s;
    s.sum = r.sum, s.error = r.error, s.reference = r.reference;
    s.held_hi = r.held_hi, s.held_lo = r.held_lo;
    return s;
  }
};

// What is known of a row before its sum: an upper bound, and for functions that do not follow the
// row its reference.
struct Known {
  double top = INFINITY;
  int reference = 0;
};
// The type of a call that knows nothing: no code is made for a known maximum.
struct Unknown : Known {};

template <class F, bool kHold, bool kStore, class Source, class T, class K,
          class Beside = NothingBeside>
inline void sum_piece_of(Source x, T* y, int64_t n, K known, BlockState<typename F::V>& state,
                         int32_t* references, Beside beside = {}) {
  using V = typename F::V;
  if (!state.started) {
    state.total.reference = known.reference;
    if constexpr (F::kFollows) {  // the first group's maximum
      V v[4];
      for (int j = 0; j < 4; ++j)
        v[j] = high(load_up_to(x, j * int64_t{V::lanes}, n - j * int64_t{V::lanes}));
      const V top = max_of(v[0], v[1], v[2], v[3]);
      state.total.reference = reference_of<V>(max_lane(top));
    }
  }
  // A known maximum of the row can spare the check, but never changes the reference. Worth it where
  // a term costs little else.
  constexpr bool kSpares =
      !std::is_same<K, Unknown>::value && !kHold && sizeof(typename Source::Value) == sizeof(V);
  PieceSum<F, kHold, kStore, Source> sum(x, y, state);
  if (F::kFollows && !(kSpares && known.top <= limit_of(state.total.reference)))
    return sum.template run<!F::kFollows>(n, references, beside);
  if constexpr (kSpares || !F::kFollows) sum.template run<true>(n, references, beside);
}

// Moves all but the largest of the lanes' held arguments into the sum.
template <class F>
SOFTMAXLIB_NOINLINE RowRest<F> take_largest(const BlockState<typename F::V>& state) {
  using V = typename F::V;
  typename V::elem hi[V::lanes], lo[V::lanes];
  store(hi, state.held.hi);
  store(lo, state.held.lo);
  int largest = 0;
  for (int i = 1; i < V::lanes; ++i)
    if (hi[i] > hi[largest]) largest = i;
  RowRest<F> result;
  static_cast<Total&>(result) = state.total;
  result.held_hi = static_cast<double>(hi[largest]);
  result.held_lo = static_cast<double>(lo[largest]);
  hi[largest] = static_cast<typename V::elem>(-INFINITY);
  lo[largest] = 0;
  result.add(sum_lanes(widen_sum(F(state.total.reference)(Pair<V>{load(hi), load(lo)}))));
  return result;
}

// The sink of a row joins the sum as one more block.
template <class F, class R>
SOFTMAXLIB_NOINLINE void add_sink(double sink, R& result, Known known) {
  using T = typename F::V::elem;
  const T hi = static_cast<T>(sink), lo = static_cast<T>(sink - static_cast<double>(hi));
  result.merge(R::of_term(hi, hi - hi == 0 ? lo : 0,
                          F::kFollows ? reference_of<typename F::V>(hi) : known.reference));
}
template <class F, class D, class R>
inline R with_sink(const Row<D>& row, R result, Known known) {
  const double sink = row.shifted_sink();
  if (sink != -INFINITY) add_sink<F>(sink, result, known);
  return result;
}

// Sum of f(x), added to what was there before. Reads x.
template <class F, class D>
inline RowSum<F> sum_of(const Row<D>& row, Known known = {}, const RowSum<F>* before = nullptr) {
  const auto total = row.template reduce_blocks<RowSum<F>>(
      [&](int64_t start, int64_t stop) {
        BlockState<typename F::V> state(row);
        row.read(start, stop, [&](auto x, int64_t, int64_t n) {
          sum_piece_of<F, false, false>(x, static_cast<typename F::V::elem*>(nullptr), n, known,
                                        state, nullptr);
        });
        RowSum<F> result;
        static_cast<Total&>(result) = state.total;
        return result;
      },
      before);
  return with_sink<F>(row, total, known);
}

// The same, leaving every f(x) in y, or where the row has its terms wait, under its chunk's
// reference. Reads x, writes y. In y of float or double only: a half cannot hold f(x).
// beside(i) is done beside the group at element i.
template <class F, class D, class K = Known, class Beside = NothingBeside>
inline RowSum<F> store_of(const Row<D>& row, K known = {}, Beside beside = {}) {
  const auto total = row.template reduce_blocks<RowSum<F>>([&](int64_t start, int64_t stop) {
    BlockState<typename F::V> state(row);
    row.read_store(start, stop, [&](auto x, auto* terms, int64_t i, int64_t n) {
      sum_piece_of<F, false, true>(x, terms, n, known, state, &row.reference_of_chunk(i),
                                   [&](int64_t j) SOFTMAXLIB_INLINE_LAMBDA { beside(i + j); });
    });
    RowSum<F> result;
    static_cast<Total&>(result) = state.total;
    return result;
  });
  return with_sink<F>(row, total, known);
}

// Sum of f(x) beside the largest, likewise. Reads x.
template <class F, class D>
inline RowRest<F> rest_of(const Row<D>& row, Known known = {}, const RowRest<F>* before = nullptr) {
  const auto total = row.template reduce_blocks<RowRest<F>>(
      [&](int64_t start, int64_t stop) {
        BlockState<typename F::V> state(row);
        row.read(start, stop, [&](auto x, int64_t, int64_t n) {
          sum_piece_of<F, true, false>(x, static_cast<typename F::V::elem*>(nullptr), n, known,
                                       state, nullptr);
        });
        return take_largest<F>(state);
      },
      before);
  return with_sink<F>(row, total, known);
}

template <class F>
struct Scaled {
  static constexpr int kAtOnce = kInStep > 2 ? kInStep : 2;
  F f;
  typename F::V::elem scale;

  template <class X>
  SOFTMAXLIB_INLINE typename F::V operator()(X x) const {
    return f(x) * F::V::set1(scale);
  }
  template <class X>
  SOFTMAXLIB_INLINE void operator()(const X (&x)[kAtOnce], typename F::V (&y)[kAtOnce]) const {
    for (int j = 0; j < kAtOnce; j += kInStep) f.template evaluate<kInStep>(x + j, y + j);
    for (int j = 0; j < kAtOnce; ++j) y[j] = y[j] * F::V::set1(scale);
  }
};

// y = f(x) / total. Reads x, writes y.
template <class F, class D>
inline void write_of(const Row<D>& row, const RowSum<F>& total) {
  using V = typename F::V;
  row.map(Scaled<F>{F(total.reference), static_cast<typename V::elem>(reciprocal(total))});
}

// y = term / total for what store_of left. Reads y, writes y.
template <class V>
struct ScaledTerms {
  using T = typename V::elem;
  T scale;
  int reference;

  void operator()(const Row<T>& row, T* terms, int64_t i, int64_t n) const {
    const int below = row.reference_of_chunk(i) - reference;
    if (below != 0) map_elements(Contiguous<T>{terms}, terms, n, false, ScaleDown<V>(below));
    row.put_scaled(i, n, terms, scale);
  }
};
template <class F, class D>
inline void scale_stored(const Row<D>& row, const RowSum<F>& total) {
  using V = typename F::V;
  row.map_stored(ScaledTerms<V>{static_cast<typename V::elem>(reciprocal(total)), total.reference});
}

// The row's maximum. Reads x.
template <class D>
inline double max_of_row(const Row<D>& row) {
  using V = typename Row<D>::V;
  struct Max {
    double value = -INFINITY;
    void merge(Max other) { value = other.value > value ? other.value : value; }
    BlockResult pack() const { return {0, 0, value, 0, 0, {}}; }
    static Max unpack(const BlockResult& r) { return {r.held_hi}; }
  };
  const Max result = row.template reduce_blocks<Max>([&](int64_t start, int64_t stop) {
    constexpr int64_t kLanes = V::lanes;
    V top = V::set1(static_cast<typename V::elem>(-INFINITY));
    row.read(start, stop, [&](auto x, int64_t, int64_t n) {
      V a = top, b = a, c = a, d = a;  // in registers: top's address is taken
      int64_t i = 0;
      for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
        a = max(high(x.load(i)), a);
        b = max(high(x.load(i + kLanes)), b);
        c = max(high(x.load(i + 2 * kLanes)), c);
        d = max(high(x.load(i + 3 * kLanes)), d);
      }
      for (; i < n; i += kLanes) a = max(high(load_up_to(x, i, n - i)), a);
      top = max_of(a, b, c, d);
    });
    return Max{static_cast<double>(max_lane(top))};
  });
  return result.value;
}

}  // namespace
}  // namespace SOFTMAX_ISA
}  // namespace softmaxlib
