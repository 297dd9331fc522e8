// What a double is, by its bits. An operation would depend on the caller's floating-point mode:
// where subnormals are taken for 0 none is positive, and where exceptions are trapped comparing a
// NaN, or a subnormal, ends the process.
#pragma once

#include <stdint.h>
#include <string.h>

namespace softmaxlib {

inline uint64_t bits_of(double x) {
  uint64_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
}

constexpr uint64_t kSignBit = uint64_t{1} << 63, kBitsOfOne = 0x3ff0000000000000u,
                   kBitsOfInfinity = 0x7ff0000000000000u;

inline bool is_finite(double x) { return (bits_of(x) & ~kSignBit) < kBitsOfInfinity; }
inline bool is_zero(double x) { return (bits_of(x) & ~kSignBit) == 0; }
inline bool is_one(double x) { return bits_of(x) == kBitsOfOne; }
inline bool is_positive_finite(double x) { return !is_zero(x) && bits_of(x) < kBitsOfInfinity; }
inline bool is_positive_finite(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits > 0 && bits < 0x7f800000u;
}
inline bool is_finite_not_negative(double x) { return is_zero(x) || is_positive_finite(x); }
inline bool in_unit_interval(double x) { return is_zero(x) || bits_of(x) <= kBitsOfOne; }
inline bool is_negative_infinity(double x) { return bits_of(x) == (kSignBit | kBitsOfInfinity); }

}  // namespace softmaxlib
