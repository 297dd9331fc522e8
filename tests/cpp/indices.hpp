// Shapes, and the indices of all their elements.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <vector>

namespace softmaxlib::test {

using Shape = std::vector<int64_t>;

inline int64_t size_of(const Shape& shape) {
  int64_t size = 1;
  for (const int64_t d : shape) size *= d;
  return size;
}

// Calls f(index) for every index of a shape, in C order.
template <class F>
void for_indices(const Shape& shape, F f) {
  if (size_of(shape) == 0) return;
  Shape index(shape.size());
  for (;;) {
    f(index);
    size_t d = shape.size();
    while (d > 0 && ++index[d - 1] == shape[d - 1]) index[--d] = 0;
    if (d == 0) return;
  }
}

}  // namespace softmaxlib::test
