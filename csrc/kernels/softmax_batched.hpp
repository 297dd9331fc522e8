// Not in the paper: rows of a group up to a chunk, a batch at a time, so that no row waits for the
// chain of its own maximum, sum and reciprocal: these are taken for all rows of a batch at once, a
// row per lane. While the exponentials of a batch are computed, the results of the one before
// leave.
#pragma once

#include "rows/batch.hpp"

namespace softmaxlib {
namespace SOFTMAX_ISA {
namespace {

template <class D>
class Batch {
 public:
  using V = typename vector_of<D>::type;
  using T = typename V::elem;
  static constexpr int kLanes = V::lanes, kGroup = kVectorsPerGroup * kLanes;

  explicit Batch(int64_t n) : n_(n), pitch_((n + kLanes - 1) / kLanes * kLanes) {}

  int most() const { return kRoom / pitch_ < kLanes ? static_cast<int>(kRoom / pitch_) : kLanes; }
  int rows() const { return rows_; }

  // The references of all rows, from the maximum of each first group.
  SOFTMAXLIB_NOINLINE void start(const Run<D>& run, int64_t first, int rows) {
    run_ = &run, first_ = first, rows_ = rows;
    alignas(64) T tops[kLanes][kLanes];
    for (int r = 0; r < rows; ++r) {
      const D* const x = run.x_row(first + r);
      store(tops[r], max_of(load(x), load(x + kLanes), load(x + 2 * kLanes), load(x + 3 * kLanes)));
    }
    for (int r = rows; r < kLanes; ++r) {  // lanes without a row
      store(tops[r], V::set1(0));
      keep(r, f64x8::set1(1), f64x8::set1(0));
    }
    V top = V::set1(static_cast<T>(-INFINITY));
    for (int j = 0; j < kLanes; j += 8) {
      V c[8];
      load_columns(tops[0] + j, kLanes, c);
      top = max(max(max_of(c[0], c[1], c[2], c[3]), max_of(c[4], c[5], c[6], c[7])), top);
    }
    const InLanes<V> references = references_of(top);
    const ExpInLanes<V> exp(references);
    store(reference_, references.value());
    store(magic_, exp.magic());
    store(floor_, exp.floor());
    store(limit_,
          references.map([](f64x8 r) { return (r + f64x8::set1(kSlack)) * f64x8::set1(kLn2Hi); })
              .value());
  }

  // The exponentials of row r of the batch, and their sums per lane.
  SOFTMAXLIB_INLINE void compute(const Exp<V>& exp, int r) {
    const D* const x = run_->x_row(first_ + r);
    T* const e = exps_ + r * pitch_;
    const V magic = V::set1(magic_[r]), floor = V::set1(floor_[r]);
    V top = V::set1(static_cast<T>(-INFINITY));
    Lanes<V> lanes;
    int64_t i = 0;
    for (; i + kGroup <= n_; i += kGroup) {
      V v[4], t[4];
      for (int j = 0; j < 4; ++j) v[j] = load_ahead(x + i + j * kLanes, kLanes);
      if (i > 0) top = max(max_of(v[0], v[1], v[2], v[3]), top);
      for (int j = 0; j < 4; j += kInStep)
        exp.template evaluate<kInStep>(v + j, magic, floor, t + j);
      for (int j = 0; j < 4; ++j) store(e + i + j * kLanes, t[j]);
      lanes.add(t[0], t[1], t[2], t[3]);
    }
    if (i < n_) {
      V t[4];
      for (int j = 0; j < 4; ++j, i += kLanes) {
        t[j] = V::set1(0);
        if (i >= n_) continue;
        const V v = load_ahead(x + i, n_ - i);
        top = max(v, top);
        t[j] = exp.evaluate(v, magic, floor);
        store(e + i, t[j]);
      }
      lanes.add(t[0], t[1], t[2], t[3]);
    }
    // A later group may exceed the reference.
    alone_[r] = n_ > kGroup && any(gt(top, V::set1(limit_[r])));
    if constexpr (kLanes == 16) keep(r, lanes.sum, f64x8::set1(0));
    else keep(r, lanes.sum, lanes.error);
  }

