// Gradients of long rows, one after the other: each is read while the one before is written, or in
// cache written as soon as it is read.
#pragma once

#include "isa/kernels/gradient_element.hpp"

namespace softmaxlib {
namespace SOFTMAX_ISA {
namespace {

// Where operands wait that cannot be read or written in place: a chunk, and what alignment adds.
template <class T>
struct GradientStage {
  static constexpr int kSize = (kVectorsPerChunk + 1) * vector_of<T>::type::lanes;
  alignas(64) T grad[kSize], y[kSize], x[kSize], out[kSize];
  uint8_t where[kSize];
};

// Storage: of all operands, which then are direct, without x and `where`; or T, and they may be
// anything.
template <bool kLog, class T, class Storage = T>
class GradientRow {
 public:
  using V = typename vector_of<T>::type;
  static constexpr int64_t kChunk = kVectorsPerChunk * V::lanes;

  // is_alone: not one of many rows, of which one is read while another is written.
  GradientRow(const Job& job, const Place& place, GradientStage<T>* stage, Edge<Storage>* edge,
              bool is_alone)
      : job_(&job),
        is_alone_(is_alone),
        place_(place),
        stage_(stage),
        edge_(edge),
        scale_(GradientKind(job.function), affine_of(job, place, {0, 0})) {
    find_edge();
  }
  // Another row of the job.
  void move_to(const Place& place) {
    place_ = place;
    if (job_->base[kScale] || scale_.unit != 1)
      scale_ = GradientScale(scale_.kind, affine_of(*job_, place, {0, 0}));
    find_edge();
  }

  // Chunk by chunk, so that this row is read while the one before is written.
  void read_beside(const GradientRow* before) {
    if (scale_.kind.reduces) {
      result_ = row_operand(*job_, place_, kResult, 0);
      sum_ = row_operand(*job_, place_, kGrad, 0);
    }
    sum_up(before, true);
    if (scale_.kind.reduces) return;
    is_quick_ = ElementGradient<kLog, V>::is_good(in_all(sum_, V()));
    if (is_quick_) return;
    sum_up(nullptr, false);
    if (sizeof(T) == 4 || !needs_smaller_unit(sum_)) return;
    scale_ = GradientScale(scale_.kind, scale_.affine, kSmallUnit);
    sum_up(nullptr, false);
  }
  void write() const {
    if (is_direct() && !job_->base[kWhere]) return write_some(0, job_->n);
    for (int64_t start = 0; start < job_->n; start += kChunk) write_chunk(start);
  }

 private:
  static constexpr bool kIsOwn = sizeof(Storage) == sizeof(T);
  static constexpr int64_t kItem = sizeof(Storage), kVector = V::lanes * kItem;

  void find_edge() {
    const auto at = reinterpret_cast<uintptr_t>(job_->base[kOut] + place_.offset[kOut]);
    const int64_t past = static_cast<int64_t>(at) % kVector;
    streams_ = is_direct() && job_->streaming && job_->n >= V::lanes && past % kItem == 0;
    head_ = streams_ && past ? (kVector - past) / kItem : 0;
  }
  // Whether all operands are read and written where they are.
  bool is_direct() const { return !kIsOwn || (job_->direct && job_->dtype[kOut] == kOwnDtype<T>); }

  SOFTMAXLIB_NOINLINE void sum_up(const GradientRow* before, bool quick) {
    Total total;
    total.reference = 0;
    if (quick && !scale_.kind.reduces && is_brief(job_->n)) {
      sum_ = piece(0, job_->n).brief_sum(job_->n);
      if (before) before->write_chunk(0);
      return;
    }
    for (int64_t start = 0; start < job_->n; start += kChunk) {
      const int64_t n = job_->n - start < kChunk ? job_->n - start : kChunk;
      if (!scale_.kind.reduces)
        (quick ? piece(start, n).quick_sum(n) : piece(start, n).careful_sum(n, scale_.unit))
            .fold_into(total);
      if (before) before->write_chunk(start);
    }
    if (!scale_.kind.reduces) sum_ = total.value();
  }

