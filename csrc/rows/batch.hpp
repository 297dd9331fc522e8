// Many short rows at once: where they lie, how their results leave, and the sums of rows side by
// side in lanes, with the bits that rows/sum.hpp gives each of them.
#pragma once

#include <stdint.h>

#include "kernels/softmax_two_pass.hpp"

namespace softmaxlib {
namespace SOFTMAX_ISA {
namespace {

// Rows at constant distances, in bytes.
template <class D>
struct Run {
  char *x, *y;
  int64_t x_stride, y_stride, rows;

  const D* x_row(int64_t i) const { return reinterpret_cast<const D*>(x + i * x_stride); }
  D* y_row(int64_t i) const { return reinterpret_cast<D*>(y + i * y_stride); }
};

// visit(Run) for rows [start, stop) of a direct job.
template <class D, class F>
inline void for_runs_of_rows(const Job& job, int64_t start, int64_t stop, F visit) {
  const int last = job.outer_ndim - 1;
  const Dim along = last < 0 ? Dim{1, {}} : job.outer[last];
  while (start < stop) {
    int64_t at = start / along.size, in_run = start % along.size;
    Run<D> run = {job.base[kX] + in_run * along.stride[kX],
                  job.base[kOut] + in_run * along.stride[kOut], along.stride[kX],
                  along.stride[kOut], along.size - in_run};
    for (int d = last - 1; d >= 0; at /= job.outer[d].size, --d) {
      run.x += at % job.outer[d].size * job.outer[d].stride[kX];
      run.y += at % job.outer[d].size * job.outer[d].stride[kOut];
    }
    if (run.rows > stop - start) run.rows = stop - start;
    visit(run);
    start += run.rows;
  }
}

// Rows that need more than a batch does for them: NaN, infinities, far from 0, steep.
template <class D>
SOFTMAXLIB_NOINLINE void softmax_alone(const Job& job, const Run<D>& run, int64_t row,
                                       int64_t count) {
  int32_t one_block[kVectorsPerBlock / kVectorsPerChunk];
  for (int64_t i = row; i < row + count; ++i) {
    Place place = {};
    place.offset[kX] = run.x + i * run.x_stride - job.base[kX];
    place.offset[kOut] = run.y + i * run.y_stride - job.base[kOut];
    run_softmax(Row<D>(job, place, nullptr, one_block), softmax_two_pass<D>);
  }
}

// Results of rows that follow each other in memory, to leave in whole vectors: what does not fill
// one waits in a register for the next row. Through memory it would wait for the stores before it.
template <class D>
class Outbox {
 public:
  using V = typename vector_of<D>::type;
  using T = typename V::elem;

  explicit Outbox(bool streaming) : may_stream_(streaming) {}

  // From here on results go to y. Streaming stores are aligned: then the first `held_` lanes,
  // before y, are not ours.
  void start(D* y) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(y);
    streaming_ = may_stream_ && address % sizeof(D) == 0;
    head_ = held_ = streaming_ ? static_cast<int>(address / sizeof(D) % V::lanes) : 0;
    y_ = y - held_;
  }
  // The next n results are f(e[0, n)). Reads up to a vector more on either side.
  template <class F>
  SOFTMAXLIB_INLINE void put(const T* e, int64_t n, F f) {
    const V line = select(first_lanes_of(held_), pending_, f(load(e - held_)));
    int64_t i = V::lanes - held_;
    if (n < i) {
      pending_ = line;
      held_ += static_cast<int>(n);
      return;
    }
    if (SOFTMAXLIB_UNLIKELY(head_)) put_some(line, V::lanes);
    else put_line(line);
    y_ += V::lanes;
    for (; i + V::lanes <= n; i += V::lanes, y_ += V::lanes) put_line(f(load(e + i)));
    pending_ = f(load(e + i));
    held_ = static_cast<int>(n - i);
  }
  void finish() {
    put_some(pending_, held_);
    y_ += held_;
    held_ = 0;
  }

 private:
  static SOFTMAXLIB_INLINE typename V::Mask first_lanes_of(int n) {
    constexpr T kLane[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return gt(V::set1(static_cast<T>(n)), load(kLane));
  }
  SOFTMAXLIB_INLINE void put_line(V line) {
    if (streaming_) stream(y_, line);
    else store(y_, line);
  }
  // Lanes [head_, stop).
  SOFTMAXLIB_NOINLINE void put_some(V line, int stop) {
    T lanes[2 * V::lanes] = {};
    store(lanes, line);
    if (stop > head_) store_n(y_ + head_, load(lanes + head_), stop - head_);
    head_ = 0;
  }

  V pending_ = V::set1(0);
  D* y_ = nullptr;
  int held_ = 0, head_ = 0;
  bool may_stream_, streaming_ = false;
};

// The sums of eight rows, one per lane.
struct EightTotals {
  f64x8 sum, error;
};

// total.add() in every lane.
SOFTMAXLIB_INLINE void add(EightTotals& total, f64x8 x) { two_sum(total.sum, total.error, x); }

SOFTMAXLIB_INLINE f64x8 reciprocal(const EightTotals& total) {
  const f64x8 r = f64x8::set1(1) / total.sum;
  return r - r * (r * total.error);
}

// d(0) to d(7) folded lane for lane as sum_lanes() folds the lanes of one vector; what is missing
// to eight is +0 and would change nothing. n > 1.
template <class At>
SOFTMAXLIB_INLINE f64x8 fold(At d, int n) {
  f64x8 even = d(0), odd = d(1);
  if (n > 4) even = even + d(4);
  if (n > 5) odd = odd + d(5);
  if (n > 2) even = even + (n > 6 ? d(2) + d(6) : d(2));
  if (n > 3) odd = odd + (n > 7 ? d(3) + d(7) : d(3));
  return even + odd;
}

// usable() of every lane; a NaN in a row makes its scale one.
template <class V>
SOFTMAXLIB_INLINE bool all_usable(V references, V scale) {
  const V limit = V::set1(kSafeReference);
  const V magnitude = max(references, V::set1(0) - references);
  return !any(eq(select(eq(scale, scale), magnitude, limit), limit));
}

}  // namespace
}  // namespace SOFTMAX_ISA
}  // namespace softmaxlib
