// Number formats written down independently of the library, and the exact results of functions of a
// row; for the tests and the fuzz targets.
#pragma once

#include <float.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "softmaxlib/softmaxlib.h"

namespace softmaxlib::test {

using Real = long double;
static_assert(std::numeric_limits<Real>::digits >= 64, "the reference needs extended precision");

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

constexpr const char* kFunctionNames[] = {
#define SOFTMAXLIB_FUNCTION(name, NAME, element, finish) #name,
#include "registry/functions.def"
#undef SOFTMAXLIB_FUNCTION
};
constexpr const char* kDtypeNames[] = {
#define SOFTMAXLIB_FLOAT(name, NAME, numpy, bytes) #name,
#define SOFTMAXLIB_INTEGER(NAME, numpy, type) #numpy,
#include "registry/dtypes.def"
#undef SOFTMAXLIB_FLOAT
#undef SOFTMAXLIB_INTEGER
};

// ---- Number formats.

struct Format {
  int item, digits, lowest;  // lowest: the exponent of the smallest subnormal
  double largest;
};
inline Format format_of(softmaxlib_dtype dtype) {
  switch (dtype) {
    case SOFTMAXLIB_F32: return {4, 24, -149, 0x1.fffffep127};
    case SOFTMAXLIB_F64: return {8, 53, -1074, std::numeric_limits<double>::max()};
    case SOFTMAXLIB_F16: return {2, 11, -24, 65504};
    default: return {2, 8, -133, 0x1.fep127};
  }
}
// The dtype that arithmetic on a storage dtype uses.
inline softmaxlib_dtype arithmetic_of(softmaxlib_dtype dtype) {
  return dtype == SOFTMAXLIB_F64 ? SOFTMAXLIB_F64 : SOFTMAXLIB_F32;
}

// The unit in the last place of |x|'s binade.
inline Real ulp_of(Real x, const Format& f) {
  int exponent;
  std::frexp(x, &exponent);
  return std::ldexp(Real{1}, std::max(x == 0 ? f.lowest : exponent - f.digits, f.lowest));
}

// x rounded to nearest even in a format, by exact scaling and the C library's rint.
inline double round_to(double x, const Format& f) {
  if (!std::isfinite(x) || x == 0) return x;
  const Real unit = ulp_of(x, f);
  const double rounded = static_cast<double>(std::rint(Real{x} / unit) * unit);
  return std::fabs(rounded) > f.largest ? std::copysign(kInf, x) : rounded;
}

template <class To, class From>
To bits_to(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

// Formats of 16 bits, by arithmetic on their fields.
inline double from_half(uint16_t h, int exponent_bits) {
  const int mantissa_bits = 15 - exponent_bits, bias = (1 << (exponent_bits - 1)) - 1;
  const int field = (h & 0x7fff) >> mantissa_bits, mantissa = h & ((1 << mantissa_bits) - 1);
  double value;
  if (field == (1 << exponent_bits) - 1) value = mantissa ? kNaN : kInf;
  else if (field == 0) value = std::ldexp(mantissa, 1 - bias - mantissa_bits);
  else value = std::ldexp(mantissa + (1 << mantissa_bits), field - bias - mantissa_bits);
  return h & 0x8000 ? -value : value;
}
inline uint16_t to_half(double x, int exponent_bits) {
  const int mantissa_bits = 15 - exponent_bits, bias = (1 << (exponent_bits - 1)) - 1;
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const int infinity = ((1 << exponent_bits) - 1) << mantissa_bits;
  const double r =
      std::fabs(round_to(x, format_of(exponent_bits == 5 ? SOFTMAXLIB_F16 : SOFTMAXLIB_BF16)));
  int magnitude;
  if (r != r) magnitude = infinity | 1 << (mantissa_bits - 1);
  else if (r == kInf) magnitude = infinity;
  else {
    int e;
    std::frexp(r, &e);
    const int field = r == 0 ? 0 : std::max(e - 1 + bias, 0);
    const double units = std::ldexp(r, mantissa_bits + bias - std::max(field, 1));
    magnitude = static_cast<int>(units) + (std::max(field - 1, 0) << mantissa_bits);
  }
  return static_cast<uint16_t>(sign | magnitude);
}

inline int item_size_of(softmaxlib_dtype dtype) {
  constexpr int kSizes[] = {4, 8, 2, 2, 1, 1, 2, 4, 8, 1, 2, 4, 8};
  return kSizes[dtype];
}

template <class T>
void put_as(char* p, double x) {
  const T value = static_cast<T>(x);
  memcpy(p, &value, sizeof(T));
}
template <class T>
Real get_as(const char* p) {
  T value;
  memcpy(&value, p, sizeof(T));
  return static_cast<Real>(value);
}

inline void encode(double x, softmaxlib_dtype dtype, char* p) {
  switch (dtype) {
    case SOFTMAXLIB_F32: return put_as<float>(p, x);
    case SOFTMAXLIB_F64: return put_as<double>(p, x);
    case SOFTMAXLIB_F16: {
      const uint16_t h = to_half(x, 5);
      memcpy(p, &h, 2);
      return;
    }
    case SOFTMAXLIB_BF16: {
      const uint16_t h = to_half(x, 8);
      memcpy(p, &h, 2);
      return;
    }
    case SOFTMAXLIB_BOOL: return put_as<uint8_t>(p, x != 0);
    case SOFTMAXLIB_I8: return put_as<int8_t>(p, x);
    case SOFTMAXLIB_I16: return put_as<int16_t>(p, x);
    case SOFTMAXLIB_I32: return put_as<int32_t>(p, x);
    case SOFTMAXLIB_I64: return put_as<int64_t>(p, x);
    case SOFTMAXLIB_U8: return put_as<uint8_t>(p, x);
    case SOFTMAXLIB_U16: return put_as<uint16_t>(p, x);
    case SOFTMAXLIB_U32: return put_as<uint32_t>(p, x);
    default: return put_as<uint64_t>(p, x);
  }
}
inline Real decode(softmaxlib_dtype dtype, const char* p) {
  uint16_t h = 0;
  if (item_size_of(dtype) == 2) memcpy(&h, p, 2);
  switch (dtype) {
    case SOFTMAXLIB_F32: return get_as<float>(p);
    case SOFTMAXLIB_F64: return get_as<double>(p);
    case SOFTMAXLIB_F16: return from_half(h, 5);
    case SOFTMAXLIB_BF16: return from_half(h, 8);
    case SOFTMAXLIB_BOOL:
    case SOFTMAXLIB_U8: return get_as<uint8_t>(p);
    case SOFTMAXLIB_I8: return get_as<int8_t>(p);
    case SOFTMAXLIB_I16: return get_as<int16_t>(p);
    case SOFTMAXLIB_I32: return get_as<int32_t>(p);
    case SOFTMAXLIB_I64: return get_as<int64_t>(p);
    case SOFTMAXLIB_U16: return get_as<uint16_t>(p);
    case SOFTMAXLIB_U32: return get_as<uint32_t>(p);
    default: return get_as<uint64_t>(p);
  }
}

// A value of any dtype as the arithmetic of `out` sees it.
inline Real converted(Real x, softmaxlib_dtype out) {
  return out == SOFTMAXLIB_F64 ? Real{static_cast<double>(x)} : Real{static_cast<float>(x)};
}

inline std::vector<char> encode_all(const std::vector<double>& values, softmaxlib_dtype dtype) {
  const size_t item = static_cast<size_t>(item_size_of(dtype));
  std::vector<char> bytes(values.size() * item);
  for (size_t i = 0; i < values.size(); ++i) encode(values[i], dtype, bytes.data() + i * item);
  return bytes;
}
inline std::vector<Real> decode_all(const char* p, int64_t n, softmaxlib_dtype dtype) {
  std::vector<Real> values(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i)
    values[static_cast<size_t>(i)] = decode(dtype, p + i * item_size_of(dtype));
  return values;
}

// ---- Exact results.

// Arguments and sums: the difference of two arguments is to keep all bits of a Real.
#if LDBL_MANT_DIG < 113
using Wide = __float128;
#else
using Wide = long double;
#endif

inline Real stable(Wide x) { return static_cast<Real>(x >= 0 ? x + 1 : 1 / (1 - x)); }
inline Real exp_of(Wide x) {
  if (!(x > -20000)) return x == x ? 0 : Real{kNaN};
  const Real high = static_cast<Real>(x);
  return std::exp(high) * (1 + static_cast<Real>(x - high));
}

// The distribution of a row, by softmax or by stablemax.
class Distribution {
 public:
  explicit Distribution(bool stablemax) : stablemax_(stablemax) {}

  // A term of the sum; all of them before anything else is called.
  void add(Wide z) {
    terms_.push_back(z);
    nan_ |= z != z;
    if (z > largest_) largest_ = z;
  }
  void sum_up() {
    if (!valid()) return;
    Wide rest = 0;  // the sum but for its largest term
    bool held = false;
    for (const Wide z : terms_)
      if (held || z != largest_) rest += term(z);
      else held = true;
    ratio_ = static_cast<Real>(rest) / (stablemax_ ? stable(largest_) : 1);
  }

  bool valid() const { return !nan_ && largest_ > -kInf && largest_ < kInf; }
  Wide largest() const { return largest_; }
  // Of softmax.
  Real log_sum() const {
    if (nan_) return kNaN;
    return static_cast<Real>(valid() ? largest_ + std::log1p(ratio_) : largest_);
  }
  // The logarithm of the sum of s.
  Real log_stable_sum() const { return std::log(stable(largest_)) + std::log1p(ratio_); }

  // Of an argument that was added, where the row is valid.
  Real p(Wide z) const { return term(z) / (stablemax_ ? stable(largest_) : 1) / (1 + ratio_); }
  Real others(Wide z) const { return z == largest_ ? ratio_ / (1 + ratio_) : 1 - p(z); }  // 1 - p
  Real log_p(Wide z) const {
    if (z == -kInf) return -kInf;
    if (!stablemax_) return static_cast<Real>((z - largest_) - std::log1p(ratio_));
    return z == largest_ ? -std::log1p(ratio_) : std::log(p(z));
  }

 private:
  Real term(Wide z) const {
    if (z == -kInf) return 0;
    return stablemax_ ? stable(z) : exp_of(z - largest_);
  }

  bool stablemax_, nan_ = false;
  Wide largest_ = -kInf;
  Real ratio_ = 0;
  std::vector<Wide> terms_;
};

inline bool is_logarithm(softmaxlib_function function) {
  return function == SOFTMAXLIB_LOG_SOFTMAX || function == SOFTMAXLIB_LOG_STABLEMAX;
}
inline bool is_stablemax(softmaxlib_function function) {
  return function == SOFTMAXLIB_STABLEMAX || function == SOFTMAXLIB_LOG_STABLEMAX;
}

template <class X>
Distribution distribution_of(softmaxlib_function function, const std::vector<X>& x,
                             const std::vector<bool>& where, Wide sink = -kInf) {
  Distribution all(is_stablemax(function));
  for (size_t i = 0; i < x.size(); ++i)
    if (where.empty() || where[i]) all.add(x[i]);
  if (sink != -kInf) all.add(sink);
  all.sum_up();
  return all;
}

// A function of a row in extended precision; where[i] false: takes no part. Specials as in the
// contract's tables.
template <class X>
std::vector<Real> exact_row(softmaxlib_function function, const std::vector<X>& x,
                            const std::vector<bool>& where = {}, Wide sink = -kInf) {
  const Distribution all = distribution_of(function, x, where, sink);
  if (function == SOFTMAXLIB_LOGSUMEXP) return {all.log_sum()};
  std::vector<Real> y(x.size(), is_logarithm(function) ? -kInf : 0);
  for (size_t i = 0; i < x.size(); ++i)
    if (where.empty() || where[i])
      y[i] = !all.valid() ? kNaN : is_logarithm(function) ? all.log_p(x[i]) : all.p(x[i]);
  return y;
}

// The contract's bound in ULP; logsumexp may instead be off by an absolute amount.
inline Real bound_of(softmaxlib_function function, softmaxlib_dtype dtype) {
  if (dtype == SOFTMAXLIB_F16 || dtype == SOFTMAXLIB_BF16) return 0.5L + 0x1p-10L;
  if (dtype == SOFTMAXLIB_F64 || function == SOFTMAXLIB_SOFTMAX) return 5;
  return function == SOFTMAXLIB_LOGSUMEXP ? 2 : 4;
}

}  // namespace softmaxlib::test
