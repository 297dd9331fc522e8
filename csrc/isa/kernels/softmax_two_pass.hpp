// Algorithm 3 of Dukhan and Ablavatski (2020), "The Two-Pass algorithm": exponentials as (mantissa,
// exponent) pairs need no maximum first. Memory traffic 3N: two reads, one write.
#pragma once

#include "isa/kernels/softmax.hpp"

namespace softmaxlib {
namespace SOFTMAX_ISA {
namespace {

template <class D>
inline bool softmax_two_pass(const Row<D>& row) {
  using E = Exp<typename Row<D>::V>;
  const RowSum<E> total = sum_of<E>(row);  // reads x
  if (!usable(total)) return false;
  write_of(row, total);  // reads x, writes y
  return true;
}

}  // namespace
}  // namespace SOFTMAX_ISA
}  // namespace softmaxlib
