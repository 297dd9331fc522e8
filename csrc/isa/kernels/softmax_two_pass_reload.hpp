// Not in the paper: its two-pass sum, with the exponentials stored as Algorithm 2 does, each chunk
// under the reference exponent of its time. Memory traffic 4N: two reads, two writes; one
// exponential per element, so the fastest in cache. Not in place: see softmax_three_pass_reload.
#pragma once

#include "isa/kernels/softmax.hpp"

namespace softmaxlib {
namespace SOFTMAX_ISA {
namespace {

template <class D>
inline bool softmax_two_pass_reload(const Row<D>& row) {
  using E = Exp<typename Row<D>::V>;
  const RowSum<E> total = store_of<E>(row);  // reads x, writes y
  if (!usable(total)) return false;
  scale_stored(row, total);  // reads y, writes y
  return true;
}

}  // namespace
}  // namespace SOFTMAX_ISA
}  // namespace softmaxlib
