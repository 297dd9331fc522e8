// log(1 + a) for a >= 0, in two parts that a caller can add in the order that loses least:
//
//   1 + a = 2^e m, m in [sqrt(1/2), sqrt(2));  log(1 + a) = e ln2 + log m
//   log m = f - s (f - z P(z)),  f = m - 1,  s = f / (2 + f),  z = s^2
//
// The rounding error of 1 + a is carried into f, so that small a keep their relative accuracy.
// Relative error of the polynomial: float 2^-30.2, double 2^-59.5 (coefficients.py).
#pragma once

#include "isa/macros.hpp"
#include "isa/math/coefficients.hpp"
#include "isa/math/value.hpp"

namespace softmaxlib {
namespace SOFTMAX_ISA {
namespace {

template <class V>
struct LogConstants;

template <>
struct LogConstants<f32x16> {
  static constexpr int kMantissaBits = 23;
  static constexpr uint32_t kOne = 0x3f800000u, kSqrtHalf = 0x3f3504f3u, kSignBit = 0x80000000u;
  static constexpr float kShifter = 0x1p23f;
  // Short enough that e * kLn2Hi is exact.
  static constexpr float kLn2Hi = kLogLn2FloatHi, kLn2Lo = kLogLn2FloatLo;
  static f32x16 polynomial(f32x16 z) {
    f32x16 p = fma(f32x16::set1(kLog32[2]), z, f32x16::set1(kLog32[1]));
    return fma(p, z, f32x16::set1(kLog32[0]));
  }
};

template <>
struct LogConstants<f64x8> {
  static constexpr int kMantissaBits = 52;
  static constexpr uint64_t kOne = 0x3ff0000000000000u, kSqrtHalf = 0x3fe6a09e667f3bcdu,
                            kSignBit = 0x8000000000000000u;
  static constexpr double kShifter = 0x1p52;
  static constexpr double kLn2Hi = kLogLn2DoubleHi, kLn2Lo = kLogLn2DoubleLo;
  static f64x8 polynomial(f64x8 z) {
    f64x8 p = fma(f64x8::set1(kLog64[6]), z, f64x8::set1(kLog64[5]));
    p = fma(p, z, f64x8::set1(kLog64[4]));
    p = fma(p, z, f64x8::set1(kLog64[3]));
    p = fma(p, z, f64x8::set1(kLog64[2]));
    p = fma(p, z, f64x8::set1(kLog64[1]));
    return fma(p, z, f64x8::set1(kLog64[0]));
  }
};

template <class V>
struct LogParts {
  V exponent;  // e
  V mantissa;  // log m
};

// low: a further, small part of a.
template <class V>
SOFTMAXLIB_INLINE LogParts<V> log1p_parts(V a, V low) {
  using C = LogConstants<V>;
  using Int = typename V::Int;
  const V one = V::set1(1);
  const V u = one + a;
  const V back = u - one;
  const V lost = ((one - (u - back)) + (a - back)) + low;

  const Int e = shr<C::kMantissaBits>(bits(u) - Int::set1(C::kSqrtHalf));
  const V exponent = from_bits(e + bits(V::set1(C::kShifter))) - V::set1(C::kShifter);
  const V m = from_bits(bits(u) - shl<C::kMantissaBits>(e));
  // Far from 1 what was lost does not count, and 2^-e may not be a normal number.
  const V down = select(gt(exponent, V::set1(100)), V::set1(0),
                        from_bits(Int::set1(C::kOne) - shl<C::kMantissaBits>(e)));
  const V f = fma(lost, down, m - one);
  const V s = f / (V::set1(2) + f);
  const V z = s * s;
  return {exponent, f - s * (f - z * C::polynomial(z))};
}

// log(1 + a) as hi + lo, hi being a short multiple of ln2's high part; a >= 0 and finite.
SOFTMAXLIB_NOINLINE Pair<double> log1p_pair(double a) {
  using C = LogConstants<f64x8>;
  const LogParts<f64x8> parts = log1p_parts(f64x8::set1(a), f64x8::set1(0));
  const double e = first(parts.exponent);
  return {e * C::kLn2Hi, first(parts.mantissa) + e * C::kLn2Lo};
}

}  // namespace
}  // namespace SOFTMAX_ISA
}  // namespace softmaxlib
