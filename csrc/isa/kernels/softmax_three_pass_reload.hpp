// Algorithm 2 of Dukhan and Ablavatski (2020), "Three-Pass algorithm with re-loading of exponential
// function". Memory traffic 5N: three reads, two writes.
#pragma once

#include "isa/kernels/softmax_three_pass_recompute.hpp"

namespace softmaxlib {
namespace SOFTMAX_ISA {
namespace {

template <class D>
inline bool softmax_three_pass_reload(const Row<D>& row) {
  using E = Exp<typename Row<D>::V>;
  const double top = max_of_row(row);  // reads x
  // Stored exponentials must not replace an x that may be needed again.
  const double sink = row.sink(), most = sink > top || sink != sink ? sink : top;
  if (row.in_place() && !(most > -kSafe / 2 && most < kSafe / 2))
    return softmax_three_pass_recompute(row);
  const RowSum<E> total = store_of<E>(row, Known{top});  // reads x, writes y
  if (!usable(total)) return false;
  scale_stored(row, total);  // reads y, writes y
  return true;
}

}  // namespace
}  // namespace SOFTMAX_ISA
}  // namespace softmaxlib
