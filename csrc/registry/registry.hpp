// What functions.def, dtypes.def and kernels.def say, as constants that the compiler knows; that
// what they say is complete is checked in host/schedule.cpp, beside the choice of a kernel.
#pragma once

#include <math.h>
#include <stdint.h>

#include "softmaxlib/softmaxlib.h"

namespace softmaxlib {

// The registry's names as indices.
namespace registry {
enum Function {
#define SOFTMAXLIB_FUNCTION(name, NAME, element, finish) name,
#include "registry/functions.def"
#undef SOFTMAXLIB_FUNCTION
  kFunctions
};
enum Schedule {
  automatic,  // the algorithms that a caller may name: one row at a time
  three_pass_recompute,
  three_pass_reload,
  two_pass,
  two_pass_reload,
  in_lanes,  // and those that only `auto` picks: many rows at a time
  batched,
  pipelined,
  columns,
  kSchedules,
  kAlgorithms = in_lanes
};
enum Storage {
#define SOFTMAXLIB_FLOAT(name, NAME, numpy, bytes) name,
#define SOFTMAXLIB_INTEGER(NAME, numpy, type)
#include "registry/dtypes.def"
#undef SOFTMAXLIB_FLOAT
#undef SOFTMAXLIB_INTEGER
  kStorages
};
enum OtherCall {
#define SOFTMAXLIB_KERNEL(function, algorithm, storages)
#define SOFTMAXLIB_ROWS_KERNEL(function, schedule, algorithm)
#define SOFTMAXLIB_CALL(name, kernel) name,
#include "registry/kernels.def"
#undef SOFTMAXLIB_KERNEL
#undef SOFTMAXLIB_ROWS_KERNEL
#undef SOFTMAXLIB_CALL
  kOtherCalls
};
static_assert(int{two_pass_reload} == SOFTMAXLIB_TWO_PASS_RELOAD, "the order of softmaxlib.h");
}  // namespace registry
using registry::kAlgorithms, registry::kFunctions, registry::kSchedules, registry::kStorages;

// What an element's term in the sum is, and how the result comes from it.
enum class Element : uint8_t { exp, stable };
enum class Finish : uint8_t { ratio, logarithm, log_sum };

struct Function {
  softmaxlib_function code;
  const char* name;
  Element element;
  Finish finish;
};
constexpr Function kFunctionInfo[] = {
#define SOFTMAXLIB_FUNCTION(name, NAME, element, finish) \
  {SOFTMAXLIB_##NAME, #name, Element::element, Finish::finish},
#include "registry/functions.def"
#undef SOFTMAXLIB_FUNCTION
};
[[maybe_unused]] static constexpr bool is_function(softmaxlib_function f) {
  return f >= 0 && f < kFunctions;
}
// One result per row, instead of one per element.
[[maybe_unused]] static constexpr bool reduces(softmaxlib_function f) {
  return kFunctionInfo[f].finish == Finish::log_sum;
}
[[maybe_unused]] static constexpr bool is_stable(softmaxlib_function f) {
  return kFunctionInfo[f].element == Element::stable;
}
// The result of an element that a mask hides.
[[maybe_unused]] static constexpr double masked_result(softmaxlib_function f) {
  return kFunctionInfo[f].finish == Finish::ratio ? 0 : -INFINITY;
}
// Whether results alone do not tell the gradient: it depends on x too.
[[maybe_unused]] static constexpr bool gradient_reads_x(softmaxlib_function f) {
  return is_stable(f) || reduces(f);
}

struct Dtype {
  softmaxlib_dtype code;
  const char *name, *numpy;
  int8_t bytes;
  bool is_float;
};
constexpr Dtype kDtypeInfo[] = {
#define SOFTMAXLIB_FLOAT(name, NAME, numpy, bytes) {SOFTMAXLIB_##NAME, #name, #numpy, bytes, true},
#define SOFTMAXLIB_INTEGER(NAME, numpy, type) \
  {SOFTMAXLIB_##NAME, #NAME, #numpy, sizeof(type), false},
#include "registry/dtypes.def"
#undef SOFTMAXLIB_FLOAT
#undef SOFTMAXLIB_INTEGER
};
constexpr int kDtypes = sizeof(kDtypeInfo) / sizeof(kDtypeInfo[0]);
[[maybe_unused]] static constexpr bool is_dtype(softmaxlib_dtype dtype) {
  return dtype >= 0 && dtype < kDtypes;
}
[[maybe_unused]] static constexpr bool is_float(softmaxlib_dtype dtype) {
  return dtype >= 0 && dtype < kStorages;
}
[[maybe_unused]] static constexpr bool is_half(softmaxlib_dtype dtype) {
  return is_float(dtype) && kDtypeInfo[dtype].bytes == 2;
}
// Results of doubles are computed in double, all others in float.
[[maybe_unused]] static constexpr softmaxlib_dtype arithmetic_of(softmaxlib_dtype dtype) {
  return dtype == SOFTMAXLIB_F64 ? SOFTMAXLIB_F64 : SOFTMAXLIB_F32;
}
// 8 for what is no dtype.
[[maybe_unused]] static constexpr int64_t item_size(softmaxlib_dtype dtype) {
  return is_dtype(dtype) ? kDtypeInfo[dtype].bytes : 8;
}

[[maybe_unused]] static constexpr bool in_order() {
  for (int i = 0; i < kFunctions; ++i)
    if (kFunctionInfo[i].code != i) return false;
  for (int i = 0; i < kDtypes; ++i)
    if (kDtypeInfo[i].code != i) return false;
  return true;
}
static_assert(in_order(), "functions.def and dtypes.def: the order of softmaxlib.h");

// The kernels of softmaxlib_run.
enum class Storages : uint8_t { kAll, kWide };
struct Registered {
  softmaxlib_function function;
  int schedule;                    // registry::Schedule
  softmaxlib_algorithm algorithm;  // that of the interface that comes nearest
  Storages storages;
  const char *function_name, *schedule_name;
};
constexpr Registered kRegistry[] = {
#define SOFTMAXLIB_KERNEL(function, algorithm, storages)         \
  {registry::function, registry::algorithm, registry::algorithm, \
   Storages::storages, #function,           #algorithm},
#define SOFTMAXLIB_ROWS_KERNEL(function, schedule, algorithm)   \
  {registry::function, registry::schedule, registry::algorithm, \
   Storages::kAll,     #function,          #schedule},
#define SOFTMAXLIB_CALL(name, kernel)
#include "registry/kernels.def"
#undef SOFTMAXLIB_KERNEL
#undef SOFTMAXLIB_ROWS_KERNEL
#undef SOFTMAXLIB_CALL
};
[[maybe_unused]] static constexpr bool has_storage(const Registered& r, softmaxlib_dtype storage) {
  return is_float(storage) && (r.storages == Storages::kAll || !is_half(storage));
}
// NULL where there is none.
[[maybe_unused]] static constexpr const Registered* registered(softmaxlib_function function,
                                                               int schedule,
                                                               softmaxlib_dtype storage) {
  for (const Registered& r : kRegistry)
    if (r.function == function && r.schedule == schedule && has_storage(r, storage)) return &r;
  return nullptr;
}

}  // namespace softmaxlib
