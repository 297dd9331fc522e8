// One table of kernels per ISA, all made from kernels.def.
#pragma once

#include "internal.hpp"
#include "job.hpp"

namespace softmaxlib {

constexpr int kFunctions = 5, kAlgorithms = 5, kStorages = 4;

// The registry's names as indices.
namespace registry {
enum Function { softmax, log_softmax, logsumexp, stablemax, log_stablemax };
enum Algorithm { automatic, three_pass_recompute, three_pass_reload, two_pass, two_pass_reload };
enum Storage { f32, f64, f16, bf16 };
static_assert(int{log_stablemax} == SOFTMAXLIB_LOG_STABLEMAX && int{bf16} == SOFTMAXLIB_BF16 &&
                  int{two_pass_reload} == SOFTMAXLIB_TWO_PASS_RELOAD,
              "the same order as in softmaxlib.h");
}  // namespace registry

struct KernelTable {
  softmaxlib_isa isa;
  Kernel kernels[kFunctions][kAlgorithms][kStorages];  // NULL: not in the registry
  ExpSweep (*exp_sweep)(bool accurate, uint32_t first, uint64_t count);
  void (*roofline)(Roofline kind, const void* x, void* y, size_t bytes);
};

// NULL where the ISA is not compiled in or this CPU lacks it; SOFTMAXLIB_ISA_AUTO: the best.
const KernelTable* table_of(softmaxlib_isa isa);

}  // namespace softmaxlib
