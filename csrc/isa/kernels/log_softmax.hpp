// log_softmax and logsumexp with relative accuracy where one element holds nearly all of the sum:
// with M the largest element and rest = sum of the others' e^(x - M),
//
//   logsumexp = M + log1p(rest),  log_softmax = (x - M) - log1p(rest)
//
// The sum needs no maximum first; the three-pass algorithm reads x for it all the same, because
// that is the algorithm which the caller asked to have.
#pragma once

#include "isa/kernels/pipelined.hpp"
#include "isa/kernels/softmax.hpp"
#include "isa/math/log.hpp"

namespace softmaxlib {
namespace SOFTMAX_ISA {
namespace {

// log1p(rest / e^M) of a vector of rows. A quotient of doubles, since a float's sum is one; its
// logarithm in V, which has the digits of a result. e^M of a float is one of two parts.
template <class V>
struct LogRest {
  using E = Exp<V, Use::kExact>;
  V hi, lo;                   // the logarithm; hi: a multiple of ln2's high part
  InLanes<V> of_held, ratio;  // e^M in units of 2^(reference - E::kBias); rest / e^M

  SOFTMAXLIB_INLINE LogRest(Pair<V> held, InLanes<V> rest, V reference) {
    using C = LogConstants<V>;
    const ExpInLanes<V, E> exp(reference);
    of_held = sum_of_parts(exp(held));
    ratio = rest / of_held;
    const LogParts<V> parts = log1p_parts(ratio.value(), V::set1(0));
    hi = parts.exponent * V::set1(C::kLn2Hi);
    lo = parts.mantissa + parts.exponent * V::set1(C::kLn2Lo);
  }

 private:
  static InLanes<f32x16> sum_of_parts(Pair<f32x16> x) {
    return InLanes<f32x16>::of(x.hi) + InLanes<f32x16>::of(x.lo);
  }
  static InLanes<f64x8> sum_of_parts(f64x8 x) { return {x}; }
};

template <class D>
using LogExp = Exp<typename Row<D>::V, Use::kLogarithms>;

// That of one row.
template <class D, class V = typename Row<D>::V>
SOFTMAXLIB_NOINLINE LogRest<V> log_rest_of_row(const RowRest<LogExp<D>>& rest) {
  using T = typename V::elem;
  const Pair<V> held = {V::set1(static_cast<T>(rest.held_hi)),
                        V::set1(static_cast<T>(rest.held_lo))};
  return LogRest<V>(held, in_all(rest.value(), V()), V::set1(static_cast<T>(rest.reference)));
}

struct LogSum {
  double held_hi, held_lo;  // M, less the row's shift
  Pair<double> log_rest;    // log1p(rest)
};
template <class D, class V = typename Row<D>::V>
inline LogSum log_sum_of(const RowRest<LogExp<D>>& rest, const LogRest<V>& log_rest) {
  return {rest.held_hi,
          rest.held_lo,
          {static_cast<double>(first(log_rest.hi)), static_cast<double>(first(log_rest.lo))}};
}

template <class V>
inline V subtract(V x, V y, V y_low) {
  return (x - y) - y_low;
}
template <class V>
inline V subtract(Pair<V> x, V y, V y_low) {
  return (x.hi - y) + (x.lo - y_low);
}

// finish(row, its RowRest), or invalid(row, its maximum) where there is no sum.
template <class D, class Finish, class Invalid>
inline void with_rest(Row<D> row, bool three_pass, Finish finish, Invalid invalid) {
  for (int attempt = 0; attempt < 2; ++attempt) {
    const Known known = three_pass ? Known{max_of_row(row)} : Known{};
    const auto rest = rest_of<LogExp<D>>(row, known);
    if (usable(rest)) return finish(row, rest);
    const Pair<double> top = exact_max_of(row);
    if (!finite(top.hi)) return invalid(row, top.hi);
    row.shift_by(top);
  }
  invalid(row, NAN);
}

// finish(row, its LogSum), likewise.
template <class D, class Finish, class Invalid>
inline void with_log_sum(const Row<D>& row, bool three_pass, Finish finish, Invalid invalid) {
  with_rest(
      row, three_pass,
      [&](const Row<D>& r, const auto& rest) {
        finish(r, log_sum_of<D>(rest, log_rest_of_row<D>(rest)));
      },
      invalid);
}

// Of one element.
template <class V>
struct LogSoftmaxOf {
  typename V::elem hi, lo, log_rest;

