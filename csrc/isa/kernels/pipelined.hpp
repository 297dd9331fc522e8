// Many rows, any function: while a row is summed, the row before, still in cache, is written, some
// groups at a time. So the memory is read and written all the time, where a row by itself would
// first be read and then be written. Terms that are reloaded wait in a buffer, not in y, so that x
// is read once and y written once (2N). What is computed of a row is its kernel's affair.
#pragma once

#include "isa/kernels/softmax.hpp"
#include "registry/registry.hpp"

namespace softmaxlib {
namespace SOFTMAX_ISA {
namespace {

template <class T>
SOFTMAXLIB_NOINLINE void rows_pipelined(const Job& job, int64_t first, int64_t last, char* scratch,
                                        void (*kernel)(const Row<T>&)) {
  int32_t one_block[kVectorsPerBlock / kVectorsPerChunk];
  char* const references = scratch + pipelined_buffer(job);
  Results<T> results[2];
  Place places[2];
  Rows rows(job, first);
  for (int64_t r = first; r < last; ++r, rows.next()) {
    Results<T>&own = results[r % 2], &before = results[1 - r % 2];
    places[r % 2] = rows.place;
    Beside<T> beside(job, rows.place, &before);
    const Row<T> row(job, places[r % 2], references, one_block, nullptr,
                     {&beside, &own, reinterpret_cast<T*>(scratch)});
    kernel(row);
    if (job.causal) row.fill_beyond(static_cast<T>(masked_result(job.function)));
    before.finish();  // what the row was too short for
  }
  for (Results<T>& left : results) left.finish();
}

}  // namespace
}  // namespace SOFTMAX_ISA
}  // namespace softmaxlib
