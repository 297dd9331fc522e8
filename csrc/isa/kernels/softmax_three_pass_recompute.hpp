// Algorithm 1 of Dukhan and Ablavatski (2020), "Three-Pass algorithm with re-computing of
// exponential function". Memory traffic 4N: three reads, one write.
#pragma once

#include "isa/kernels/softmax.hpp"

namespace softmaxlib {
namespace SOFTMAX_ISA {
namespace {

template <class D>
inline bool softmax_three_pass_recompute(const Row<D>& row) {
  using E = Exp<typename Row<D>::V>;
  const double top = max_of_row(row);                  // reads x
  const RowSum<E> total = sum_of<E>(row, Known{top});  // reads x
  if (!usable(total)) return false;
  write_of(row, total);  // reads x, writes y
  return true;
}

}  // namespace
}  // namespace SOFTMAX_ISA
}  // namespace softmaxlib
