#include "host/cpu.hpp"

#include <initializer_list>

#if defined(__x86_64__) || defined(__i386__) || defined(_M_X64) || defined(_M_IX86)
#define SOFTMAXLIB_X86 1
#if defined(_MSC_VER)
#include <immintrin.h>
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#endif
#if defined(__linux__)
#include <unistd.h>
#endif

namespace softmaxlib {
namespace {

#if defined(SOFTMAXLIB_X86)

struct Registers {
  uint32_t eax, ebx, ecx, edx;
};

Registers cpuid(uint32_t leaf, uint32_t subleaf) {
  Registers r = {};
#if defined(_MSC_VER)
  int v[4];
  __cpuidex(v, static_cast<int>(leaf), static_cast<int>(subleaf));
  r = {static_cast<uint32_t>(v[0]), static_cast<uint32_t>(v[1]), static_cast<uint32_t>(v[2]),
       static_cast<uint32_t>(v[3])};
#else
  __cpuid_count(leaf, subleaf, r.eax, r.ebx, r.ecx, r.edx);
#endif
  return r;
}

uint64_t enabled_states() {
#if defined(_MSC_VER)
  return _xgetbv(0);
#else
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return static_cast<uint64_t>(high) << 32 | low;
#endif
}

// Intel describes its caches in leaf 4, AMD in the same form in leaf 0x8000001d.
int64_t cache_from_cpuid(int level) {
  for (const uint32_t leaf : {0x8000001du, 4u}) {
    if (cpuid(leaf & 0x80000000u, 0).eax < leaf) continue;
    for (uint32_t i = 0; i < 16; ++i) {
      const Registers r = cpuid(leaf, i);
      const uint32_t type = r.eax & 31u;
      if (type == 0) break;
      if (type == 2 || static_cast<int>(r.eax >> 5 & 7u) != level) continue;  // 2: instructions
      const int64_t ways = (r.ebx >> 22) + 1, partitions = (r.ebx >> 12 & 1023u) + 1;
      return ways * partitions * ((r.ebx & 4095u) + 1) * (int64_t{r.ecx} + 1);
    }
  }
  return 0;
}

#endif

}  // namespace

uint32_t cpu_features() {
  uint32_t found = 0;
#if defined(SOFTMAXLIB_X86)
  if (cpuid(0, 0).eax < 7) return 0;
  const Registers one = cpuid(1, 0), seven = cpuid(7, 0);
  if (!(one.ecx >> 27 & 1u)) return 0;  // the operating system saves no extended registers
  const uint64_t states = enabled_states();
  if ((states & 0x6u) != 0x6u) return 0;
  if (one.ecx >> 12 & 1u) found |= kCpu_fma;
  if (one.ecx >> 29 & 1u) found |= kCpu_f16c;
  if (seven.ebx >> 5 & 1u) found |= kCpu_avx2;
  if ((states & 0xe6u) != 0xe6u) return found;
  if (seven.ebx >> 16 & 1u) found |= kCpu_avx512f;
  if (seven.ebx >> 17 & 1u) found |= kCpu_avx512dq;
  if (seven.ebx >> 30 & 1u) found |= kCpu_avx512bw;
  if (seven.ebx >> 31 & 1u) found |= kCpu_avx512vl;
#endif
  return found;
}

Tuning tuning_of_cpu() {
  // Past the caches the hardware's prefetchers alone keep up with a copy, but on most CPUs not with
  // this much arithmetic between two loads.
  Tuning tuning = {8192, false, false};
#if defined(SOFTMAXLIB_X86)
  const Registers vendor = cpuid(0, 0), one = cpuid(1, 0);
  const bool is_amd = vendor.ebx == 0x68747541u;  // "Auth", of AuthenticAMD
  const uint32_t family = (one.eax >> 8 & 15u) + (one.eax >> 20 & 255u);
  const uint32_t model = (one.eax >> 16 & 15u) << 4 | (one.eax >> 4 & 15u);
  // On Zen 4 passes over one row are faster without such fetches, and many rows are faster with
  // fetches into the second level, or one after the other (docs/performance.md). On Zen 5 the usual
  // setting was faster.
  const bool is_zen4 =
      is_amd && family == 25 &&
      ((model >= 0x10 && model <= 0x1f) || (model >= 0x60 && model <= 0x7f) || model >= 0xa0);
  if (is_zen4) tuning = {0, true, true};
#endif
  return tuning;
}

int64_t cache_size(int level) {
  if (level < 1 || level > 3) return 0;
#if defined(SOFTMAXLIB_X86)
  if (const int64_t size = cache_from_cpuid(level)) return size;
#endif
#if defined(__linux__) && defined(_SC_LEVEL1_DCACHE_SIZE)
  const int names[] = {_SC_LEVEL1_DCACHE_SIZE, _SC_LEVEL2_CACHE_SIZE, _SC_LEVEL3_CACHE_SIZE};
  if (const long size = sysconf(names[level - 1]); size > 0) return size;
#endif
  return 0;
}

}  // namespace softmaxlib
