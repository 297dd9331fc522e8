// How a job runs: which algorithm, which stores, which split over threads. Nothing here can change
// a bit of the result. Measured with `softmaxlib bench`.
#pragma once

#include "kernel_table.hpp"

namespace softmaxlib {

struct Schedule {
  int kernel;  // registry::Schedule, in the registry for the job's function and storage
  bool streaming;
  bool split;       // the blocks of each row go to the threads, else whole rows
  int64_t tasks;    // 1: serial
  int64_t tile;     // Job::tile
  int64_t scratch;  // bytes of one task
};

Schedule choose_schedule(softmaxlib_function function, const Job& job,
                         const softmaxlib_options& options);

}  // namespace softmaxlib
