// The passes that algorithms are made of, for any function F of an element: Exp (math/exp.hpp) or
// Stable (math/stable.hpp), which give their results in units of 2^(reference - bias).
#pragma once

#include "rows/sum.hpp"

namespace softmaxlib {
namespace SOFTMAX_ISA {
namespace {

template <class V>
inline V max_of(V a, V b, V c, V d) {
  return max(max(a, b), max(c, d));
}

// Keeps the larger of held and x in held, returns the other; a NaN is never held.
template <class V>
inline V hold(V& held, V x) {
  const V smaller = min(held, x);
  held = max(x, held);
  return smaller;
}
template <class V>
inline Pair<V> hold(Pair<V>& held, Pair<V> x) {
  const auto larger = gt(x.hi, held.hi);
  const Pair<V> smaller = {select(larger, held.hi, x.hi), select(larger, held.lo, x.lo)};
  held = {select(larger, x.hi, held.hi), select(larger, x.lo, held.lo)};
  return smaller;
}

// kHold: each lane keeps its largest argument out of the sum. kChecked: a group may exceed the
// reference; without, the caller knows that none does.
template <class F, class Value, bool kHold, bool kChecked>
class Terms {
 public:
  using V = typename F::V;
  using Term = typename F::Term;
  static constexpr bool kRescales = kChecked;

  Terms(int reference, Pair<V> held) : function_(reference), limit_(limit(reference)) {
    from_pair(held, held_);
  }

  // True if what was summed and stored so far must be scaled by 2^down_by().
  bool prepare(Value a, Value b, Value c, Value d, Total& total) {
    const V top = max_of(high(a), high(b), high(c), high(d));
    if (!any(gt(top, V::set1(limit_)))) return false;
    const int reference = reference_of(static_cast<double>(max_lane(top)));
    if (reference <= total.reference) return false;
    down_by_ = total.reference - reference;
    total.raise(reference);
    function_ = F(reference);
    limit_ = limit(reference);
    return true;
  }
  int down_by() const { return down_by_; }

  SOFTMAXLIB_INLINE Term operator()(Value x) {
    if constexpr (kHold) return function_(hold(held_, x));
    else return function_(x);
  }
  SOFTMAXLIB_INLINE static void add_to(Lanes<V>& lanes, Term a, Term b, Term c, Term d) {
    if constexpr (F::kWide)
      lanes.add((widen_sum(a) + widen_sum(b)) + (widen_sum(c) + widen_sum(d)));
    else lanes.add(a, b, c, d);
  }
  static Term zero() {
    Term term;
    from_pair(Pair<V>{V::set1(0), V::set1(0)}, term);
    return term;
  }
  Pair<V> held() const { return to_pair(held_); }

 private:
  static typename V::elem limit(int reference) {
    return static_cast<typename V::elem>(limit_of(reference));
  }

  F function_;
  typename V::elem limit_;
  Value held_;
  int down_by_ = 0;
};

// The sum of a row or block.
template <class F>
struct RowSum : Total {
  void merge(const RowSum& other) { Total::merge(other); }
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

