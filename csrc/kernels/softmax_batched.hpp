// Not in the paper: rows of up to a chunk, a batch at a time, so that no row waits for the chain of
// its own maximum, sum and reciprocal: these are taken for all rows of a batch at once, a row per
// lane. While the exponentials of a batch are computed, the results of the one before leave.
#pragma once

#include "rows/batch.hpp"

namespace softmaxlib {
namespace SOFTMAX_ISA {
namespace {

constexpr int kBatchVectors = 2;  // of rows

SOFTMAXLIB_INLINE void columns_of_rows(const double* rows, f64x8 (&c)[8]) {
  f64x8 low[4], high[4];
  load_columns(rows, 8, low);
  load_columns(rows + 4, 8, high);
  for (int j = 0; j < 4; ++j) c[j] = low[j], c[j + 4] = high[j];
}

// What Lanes leaves for every row, folded for a vector of rows at once.
template <class V>
struct BatchSums {
  alignas(64) double sum[kBatchVectors * V::lanes][8];

  BatchSums() {
    for (auto& row : sum) store(row, f64x8::set1(1));
  }
  void keep(int r, const Lanes<V>& lanes) { store(sum[r], lanes.sum); }
  V reciprocals(int g) const {
    return InLanes<V>{eight(g * 16), eight(g * 16 + 8)}
        .map([](f64x8 x) { return f64x8::set1(1) / x; })
        .value();
  }

 private:
  SOFTMAXLIB_INLINE f64x8 eight(int r) const {
    f64x8 d[8];
    columns_of_rows(sum[r], d);
    return fold([&](int i) { return d[i]; }, 8);
  }
};

template <>
struct BatchSums<f64x8> {
  alignas(64) double sum[kBatchVectors * 8][8], error[kBatchVectors * 8][8] = {};

  BatchSums() {
    for (auto& row : sum) store(row, f64x8::set1(1));
  }
  void keep(int r, const Lanes<f64x8>& lanes) {
    store(sum[r], lanes.sum);
    store(error[r], lanes.error);
  }
  f64x8 reciprocals(int g) const {
    f64x8 d[8];
    columns_of_rows(sum[g * 8], d);
    EightTotals total = {d[0], f64x8::set1(0)};
    for (int l = 1; l < 8; ++l) add(total, d[l]);
    columns_of_rows(error[g * 8], d);
    total.error = total.error + fold([&](int i) { return d[i]; }, 8);
    return reciprocal(total);
  }
};

template <class D>
class Batch {
 public:
  using V = typename vector_of<D>::type;
  using T = typename V::elem;
  static constexpr int kLanes = V::lanes;
  static constexpr int kRows = kBatchVectors * kLanes;

  explicit Batch(int64_t n) : n_(n), pitch_((n + kLanes - 1) / kLanes * kLanes) {}

  int most() const { return kRoom / pitch_ < kRows ? static_cast<int>(kRoom / pitch_) : kRows; }
  int rows() const { return rows_; }

  // The references of all rows, from the maximum of each first group.
  SOFTMAXLIB_NOINLINE void start(const Run<D>& run, int64_t first, int rows) {
    alignas(64) T tops[kRows * kLanes];
    run_ = &run, first_ = first, rows_ = rows, bad_ = 0;
    for (int r = rows; r < (rows + kLanes - 1) / kLanes * kLanes; ++r)
      store(tops + r * kLanes, V::set1(0));
    for (int r = 0; r < rows; ++r) {
      const Contiguous<D> x = {run.x_row(first + r)};
      V v[4];
      for (int j = 0; j < 4; ++j) v[j] = load_up_to(x, j * kLanes, n_ - j * kLanes);
      store(tops + r * kLanes, max_of(v[0], v[1], v[2], v[3]));
    }
    for (int r = 0; r < rows; r += kLanes) {
      V top = V::set1(static_cast<T>(-INFINITY));
      for (int j = 0; j < kLanes; j += 4) {
        V c[4];
        load_columns(tops + r * kLanes + j, kLanes, c);
        top = max(top, max_of(c[0], c[1], c[2], c[3]));
      }
      const InLanes<V> references = references_of(top);
      const ExpInLanes<V> exp(references);
      references_[r / kLanes] = references.value();
      store(magic_ + r, exp.magic());
      store(floor_ + r, exp.floor());
      store(limit_ + r,
            references.map([](f64x8 q) { return (q + f64x8::set1(kSlack)) * f64x8::set1(kLn2Hi); })
                .value());
    }
  }

