// The kernels of one leaf and their table; included once per ISA unit, after the leaf.
#pragma once

#include "isa/kernels/cross_entropy.hpp"
#include "isa/kernels/gradient.hpp"
#include "isa/kernels/lanes.hpp"
#include "isa/kernels/log_softmax.hpp"
#include "isa/kernels/orthogonal.hpp"
#include "isa/kernels/sample.hpp"
#include "isa/kernels/scale_rows.hpp"
#include "isa/kernels/softmax_pipelined.hpp"
#include "isa/kernels/softmax_three_pass_recompute.hpp"
#include "isa/kernels/softmax_three_pass_reload.hpp"
#include "isa/kernels/softmax_two_pass.hpp"
#include "isa/kernels/softmax_two_pass_reload.hpp"
#include "isa/kernels/stablemax.hpp"
#include "isa/kernels/state.hpp"
#include "isa/kernels/take_log_softmax.hpp"
#include "isa/probes.hpp"
#include "isa/stage/each_row.hpp"
#include "registry/table.hpp"

namespace softmaxlib {
namespace SOFTMAX_ISA {
namespace {

// What a row of a job gets, whichever kernel computes it.
template <class T, auto kKernel>
void rows_one_by_one(const Job& job, int64_t start, int64_t stop, char* scratch) {
  for_each_row<T>(job, start, stop, scratch, [&](const Row<T>& row, const Place&) {
    run_row<T, kKernel>(row);
    if (job.causal && !job.reduces) row.fill_beyond(static_cast<T>(masked_result(job.function)));
  });
}
template <Kernel kKernel>
void many_rows(const Job& job, int64_t start, int64_t stop, char* scratch) {
  const DefaultFloatingPoint environment;
  kKernel(job, start, stop, scratch);
  stream_fence();
}

KernelTable make_table(const Tuning& of_cpu) {
  tuning = of_cpu;
  KernelTable table = {};
  table.isa = kIsa;
  table.many_rows = kHasManyRows;
  table.streaming_stores = kHasStreamingStores;
  table.in_lanes_below[0] = kInLanesBelow<float>;
  table.in_lanes_below[1] = kInLanesBelow<double>;
#define SOFTMAXLIB_KERNEL(function, algorithm, storages)     \
  table.run[registry::function][registry::algorithm] = {     \
      rows_one_by_one<float, function##_##algorithm<float>>, \
      rows_one_by_one<double, function##_##algorithm<double>>};
#define SOFTMAXLIB_ROWS_KERNEL(function, schedule, algorithm) \
  if constexpr (kHasManyRows)                                 \
    table.run[registry::function][registry::schedule] = {     \
        many_rows<function##_##schedule<float>>, many_rows<function##_##schedule<double>>};
#define SOFTMAXLIB_CALL(name, kernel) \
  table.others[registry::name] = {kernel<float>, kernel<double>};
#include "registry/kernels.def"
#undef SOFTMAXLIB_KERNEL
#undef SOFTMAXLIB_ROWS_KERNEL
#undef SOFTMAXLIB_CALL
#define SOFTMAXLIB_FUNCTION(name, NAME, element, finish)                                         \
  table.backward[registry::name] = {gradient_rows<Finish::finish == Finish::logarithm, float>,   \
                                    gradient_rows<Finish::finish == Finish::logarithm, double>}; \
  table.states[registry::name] = state_kernels<StateOf<Element::element, Finish::finish>::type>();
#include "registry/functions.def"
#undef SOFTMAXLIB_FUNCTION
  table.reduce_losses = reduce_losses;
  table.exp_sweep = run_exp_sweep;
  table.roofline = run_roofline;
  table.pass = run_pass_alone;
  return table;
}

}  // namespace
}  // namespace SOFTMAX_ISA

// Filled in by code of the unit itself, so called only after the CPU was found to have the ISA.
KernelTable SOFTMAXLIB_MAKE_TABLE(const Tuning& tuning) { return SOFTMAX_ISA::make_table(tuning); }

}  // namespace softmaxlib