  void add_term(double hi, double lo) {
    using V = typename F::V;
    typename V::elem hi_lanes[V::lanes], lo_lanes[V::lanes] = {};
    for (auto& lane : hi_lanes) lane = static_cast<typename V::elem>(-INFINITY);
    hi_lanes[0] = static_cast<typename V::elem>(hi);
    lo_lanes[0] = static_cast<typename V::elem>(lo);
    const Pair<V> x = {load(hi_lanes), load(lo_lanes)};
    add(sum_lanes(widen_sum(F(reference)(x))));
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

// What a block carries from one piece to the next.
template <class V>
struct BlockState {
  Total total;
  Pair<V> held = {V::set1(static_cast<typename V::elem>(-INFINITY)), V::set1(0)};
  bool started = false;
};

// What is known of a row before its sum: an upper bound, and for functions that do not follow the
// row its reference.
struct Known {
  double top = INFINITY;
  int reference = 0;
};

template <class F, bool kHold, bool kStore, class Source, class D>
inline void sum_piece_of(Source x, D* y, int64_t n, Known known, BlockState<typename F::V>& state,
                         int32_t* references) {
  using V = typename F::V;
  using Value = typename Source::Value;
  if (!state.started) {
    state.started = true;
    state.total.reference = known.reference;
    if constexpr (F::kFollows) {  // the first group's maximum
      V v[4];
      for (int j = 0; j < 4; ++j)
        v[j] = high(load_up_to(x, j * int64_t{V::lanes}, n - j * int64_t{V::lanes}));
      const V top = max_of(v[0], v[1], v[2], v[3]);
      state.total.reference = reference_of(static_cast<double>(max_lane(top)));
    }
  }
  const auto run = [&](auto terms) {
    sum_piece<kStore>(terms, x, y, n, state.total, references);
    state.held = terms.held();
  };
  // A known maximum of the row can spare the check, but never changes the reference.
  if constexpr (F::kFollows) {
    if (!(known.top <= limit_of(state.total.reference)))
      return run(Terms<F, Value, kHold, true>(state.total.reference, state.held));
  }
  run(Terms<F, Value, kHold, false>(state.total.reference, state.held));
}

// Moves all but the largest of the lanes' held arguments into the sum.
template <class F>
inline RowRest<F> take_largest(const BlockState<typename F::V>& state) {
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

// Sum of f(x). Reads x.
template <class F, class D>
inline RowSum<F> sum_of(const Row<D>& row, Known known = {}) {
  return row.template reduce_blocks<RowSum<F>>([&](int64_t start, int64_t stop) {
    BlockState<typename F::V> state;
    row.read(start, stop, [&](auto x, int64_t, int64_t n) {
      sum_piece_of<F, false, false>(x, static_cast<D*>(nullptr), n, known, state, nullptr);
    });
    RowSum<F> result;
    static_cast<Total&>(result) = state.total;
    return result;
  });
}

// The same, leaving every f(x) in y under its chunk's reference. Reads x, writes y. Direct rows of
// float or double only: a half cannot hold f(x).
template <class F, class D>
inline RowSum<F> store_of(const Row<D>& row, Known known = {}) {
  return row.template reduce_blocks<RowSum<F>>([&](int64_t start, int64_t stop) {
    BlockState<typename F::V> state;
    row.read_write_direct(start, stop, [&](auto x, D* y, int64_t i, int64_t n) {
      sum_piece_of<F, false, true>(x, y, n, known, state, &row.reference_of_chunk(i));
    });
    RowSum<F> result;
    static_cast<Total&>(result) = state.total;
    return result;
  });
}

// Sum of f(x) beside the largest. Reads x.
template <class F, class D>
inline RowRest<F> rest_of(const Row<D>& row, Known known = {}) {
  return row.template reduce_blocks<RowRest<F>>([&](int64_t start, int64_t stop) {
    BlockState<typename F::V> state;
    row.read(start, stop, [&](auto x, int64_t, int64_t n) {
      sum_piece_of<F, true, false>(x, static_cast<D*>(nullptr), n, known, state, nullptr);
    });
    return take_largest<F>(state);
  });
}

// y = f(x) / total. Reads x, writes y.
template <class F, class D>
inline void write_of(const Row<D>& row, const RowSum<F>& total) {
  using V = typename F::V;
  const F f(total.reference);
  const auto scale = static_cast<typename V::elem>(reciprocal(total));
  row.map(0, [f, scale](auto x) SOFTMAXLIB_INLINE_LAMBDA { return f(x) * V::set1(scale); });
}

// y = y / total for what store_of left there. Reads y, writes y.
template <class F, class D>
inline void scale_stored(const Row<D>& row, const RowSum<F>& total) {
  using V = typename F::V;
  const auto scale = static_cast<typename V::elem>(reciprocal(total));
  row.map_stored([&](D* y, int64_t i, int64_t n, bool streaming) {
    const int below = row.reference_of_chunk(i) - total.reference;
    if (below == 0) {
      Row<D>::map_elements(Contiguous<D>{y}, y, n, streaming,
                           [scale](V v) { return v * V::set1(scale); });
    } else {
      const ScaleDown<V> down(below);
      Row<D>::map_elements(Contiguous<D>{y}, y, n, streaming,
                           [scale, down](V v) { return down(v) * V::set1(scale); });
    }
  });
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
    V a = V::set1(static_cast<typename V::elem>(-INFINITY)), b = a, c = a, d = a;
    row.read(start, stop, [&](auto x, int64_t, int64_t n) {
      int64_t i = 0;
      for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
        a = max(high(x.load(i)), a);
        b = max(high(x.load(i + kLanes)), b);
        c = max(high(x.load(i + 2 * kLanes)), c);
        d = max(high(x.load(i + 3 * kLanes)), d);
      }
      for (; i < n; i += kLanes) a = max(high(load_up_to(x, i, n - i)), a);
    });
    return Max{static_cast<double>(max_lane(max_of(a, b, c, d)))};
  });
  return result.value;
}

}  // namespace
}  // namespace SOFTMAX_ISA
}  // namespace softmaxlib
