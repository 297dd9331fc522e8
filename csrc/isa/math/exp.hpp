// e^x as the paper's (mantissa, exponent) pair, relative to a reference exponent R:
//
//   Exp<V>(R)(x) = e^x 2^(kBias - R), and exactly 0 far below, for x up to 2^40 above R.
//
// The argument is decomposed as it is, without subtracting a maximum first:
//   k = round(8 x log2 e),  t = x - k ln2/8 (two fma),  e^x = 2^(k div 8) 2^((k mod 8)/8) e^t
// in float, with the eight fractions in one register, and n = round(x log2 e), t = x - n ln2 in
// double. kBias keeps what is far below the reference normal until it is scaled for good, so that
// a subnormal result is rounded once. Exhaustive over all floats (softmaxlib verify):
//   float            max error 1.18 ULP
//   float, exact     max error 0.15 ULP before it is rounded
// double: polynomial error 2^-57.7. Coefficients: by Remez exchange (coefficients.py).
#pragma once

#include <stdint.h>
#include <string.h>

#include "isa/macros.hpp"
#include "isa/math/coefficients.hpp"
#include "isa/math/in_lanes.hpp"
#include "isa/math/value.hpp"

namespace softmaxlib {
namespace SOFTMAX_ISA {
namespace {

// Beyond this magnitude of a row's maximum the row takes the path that subtracts the maximum (which
// is exact there for every element that counts).
constexpr double kSafe = 32768.0;
constexpr int kSafeReference = 47274;  // round(kSafe log2 e)

// The reference is raised when an element is more than this many binades above it.
constexpr int kSlack = 40;

// The largest x that needs no raise.
inline double limit_of(int reference) { return (reference + kSlack) * kLn2Hi; }

// t plus what x has beside its high part, unless that was below the floor.
template <class V>
inline V plus_low(V t, V, V) {
  return t;
}
template <class V>
inline V plus_low(V t, Pair<V> x, V floor) {
  return t + select(gt(x.hi, floor), x.lo, V::set1(0));
}

// Of what is known to be above the floor.
template <class V>
inline V plus_low(V t, V) {
  return t;
}
template <class V>
inline V plus_low(V t, Pair<V> x) {
  return t + x.lo;
}

// What exponentials are for. Results: what is far below the reference is 0. Sums of logarithms also
// need the terms that are below the range of results one by one. Exact ones are an unevaluated sum,
// so that their last rounding happens in what they are part of.
enum class Use { kResults, kLogarithms, kExact };

// A number of one part or of two.
template <class V, bool kPair>
struct OneOrPair {
  using type = V;
};
template <class V>
struct OneOrPair<V, true> {
  using type = Pair<V>;
};

// Most arguments are neither so small that they must be clamped nor so large that they raise the
// reference: their scaled k is in a window as wide as a power of two. Where magic is shifted so
// that the window is aligned to its width, the bits of all k in it agree but for the lowest ones.
// One operation per vector gathers in what they ever differ, and one look at the end of a chunk
// tells whether all were inside; then neither clamps nor comparisons were missed. Where some are
// far below, -inf for example, arguments are clamped, and only the window's upper end is looked at.
enum class Range { kAny, kInWindow, kBelowEnd };

// The table's entries for shifted bits.
struct ShiftedTable {
  uint32_t entry[8];
  constexpr explicit ShiftedTable(uint32_t shift) : entry() {
    for (int j = 0; j < 8; ++j) entry[j] = kExp32Table[j] - (shift << 20);
  }
};

// How an exponential is called, one vector or N in step. Self evaluates them: evaluate_in().
template <class Self, class Vector, class Result>
class ExpCalls {
 public:
  using V = Vector;
  using Term = Result;

  template <class X>
  SOFTMAXLIB_INLINE Term operator()(X x) const {
    return evaluate(x, V::set1(magic_), V::set1(floor_));
  }
  template <class X>
  SOFTMAXLIB_INLINE Term evaluate(X x, V magic, V floor) const {
    Term y;
    evaluate<1>(&x, magic, floor, &y);
    return y;
  }
  // N vectors in step: their chains of dependent instructions overlap.
  template <int N, class X>
  SOFTMAXLIB_INLINE void evaluate(const X* x, Term* y) const {
    evaluate<N>(x, V::set1(magic_), V::set1(floor_), y);
  }
  template <int N, class X>
  SOFTMAXLIB_INLINE void evaluate(const X* x, V magic, V floor, Term* y) const {
    typename V::Seen none;
    self().template evaluate_in<Range::kAny, N>(x, magic, floor, y, none);
  }
  // Right if what is seen in the end is_inside().
  template <Range kRange, int N, class X>
  SOFTMAXLIB_INLINE void evaluate_in_range(const X* x, Term* y, typename V::Seen& seen) const {
    self().template evaluate_in<kRange, N>(x, V::set1(magic_), V::set1(floor_), y, seen);
  }

