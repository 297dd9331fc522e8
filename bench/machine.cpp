// The machine: caches, memory, threads.
#include <string.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include <algorithm>
#include <new>
#include <random>
#include <stdexcept>
#include <thread>

#include "bench.hpp"

namespace softmaxlib::bench {
namespace {

constexpr int64_t kPage = 4096;

// The library keeps shorter rows serial.
constexpr int64_t kParallelElements = 65536;

int64_t cache_or(int32_t level, int64_t assumed) {
  const int64_t size = softmaxlib_cache_size(level);
  return size ? size : assumed;
}

int64_t largest_case() { return 4 * caches().last; }

int64_t& offset() {
  static int64_t bytes = 0;
  return bytes;
}

// As NumPy allocates: pages, huge ones where the kernel grants them, and a few bytes past the
// first.
char* allocate(int64_t bytes) {
  const size_t size = static_cast<size_t>(bytes + kPage);
  char* p = static_cast<char*>(::operator new(size, std::align_val_t{kPage}));
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  madvise(p, size, MADV_HUGEPAGE);
#endif
  memset(p, 0, size);
  return p + offset();
}

struct Arrays {
  int64_t size = std::max(largest_case(), kLargestShape);
  char *x = allocate(size), *y = allocate(size);
  softmaxlib_dtype dtype = -1;
};
Arrays& arrays() {
  static Arrays both;
  return both;
}

// Normal deviates are far from the limits of the half formats, so cutting digits off is enough.
template <class T>
void encode(float value, softmaxlib_dtype dtype, T* to) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  if (dtype == SOFTMAXLIB_F16) {
    const uint32_t magnitude = bits & 0x7fffffffu;  // what a half would hold as a subnormal is 0
    const uint32_t half = magnitude < 0x38800000u ? 0 : (magnitude - 0x38000000u) >> 13;
    bits = (half | (bits >> 16 & 0x8000u)) << 16;
  }
  const uint16_t high = static_cast<uint16_t>(bits >> 16);
  if constexpr (sizeof(T) == 2) *to = high;
  else *to = static_cast<T>(value);
}

template <class T>
void fill(char* to, int64_t size, softmaxlib_dtype dtype) {
  static const std::vector<float> deviates = [] {
    std::vector<float> values(65536);
    std::mt19937 random(2020);
    std::normal_distribution<float> normal;
    for (float& v : values) v = normal(random);
    return values;
  }();
  std::vector<T> pattern(deviates.size());
  for (size_t i = 0; i < pattern.size(); ++i) encode(deviates[i], dtype, &pattern[i]);
  const int64_t step = static_cast<int64_t>(pattern.size() * sizeof(T));
  for (int64_t i = 0; i < size; i += step)
    memcpy(to + i, pattern.data(), static_cast<size_t>(std::min(step, size - i)));
}

}  // namespace

Caches caches() {
  static const Caches found = [] {
    const int64_t l2 = cache_or(2, int64_t{1} << 20);
    return Caches{cache_or(1, 32 << 10), l2, std::max(cache_or(3, int64_t{32} << 20), l2)};
  }();
  return found;
}

int32_t all_threads() {
  return static_cast<int32_t>(std::max(1u, std::thread::hardware_concurrency()));
}

std::vector<int32_t> thread_counts() {
  if (all_threads() == 1) return {1};
  return {1, all_threads()};
}

std::vector<softmaxlib_isa> isas() {
  std::vector<softmaxlib_isa> found;
  for (int32_t i = 0; const softmaxlib_isa isa = softmaxlib_isa_available(i); ++i)
    found.push_back(isa);
  return found;
}

bool has_streaming_stores(softmaxlib_isa isa) {
  alignas(64) float row[16] = {};
  const int64_t shape[] = {16};
  const softmaxlib_array array = {row, SOFTMAXLIB_F32, 1, shape, nullptr};
  softmaxlib_report report = SOFTMAXLIB_REPORT_INIT;
  softmaxlib_options options = SOFTMAXLIB_OPTIONS_INIT;
  options.algorithm = SOFTMAXLIB_TWO_PASS;
  options.isa = isa;
  options.store = SOFTMAXLIB_STORE_STREAMING;
  options.report = &report;
  softmaxlib_run(SOFTMAXLIB_SOFTMAX, &array, &array, 0, nullptr, &options);
  return report.store == SOFTMAXLIB_STORE_STREAMING;
}

std::vector<Case> cases(int64_t item) {
  const Caches c = caches();
  int64_t first = 64;
  while (first <= c.l1 / 8) first *= 2;
  std::vector<int64_t> sizes;
  for (int64_t bytes = first; bytes < largest_case(); bytes *= 4) sizes.push_back(bytes);
  sizes.push_back(largest_case());

  std::vector<Case> found;
  for (const int64_t bytes : sizes) {
    const int64_t both = 2 * bytes;
    const bool cached = both < c.last;
    const char* level = both < c.l1 ? "L1" : both < c.l2 ? "L2" : cached ? "L3" : "DRAM";
    for (const int32_t threads : thread_counts()) {
      if (threads > 1 && bytes / item < kParallelElements) continue;
      found.push_back({bytes, level, threads});
      if (cached) found.push_back({bytes, "cold", threads});
    }
  }
  return found;
}

void set_offset(int64_t bytes) { offset() = bytes; }

void fill_x(softmaxlib_dtype dtype) {
  Arrays& a = arrays();
  if (a.dtype == dtype) return;
  if (dtype == SOFTMAXLIB_F32) fill<float>(a.x, a.size, dtype);
  else if (dtype == SOFTMAXLIB_F64) fill<double>(a.x, a.size, dtype);
  else fill<uint16_t>(a.x, a.size, dtype);
  a.dtype = dtype;
}

char* x() { return arrays().x; }
char* y() { return arrays().y; }

void evict(int64_t bytes) {
#if defined(__SSE2__)
  for (const char* p : {x(), y()}) {
    for (int64_t i = 0; i < bytes; i += 64) _mm_clflush(p + i);
    _mm_clflush(p + bytes - 1);
  }
  _mm_mfence();
#else
  (void)bytes;  // other data takes the caches
  static std::vector<char> sweep(static_cast<size_t>(2 * caches().last));
  for (size_t i = 0; i < sweep.size(); i += 32) ++sweep[i];
  benchmark::ClobberMemory();
#endif
}

softmaxlib_pool* pool() {
  static softmaxlib_pool* const one = [] {
    softmaxlib_pool* created = nullptr;
    if (const softmaxlib_status status = softmaxlib_pool_create(all_threads(), &created))
      throw std::runtime_error(softmaxlib_status_text(status));
    return created;
  }();
  return one;
}

}  // namespace softmaxlib::bench
