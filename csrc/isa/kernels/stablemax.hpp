// stablemax = s(x) / sum of s(x) and log_stablemax = sign(x) log1p(|x|) - log(sum of s(x)), with
// StableMax's s (math/stable.hpp; Prieto et al., 2025). There is no maximum to subtract: two passes
// are all there is, with s computed again (3N) or reloaded (4N).
#pragma once

#include "isa/kernels/pipelined.hpp"
#include "isa/kernels/softmax.hpp"
#include "isa/math/log.hpp"
#include "isa/math/stable.hpp"

namespace softmaxlib {
namespace SOFTMAX_ISA {
namespace {

// The reference under which a sum and its reciprocal stay in range: 0 but for huge arguments.
template <class V>
inline int stable_reference(double sum) {
  constexpr bool kFloat = sizeof(typename V::elem) == 4;
  if (sum > (kFloat ? 0x1p64 : 0x1p900)) return kFloat ? 64 : 200;
  if (sum < (kFloat ? 0x1p-90 : 0x1p-900)) return kFloat ? -60 : -200;
  return 0;
}

inline double s_of_held(const Total&) { return 0; }
template <class S>
SOFTMAXLIB_NOINLINE double s_of_held(const RowRest<S>& rest) {
  const Pair<f64x8> held = {f64x8::set1(rest.held_hi), f64x8::set1(rest.held_lo)};
  return first(Stable<f64x8>(rest.reference)(held));
}

// compute(known) gives the sum of s under known.reference; a second time where 0 will not do.
template <class D, class Compute>
inline auto in_range(Compute compute) {
  for (Known known;;) {
    const auto total = compute(known);
    if (known.reference) return total;
    known.reference = stable_reference<typename Row<D>::V>(total.sum + s_of_held(total));
    if (!known.reference) return total;
  }
}

inline bool positive_finite(double x) { return x > 0 && finite(x); }

template <class D, class Compute, class Write>
inline void run_stablemax(const Row<D>& row, Compute compute, Write write) {
  using T = typename Row<D>::T;
  const auto total = in_range<D>(compute);
  if (!positive_finite(total.sum)) row.fill(static_cast<T>(NAN), 0);
  else if (row.terms() == 1) row.fill(1, 0);
  else write(total);
}

template <class D>
inline void stablemax_two_pass(const Row<D>& row) {
  using S = Stable<typename Row<D>::V>;
  run_stablemax(
      row, [&](Known known) { return sum_of<S>(row, known); },  // reads x
      [&](const RowSum<S>& total) { write_of(row, total); });   // reads x, writes y
}

template <class D>
inline void stablemax_two_pass_reload(const Row<D>& row) {
  using S = Stable<typename Row<D>::V>;
  run_stablemax(
      row, [&](Known known) { return store_of<S>(row, known); },   // reads x, writes y
      [&](const RowSum<S>& total) { scale_stored(row, total); });  // reads y, writes y
}

template <class T>
inline void stablemax_pipelined(const Job& job, int64_t first, int64_t last, char* scratch) {
  rows_pipelined<T>(job, first, last, scratch, run_row<T, stablemax_two_pass_reload<T>>);
}

// log s(x) = sign(x) log1p(|x|) = sign(x) (e ln2 + log m), with the logarithm of the sum in the
// same form, so that the large parts cancel exactly. For the largest element, where all would
// cancel, the result is -log1p(rest / s(largest)). Of eight rows:
struct LogSumsOfStable {
  f64x8 exponent, mantissa;  // log sum = log s(largest) + log1p(ratio) = exponent ln2 + mantissa
  f64x8 of_largest;