 private:
  friend Self;
  ExpCalls(typename V::elem magic, typename V::elem floor) : magic_(magic), floor_(floor) {}
  SOFTMAXLIB_INLINE const Self& self() const { return static_cast<const Self&>(*this); }

  // Scalars: a broadcast stays in one register, a vector from memory may take two.
  typename V::elem magic_, floor_;
};

template <class Vector, Use kUse = Use::kResults>
class Exp;

template <Use kUse>
using Exp32Calls =
    ExpCalls<Exp<f32x16, kUse>, f32x16, typename OneOrPair<f32x16, kUse == Use::kExact>::type>;

template <Use kUse>
class Exp<f32x16, kUse> : public Exp32Calls<kUse> {
 public:
  using V = f32x16;
  using Term = typename Exp32Calls<kUse>::Term;
  static constexpr bool kFollows = true;  // the reference follows the row
  static constexpr bool kWide = false;
  static constexpr int kBias = kUse == Use::kResults ? 26 : 60;

  // In the window results have exponents 64 to 191, those for logarithms 96 to 223.
  static constexpr uint32_t kShift = kBias == 26 ? 512 : 256, kWindow = 1024;
  // The bits of the rounded constant where k is 0, and where k is the window's last.
  static constexpr uint32_t kZero = 0x4b400000u, kEnd = kZero + 2 * kWindow - 1 - kShift;

  // Of a range in the window only the evaluation that gathers may be used.
  explicit Exp(int reference, Range range = Range::kAny)
      : Exp32Calls<kUse>(static_cast<float>(0x1.8p23 + 8 * (127 + kBias - reference) +
                                            (range == Range::kInWindow ? kShift : 0)),
                         static_cast<float>((reference - kBias - 127) * kLn2Hi)),
        table_(load_table8(range == Range::kInWindow ? kShifted.entry : kExp32Table)),
        delta_(load_table8(reinterpret_cast<const uint32_t*>(kExp32Delta))) {}

  template <Range kRange>
  static SOFTMAXLIB_INLINE bool is_inside(V::Seen seen) {
    return kRange == Range::kInWindow ? !any_from_bit<10>(seen) : !any_from_bit<31>(seen);
  }

 private:
  template <class, class, class>
  friend class ExpCalls;
  template <Range kRange, int N, class X>
  SOFTMAXLIB_INLINE void evaluate_in(const X* argument, V magic, V floor, Term* y,
                                     V::Seen& seen) const {
    V x[N], m[N], k[N], t[N], s[N], q[N];
    // max() passes its second operand on when one is NaN.
    for (int j = 0; j < N; ++j)
      x[j] = kRange == Range::kInWindow ? high(argument[j]) : max(floor, high(argument[j]));
    for (int j = 0; j < N; ++j) m[j] = fma(x[j], V::set1(k8Log2E), magic);
    if constexpr (kRange == Range::kInWindow)
      for (int j = 0; j < N; ++j) see_differences(seen, bits(m[j]), V::Int::set1(kZero + kWindow));
    if constexpr (kRange == Range::kBelowEnd)
      for (int j = 0; j < N; ++j)
        see_differences(seen, V::Int::set1(kEnd) - bits(m[j]), V::Int::set1(0));
    for (int j = 0; j < N; ++j) k[j] = m[j] - magic;
    for (int j = 0; j < N; ++j) t[j] = fnma(k[j], V::set1(kLn2Over8Hi), x[j]);
    for (int j = 0; j < N; ++j) t[j] = fnma(k[j], V::set1(kLn2Over8Lo), t[j]);
    for (int j = 0; j < N; ++j)
      t[j] = kRange == Range::kInWindow ? plus_low(t[j], argument[j])
                                        : plus_low(t[j], argument[j], floor);
    for (int j = 0; j < N; ++j) s[j] = from_bits(lookup(table_, bits(m[j])) + shl<20>(bits(m[j])));
    if constexpr (kUse == Use::kExact) {
      for (int j = 0; j < N; ++j) t[j] = t[j] + from_bits(lookup(delta_, bits(m[j])));
      for (int j = 0; j < N; ++j)
        q[j] = fma(V::set1(kExp32Accurate[3]), t[j], V::set1(kExp32Accurate[2]));
      for (int j = 0; j < N; ++j) q[j] = fma(q[j], t[j], V::set1(kExp32Accurate[1]));
      for (int j = 0; j < N; ++j) q[j] = fma(q[j], t[j], V::set1(kExp32Accurate[0]));
      for (int j = 0; j < N; ++j) y[j] = {s[j], s[j] * t[j] * q[j]};
    } else {
      for (int j = 0; j < N; ++j) q[j] = fma(V::set1(kExp32[2]), t[j], V::set1(kExp32[1]));
      for (int j = 0; j < N; ++j) q[j] = fma(q[j], t[j], V::set1(kExp32[0]));
      for (int j = 0; j < N; ++j) y[j] = fma(s[j] * t[j], q[j], s[j]);
    }
  }

