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

// What `where` hides has a probability of 0 already where y came from a function that had the same
// mask. Then nothing is left to hide, and the rows are those of a call without it.
template <class T>
class HiddenAlready {
 public:
  using V = typename vector_of<T>::type;

  // none: the result of what is hidden.
  SOFTMAXLIB_NOINLINE HiddenAlready(const Job& job, T none) : job_(job), none_(none) {
    const Access y(job, kResult);
    if (!job.base[kWhere] || GradientKind(job.function).reduces || !y.fits) return;
    item_ = y.item, is_along_ = y.along && is_contiguous(job, kWhere, 1);
    is_across_ = y.across && job.outer[job.outer_ndim - 1].stride[kWhere] == 1;
  }
  bool can_tell() const { return is_along_ || is_across_; }
  // So many as stay in cache until they are computed; those side by side in whole panels.
  int64_t rows_at_once() const {
    constexpr int64_t kElements = 32768, kPanel = 128;
    const int64_t most = kElements / job_.n;
    if (most > kPanel) return most / kPanel * kPanel;
    return is_along_ ? most + 1 : kPanel;
  }
  // Of rows [row, stop).
  SOFTMAXLIB_NOINLINE bool operator()(int64_t row, int64_t stop) const {
    bool all = true;
    for (RowRun run(job_, row); all && row < stop;) {
      const int64_t rows = run.rows < stop - row ? run.rows : stop - row, n = job_.n;
      const char* const y = job_.base[kResult] + run.place.offset[kResult];
      const char* const where = job_.base[kWhere] + run.place.offset[kWhere];
      const int64_t y_step = run.step.stride[kResult], where_step = run.step.stride[kWhere];
      const Dim& along = job_.inner[0];
      if (!is_along_)
        all = are_hidden(y, where, rows, n, along.stride[kResult], along.stride[kWhere]);
      else if (y_step == n * item_ && where_step == n)
        all = are_hidden(y, where, rows * n, 1, 0, 0);
      else all = are_hidden(y, where, n, rows, y_step, where_step);
      row += rows;
      run.advance(rows);
    }
    return all;
  }

 private:
  // n elements, and as many again some bytes from there.
  SOFTMAXLIB_NOINLINE bool are_hidden(const char* y, const char* where, int64_t n, int64_t times,
                                      int64_t y_step, int64_t where_step) const {
    bool all = true;
    with_storage(job_.dtype[kResult], V(), [&](const auto* storage) SOFTMAXLIB_INLINE_LAMBDA {
      using Storage = decltype(storage);
      const V none = V::set1(none_);
      typename V::Seen seen;
      const auto look = [&](V elements, const uint8_t* mask) SOFTMAXLIB_INLINE_LAMBDA {
        see_differences(seen, bits(select(load_mask(mask, none), none, elements)), bits(none));
      };
      for (; times > 0; --times, y += y_step, where += where_step) {
        const auto* const elements = reinterpret_cast<Storage>(y);
        const auto* const mask = reinterpret_cast<const uint8_t*>(where);
        int64_t i = 0;
        for (; i + V::lanes <= n; i += V::lanes) look(load(elements + i), mask + i);
        if (i < n && n >= V::lanes) look(load(elements + n - V::lanes), mask + n - V::lanes);
        else
          for (; i < n; ++i)
            if (!mask[i]) see_differences(seen, bits(load_n(elements + i, 1, none_)), bits(none));
      }
      all = !any_from_bit<0>(seen);
    });
    return all;
  }

  const Job& job_;
  const T none_;
  int64_t item_ = 0;
  bool is_along_ = false, is_across_ = false;
};

template <bool kLog, class T>
SOFTMAXLIB_NOINLINE void gradient_of_rows(const Job& job, int64_t start, int64_t stop) {
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

template <bool kLog, class T>
void gradient_rows(const Job& job, int64_t start, int64_t stop, char*) {
  const DefaultFloatingPoint environment;
  if (start == stop || job.n == 0) return;
  if constexpr (kHasManyRows) {
    const HiddenAlready<T> hidden(job, static_cast<T>(kLog ? -INFINITY : 0));
    if (hidden.can_tell()) {
      const int64_t rows = hidden.rows_at_once();
      Job seen = job;
      seen.base[kWhere] = nullptr;
      for (int64_t stop_here; start < stop; start = stop_here) {
        stop_here = rows < stop - start ? start + rows : stop;
        gradient_of_rows<kLog, T>(hidden(start, stop_here) ? seen : job, start, stop_here);
      }
      return;
    }
  }
  gradient_of_rows<kLog, T>(job, start, stop);
}

}  // namespace
}  // namespace SOFTMAX_ISA
}  // namespace softmaxlib
