// One call between its checks and its kernel: what the entries of the C interface share.
#pragma once

#include <math.h>
#include <stddef.h>
#include <string.h>

#include "bits.hpp"
#include "kernel_table.hpp"
#include "rows/layout.hpp"
#include "rows/schedule.hpp"

namespace softmaxlib {

struct Call {
  Job job;
  Schedule schedule;

  int64_t scratch() const { return schedule.scratch * (schedule.split ? 1 : schedule.tasks); }
};

// A caller's struct that says its own size. NULL is all defaults; `older` is the size that an older
// header gives it (0: there is none), and what that lacks is at its default. Of a struct of any
// other size nothing but the size is read: it may end where the caller's memory does.
template <class S>
class Versioned {
 public:
  Versioned(const S* given, const S& defaults, size_t older) : use_(given) {
    if (given && given->struct_size == sizeof(S)) return;
    local_ = defaults;
    use_ = &local_;
    if (!given) return;
    if (older && given->struct_size == older) memcpy(&local_, given, older);
    else valid_ = false;
    local_.struct_size = sizeof(S);
  }
  Versioned(const Versioned&) = delete;
  Versioned& operator=(const Versioned&) = delete;

  bool valid() const { return valid_; }
  const S& operator*() const { return *use_; }
  const S* operator->() const { return use_; }

 private:
  const S* use_;
  S local_;
  bool valid_ = true;
};

class Options : public Versioned<softmaxlib_options> {
 public:
  explicit Options(const softmaxlib_options* given)
      : Versioned(given, SOFTMAXLIB_OPTIONS_INIT, offsetof(softmaxlib_options, scale)) {}
};

// Those that say how to run. `reports`: the report is used.
inline softmaxlib_status check(const Options& options, bool reports = true) {
  if (!options.valid()) return SOFTMAXLIB_ERROR_STRUCT_SIZE;
  const softmaxlib_options& o = *options;
  if (reports && o.report && o.report->struct_size != sizeof(softmaxlib_report))
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
