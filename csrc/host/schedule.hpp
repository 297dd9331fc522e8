// How a job runs: which kernel, which stores, which split over threads, and why. Nothing here can
// change a bit of the result. Measured with `softmaxlib bench`; docs/performance.md has the
// figures.
#pragma once

#include "registry/table.hpp"

namespace softmaxlib {

struct Schedule {
  int kernel;  // registry::Schedule, in the registry for the job's function and storage
  const char* why_kernel;
  bool streaming;
  const char* why_stores;
  bool split;     // the blocks of each row go to the threads, else whole rows
  int64_t tasks;  // 1: serial
  const char* why_tasks;
  int64_t tile;     // Job::tile
  int64_t scratch;  // bytes of one task

  int64_t scratch_in_all() const { return scratch * (split ? 1 : tasks); }
};

// frugal: without any scratch.
Schedule choose_schedule(softmaxlib_function function, const Job& job,
                         const softmaxlib_options& options, bool frugal);

// For calls other than softmaxlib_run: a kernel of their own, whole rows shared. `tiles`: rows that
// lie side by side come into tiles where there is scratch for them.
Schedule share_rows(const Job& job, const softmaxlib_options& options, bool tiles);

// For one row: its blocks are shared.
Schedule share_blocks(const Job& job, const softmaxlib_options& options);

}  // namespace softmaxlib
