// The kernels of one leaf and their table; included once per ISA unit, after the leaf.
#pragma once

#include "kernel_table.hpp"
#include "kernels/log_softmax.hpp"
#include "kernels/softmax_three_pass_recompute.hpp"
#include "kernels/softmax_three_pass_reload.hpp"
#include "kernels/softmax_two_pass.hpp"
#include "kernels/softmax_two_pass_reload.hpp"
#include "kernels/stablemax.hpp"
#include "probes.hpp"

namespace softmaxlib {
namespace SOFTMAX_ISA {
namespace {

using f32 = float;
using f64 = double;

// Where row `index` starts in every operand, and the step to the next row.
class Rows {
 public:
  Rows(const Job& job, int64_t row) : job_(job) {
    for (int64_t& o : place_.offset) o = 0;
    for (int d = job.outer_ndim - 1; d >= 0; --d) {
      index_[d] = row % job.outer[d].size;
      row /= job.outer[d].size;
      for (int k = 0; k < kOperands; ++k) place_.offset[k] += index_[d] * job.outer[d].stride[k];
    }
  }
  void next() {
    for (int d = job_.outer_ndim - 1; d >= 0; --d) {
      const Dim& dim = job_.outer[d];
      const bool wraps = ++index_[d] == dim.size;
      for (int k = 0; k < kOperands; ++k)
        place_.offset[k] += wraps ? dim.stride[k] - dim.size * dim.stride[k] : dim.stride[k];
      if (!wraps) return;
      index_[d] = 0;
    }
  }
  const Place& place() const { return place_; }

 private:
  const Job& job_;
  Place place_;
  int64_t index_[SOFTMAXLIB_MAX_NDIM];
};

inline void fill_report(const Job& job, softmaxlib_isa isa, softmaxlib_algorithm algorithm,
                        const char* kernel) {
  job.report->isa = isa;
  job.report->algorithm = algorithm;
  job.report->store =
      job.streaming && kHasStreamingStores ? SOFTMAXLIB_STORE_STREAMING : SOFTMAXLIB_STORE_PLAIN;
  job.report->kernel = kernel;
}

template <class T>
constexpr bool kIsBool = false;
template <>
constexpr bool kIsBool<bool> = true;

// f computes a row, or is a schedule of softmax.
template <class D, class F>
inline void run_rows(const Job& job, int64_t start, int64_t stop, char* scratch, F f) {
  const DefaultFloatingPoint environment;
  int32_t one_block[kVectorsPerBlock / kVectorsPerChunk];
  Rows rows(job, start);
  for (int64_t r = start; r < stop; ++r, rows.next()) {
    const Row<D> row(job, rows.place(), scratch, one_block);
    if constexpr (kIsBool<decltype(f(row))>) run_softmax(row, f);
    else f(row);
  }
  stream_fence();
}

#define SOFTMAXLIB_KERNEL(function, algorithm, storage)                                   \
  void function##_##algorithm##_##storage(const Job& job, int64_t start, int64_t stop,    \
                                          char* scratch) {                                \
    if (start == 0 && job.report)                                                         \
      fill_report(job, kIsa, registry::algorithm, #function "_" #algorithm "_" #storage); \
    run_rows<storage>(job, start, stop, scratch,                                          \
                      [](const auto& row) { return function##_##algorithm(row); });       \
  }
#include "kernels.def"
#undef SOFTMAXLIB_KERNEL

KernelTable make_table() {
  KernelTable table = {};
  table.isa = kIsa;
#define SOFTMAXLIB_KERNEL(function, algorithm, storage)                       \
  table.kernels[registry::function][registry::algorithm][registry::storage] = \
      function##_##algorithm##_##storage;
#include "kernels.def"
#undef SOFTMAXLIB_KERNEL
  table.exp_sweep = run_exp_sweep;
  table.roofline = run_roofline;
  return table;
}

}  // namespace
}  // namespace SOFTMAX_ISA

// Filled in by code of the unit itself, so called only after the CPU was found to have the ISA.
KernelTable SOFTMAXLIB_MAKE_TABLE() { return SOFTMAX_ISA::make_table(); }

}  // namespace softmaxlib
