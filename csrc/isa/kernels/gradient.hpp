// Vector-Jacobian products of rows of any length and layout; the formulas: gradient_element.hpp.
#pragma once

#include "isa/kernels/gradient_across.hpp"
#include "isa/kernels/gradient_tiles.hpp"

namespace softmaxlib {
namespace SOFTMAX_ISA {
namespace {

// Rows of any length; Storage: as GradientRow and GradientTiles have it.
template <bool kLog, class T, class Storage>
void gradient_along(const Job& job, int64_t start, int64_t stop) {
  constexpr int64_t kLanes = vector_of<T>::type::lanes;
  if constexpr (kHasManyRows) {
    if (job.n <= kVectorsPerChunk * kLanes) {
      // Beside exponentials it does not show that halves are converted first.
      const bool in_place = !kLog && job.n % kLanes == 0 && !job.streaming;
      using InPlace = GradientTiles<kLog, T, typename std::conditional<kLog, T, Storage>::type>;
      if (in_place) InPlace(job).compute(start, stop);
      else GradientTiles<kLog, T>(job).compute(start, stop);
      return stream_fence();
    }
  }
  gradient_of_long_rows<kLog, T, Storage>(job, start, stop);
  stream_fence();
}

template <bool kLog, class T>
void gradient_rows(const Job& job, int64_t start, int64_t stop, char*) {
  const DefaultFloatingPoint environment;
  if (start == stop || job.n == 0) return;
  if constexpr (kHasManyRows) {
    if (GradientAcross<kLog, T>::takes(job)) {
      GradientAcross<kLog, T>(job).compute(start, stop);
      return stream_fence();
    }
    // What mixed precision trains with reads its halves where they are.
    if constexpr (sizeof(T) == 4) {
      if (job.direct && !job.base[kWhere] && !GradientKind(job.function).reads_x()) {
        if (job.dtype[kOut] == SOFTMAXLIB_F16)
          return gradient_along<kLog, T, f16>(job, start, stop);
        if (job.dtype[kOut] == SOFTMAXLIB_BF16)
          return gradient_along<kLog, T, bf16>(job, start, stop);
      }
    }
  }
  gradient_along<kLog, T, T>(job, start, stop);
}

}  // namespace
}  // namespace SOFTMAX_ISA
}  // namespace softmaxlib