  static constexpr ShiftedTable kShifted{kShift};
  Table8 table_, delta_;
};

template <Use kUse>
class Exp<f64x8, kUse> : public ExpCalls<Exp<f64x8, kUse>, f64x8, f64x8> {
 public:
  using V = f64x8;
  using Term = V;
  static constexpr bool kFollows = true;  // the reference follows the row
  static constexpr bool kWide = false;
  static constexpr int kBias = 64;

  // In the window results have exponents 614 to 1125.
  static constexpr int kShift = 410;
  static constexpr uint64_t kWindow = 1024;
  static constexpr uint64_t kZero = 0x4338000000000000u, kEnd = kZero + kWindow + 511 - kShift;

  explicit Exp(int reference, Range range = Range::kAny)
      : ExpCalls<Exp, V, V>(
            0x1.8p52 + (1023 + kBias - reference + (range == Range::kInWindow ? kShift : 0)),
            (reference - kBias - 1023) * kLn2Hi) {}

  template <Range kRange>
  static SOFTMAXLIB_INLINE bool is_inside(V::Seen seen) {
    return kRange == Range::kInWindow ? !any_from_bit<9>(seen) : !any_from_bit<63>(seen);
  }

 private:
  template <class, class, class>
  friend class ExpCalls;
  template <Range kRange, int N, class X>
  SOFTMAXLIB_INLINE void evaluate_in(const X* argument, V magic, V floor, Term* y,
                                     V::Seen& seen) const {
    V x[N], m[N], n[N], t[N], q[N];
    for (int j = 0; j < N; ++j)
      x[j] = kRange == Range::kInWindow ? high(argument[j]) : max(floor, high(argument[j]));
    for (int j = 0; j < N; ++j) m[j] = fma(x[j], V::set1(kLog2E), magic);
    if constexpr (kRange == Range::kInWindow)
      for (int j = 0; j < N; ++j) see_differences(seen, bits(m[j]), V::Int::set1(kZero + kWindow));
    if constexpr (kRange == Range::kBelowEnd)
      for (int j = 0; j < N; ++j)
        see_differences(seen, V::Int::set1(kEnd) - bits(m[j]), V::Int::set1(0));
    for (int j = 0; j < N; ++j) n[j] = m[j] - magic;
    for (int j = 0; j < N; ++j) t[j] = fnma(n[j], V::set1(kLn2Hi), x[j]);
    for (int j = 0; j < N; ++j) t[j] = fnma(n[j], V::set1(kLn2Lo), t[j]);
    for (int j = 0; j < N; ++j)
      t[j] = kRange == Range::kInWindow ? plus_low(t[j], argument[j])
                                        : plus_low(t[j], argument[j], floor);
    for (int j = 0; j < N; ++j) q[j] = V::set1(kExp64[10]);
    const auto step = [&](double c) SOFTMAXLIB_INLINE_LAMBDA {
      for (int j = 0; j < N; ++j) q[j] = fma(q[j], t[j], V::set1(c));
    };
    step(kExp64[9]);
    step(kExp64[8]);
    step(kExp64[7]);
    step(kExp64[6]);
    step(kExp64[5]);
    step(kExp64[4]);
    step(kExp64[3]);
    step(kExp64[2]);
    step(kExp64[1]);
    step(kExp64[0]);
    constexpr uint64_t kBack = kRange == Range::kInWindow ? uint64_t{kShift} << 52 : 0;
    for (int j = 0; j < N; ++j) {
      typename V::Int power = shl<52>(bits(m[j]));
      if constexpr (kBack != 0) power = power - V::Int::set1(kBack);
      const V s = from_bits(power);
      y[j] = fma(s * t[j], q[j], s);
    }
  }
};

// round(x log2 e) of rows' or a group's maxima, clamped to the safe range; NaN gives the lower end.
// Computed in the arithmetic's own type: near a half it may be either neighbour.
template <class V>
SOFTMAXLIB_INLINE V references_of(V top) {
  using T = typename V::elem;
  const V shifter = V::set1(static_cast<T>(sizeof(T) == 4 ? 0x1.8p23 : 0x1.8p52));
  top = min(max(top, V::set1(static_cast<T>(-kSafe))), V::set1(static_cast<T>(kSafe)));
  return fma(top, V::set1(static_cast<T>(kLog2E)), shifter) - shifter;
}
template <class V>
SOFTMAXLIB_NOINLINE int reference_of(typename V::elem top) {
  return static_cast<int>(first(references_of(V::set1(top))));
}

// limit_of() of every lane's reference.
template <class V>
inline V limits_of(V references) {
  const auto limit = [](f64x8 r) { return (r + f64x8::set1(kSlack)) * f64x8::set1(kLn2Hi); };
  return InLanes<V>::of(references).map(limit).value();
}

// Exp with a reference per lane; the same bits as Exp(reference) gives for that lane. The floor may
// be off by a few units in the last place, which changes nothing: from half a step of k above it
// downwards all results are 0.
template <class V, class F = Exp<V>>
class ExpInLanes {
 public:
  explicit ExpInLanes(V references)
      : exp_(0),
        magic_(fnma(references, V::set1(kSteps), V::set1(kMagic + kSteps * kOffset))),
        floor_((references - V::set1(kOffset)) * V::set1(static_cast<T>(kLn2Hi))) {}