  SOFTMAXLIB_NOINLINE void finish_sums() {
    f64x8 a[8], b[8];
    load_columns(sums_[0][0], 8, a);
    load_columns(sums_[1][0], 8, b);
    const auto at_a = [&](int i) { return a[i]; };
    const auto at_b = [&](int i) { return b[i]; };
    V scale;
    if constexpr (kLanes == 16) scale = reciprocals_of_floats(at_a, at_b, 8);
    else scale = reciprocals_of_doubles(at_a, fold(at_b, 8), 8);
    store(scale_, scale);
    if (all_usable(load(reference_), scale)) return;
    for (int r = 0; r < rows_; ++r) alone_[r] |= !usable(reference_[r], scale_[r]);
  }

  // The results of row r; outbox: NULL where rows do not follow each other, or not past the caches.
  SOFTMAXLIB_INLINE void put(const Job& job, int r, Outbox<D>* outbox) const {
    D* const y = run_->y_row(first_ + r);
    const T* const e = exps_ + r * pitch_;
    const V scale = V::set1(scale_[r]);
    if (SOFTMAXLIB_UNLIKELY(alone_[r])) {
      if (outbox) outbox->finish();
      softmax_alone(job, *run_, first_ + r);
      if (outbox) outbox->start(y + n_);
    } else if (outbox) {
      outbox->put(e, n_, scale);
    } else {  // the last vector overlaps the one before
      int64_t i = 0;
      for (; i + kLanes <= n_; i += kLanes) store(y + i, load(e + i) * scale);
      if (i < n_) store(y + n_ - kLanes, load(e + n_ - kLanes) * scale);
    }
  }

 private:
  static constexpr int kRoom = kVectorsPerChunk * 3 * kLanes;  // a part of the first level cache

  static SOFTMAXLIB_INLINE V load_ahead(const D* x, int64_t left) {
    prefetch(reinterpret_cast<const char*>(x) + kBatchPrefetchBytes);
    if (left >= kLanes) return load(x);
    return load_n(x, static_cast<int>(left), static_cast<T>(-INFINITY));
  }
  // Floats: eight rows' sums, then the others'. Doubles: sums, then errors.
  SOFTMAXLIB_INLINE void keep(int r, f64x8 sum, f64x8 error) {
    store(sums_[kLanes == 16 ? r / 8 : 0][r % 8], sum);
    if (kLanes == 8) store(sums_[1][r], error);
  }

  const int64_t n_, pitch_;
  const Run<D>* run_ = nullptr;
  int64_t first_ = 0;
  int rows_ = 0;
  alignas(64) T room_[kLanes + kRoom + kLanes];  // an outbox reads around what it takes
  T* const exps_ = room_ + kLanes;
  alignas(64) T reference_[kLanes], magic_[kLanes], floor_[kLanes], limit_[kLanes], scale_[kLanes];
  alignas(64) double sums_[2][8][8];
  bool alone_[kLanes];
};

template <class D>
inline void softmax_batches(const Job& job, const Run<D>& run) {
  Outbox<D> outbox(true);
  const bool posts = job.streaming && Outbox<D>::takes(run.y_row(0), run.y_stride, job.n);
  Outbox<D>* const post = posts ? &outbox : nullptr;
  if (post) post->start(run.y_row(0));

  const Exp<typename vector_of<D>::type> exp(0);
  Batch<D> batches[2] = {Batch<D>(job.n), Batch<D>(job.n)};
  Batch<D>*now = batches, *before = batches + 1;
  for (int64_t row = 0; row < run.rows; row += before->rows()) {
    const int64_t left = run.rows - row;
    now->start(run, row, left < now->most() ? static_cast<int>(left) : now->most());
    for (int r = 0; r < now->rows() || r < before->rows(); ++r) {
      if (r < now->rows()) now->compute(exp, r);
      if (r < before->rows()) before->put(job, r, post);
    }
    now->finish_sums();
    Batch<D>* const next = before;
    before = now;
    now = next;
  }
  for (int r = 0; r < before->rows(); ++r) before->put(job, r, post);
  if (post) post->finish();
}

template <class D>
inline void softmax_batched(const Job& job, int64_t start, int64_t stop, char*) {
  for_runs_of_rows<D>(job, start, stop, [&](const Run<D>& run) { softmax_batches(job, run); });
}

}  // namespace
}  // namespace SOFTMAX_ISA
}  // namespace softmaxlib
