// What the benchmarks share: cases, the two arrays, states of the caches, threads, counters.
#pragma once

#include <benchmark/benchmark.h>
#include <stddef.h>
#include <stdint.h>

#include <functional>
#include <string>
#include <vector>

#include "internal.hpp"
#include "softmaxlib/softmaxlib.h"

namespace softmaxlib::bench {

// ---- machine.cpp

// Caches as one core sees them; a common size where the machine does not tell.
struct Caches {
  int64_t l1, l2, last;
};
Caches caches();
int32_t all_threads();
std::vector<int32_t> thread_counts();  // 1 and all
std::vector<softmaxlib_isa> isas();    // that this CPU can run, best first
bool has_streaming_stores(softmaxlib_isa isa);

struct Case {
  int64_t bytes;      // of x, and of y
  std::string level;  // the smallest cache that holds both, where they are; "DRAM"; "cold"
  int32_t threads;

  bool cold() const { return level == "cold"; }
};
// From half of L1 to 4 times the last level, for elements of so many bytes.
std::vector<Case> cases(int64_t item);

// The two arrays of all benchmarks. x holds normal deviates of the dtype last asked for.
constexpr int64_t kLargestShape = int64_t{128} << 20;  // bytes, at least
void set_offset(int64_t bytes);                        // past a page; before their first use
void fill_x(softmaxlib_dtype dtype);
char* x();
char* y();
void evict(int64_t bytes);  // so many of x and y, from all caches

// Zeros, aligned as kernels ask for.
class Scratch {
 public:
  explicit Scratch(size_t bytes = 0) : raw_(bytes + 64) {}
  void* data() { return raw_.data() + (64 - reinterpret_cast<uintptr_t>(raw_.data()) % 64); }

 private:
  std::vector<char> raw_;
};

softmaxlib_pool* pool();  // the library's own, of all_threads()

// ---- stream.cpp

// What a benchmark is measured against: passes over as many bytes that compute nothing, with the
// best ISA, the same threads and the same state of the caches.
enum class Floor { kNone, kRead, kCopy, kInPlace, kReadThenCopy };
double seconds_of(Floor floor, const Case& c);  // measured once, at its first use
constexpr char kFloorText[] =
    "time of a read (logsumexp; passes that only read), of a copy (rows; passes that write; in "
    "place for pass/scale) or of a read and a copy (the others) of as many bytes, over the "
    "benchmark's; copies with plain or streaming stores, whichever is faster; median of 15, "
    "measured in the same run once per size, threads and state of the caches";

void register_stream();

// ---- report.cpp

struct Work {
  int64_t elements;
  int64_t moved;        // bytes, by the algorithm's tally; 0: not reported
  int64_t algorithmic;  // bytes that any algorithm must move; 0: not reported
  Floor floor;
};
// Times call() in the case's state of the caches and reports the counters.
void run(benchmark::State& state, const Case& c, const Work& work,
         const std::function<void()>& call);

std::string tail_of(const Case& c, int64_t elements);  // such as "/L2/n:32768/threads:1"
void add(const std::string& name, const Case& c, std::function<void(benchmark::State&)> body);

// ---- passes.cpp, kernels.cpp

void register_passes();
void register_kernels();
void register_rows();
std::vector<std::string> rows_kernels_that_never_ran();

}  // namespace softmaxlib::bench
