// Selected log-probabilities, in one read.
#pragma once

#include "isa/kernels/cross_entropy_row.hpp"
#include "isa/kernels/lanes.hpp"

namespace softmaxlib {
namespace SOFTMAX_ISA {
namespace {

// log_softmax at indices; its logsumexp to kLogSum.
template <class D>
void take_of_row(const Job& job, const Row<D>& row, const Place& place) {
  using V = typename Row<D>::V;
  using T = typename Row<D>::T;
  // value(element) for each index.
  const auto take = [&](auto value) {
    for (int64_t i = 0; i < job.top->k; ++i) {
      int64_t element;
      memcpy(&element, job.base[kIndices] + place.offset[kIndices] + i * job.top->index_stride,
             sizeof(element));
      // Checked before, but the caller's memory may have changed since.
      const bool valid = element >= 0 && element < job.n;
      const T taken = valid ? value(element) : static_cast<T>(NAN);
      put_as(job.dtype[kOut], job.base[kOut] + place.offset[kOut] + i * job.top->weight_stride,
             static_cast<double>(taken));
    }
  };
  const auto put_sum = [&](double sum) {
    if (job.base[kLogSum])
      put_as(job.dtype[kLogSum], job.base[kLogSum] + place.offset[kLogSum],
             static_cast<double>(static_cast<T>(sum)));
  };
  with_log_sum(
      row, false,
      [&](const Row<D>& r, LogSum s) {
        const LogSoftmaxOf<V> log_softmax(s);
        take([&](int64_t i) { return first(log_softmax(element_of(r, i))); });
        put_sum(logsumexp_of(s, r.shift()));
      },
      [&](const Row<D>& r, double top) {
        take(
            [&](int64_t i) { return static_cast<T>(is_visible(job, place, i) ? NAN : -INFINITY); });
        put_sum(logsumexp_of_invalid(r, top));
      });
}
template <class D>
SOFTMAXLIB_NOINLINE void take_alone(const Job& job, int64_t row) {
  int32_t one_block[kVectorsPerBlock / kVectorsPerChunk];
  const Rows at(job, row);
  take_of_row<D>(job, Row<D>(job, at.place, nullptr, one_block), at.place);
}

template <class D>
void take_of_rows(const Job& job, int64_t start, int64_t stop, char* scratch) {
  const DefaultFloatingPoint environment;
  using Kind = BatchOfLogSums<typename vector_of<D>::type>;
  if (run_many<Kind>(job, start, stop, scratch, take_alone<D>)) return;
  for_each_row<D>(job, start, stop, scratch,
                  [&](const Row<D>& row, const Place& place) { take_of_row<D>(job, row, place); });
}

}  // namespace
}  // namespace SOFTMAX_ISA
}  // namespace softmaxlib
