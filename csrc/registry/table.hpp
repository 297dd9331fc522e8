// One table of kernels per ISA, made from kernels.def and functions.def (isa/unit.hpp).
#pragma once

#include "internal.hpp"
#include "job.hpp"
#include "registry/registry.hpp"

namespace softmaxlib {

// One kernel for float, which all but doubles are computed in, and one for double.
struct Kernels {
  Kernel of_float, of_double;

  Kernel operator[](softmaxlib_dtype storage) const {
    return storage == SOFTMAXLIB_F64 ? of_double : of_float;
  }
};

// What the streaming calls run; merge and finish take states of one arithmetic: [F32], [F64].
struct StateKernels {
  Kernels update, scale;
  void (*merge[2])(softmaxlib_state* into, const softmaxlib_state* from, int64_t rows);
  void (*finish[2])(const softmaxlib_state* states, double* log_sums, int64_t rows);
};

struct KernelTable {
  softmaxlib_isa isa;
  bool many_rows;         // whether it has the schedules that only `auto` picks
  bool streaming_stores;  // whether they are other instructions than plain stores
  // Contiguous rows of less elements than that are computed a row per lane: floats, doubles.
  int64_t in_lanes_below[2];
  Kernels run[kFunctions][kSchedules];
  Kernels backward[kFunctions];
  StateKernels states[kFunctions];
  Kernels others[registry::kOtherCalls];
  void (*reduce_losses)(const Job& job, const Reduction& reduction);
  ExpSweep (*exp_sweep)(bool accurate, uint32_t first, uint64_t count);
  void (*roofline)(Roofline kind, const void* x, void* y, size_t bytes);
  void (*pass)(Pass pass, bool streaming, const float* x, float* y, int64_t n, char* scratch);
};

// NULL where the ISA is not compiled in or this CPU lacks it; SOFTMAXLIB_ISA_AUTO: the best.
const KernelTable* table_of(softmaxlib_isa isa);

// A kernel of a table for one storage, and what reports call it.
struct NamedKernel {
  Kernel run;
  const char* name;
  softmaxlib_algorithm algorithm;
};
NamedKernel kernel_of(const KernelTable& table, softmaxlib_function function, int schedule,
                      softmaxlib_dtype storage);
NamedKernel kernel_of(const KernelTable& table, registry::OtherCall call, softmaxlib_dtype storage);
NamedKernel backward_of(const KernelTable& table, softmaxlib_function function,
                        softmaxlib_dtype storage);
// Of states: to add a chunk, or to scale one.
NamedKernel update_of(const KernelTable& table, softmaxlib_function function,
                      softmaxlib_dtype storage);
NamedKernel scale_of(const KernelTable& table, softmaxlib_function function,
                     softmaxlib_dtype storage);

}  // namespace softmaxlib