  void write_chunk(int64_t start) const {
    const int64_t end = start + kChunk + head_ < job_->n ? start + kChunk + head_ : job_->n;
    if (start) start += head_;
    if (end > start) write_some(start, end - start);
  }
  SOFTMAXLIB_NOINLINE void write_some(int64_t start, int64_t n) const {
    const ElementGradient<kLog, V> element(scale_, in_all(sum_, V()), is_quick_, result_);
    if constexpr (!kIsOwn)
      if (!element.is_plain()) return write_through_stage(start);
    if (is_direct())
      return piece(start, n).write(at(kOut) + start, n, element, streams_ ? edge_ : nullptr);
    if constexpr (kIsOwn) {
      piece(start, n).write(stage_->out, n, element, nullptr);
      scatter_elements(*job_, place_, start, n, stage_->out);
    }
  }

  // A row of halves that is not plain, once.
  SOFTMAXLIB_NOINLINE void write_through_stage(int64_t start) const {
    if (start) return;
    Edge<T> edge;
    GradientRow<kLog, T> row(*job_, place_, stage_, &edge, true);
    row.read_beside(nullptr);
    row.write();
    edge.flush();
  }

  Storage* at(Operand k) const {
    return reinterpret_cast<Storage*>(job_->base[k] + place_.offset[k]);
  }
  using Piece = GradientPiece<kLog, V, false, Storage>;
  Piece piece(int64_t start, int64_t n) const {
    Piece piece = {};
    piece.fetches = job_->streaming;
    if (is_alone_) {
      piece.fetch_ahead = FetchAhead(true);
      piece.ahead = tuning.prefetch_distance;
    }
    if (job_->base[kWhere]) gather_visible(*job_, place_, start, n, stage_->where);
    if (!scale_.kind.reduces) {
      piece.grad = fetch(kGrad, start, n, stage_->grad);
      piece.y = visible(fetch(kResult, start, n, stage_->y), n, Piece::kNone, stage_->y);
    }
    if (scale_.kind.reads_x()) piece.x = fetch(kX, start, n, stage_->x);
    if (scale_.kind.reduces) piece.x = visible(piece.x, n, -INFINITY, stage_->x);
    return piece;
  }
  const Storage* fetch(Operand k, int64_t start, int64_t n, T* to) const {
    if constexpr (kIsOwn) {
      if (!is_direct()) {
        gather_elements(*job_, place_, k, start, n, to);
        return to;
      }
    }
    return at(k) + start;
  }
  // x, or elements of which those that `where` hides are `none`.
  const Storage* visible(const Storage* x, int64_t n, double none, T* to) const {
    if constexpr (kIsOwn) {
      if (job_->base[kWhere]) {
        hide<V>(stage_->where, n, x, none, to);
        return to;
      }
    }
    return x;
  }

  const Job* job_;
  bool is_alone_;
  Place place_;
  GradientStage<T>* stage_;
  Edge<Storage>* edge_;
  bool streams_ = false;
  int64_t head_ = 0;  // elements before the first whole vector of results
  GradientScale scale_;
  double sum_ = 0, result_ = 0;
  bool is_quick_ = false;
};

// Rows one after the other.
template <bool kLog, class T, class Storage>
SOFTMAXLIB_NOINLINE void gradient_of_long_rows(const Job& job, int64_t start, int64_t stop) {
  using Row = GradientRow<kLog, T, Storage>;
  GradientStage<T> stage;
  Edge<Storage> edge;
  Rows rows(job, start);
  Row row(job, rows.place, &stage, &edge, stop - start == 1);
  row.read_beside(nullptr);
  for (int64_t r = start + 1; r < stop; ++r) {
    rows.next();
    if (job.streaming) {
      const Row before = row;
      row.move_to(rows.place);
      row.read_beside(&before);
    } else {  // a row is written while it is in the first level cache
      row.write();
      row.move_to(rows.place);
      row.read_beside(nullptr);
    }
  }
  row.write();
  edge.flush();
}

// One row by itself.
template <bool kLog, class T>
SOFTMAXLIB_NOINLINE void gradient_of_row(const Job& job, int64_t row) {
  GradientStage<T> stage;
  Edge<T> edge;
  GradientRow<kLog, T> one(job, Rows(job, row).place, &stage, &edge, true);
  one.read_beside(nullptr);
  one.write();
  edge.flush();
}

}  // namespace
}  // namespace SOFTMAX_ISA
}  // namespace softmaxlib