  // largest: normalized; ratio: rest / s(largest)
  LogSumsOfStable(Pair<f64x8> largest, f64x8 ratio) {
    using C = LogConstants<f64x8>;
    const Pair<f64x8> a = magnitude(largest);
    const LogParts<f64x8> of_held = log1p_parts(a.hi, a.lo);
    const LogParts<f64x8> of_rest = log1p_parts(ratio, f64x8::set1(0));
    exponent = with_sign_of(of_held.exponent, largest.hi) + of_rest.exponent;
    mantissa = with_sign_of(of_held.mantissa, largest.hi) + of_rest.mantissa;
    of_largest = f64x8::set1(0) - (of_rest.exponent * f64x8::set1(C::kLn2Hi) +
                                   (of_rest.mantissa + of_rest.exponent * f64x8::set1(C::kLn2Lo)));
  }
  // The mantissa in the form that log_stablemax_of() takes, whose ln2 is V's.
  template <class V>
  f64x8 mantissa_for() const {
    constexpr double kLn2Rest = kLn2Hi - static_cast<double>(LogConstants<V>::kLn2Hi) + kLn2Lo;
    return mantissa + exponent * f64x8::set1(kLn2Rest);
  }
};

template <class V>
struct LogSumOfStable {
  V exponent, mantissa, largest, of_largest;
};
template <class V, class X>
SOFTMAXLIB_INLINE V log_stablemax_of(X argument, const LogSumOfStable<V>& sum) {
  using C = LogConstants<V>;
  const X x = normalized(argument);
  const Pair<V> m = magnitude(x);
  const LogParts<V> log_s = log1p_parts(m.hi, m.lo);
  const V large = (with_sign_of(log_s.exponent, high(x)) - sum.exponent) * V::set1(C::kLn2Hi);
  const V small = fma(log_s.exponent, V::set1(C::kLn2Lo), log_s.mantissa);
  const V none = V::set1(static_cast<typename V::elem>(-INFINITY));
  V y = large + (with_sign_of(small, high(x)) - sum.mantissa);
  y = select(eq(high(x), none), none, y);
  return select(eq(high(argument), sum.largest), sum.of_largest, y);
}

// Of one row.
template <class V>
class LogStablemaxOf {
 public:
  // s_held: s(largest), finite and positive as the sum is.
  template <class Rest>
  LogStablemaxOf(const Rest& rest, double s_held) : largest_(static_cast<T>(rest.held_hi)) {
    const Pair<f64x8> held =
        normalized(Pair<f64x8>{f64x8::set1(rest.held_hi), f64x8::set1(rest.held_lo)});
    const LogSumsOfStable sums(held, f64x8::set1(rest.value() / s_held));
    exponent_ = static_cast<T>(first(sums.exponent));
    mantissa_ = static_cast<T>(first(sums.template mantissa_for<V>()));
    of_largest_ = static_cast<T>(first(sums.of_largest));
  }

  template <class X>
  SOFTMAXLIB_INLINE V operator()(X x) const {
    return log_stablemax_of<V>(
        x, {V::set1(exponent_), V::set1(mantissa_), V::set1(largest_), V::set1(of_largest_)});
  }

 private:
  using T = typename V::elem;
  T exponent_, mantissa_, largest_, of_largest_;
};

template <class D, class Rest>
inline void write_log_stablemax(const Row<D>& row, const Rest& rest) {
  const auto masked = static_cast<typename Row<D>::T>(-INFINITY);
  const double s_held = s_of_held(rest);
  if (!positive_finite(s_held + rest.sum))
    return row.fill(static_cast<typename Row<D>::T>(NAN), masked);
  const LogStablemaxOf<typename Row<D>::V> log_stablemax(rest, s_held);
  row.map([log_stablemax](auto x) SOFTMAXLIB_INLINE_LAMBDA {  // reads x, writes y
    return log_stablemax(x);
  });
}

template <class D>
inline void log_stablemax_two_pass(const Row<D>& row) {
  using S = Stable<typename Row<D>::V>;
  write_log_stablemax(                                                         // writes y
      row, in_range<D>([&](Known known) { return rest_of<S>(row, known); }));  // reads x twice
}

template <class T>
inline void log_stablemax_pipelined(const Job& job, int64_t first, int64_t last, char* scratch) {
  rows_pipelined<T>(job, first, last, scratch, run_row<T, log_stablemax_two_pass<T>>);
}

}  // namespace
}  // namespace SOFTMAX_ISA
}  // namespace softmaxlib
