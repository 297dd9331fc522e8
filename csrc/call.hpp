// One call between its checks and its kernel: what the entries of the C interface share.
#pragma once

#include <math.h>
#include <stddef.h>
#include <string.h>

#include "kernel_table.hpp"
#include "rows/layout.hpp"
#include "rows/schedule.hpp"

namespace softmaxlib {

// By its bits: comparing a NaN would raise a flag, and for callers who unmasked it a signal.
inline bool is_finite(double x) {
  uint64_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return (bits >> 52 & 0x7ff) != 0x7ff;
}

struct Call {
  Job job;
  Schedule schedule;

  int64_t scratch() const { return schedule.scratch * (schedule.split ? 1 : schedule.tasks); }
};

// The caller's options: NULL and what an older header lacks is at its default.
class Options {
 public:
  explicit Options(const softmaxlib_options* given) : use_(given) {
    static constexpr softmaxlib_options kDefaults = SOFTMAXLIB_OPTIONS_INIT;
    constexpr size_t kFirst = offsetof(softmaxlib_options, scale);  // 0.1 without attention
    if (!given) {
      use_ = &kDefaults;
    } else if (given->struct_size == kFirst) {
      local_ = kDefaults;
      memcpy(&local_, given, kFirst);
      local_.struct_size = sizeof(local_);
      use_ = &local_;
    }
  }
  Options(const Options&) = delete;
  Options& operator=(const Options&) = delete;

  const softmaxlib_options& operator*() const { return *use_; }
  const softmaxlib_options* operator->() const { return use_; }

 private:
  const softmaxlib_options* use_;
  softmaxlib_options local_;
};

// Those that say how to run.
inline softmaxlib_status check(const softmaxlib_options& o) {
  if (o.struct_size != sizeof(softmaxlib_options)) return SOFTMAXLIB_ERROR_STRUCT_SIZE;
  if (o.report && o.report->struct_size != sizeof(softmaxlib_report))
    return SOFTMAXLIB_ERROR_STRUCT_SIZE;
  if (o.algorithm < 0 || o.algorithm >= kAlgorithms) return SOFTMAXLIB_ERROR_ALGORITHM;
  if (!softmaxlib_isa_name(o.isa) && o.isa != SOFTMAXLIB_ISA_AUTO) return SOFTMAXLIB_ERROR_ISA;
  if (o.store < 0 || o.store > SOFTMAXLIB_STORE_STREAMING) return SOFTMAXLIB_ERROR_STORE;
  if (o.num_threads < 0) return SOFTMAXLIB_ERROR_THREADS;
  return table_of(o.isa) ? SOFTMAXLIB_OK : SOFTMAXLIB_ERROR_ISA_UNSUPPORTED;
}

// What a run of the job needs beside its layout.
struct Means {
  softmaxlib_parallel_for parallel_for;
  void* parallel_context;
  softmaxlib_report* report;
  void* scratch;
  size_t scratch_size;
};

// Runs a kernel over all rows; job.tasks shares them out.
softmaxlib_status run(Call& call, Kernel kernel, const Means& means);

}  // namespace softmaxlib
