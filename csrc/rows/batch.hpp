// Many short rows at once: where they lie, how their results leave, and the sums of rows side by
// side, a row per lane, with the bits that rows/sum.hpp gives each of them.
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

// A batch computes for long between two looks at memory.
constexpr int kBatchPrefetchBytes = 16384;

// Results that follow each other in memory, on their way to aligned stores, streaming or not. What
// does not fill a vector waits for what comes next. What is put here must not have been stored just
// before: a load that spans several stores waits until they are done, and they stand in line behind
// the streaming ones.
template <class D>
class Outbox {
 public:
  using V = typename vector_of<D>::type;
  using T = typename V::elem;

  explicit Outbox(bool streaming) : streaming_(streaming) {}

  // Whether rows of n elements, `stride` bytes from one to the next, can be collected.
  static bool takes(const D* y, int64_t stride, int64_t n) {
    constexpr int64_t kItem = sizeof(D);
    return stride == n * kItem && reinterpret_cast<uintptr_t>(y) % kItem == 0;
  }
  // From here on results go to y. The first `head_` lanes of its vector lie before it.
  void start(D* y) {
    head_ = held_ = static_cast<int>(reinterpret_cast<uintptr_t>(y) / sizeof(D) % V::lanes);
    y_ = y - held_;
  }
  // The next n results are e[0, n) by a factor. Reads up to a vector more on either side.
  SOFTMAXLIB_INLINE void put(const T* e, int64_t n, V factor) {
    const V line = join(held_, load(waiting_), load(e - held_) * factor);
    int64_t i = V::lanes - held_;
    if (n < i) {
      store(waiting_, line);
      held_ += static_cast<int>(n);
      return;
    }
    if (SOFTMAXLIB_UNLIKELY(head_ != 0)) put_some(line, V::lanes);
    else put_line(line);
    for (y_ += V::lanes; i + V::lanes <= n; i += V::lanes, y_ += V::lanes)
      put_line(load(e + i) * factor);
    store(waiting_, load(e + i) * factor);
    held_ = static_cast<int>(n - i);
  }
  void finish() {
    put_some(load(waiting_), held_);
    y_ += held_;
    held_ = 0;
  }

 private:
  // The first n lanes of a, then b's.
  static SOFTMAXLIB_INLINE V join(int n, V a, V b) {
    constexpr T kLane[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return select(gt(V::set1(static_cast<T>(n)), load(kLane)), a, b);
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

  alignas(64) T waiting_[V::lanes] = {};
  D* y_ = nullptr;
  int held_ = 0, head_ = 0;
  bool streaming_;
};

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

// 1 / total of rows side by side, from what Lanes (rows/sum.hpp) holds of each: low(i) and high(i)
// are its lane i in the first eight rows and in the others; of doubles, sum(i), with the errors of
// the lanes folded. Lanes from n on are +0.
template <class Low, class High>
SOFTMAXLIB_INLINE f32x16 reciprocals_of_floats(Low low, High high, int n) {
  const f64x8 one = f64x8::set1(1);
  return narrow(one / fold(low, n), one / fold(high, n));
}
template <class Sum>
SOFTMAXLIB_INLINE f64x8 reciprocals_of_doubles(Sum sum, f64x8 lane_errors, int n) {
  f64x8 total = sum(0), error = f64x8::set1(0);
  for (int i = 1; i < n; ++i) two_sum(total, error, sum(i));
  error = error + lane_errors;
  const f64x8 r = f64x8::set1(1) / total;
  return r - r * (r * error);
}

// usable() of a row and of a vector of rows: a NaN anywhere in a row makes its scale one.
template <class T>
inline bool usable(T reference, T scale) {
  return scale == scale && reference > -kSafeReference && reference < kSafeReference;
}
template <class V>
SOFTMAXLIB_INLINE bool all_usable(V references, V scale) {
  const V limit = V::set1(kSafeReference);
  const V magnitude = max(references, V::set1(0) - references);
  return !any(eq(select(eq(scale, scale), magnitude, limit), limit));
}

}  // namespace
}  // namespace SOFTMAX_ISA
}  // namespace softmaxlib