  // The exponentials of row r of the batch, and their sums per lane.
  SOFTMAXLIB_INLINE void compute(const Exp<V>& exp, int r) {
    const Contiguous<D> x = {run_->x_row(first_ + r)};
    T* const e = exps_ + r * pitch_;
    const V magic = V::set1(magic_[r]), floor = V::set1(floor_[r]);
    V top = V::set1(static_cast<T>(-INFINITY));
    Lanes<V> lanes;
    int64_t i = 0;
    for (; i + 4 * kLanes <= n_; i += 4 * kLanes) {
      V v[4], t[4];
      for (int j = 0; j < 4; ++j) v[j] = x.load(i + j * kLanes);
      if (i) top = max(top, max_of(v[0], v[1], v[2], v[3]));
      for (int j = 0; j < 4; j += kInStep)
        exp.template evaluate<kInStep>(v + j, magic, floor, t + j);
      for (int j = 0; j < 4; ++j) store(e + i + j * kLanes, t[j]);
      lanes.add(t[0], t[1], t[2], t[3]);
    }
    if (i < n_) {
      V t[4];
      for (int j = 0; j < 4; ++j) {
        const int64_t at = i + j * kLanes;
        t[j] = V::set1(0);
        if (at >= n_) continue;
        const V v = load_up_to(x, at, n_ - at);
        top = max(top, v);
        t[j] = exp.evaluate(v, magic, floor);
        store(e + at, t[j]);
      }
      lanes.add(t[0], t[1], t[2], t[3]);
    }
    if (n_ > 4 * kLanes)  // a later group may exceed the reference
      bad_ |= static_cast<uint64_t>(any(gt(top, V::set1(limit_[r])))) << r;
    sums_.keep(r, lanes);
  }

  SOFTMAXLIB_NOINLINE void finish_sums() {
    for (int r = 0; r < rows_; r += kLanes) {
      const V scale = sums_.reciprocals(r / kLanes);
      store(scale_ + r, scale);
      if (!all_usable(references_[r / kLanes], scale)) bad_ = ~uint64_t{0};
    }
  }

  // The results of row r; outbox: NULL where rows do not follow each other.
  SOFTMAXLIB_INLINE void put(const Job& job, int r, Outbox<D>* outbox) const {
    const int64_t row = first_ + r;
    D* const y = run_->y_row(row);
    const T* const e = exps_ + r * pitch_;
    if (SOFTMAXLIB_UNLIKELY(bad_ >> r & 1)) {
      if (outbox) outbox->finish();
      softmax_alone(job, *run_, row, 1);
      if (outbox) outbox->start(run_->y_row(row + 1));
      return;
    }
    const V scale = V::set1(scale_[r]);
    if (outbox) {
      outbox->put(e, n_, [scale](V v) SOFTMAXLIB_INLINE_LAMBDA { return v * scale; });
    } else if (n_ >= kLanes) {  // the last vector overlaps the one before
      for (int64_t i = 0; i + kLanes <= n_; i += kLanes) store(y + i, load(e + i) * scale);
      store(y + n_ - kLanes, load(e + n_ - kLanes) * scale);
    } else {
      store_n(y, load(e) * scale, static_cast<int>(n_));
    }
  }

 private:
  static constexpr int kRoom = kVectorsPerChunk * 3 * kLanes;  // a part of the first level cache

  const int64_t n_, pitch_;
  const Run<D>* run_ = nullptr;
  int64_t first_ = 0;
  int rows_ = 0;
  uint64_t bad_ = 0;                             // rows to be computed alone
  alignas(64) T room_[kLanes + kRoom + kLanes];  // an outbox reads around what it takes
  T* const exps_ = room_ + kLanes;
  alignas(64) T magic_[kRows], floor_[kRows], limit_[kRows], scale_[kRows];
  V references_[kBatchVectors];
  BatchSums<V> sums_;
};

template <class D>
inline void softmax_batches(const Job& job, const Run<D>& run) {
  const bool adjacent = run.y_stride == job.n * static_cast<int64_t>(sizeof(D));
  Outbox<D> outbox(true);
  Outbox<D>* const post = job.streaming && adjacent ? &outbox : nullptr;
  if (post) post->start(run.y_row(0));

  const Exp<typename vector_of<D>::type> exp(0);
  Batch<D> batches[2] = {Batch<D>(job.n), Batch<D>(job.n)};
  Batch<D>*now = batches, *before = batches + 1;
  for (int64_t row = 0; row < run.rows;) {
    const int64_t left = run.rows - row;
    now->start(run, row, left < now->most() ? static_cast<int>(left) : now->most());
    for (int r = 0; r < now->rows() || r < before->rows(); ++r) {
      if (r < now->rows()) now->compute(exp, r);
      if (r < before->rows()) before->put(job, r, post);
    }
    now->finish_sums();
    row += now->rows();
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
