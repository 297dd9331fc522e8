// One table of kernels per ISA, all made from kernels.def.
#pragma once

#include "internal.hpp"
#include "job.hpp"

namespace softmaxlib {

constexpr int kFunctions = 5, kAlgorithms = 5, kSchedules = 9, kStorages = 4;

// The registry's names as indices.
namespace registry {
enum Function { softmax, log_softmax, logsumexp, stablemax, log_stablemax };
enum Schedule {
  automatic,  // the algorithms that a caller may name: one row at a time
  three_pass_recompute,
  three_pass_reload,
  two_pass,
  two_pass_reload,
  in_lanes,  // and those that only `auto` picks: many rows at a time
  batched,
  pipelined,
  columns
};
enum Storage { f32, f64, f16, bf16 };
static_assert(int{log_stablemax} == SOFTMAXLIB_LOG_STABLEMAX && int{bf16} == SOFTMAXLIB_BF16 &&
                  int{two_pass_reload} == SOFTMAXLIB_TWO_PASS_RELOAD,
              "the same order as in softmaxlib.h");
}  // namespace registry

struct KernelEntry {
  Kernel run;  // NULL: not in the registry
  const char* name;
  softmaxlib_algorithm algorithm;  // the one of the interface that comes nearest
};

// What the streaming calls run for one function, per storage or per arithmetic.
struct StateKernels {
  Kernel update[kStorages], scale[kStorages];
  void (*merge[2])(softmaxlib_state* into, const softmaxlib_state* from, int64_t rows);
  void (*finish[2])(const softmaxlib_state* states, double* log_sums, int64_t rows);
};

struct KernelTable {
  softmaxlib_isa isa;
  bool many_rows;  // whether it has the schedules that only `auto` picks
  KernelEntry kernels[kFunctions][kSchedules][kStorages];
  StateKernels states[kFunctions];
  Kernel sample[kStorages], topk[kStorages], gradient[kFunctions][kStorages];
  Kernel take[kStorages], cross_entropy[2][kStorages];  // of softmax, of stablemax
  void (*reduce_losses)(const Job& job, const Reduction& reduction);
  Kernel scale_rows[kStorages];
  Kernel orthogonal[kStorages];
  ExpSweep (*exp_sweep)(bool accurate, uint32_t first, uint64_t count);
  void (*roofline)(Roofline kind, const void* x, void* y, size_t bytes);
  void (*pass)(Pass pass, bool streaming, const float* x, float* y, int64_t n, char* scratch);
};

// NULL where the ISA is not compiled in or this CPU lacks it; SOFTMAXLIB_ISA_AUTO: the best.
const KernelTable* table_of(softmaxlib_isa isa);

}  // namespace softmaxlib