  explicit LogSoftmaxOf(LogSum s)
      : hi(static_cast<typename V::elem>(s.held_hi)),
        lo(static_cast<typename V::elem>(s.held_lo)),
        log_rest(static_cast<typename V::elem>(s.log_rest.hi) +
                 static_cast<typename V::elem>(s.log_rest.lo)) {}

  template <class X>
  SOFTMAXLIB_INLINE V operator()(X x) const {
    return subtract(x, V::set1(hi), V::set1(lo)) - V::set1(log_rest);
  }
};

template <class D>
inline void write_log_softmax(const Row<D>& row, LogSum s) {
  const LogSoftmaxOf<typename Row<D>::V> log_softmax(s);
  row.map([log_softmax](auto x) SOFTMAXLIB_INLINE_LAMBDA { return log_softmax(x); });
}

template <class D>
inline void log_softmax(const Row<D>& row, bool three_pass) {
  using T = typename Row<D>::T;
  with_log_sum(
      row, three_pass, [](const Row<D>& r, LogSum s) { write_log_softmax(r, s); },
      [](const Row<D>& r, double) { r.fill(static_cast<T>(NAN), static_cast<T>(-INFINITY)); });
}

template <class D>
inline void log_softmax_three_pass_recompute(const Row<D>& row) {
  log_softmax(row, true);
}
template <class D>
inline void log_softmax_two_pass(const Row<D>& row) {
  log_softmax(row, false);
}

template <class T>
inline void log_softmax_pipelined(const Job& job, int64_t first, int64_t last, char* scratch) {
  rows_pipelined<T>(job, first, last, scratch, run_row<T, log_softmax_two_pass<T>>);
}

// -inf if that is all there is, +inf if it is the largest, NaN if there is any.
template <class D>
inline double logsumexp_of_invalid(const Row<D>& row, double top) {
  using V = typename Row<D>::V;
  bool nan = top != top;
  row.read(0, row.size(), [&](auto x, int64_t, int64_t n) {
    V seen = V::set1(0);
    for (int64_t i = 0; i < n; i += V::lanes) {
      const V v = high(load_up_to(x, i, n - i));
      seen = select(eq(v, v), seen, V::set1(1));
    }
    nan |= any(gt(seen, V::set1(0)));
  });
  return nan ? NAN : top;
}

// The large parts may cancel, exactly.
inline double logsumexp_of(LogSum s, double shift) {
  const double large = (shift + s.held_hi) + s.log_rest.hi;
  return large + (s.held_lo + s.log_rest.lo);
}

template <class D>
inline void logsumexp(const Row<D>& row, bool three_pass) {
  using T = typename Row<D>::T;
  with_log_sum(
      row, three_pass,
      [](const Row<D>& r, LogSum s) { r.put_first(static_cast<T>(logsumexp_of(s, r.shift()))); },
      [](const Row<D>& r, double top) {
        r.put_first(static_cast<T>(logsumexp_of_invalid(r, top)));
      });
}

template <class D>
inline void logsumexp_three_pass_recompute(const Row<D>& row) {
  logsumexp(row, true);
}
template <class D>
inline void logsumexp_two_pass(const Row<D>& row) {
  logsumexp(row, false);
}

}  // namespace
}  // namespace SOFTMAX_ISA
}  // namespace softmaxlib
