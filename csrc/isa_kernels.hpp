// The kernels of one leaf and their table; included once per ISA unit, after the leaf.
#pragma once

#include "kernel_table.hpp"
#include "kernels/cross_entropy.hpp"
#include "kernels/gradient.hpp"
#include "kernels/lanes.hpp"
#include "kernels/log_softmax.hpp"
#include "kernels/orthogonal.hpp"
#include "kernels/sample.hpp"
#include "kernels/scale_rows.hpp"
#include "kernels/softmax_columns.hpp"
#include "kernels/softmax_pipelined.hpp"
#include "kernels/softmax_three_pass_recompute.hpp"
#include "kernels/softmax_three_pass_reload.hpp"
#include "kernels/softmax_two_pass.hpp"
#include "kernels/softmax_two_pass_reload.hpp"
#include "kernels/stablemax.hpp"
#include "kernels/state.hpp"
#include "kernels/take_log_softmax.hpp"
#include "probes.hpp"
#include "rows/each_row.hpp"

namespace softmaxlib {
namespace SOFTMAX_ISA {
namespace {

using f32 = float;
using f64 = double;

inline void fill_report(const Job& job, softmaxlib_isa isa, softmaxlib_algorithm algorithm,
                        const char* kernel) {
  job.report->isa = isa;
  job.report->algorithm = algorithm;
  job.report->store =
      job.streaming && kHasStreamingStores ? SOFTMAXLIB_STORE_STREAMING : SOFTMAXLIB_STORE_PLAIN;
  job.report->kernel = kernel;
}

// What rows of a storage are computed in.
template <class D>
using arithmetic = typename vector_of<D>::type::elem;

// A kernel computes a row, or is a schedule of softmax.
template <class T>
inline void run_any(const Row<T>& row, void (*kernel)(const Row<T>&)) {
  kernel(row);
}
template <class T>
inline void run_any(const Row<T>& row, bool (*kernel)(const Row<T>&)) {
  run_softmax(row, kernel);
}
// Not inline: rows and those in tiles share it.
template <class T, auto kKernel>
SOFTMAXLIB_NOINLINE void run_row(const Row<T>& row) {
  run_any<T>(row, kKernel);
}

template <class T, auto kKernel>
SOFTMAXLIB_NOINLINE void run_rows(const Job& job, int64_t start, int64_t stop, char* scratch) {
  const bool is_log = job.function != SOFTMAXLIB_SOFTMAX && job.function != SOFTMAXLIB_STABLEMAX;
  for_each_row<T>(job, start, stop, scratch, [&](const Row<T>& row, const Place&) {
    run_row<T, kKernel>(row);
    if (job.causal && !job.reduces) row.fill_beyond(static_cast<T>(is_log ? -INFINITY : 0));
  });
}

#define SOFTMAXLIB_KERNEL(function, algorithm, storage)                                          \
  void function##_##algorithm##_##storage(const Job& job, int64_t start, int64_t stop,           \
                                          char* scratch) {                                       \
    if (start == 0 && job.report)                                                                \
      fill_report(job, kIsa, registry::algorithm, #function "_" #algorithm "_" #storage);        \
    run_rows<arithmetic<storage>, function##_##algorithm<arithmetic<storage>>>(job, start, stop, \
                                                                               scratch);         \
  }
#define SOFTMAXLIB_ROWS_KERNEL(function, schedule, storage, algorithm)                     \
  template <bool kHas>                                                                     \
  void function##_##schedule##_##storage(const Job& job, int64_t start, int64_t stop,      \
                                         char* scratch) {                                  \
    if constexpr (kHas) {                                                                  \
      if (start == 0 && job.report)                                                        \
        fill_report(job, kIsa, registry::algorithm, #function "_" #schedule "_" #storage); \
      const DefaultFloatingPoint environment;                                              \
      function##_##schedule<storage>(job, start, stop, scratch);                           \
      stream_fence();                                                                      \
    }                                                                                      \
  }
#include "kernels.def"
#undef SOFTMAXLIB_KERNEL
#undef SOFTMAXLIB_ROWS_KERNEL

// Kernels of other calls, which have one schedule: `name` goes to the report.
#define SOFTMAXLIB_REPORTED(name, kernel)                                            \
  [](const Job& job, int64_t start, int64_t stop, char* scratch) {                   \
    if (start == 0 && job.report) fill_report(job, kIsa, registry::automatic, name); \
    kernel(job, start, stop, scratch);                                               \
  }
template <class T>
void cross_entropy_of_softmax(const Job& job, int64_t start, int64_t stop, char* scratch) {
  cross_entropy_of_rows<SoftmaxOf, T>(job, start, stop, scratch);
}
template <class T>
void cross_entropy_of_stablemax(const Job& job, int64_t start, int64_t stop, char* scratch) {
  cross_entropy_of_rows<StablemaxOf, T>(job, start, stop, scratch);
}

KernelTable make_table() {
  KernelTable table = {};
  table.isa = kIsa;
  table.many_rows = kHasManyRows;
#define SOFTMAXLIB_KERNEL(function, algorithm, storage)                          \
  table.kernels[registry::function][registry::algorithm][registry::storage] = {  \
      function##_##algorithm##_##storage, #function "_" #algorithm "_" #storage, \
      registry::algorithm};
#define SOFTMAXLIB_ROWS_KERNEL(function, schedule, storage, algorithm)                         \
  if (kHasManyRows)                                                                            \
    table.kernels[registry::function][registry::schedule][registry::storage] = {               \
        function##_##schedule##_##storage<kHasManyRows>, #function "_" #schedule "_" #storage, \
        registry::algorithm};
#include "kernels.def"
#undef SOFTMAXLIB_KERNEL
#undef SOFTMAXLIB_ROWS_KERNEL
  table.states[registry::softmax] = state_kernels<SoftmaxState>();
  table.states[registry::log_softmax] = state_kernels<LogSoftmaxState>();
  table.states[registry::logsumexp] = state_kernels<LogSoftmaxState>();
  table.states[registry::stablemax] = state_kernels<StablemaxState>();
  table.states[registry::log_stablemax] = state_kernels<LogStablemaxState>();
#define SOFTMAXLIB_STORAGE(storage)                                                          \
  table.sample[registry::storage] =                                                          \
      SOFTMAXLIB_REPORTED("sample_" #storage, sample_rows<arithmetic<storage>>);             \
  table.topk[registry::storage] =                                                            \
      SOFTMAXLIB_REPORTED("topk_softmax_" #storage, topk_of_rows<arithmetic<storage>>);      \
  table.take[registry::storage] =                                                            \
      SOFTMAXLIB_REPORTED("take_log_softmax_" #storage, take_of_rows<arithmetic<storage>>);  \
  table.scale_rows[registry::storage] =                                                      \
      SOFTMAXLIB_REPORTED("scale_rows_" #storage, scale_rows<arithmetic<storage>>);          \
  table.cross_entropy[0][registry::storage] = SOFTMAXLIB_REPORTED(                           \
      "cross_entropy_" #storage, cross_entropy_of_softmax<arithmetic<storage>>);             \
  table.cross_entropy[1][registry::storage] = SOFTMAXLIB_REPORTED(                           \
      "stablemax_cross_entropy_" #storage, cross_entropy_of_stablemax<arithmetic<storage>>); \
  table.orthogonal[registry::storage] = SOFTMAXLIB_REPORTED(                                 \
      "orthogonal_gradient_" #storage, orthogonal_gradient<arithmetic<storage>>);
#define SOFTMAXLIB_GRADIENT(function, log, storage)                            \
  table.gradient[registry::function][registry::storage] = SOFTMAXLIB_REPORTED( \
      #function "_backward_" #storage, (gradient_rows<log, arithmetic<storage>>));
#define SOFTMAXLIB_GRADIENTS(storage)             \
  SOFTMAXLIB_GRADIENT(softmax, false, storage)    \
  SOFTMAXLIB_GRADIENT(log_softmax, true, storage) \
  SOFTMAXLIB_GRADIENT(logsumexp, false, storage)  \
  SOFTMAXLIB_GRADIENT(stablemax, false, storage)  \
  SOFTMAXLIB_GRADIENT(log_stablemax, true, storage)
  SOFTMAXLIB_GRADIENTS(f32)
  SOFTMAXLIB_GRADIENTS(f64)
  SOFTMAXLIB_GRADIENTS(f16)
  SOFTMAXLIB_GRADIENTS(bf16)
#undef SOFTMAXLIB_GRADIENTS
#undef SOFTMAXLIB_GRADIENT
  SOFTMAXLIB_STORAGE(f32)
  SOFTMAXLIB_STORAGE(f64)
  SOFTMAXLIB_STORAGE(f16)
  SOFTMAXLIB_STORAGE(bf16)
#undef SOFTMAXLIB_STORAGE
#undef SOFTMAXLIB_REPORTED
  table.reduce_losses = reduce_losses;
  table.exp_sweep = run_exp_sweep;
  table.roofline = run_roofline;
  table.pass = run_pass_alone;
  return table;
}

}  // namespace
}  // namespace SOFTMAX_ISA

// Filled in by code of the unit itself, so called only after the CPU was found to have the ISA.
KernelTable SOFTMAXLIB_MAKE_TABLE() { return SOFTMAX_ISA::make_table(); }

}  // namespace softmaxlib