  template <class X>
  SOFTMAXLIB_INLINE typename F::Term operator()(X x) const {
    return exp_.evaluate(x, magic_, floor_);
  }
  V magic() const { return magic_; }
  V floor() const { return floor_; }

 private:
  using T = typename V::elem;
  static constexpr bool kFloat = sizeof(T) == 4;
  static constexpr T kSteps = kFloat ? 8 : 1;
  static constexpr T kMagic = static_cast<T>(kFloat ? 0x1.8p23 : 0x1.8p52);
  static constexpr T kOffset = (kFloat ? 127 : 1023) + F::kBias;

  F exp_;
  V magic_, floor_;
};

// 2^k; 0 below the range of normal doubles.
inline double power_of_two(int k) {
  if (k < -1022) return 0.0;
  const uint64_t field = static_cast<uint64_t>((k > 1023 ? 1023 : k) + 1023) << 52;
  double result;
  memcpy(&result, &field, sizeof(result));
  return result;
}

// x = m 2^exponent with 1/2 <= |m| < 1; of 0, an infinity and NaN: themselves and 0.
inline double split_exponent(double x, int* exponent) {
  uint64_t bits;
  memcpy(&bits, &x, sizeof(bits));
  const int field = static_cast<int>(bits >> 52 & 0x7ff);
  *exponent = 0;
  if (x == 0 || field == 0x7ff) return x;
  if (field == 0) {
    const double m = split_exponent(x * 0x1p64, exponent);
    *exponent -= 64;
    return m;
  }
  *exponent = field - 1022;
  return x * power_of_two(511 - field / 2) * power_of_two(511 - (field - field / 2));
}

// x 2^k for k <= 0: exact wherever the product is normal.
inline double scale_down(double x, int k) {
  const int first = k > -1022 ? k : -1022;
  return x * power_of_two(first) * power_of_two(k - first);
}

// The same for vectors: two factors, so that the product is exact wherever it is normal.
template <class V>
class ScaleDown {
 public:
  explicit ScaleDown(int k) {
    constexpr int kLowest = sizeof(typename V::elem) == 4 ? -126 : -1022;
    const int first = k > kLowest ? k : kLowest;
    const int rest = k - first;
    first_ = static_cast<typename V::elem>(power_of_two(first));
    second_ = static_cast<typename V::elem>(power_of_two(rest > kLowest ? rest : kLowest));
  }
  V operator()(V x) const { return x * V::set1(first_) * V::set1(second_); }

 private:
  typename V::elem first_, second_;
};

}  // namespace
}  // namespace SOFTMAX_ISA
}  // namespace softmaxlib
