// Vector-Jacobian products of rows of any length and layout; the formulas: gradient_element.hpp.
#pragma once

#include "kernels/gradient_across.hpp"
#include "kernels/gradient_tiles.hpp"

namespace softmaxlib {
namespace SOFTMAX_ISA {
namespace {

template <softmaxlib_function kFunction, class T>
void gradient_rows(const Job& job, int64_t start, int64_t stop, char*) {
  using V = typename vector_of<T>::type;
  const DefaultFloatingPoint environment;
  if (start == stop || job.n == 0) return;
  if constexpr (kHasManyRows) {
    if (GradientAcross<kFunction, T>::takes(job))
      return GradientAcross<kFunction, T>(job).compute(start, stop);
    if (job.n <= kVectorsPerChunk * V::lanes) {
      GradientTiles<kFunction, T>(job).compute(start, stop);
      return stream_fence();
    }
  }
  using Row = GradientRow<kFunction, T>;
  GradientStage<T> stage;
  Edge<T> edge;
  Rows rows(job, start);
  Row before(job, rows.place(), &stage, &edge);
  before.read_beside(nullptr);
  for (int64_t r = start + 1; r < stop; ++r) {
    rows.next();
    Row row(job, rows.place(), &stage, &edge);
    row.read_beside(&before);
    before = row;
  }
  before.write();
  edge.flush();
  stream_fence();
}

}  // namespace
}  // namespace SOFTMAX_ISA
}  // namespace softmaxlib
