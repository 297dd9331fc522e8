// What this CPU offers: instruction sets the operating system lets us use, and cache sizes.
#pragma once

#include <stdint.h>

#include "job.hpp"

namespace softmaxlib {

// Named as in cmake/SoftmaxlibIsa.cmake, which makes the run-time checks from these.
enum CpuFeature : uint32_t {
  kCpu_avx2 = 1u << 0,
  kCpu_fma = 1u << 1,
  kCpu_f16c = 1u << 2,
  kCpu_avx512f = 1u << 3,
  kCpu_avx512bw = 1u << 4,
  kCpu_avx512dq = 1u << 5,
  kCpu_avx512vl = 1u << 6
};
uint32_t cpu_features();

// Data cache of level 1, 2 or 3 as one core sees it, in bytes; 0 where there is none or unknown.
int64_t cache_size(int level);

// How memory should be fetched ahead of where it is read.
Tuning tuning_of_cpu();

}  // namespace softmaxlib
