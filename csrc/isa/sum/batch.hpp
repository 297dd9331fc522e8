// Many short rows at once: where they lie, how their results leave, and the sums of rows side by
// side, a row per lane, with the bits that isa/sum/sum.hpp gives each of them.
#pragma once

#include <stdint.h>

#include "isa/kernels/softmax_two_pass.hpp"

namespace softmaxlib {
namespace SOFTMAX_ISA {
namespace {

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
    // Copies, which no store can change.
    const bool streaming = streaming_;
    D* y = y_;
    if (SOFTMAXLIB_UNLIKELY(head_ != 0)) put_some(line, V::lanes);
    else put_line(y, line, streaming);
    for (y += V::lanes; i + V::lanes <= n; i += V::lanes, y += V::lanes)
      put_line(y, load(e + i) * factor, streaming);
    y_ = y;
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
  static SOFTMAXLIB_INLINE void put_line(D* y, V line, bool streaming) {
    if (streaming) stream(y, line);
    else store(y, line);
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
