// What the tests share: the registry, guarded memory, rows that have broken softmax code before,
// and comparisons with exact results.
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

#include "exact.hpp"
#include "registry/table.hpp"
#include "softmaxlib/softmaxlib.h"

namespace softmaxlib::test {

// ---- The registry and the ISAs.

// A kernel of one row, which a caller may name.
struct KernelId {
  softmaxlib_function function;
  softmaxlib_algorithm algorithm;
  softmaxlib_dtype dtype;
  std::string name;
};
inline const std::vector<KernelId>& kernels() {
  static const std::vector<KernelId> all = [] {
    std::vector<KernelId> found;
    for (const Registered& r : kRegistry)
      for (softmaxlib_dtype dtype = 0; dtype < kStorages; ++dtype)
        if (r.schedule < kAlgorithms && has_storage(r, dtype))
          found.push_back({r.function, r.algorithm, dtype,
                           std::string(r.function_name) + "_" + r.schedule_name + "_" +
                               kDtypeInfo[dtype].name});
    return found;
  }();
  return all;
}

inline const std::vector<softmaxlib_function>& functions() {
  static const std::vector<softmaxlib_function> all = [] {
    std::vector<softmaxlib_function> found;
    for (const Function& function : kFunctionInfo) found.push_back(function.code);
    return found;
  }();
  return all;
}
constexpr softmaxlib_dtype kFloatTypes[] = {SOFTMAXLIB_F32, SOFTMAXLIB_F64, SOFTMAXLIB_F16,
                                            SOFTMAXLIB_BF16};
inline std::vector<softmaxlib_algorithm> algorithms_of(softmaxlib_function function,
                                                       softmaxlib_dtype dtype) {
  std::vector<softmaxlib_algorithm> found;
  for (const KernelId& k : kernels())
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

// ---- Comparisons with the exact results of exact.hpp.

struct Errors {
  Real worst = 0, total = 0;  // in ULP of the storage
  int64_t count = 0;
  Real mean() const { return count ? total / static_cast<Real>(count) : 0; }
};

// Compares with the exact result; the message names the first element beyond the bound.
inline testing::AssertionResult accurate(softmaxlib_function function, softmaxlib_dtype dtype,
                                         const std::vector<Real>& exact,
                                         const std::vector<Real>& actual,
                                         Errors* errors = nullptr) {
  const Format f = format_of(dtype);
  const Real bound = bound_of(function, dtype);
  const Real absolute = function != SOFTMAXLIB_LOGSUMEXP ? 0
                        : dtype == SOFTMAXLIB_F64        ? 0x1p-52L
                                                         : 0x1p-23L;
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
