// What the tests share: the registry, guarded memory, number formats written down independently of
// the library, rows that have broken softmax code before, and the exact results.
#pragma once

#include <gtest/gtest.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "kernel_table.hpp"
#include "softmaxlib/softmaxlib.h"

namespace softmaxlib::test {

using Real = long double;
static_assert(std::numeric_limits<Real>::digits >= 64, "the reference needs extended precision");

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// ---- The registry and the ISAs.

struct KernelId {
  softmaxlib_function function;
  softmaxlib_algorithm algorithm;
  softmaxlib_dtype dtype;
  const char* name;
};
constexpr KernelId kRegistry[] = {
#define SOFTMAXLIB_KERNEL(function, algorithm, storage)                       \
  {int{registry::function}, int{registry::algorithm}, int{registry::storage}, \
   #function "_" #algorithm "_" #storage},
#define SOFTMAXLIB_ROWS_KERNEL(function, schedule, storage, algorithm)
#include "kernels.def"
#undef SOFTMAXLIB_KERNEL
#undef SOFTMAXLIB_ROWS_KERNEL
};

constexpr softmaxlib_function kFunctionList[] = {SOFTMAXLIB_SOFTMAX, SOFTMAXLIB_LOG_SOFTMAX,
                                                 SOFTMAXLIB_LOGSUMEXP, SOFTMAXLIB_STABLEMAX,
                                                 SOFTMAXLIB_LOG_STABLEMAX};
constexpr const char* kFunctionNames[] = {"softmax", "log_softmax", "logsumexp", "stablemax",
                                          "log_stablemax"};
constexpr softmaxlib_dtype kFloatTypes[] = {SOFTMAXLIB_F32, SOFTMAXLIB_F64, SOFTMAXLIB_F16,
                                            SOFTMAXLIB_BF16};
constexpr const char* kDtypeNames[] = {"f32", "f64", "f16", "bf16", "bool", "i8", "i16",
                                       "i32", "i64", "u8",  "u16",  "u32",  "u64"};

inline std::vector<softmaxlib_algorithm> algorithms_of(softmaxlib_function function,
                                                       softmaxlib_dtype dtype) {
  std::vector<softmaxlib_algorithm> found;
  for (const KernelId& k : kRegistry)
    if (k.function == function && k.dtype == dtype) found.push_back(k.algorithm);
  return found;
}

inline std::vector<softmaxlib_isa> isas() {
  std::vector<softmaxlib_isa> found;
  for (int32_t i = 0; softmaxlib_isa_available(i) != SOFTMAXLIB_ISA_AUTO; ++i)
    found.push_back(softmaxlib_isa_available(i));
  return found;
}

inline std::string isa_summary() {
  std::string ran, missing;
  for (const softmaxlib_isa isa : isas()) ran += std::string(" ") + softmaxlib_isa_name(isa);
  for (int32_t i = 0; const softmaxlib_isa isa = softmaxlib_isa_compiled(i); ++i) {
    const auto all = isas();
    if (std::find(all.begin(), all.end(), isa) == all.end())
      missing += std::string(" ") + softmaxlib_isa_name(isa);
  }
  return "ISAs that ran:" + ran + (missing.empty() ? "" : "; NOT run, this CPU lacks:" + missing);
}

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

// ---- Memory between two pages that fault, every byte around the data watched.

enum class Against { kFront, kBack };

class Arena {
 public:
  explicit Arena(size_t capacity) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    size_ = (capacity + page - 1) / page * page;
    base_ = mmap(nullptr, size_ + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    begin_ = static_cast<char*>(base_) + page;
    total_ = size_ + 2 * page;
    if (base_ == MAP_FAILED || mprotect(begin_, size_, PROT_READ | PROT_WRITE)) abort();
  }
  ~Arena() { munmap(base_, total_); }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  // `bytes` of memory that lie `gap` bytes from the page at one end.
  char* place(size_t bytes, Against side, size_t gap = 0) {
    data_ = side == Against::kFront ? begin_ + gap : begin_ + size_ - gap - bytes;
    stop_ = data_ + bytes;
    memset(from(), kCanary, static_cast<size_t>(to() - from()));
    return data_;
  }
  // Whether the neighbourhood of the data is as it was.
  bool intact() const {
    const auto kept = [](char c) { return c == kCanary; };
    return std::all_of(from(), data_, kept) && std::all_of(stop_, to(), kept);
  }

 private:
  static constexpr char kCanary = 0x5a;
  static constexpr ptrdiff_t kWatched = 512;
  char* from() const { return data_ - std::min(kWatched, data_ - begin_); }
  char* to() const { return stop_ + std::min(kWatched, begin_ + size_ - stop_); }

  void* base_;
  char *begin_, *data_ = nullptr, *stop_ = nullptr;
  size_t size_, total_;
};

// ---- Calls through the C door.

struct Options : softmaxlib_options {
  Options() : softmaxlib_options(SOFTMAXLIB_OPTIONS_INIT) {}
  Options(softmaxlib_isa i, softmaxlib_algorithm a, softmaxlib_store s = SOFTMAXLIB_STORE_PLAIN)
      : Options() {
    isa = i;
    algorithm = a;
    store = s;
  }
};

inline std::string describe(const Options& o) {
  const char* name = softmaxlib_isa_name(o.isa);
  return std::string(name ? name : "auto") + " algorithm " + std::to_string(o.algorithm) +
         " store " + std::to_string(o.store) + " threads " + std::to_string(o.num_threads);
}

// softmaxlib_run with exactly the scratch it asks for, watched.
inline softmaxlib_status run_array(softmaxlib_function function, const softmaxlib_array& x,
                                   const softmaxlib_array& out, int32_t naxes, const int32_t* axes,
                                   Options o) {
  size_t bytes = 0;
  if (const auto status = softmaxlib_scratch_size(function, &x, &out, naxes, axes, &o, &bytes))
    return status;
  constexpr size_t kWatched = 256;
  std::vector<char> memory(bytes + 2 * kWatched + 64, 0x3c);
  const size_t past = (reinterpret_cast<uintptr_t>(memory.data()) + kWatched) % 64;
  char* scratch = memory.data() + kWatched + (past ? 64 - past : 0);
  if (bytes) memset(scratch, 0xff, bytes);
  o.scratch = bytes ? scratch : nullptr;
  o.scratch_size = bytes;
  const softmaxlib_status status = softmaxlib_run(function, &x, &out, naxes, axes, &o);
  const auto kept = [](char c) { return c == 0x3c; };
  EXPECT_TRUE(std::all_of(memory.data(), scratch, kept)) << "wrote before scratch";
  EXPECT_TRUE(std::all_of(scratch + bytes, memory.data() + memory.size(), kept))
      << "wrote past scratch";
  return status;
}

// Rows of n contiguous elements.
inline softmaxlib_status run_rows(softmaxlib_function function, softmaxlib_dtype dtype,
                                  const void* x, void* y, int64_t rows, int64_t n,
                                  const Options& o) {
  const int64_t shape[] = {rows, n};
  const softmaxlib_array xa = {const_cast<void*>(x), dtype, 2, shape, nullptr};
  const bool reduces = function == SOFTMAXLIB_LOGSUMEXP;
  const softmaxlib_array ya = {y, dtype, reduces ? 1 : 2, shape, nullptr};
  const int32_t axis = 1;
  return run_array(function, xa, ya, 1, &axis, o);
}

inline int64_t result_elements(softmaxlib_function function, int64_t n) {
  return function == SOFTMAXLIB_LOGSUMEXP ? 1 : n;
}

inline std::vector<char> row_result(softmaxlib_function function, softmaxlib_dtype dtype,
                                    const std::vector<char>& x, const Options& o) {
  const int64_t item = item_size_of(dtype), n = static_cast<int64_t>(x.size()) / item;
  std::vector<char> y(static_cast<size_t>(result_elements(function, n) * item), 0x11);
  EXPECT_EQ(run_rows(function, dtype, x.data(), y.data(), 1, n, o), SOFTMAXLIB_OK) << describe(o);
  return y;
}

// ---- Rows.

enum class Pattern {
  kNormal,
  kWide,
  kTiny,
  kHuge,
  kTies,
  kTwoValues,
  kRising,
  kFalling,
  kSteep,
  kSpike,
  kLongTail,
  kEveryMagnitude,
  kMasked,
  kFarAbove,
  kFarBelow,
  kSubnormalResults,
  kIntegers,
  kCount
};

inline std::vector<double> make_row(Pattern pattern, int64_t n, softmaxlib_dtype dtype,
                                    uint32_t seed) {
  std::mt19937_64 random(seed * 1000003u + static_cast<uint32_t>(pattern));
  std::normal_distribution<double> normal;
  std::uniform_real_distribution<double> uniform(0, 1);
  const Format f = format_of(dtype);
  const bool wide = dtype == SOFTMAXLIB_F64;
  std::vector<double> row(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) {
    const double at = static_cast<double>(i) / static_cast<double>(std::max<int64_t>(n, 1));
    double x = normal(random);
    switch (pattern) {
      case Pattern::kNormal: break;
      case Pattern::kWide: x *= 30; break;
      case Pattern::kTiny: x *= 1e-40; break;
      case Pattern::kHuge: x *= wide ? 1e307 : 1e38; break;
      case Pattern::kTies: x = 7.25; break;
      case Pattern::kTwoValues: x = uniform(random) < 0.5 ? -3.5 : 11; break;
      case Pattern::kRising: x = 1000 * at + 1e-3 * x; break;
      case Pattern::kFalling: x = -1000 * at + 1e-3 * x; break;
      case Pattern::kSteep: x = 60 * static_cast<double>(i % 900) - 20000; break;
      case Pattern::kSpike: x = i == n / 2 ? 60 : x; break;
      case Pattern::kLongTail: x = std::log(uniform(random) + 1e-300) * 10; break;
      case Pattern::kEveryMagnitude:
        x = std::copysign(std::pow(10.0, (wide ? 600 : 78) * uniform(random) - (wide ? 300 : 40)),
                          x);
        break;
      case Pattern::kMasked: x = uniform(random) < 0.4 ? -kInf : 5 * x; break;
      case Pattern::kFarAbove: x += 50000; break;
      case Pattern::kFarBelow: x -= 50000; break;
      case Pattern::kSubnormalResults: x = i == n / 3 ? 0 : x - (wide ? 740 : 97); break;
      default: x = std::floor(4 * x); break;
    }
    if (std::isfinite(x)) x = std::min(std::max(x, -f.largest), f.largest);
    row[static_cast<size_t>(i)] = x;
  }
  return row;
}

// ---- Exact results.

inline Real stable(Real x) { return x >= 0 ? x + 1 : 1 / (1 - x); }

// A function of a row in extended precision; where[i] false: takes no part. Specials as in the
// contract's tables.
inline std::vector<Real> exact_row(softmaxlib_function function, const std::vector<Real>& x,
                                   const std::vector<bool>& where = {}) {
  const bool logarithm = function == SOFTMAXLIB_LOG_SOFTMAX || function == SOFTMAXLIB_LOG_STABLEMAX;
  const bool stablemax = function == SOFTMAXLIB_STABLEMAX || function == SOFTMAXLIB_LOG_STABLEMAX;
  const Real masked = logarithm ? -kInf : 0;
  const size_t n = x.size();
  const auto in = [&](size_t i) { return where.empty() || where[i]; };
  size_t top = n;
  bool nan = false;
  for (size_t i = 0; i < n; ++i) {
    if (!in(i)) continue;
    nan |= x[i] != x[i];
    if (top == n || x[i] > x[top]) top = i;
  }
  const Real largest = top == n ? -kInf : x[top];
  std::vector<Real> y(n, masked);
  if (function == SOFTMAXLIB_LOGSUMEXP && (nan || !std::isfinite(largest)))
    return {nan ? kNaN : largest};
  if (nan || !std::isfinite(largest)) {
    for (size_t i = 0; i < n; ++i)
      if (in(i)) y[i] = kNaN;
    return y;
  }
  const auto term = [&](size_t i) {
    return stablemax ? (x[i] == -kInf ? 0 : stable(x[i])) : std::exp(x[i] - largest);
  };
  Real rest = 0;  // the sum but for its largest term
  for (size_t i = 0; i < n; ++i)
    if (in(i) && i != top) rest += term(i);
  const Real held = stablemax ? stable(largest) : 1, ratio = rest / held;
  if (function == SOFTMAXLIB_LOGSUMEXP) return {largest + std::log1p(ratio)};
  for (size_t i = 0; i < n; ++i) {
    if (!in(i) || x[i] == -kInf) continue;
    if (function == SOFTMAXLIB_LOG_SOFTMAX) y[i] = (x[i] - largest) - std::log1p(ratio);
    else if (!logarithm) y[i] = term(i) / (rest + held);
    else y[i] = x[i] == largest ? -std::log1p(ratio) : std::log(term(i) / (rest + held));
  }
  return y;
}

struct Errors {
  Real worst = 0, total = 0;  // in ULP of the storage
  int64_t count = 0;
  Real mean() const { return count ? total / static_cast<Real>(count) : 0; }
};

// The contract's bound in ULP; logsumexp may instead be off by an absolute amount.
inline Real bound_of(softmaxlib_function function, softmaxlib_dtype dtype) {
  if (dtype == SOFTMAXLIB_F16 || dtype == SOFTMAXLIB_BF16) return 0.5L + 0x1p-10L;
  if (dtype == SOFTMAXLIB_F64 || function == SOFTMAXLIB_SOFTMAX) return 5;
  return function == SOFTMAXLIB_LOGSUMEXP ? 2 : 4;
}

// Compares with the exact result; the message names the first element beyond the bound.
inline testing::AssertionResult accurate(softmaxlib_function function, softmaxlib_dtype dtype,
                                         const std::vector<Real>& exact,
                                         const std::vector<Real>& actual,
                                         Errors* errors = nullptr) {
  const Format f = format_of(dtype);
  const Real bound = bound_of(function, dtype);
  const Real absolute = function != SOFTMAXLIB_LOGSUMEXP ? 0
                        : dtype == SOFTMAXLIB_F64        ? 0x1p-52L
                                                         : 0x1p-24L;
  if (exact.size() != actual.size()) return testing::AssertionFailure() << "sizes differ";
  for (size_t i = 0; i < exact.size(); ++i) {
    const Real e = exact[i], a = actual[i];
    if (e != e || a != a) {
      if ((e != e) == (a != a)) continue;
    } else if (e == a) {
      if (errors) ++errors->count;
      continue;
    } else if (std::isinf(a)) {  // rounded past the largest number
      if (!std::isinf(e) && std::signbit(a) == std::signbit(e) &&
          std::fabs(e) >= f.largest + ulp_of(f.largest, f) * (0.5L - 0x1p-10L))
        continue;
    } else if (!std::isinf(e)) {
      const Real distance = std::fabs(a - e), ulps = distance / ulp_of(e, f);
      if (errors) {
        errors->worst = std::max(errors->worst, ulps);
        errors->total += ulps;
        ++errors->count;
      }
      const Real rounding = bound < 1 ? ulp_of(e, f) / 2 : 0;
      if (ulps <= bound || (absolute > 0 && distance <= absolute + rounding)) continue;
    }
    return testing::AssertionFailure()
           << kFunctionNames[function] << " " << kDtypeNames[dtype] << ": element " << i << " of "
           << exact.size() << " is " << static_cast<double>(a) << ", exactly "
           << static_cast<double>(e) << ", off by "
           << static_cast<double>(std::fabs(a - e) / ulp_of(e, f)) << " ULP";
  }
  return testing::AssertionSuccess();
}

// First difference of two results, for messages.
inline testing::AssertionResult same_bits(const char* a, const char* b, size_t bytes,
                                          softmaxlib_dtype dtype) {
  if (bytes == 0 || memcmp(a, b, bytes) == 0) return testing::AssertionSuccess();
  const int item = item_size_of(dtype);
  for (size_t i = 0; i < bytes; i += static_cast<size_t>(item))
    if (memcmp(a + i, b + i, static_cast<size_t>(item)))
      return testing::AssertionFailure()
             << kDtypeNames[dtype] << " element " << i / static_cast<size_t>(item) << ": "
             << static_cast<double>(decode(dtype, a + i)) << " and "
             << static_cast<double>(decode(dtype, b + i));
  return testing::AssertionFailure() << "sizes";
}
inline testing::AssertionResult same_bits(const std::vector<char>& a, const std::vector<char>& b,
                                          softmaxlib_dtype dtype) {
  if (a.size() != b.size()) return testing::AssertionFailure() << "sizes differ";
  return same_bits(a.data(), b.data(), a.size(), dtype);
}

}  // namespace softmaxlib::test
