// Gradients of rows of up to a chunk, some at a time through tiles: the sums of as many rows as a
// vector has lanes are folded at once, and no row waits for the chain of its own.
#pragma once

#include "isa/kernels/gradient_row.hpp"

namespace softmaxlib {
namespace SOFTMAX_ISA {
namespace {

// Storage: of all operands, which then are direct, their rows whole vectors, without x and `where`
// and results not streamed; or T, and they may be anything.
template <bool kLog, class T, class Storage = T>
class GradientTiles {
 public:
  using V = typename vector_of<T>::type;
  using Element = ElementGradient<kLog, V>;
  using Plain = typename Element::Plain;
  static constexpr int kLanes = V::lanes;

  explicit GradientTiles(const Job& job)
      : job_(job),
        kind_(job.function),
        pitch_((job.n + kLanes - 1) / kLanes * kLanes),
        grad_(job, kGrad),
        y_(job, kResult),
        x_(job, kX),
        where_along_(is_contiguous(job, kWhere, 1)),
        sender_(job),
        is_direct_(!kIsOwn || (job.dtype[kOut] == kOwnDtype<T> && !sender_.collects() &&
                               (job.n == pitch_ || !job.in_place))) {}

  void compute(int64_t row, int64_t stop) {
    Affine affine = {1, 0, 0, 0, 0, 0, false};  // where each row has its own
    if (!job_.base[kScale]) affine = affine_of(job_, RowRun(job_, 0).place, {0, 0});
    const GradientScale of_all(kind_, affine);
    store(part_, V::set1(static_cast<T>(of_all.usual.part)));
    store(power_, V::set1(static_cast<T>(of_all.usual.power)));
    has_power_ = of_all.usual.power != 1;
    may_be_plain_ = Element::may_be_plain(of_all);
    for (RowRun run(job_, row); row < stop;) {
      const bool dense = is_dense(run);
      is_dense_ = dense;
      spacing_ = dense ? job_.n : pitch_;
      int64_t rows = run.rows < stop - row ? run.rows : stop - row;
      if (rows > kRoom / spacing_) rows = kRoom / spacing_;
      fetch(run, rows, dense);
      // Behind these rows nothing may be written.
      exact_from_ = dense ? rows - (kLanes + job_.n - 2) / job_.n : 0;
      for (first_ = 0; first_ < rows; first_ += kLanes) {
        rows_ = rows - first_ < kLanes ? static_cast<int>(rows - first_) : kLanes;
        if (job_.base[kScale])
          has_usual_scales_ = fetch_usual_scales(
              job_, kLog,
              job_.base[kScale] + run.place.offset[kScale] + first_ * run.step.stride[kScale],
              run.step.stride[kScale], rows_, part_, power_, has_power_);
        compute_rows(run, row, of_all);
      }
      row += rows;
      run.advance(rows);
    }
    sender_.finish();
  }

 private:
  static constexpr int64_t kRoom = 2 * kVectorsPerChunk * kLanes;
  static constexpr bool kIsOwn = sizeof(Storage) == sizeof(T);

  // An operand of some rows: in a tile, or where it is.
  struct Tile {
    Reader<V> reader;
    Operand operand;
    alignas(64) T elements[kIsOwn ? kRoom + kLanes : 1];
    const char* first;
    int64_t stride;

    Tile(const Job& job, Operand k) : reader(job, k), operand(k) {}
    void fetch(const RowRun& run, int64_t rows, int64_t spacing, bool dense, bool in_place) {
      is_in_tile(spacing);
      const char* const at = run.job.base[operand] + run.place.offset[operand];
      if (!kIsOwn || (in_place && reader.is_in_place()))
        first = at, stride = run.step.stride[operand];
      else if (dense) reader.convert(at, rows * run.job.n, elements);
      else reader.copy(run, static_cast<int>(rows), elements, spacing);
    }
    void is_in_tile(int64_t spacing) {
      first = reinterpret_cast<const char*>(elements);
      stride = spacing * static_cast<int64_t>(sizeof(T));
    }
    const Storage* row(int64_t r) const {
      return reinterpret_cast<const Storage*>(first + r * stride);
    }
  };

  // Whether the rows of a run follow each other without gaps in all operands.
  bool is_dense(const RowRun& run) const {
    const auto follows = [&](const Access& a, Operand k) {
      return a.along && run.step.stride[k] == job_.n * a.item;
    };
    if (!kind_.reduces &&
        !(follows(grad_.reader.access(), kGrad) && follows(y_.reader.access(), kResult)))
      return false;
    return (!kind_.reads_x() || follows(x_.reader.access(), kX)) &&
           follows(Access(job_, kOut), kOut) &&
           (!job_.base[kWhere] || (where_along_ && run.step.stride[kWhere] == job_.n));
  }
  void fetch(const RowRun& run, int64_t rows, bool dense) {
    // Of rows that do not end with a vector, what is behind them is read too.
    const bool in_place =
        job_.n == pitch_ || (dense && (run.rows - rows) * job_.n >= int64_t{kLanes});
    if (!kind_.reduces) {
      grad_.fetch(run, rows, spacing_, dense, in_place);
      y_.fetch(run, rows, spacing_, dense, in_place);
    }
    if (kind_.reads_x()) x_.fetch(run, rows, spacing_, dense, in_place);
    if (job_.base[kWhere]) hide_elements(run, rows);
  }
  // Gives what `where` hides a probability of 0 in a tile, or for logsumexp no x.
  SOFTMAXLIB_NOINLINE void hide_elements(const RowRun& run, int64_t rows) {
    if constexpr (kIsOwn) {
      Tile& of = kind_.reduces ? x_ : y_;
      const double none = kLog || kind_.reduces ? -INFINITY : 0;
      const int64_t n = is_dense_ ? rows * job_.n : job_.n;
      Place place = run.place;
      for (int64_t r = 0; r < (is_dense_ ? 1 : rows); ++r) {
        const char* const where = job_.base[kWhere] + place.offset[kWhere];
        if (!where_along_) gather_visible(job_, place, 0, n, visible_);
        hide<V>(where_along_ ? reinterpret_cast<const uint8_t*>(where) : visible_, n, of.row(r),
                none, of.elements + r * spacing_);
        place.offset[kWhere] += run.step.stride[kWhere];
      }
      of.is_in_tile(spacing_);
    }
  }

  using Piece = GradientPiece<kLog, V, true, Storage>;
  // The present rows. A copy of what a loop over them needs, which no store can change.
  struct Pieces {
    const char *grad, *y, *x;
    int64_t grad_stride, y_stride, x_stride;

    SOFTMAXLIB_INLINE Piece operator[](int64_t r) const {
      return {at(grad + r * grad_stride), at(y + r * y_stride), at(x + r * x_stride)};
    }

   private:
    static const Storage* at(const char* p) { return reinterpret_cast<const Storage*>(p); }
  };
  Pieces pieces() const {
    Pieces all = {nullptr, nullptr, nullptr, 0, 0, 0};
    const auto set = [this](const Tile& of, const char*& first, int64_t& stride) {
      stride = of.stride;
      first = of.first + first_ * stride;
    };
    if (!kind_.reduces) set(grad_, all.grad, all.grad_stride), set(y_, all.y, all.y_stride);
    if (kind_.reads_x()) set(x_, all.x, all.x_stride);
    return all;
  }

  // f(how many vectors a row is), which the compiler knows of floats for the commonest of up to a
  // group; 0: any.
  template <class F>
  static SOFTMAXLIB_INLINE void with_vectors(int64_t n, F f) {
    const int64_t vectors = (n + kLanes - 1) / kLanes;
    if constexpr (kIsOwn && sizeof(T) == 4) {
      if (vectors == 1) return f(Elements<1>());
      if (vectors == 2) return f(Elements<2>());
      if (vectors == 4) return f(Elements<4>());
    }
    f(Elements<0>());
  }

  // The sums of the present rows, a row per lane.
  SOFTMAXLIB_INLINE InLanes<V> sums() {
    const Pieces rows = pieces();
    const int64_t n = job_.n;
    const int count = rows_;
    with_vectors(n, [&](auto vectors) SOFTMAXLIB_INLINE_LAMBDA {
      for (int r = 0; r < count && vectors != 1; ++r) {
        if constexpr (vectors < 2) lanes_.keep(r, rows[r].quick_sum(n));
        else lanes_.keep(r, rows[r].template quick_sum<vectors>(n));
      }
    });
    Lanes<V> one;  // of lanes without a row
    one.sum = f64x8::set1(1);
    for (int r = count; r < kLanes; ++r) lanes_.keep(r, one);
    return lanes_.totals().value();
  }
  // Whether two rows are one vector, and how many elements of these there are from row r on.
  bool is_in_pairs() const { return kIsOwn && kLanes == 16 && job_.n == 8 && is_dense_; }
  int64_t in_pair(int r) const { return r + 1 < rows_ ? 16 : 8; }
  // Each of these for all elements of its row.
  static SOFTMAXLIB_INLINE V pair_of(const T* x) {
    constexpr T kLane[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return select(gt(V::set1(8), load(kLane)), V::set1(x[0]), V::set1(x[1]));
  }
  SOFTMAXLIB_INLINE V brief_sums() const {
    const Pieces rows = pieces();
    const int64_t n = job_.n;
    const int count = rows_;
    alignas(64) T group[kLanes][4];
    if (is_in_pairs())
      for (int r = 0; r < count; r += 2)
        rows[r].template store_groups<sizeof(T) == 4 ? 2 : 1>(in_pair(r), group[r]);
    else
      for (int r = 0; r < count; ++r) rows[r].store_groups(n, group[r]);
    for (int r = count; r < kLanes; ++r)
      for (T& one : group[r]) one = 1;  // lanes without a row
    V column[4];
    load_columns(group[0], 4, column);
    return sum_of_groups(column);
  }
  // Sums, but 1 for rows without a probability other than 0: theirs are 0 and may not be trusted as
  // they are, but their results are 0 whatever is taken for them.
  SOFTMAXLIB_NOINLINE InLanes<V> with_ones(InLanes<V> sums) const {
    double each[kLanes];
    store_lanes(each, sums);
    const Pieces rows = pieces();
    for (int r = 0; r < rows_; ++r)
      if (each[r] == 0 && rows[r].is_nothing(job_.n)) each[r] = 1;
    load_lanes(each, sums);
    return sums;
  }
  static InLanes<V> in_type_of(InLanes<V>, InLanes<V> sum) { return sum; }
  static V in_type_of(V, InLanes<V> sum) { return sum.value(); }
  SOFTMAXLIB_NOINLINE InLanes<V> trusted(InLanes<V> sums) {
    double each[kLanes];
    store_lanes(each, sums);
    const Pieces rows = pieces();
    for (int r = 0; r < rows_; ++r) {
      if (Element::is_good(in_all(each[r], V()))) continue;
      Total total;
      total.reference = 0;
      rows[r].careful_sum(job_.n, 1).fold_into(total);
      each[r] = total.value();
    }
    load_lanes(each, sums);
    return sums;
  }

  // And what follows from them.
  void compute_rows(const RowRun& run, int64_t row, const GradientScale& of_all) {
    InLanes<V> sums = in_all(0, V());
    Plain plain;
    bool is_plain = false;
    const auto use = [&](auto sum) SOFTMAXLIB_INLINE_LAMBDA {
      if (SOFTMAXLIB_UNLIKELY(!Element::is_good(sum)))
        sum = in_type_of(sum, with_ones(in_double(sum)));
      is_plain = may_be_plain_ && has_usual_scales_ && Element::is_good(sum);
      plain = Plain(sum, load(part_), load(power_));
      sums = in_double(sum);
    };
    if (!kind_.reduces) {
      if (is_brief(job_.n)) use(Element::own(brief_sums()));
      else use(this->sums());
    }
    T* const results = results_ + kLanes;
    const int64_t step = run.step.stride[kOut];
    char* const y = job_.base[kOut] + run.place.offset[kOut] + first_ * step;
    char* const to = is_direct_ ? y : reinterpret_cast<char*>(results);
    const int64_t to_step = is_direct_ ? step : spacing_ * static_cast<int64_t>(sizeof(T));
    const auto out = [=](int64_t r) SOFTMAXLIB_INLINE_LAMBDA {
      return reinterpret_cast<Storage*>(to + r * to_step);
    };
    const bool all =
        is_plain || (kIsOwn ? write_each(run, row, of_all, sums, out) : each_alone(row));
    if (is_plain) write_plain(plain, out);
    if (is_direct_) return;
    if (all && is_dense_ && sender_.takes_rows())
      return sender_.put_adjacent(y, results, rows_ * job_.n);
    if (all && sender_.sends_squares())
      return sender_.put_squares(y, results, pitch_, rows_, nullptr);
    for (int r = 0; r < rows_; ++r)
      if (all || !alone_[r]) sender_.put(y + r * step, results + r * spacing_, 1);
  }
  template <class Out>
  SOFTMAXLIB_INLINE void write_plain(const Plain& of_all, Out out) const {
    T hi[kLanes], lo[kLanes];
    store(hi, of_all.hi);
    store(lo, of_all.lo);
    const Pieces rows = pieces();
    const int64_t n = job_.n, exact_from = is_direct_ ? exact_from_ - first_ : kLanes;
    const int count = rows_;
    const auto of_row = [&](int r) SOFTMAXLIB_INLINE_LAMBDA {
      return Plain(V::set1(hi[r]), V::set1(lo[r]), V::set1(part_[r]), V::set1(power_[r]));
    };
    if (!kLog && has_power_) {
      for (int r = 0; r < count; ++r)
        write<0>(rows[r], n, out(r), typename Element::WithPower(of_row(r)), r >= exact_from);
    } else if (is_in_pairs()) {
      for (int r = 0; r < count; r += 2)
        write<1>(rows[r], in_pair(r), out(r),
                 Plain(pair_of(hi + r), pair_of(lo + r), pair_of(part_ + r), V::set1(1)),
                 r + 1 == count);
    } else {
      with_vectors(n, [&](auto vectors) SOFTMAXLIB_INLINE_LAMBDA {
        for (int r = 0; r < count; ++r)
          write<vectors>(rows[r], n, out(r), of_row(r), r >= exact_from);
      });
    }
  }
  // exact: behind the row's end nothing may be written. kVectors: as above.
  template <int kVectors, class F>
  static SOFTMAXLIB_INLINE void write(const Piece& row, int64_t n, Storage* to, const F& element,
                                      bool exact) {
    int64_t i = 0;
    if constexpr (kVectors != 0) {
      for (; i < (kVectors - 1) * kLanes; i += kLanes)
        store(to + i, row.results(i, kLanes, element));
    } else {
      for (; i + kLanes <= n; i += kLanes) store(to + i, row.results(i, kLanes, element));
      if (i == n) return;
    }
    const V last = row.results(i, kLanes, element);
    if (SOFTMAXLIB_UNLIKELY(exact)) store_n(to + i, last, static_cast<int>(n - i));
    else store(to + i, last);
  }
  SOFTMAXLIB_NOINLINE bool each_alone(int64_t row) const {
    for (int r = 0; r < rows_; ++r) gradient_of_row<kLog, T>(job_, row + first_ + r);
    return false;
  }
  // Row by row; false where one was computed alone.
  template <class Out>
  SOFTMAXLIB_NOINLINE bool write_each(const RowRun& run, int64_t row, const GradientScale& of_all,
                                      InLanes<V> quick, Out out) {
    double sums[kLanes];
    store_lanes(sums, kind_.reduces || Element::is_good(quick) ? quick : trusted(quick));
    Place place = run.place;
    for (int k = 0; k < kOperands; ++k) place.offset[k] += first_ * run.step.stride[k];
    bool all = true;
    const Pieces rows = pieces();
    for (int r = 0; r < rows_; ++r) {
      alone_[r] = !kind_.reduces && sizeof(T) == 8 && needs_smaller_unit(sums[r]);
      if (alone_[r]) {
        all = false;
        sender_.finish();
        gradient_of_row<kLog, T>(job_, row + first_ + r);
      } else {
        double result = 0;
        if (kind_.reduces) {
          sums[r] = row_operand(job_, place, kGrad, 0);
          result = row_operand(job_, place, kResult, 0);
        }
        const auto write_under = [&](const GradientScale& scale) {
          write<0>(rows[r], job_.n, out(r), Element(scale, in_all(sums[r], V()), false, result),
                   is_direct_ && first_ + r >= exact_from_);
        };
        if (job_.base[kScale]) write_under(GradientScale(kind_, affine_of(job_, place, {0, 0})));
        else write_under(of_all);
      }
      for (int k = 0; k < kOperands; ++k) place.offset[k] += run.step.stride[k];
    }
    return all;
  }

  const Job& job_;
  const GradientKind kind_;
  const int64_t pitch_;
  bool is_dense_ = false;  // rows follow each other without gaps, in memory and in tiles
  int64_t spacing_ = 0;    // of rows in tiles
  int64_t first_ = 0;      // of these, at which the present ones begin
  int64_t exact_from_ = 0;
  int rows_ = 0;
  Tile grad_, y_, x_;
  const bool where_along_;
  Sender<V> sender_;
  const bool is_direct_;
  LanesOfRows<V> lanes_;
  alignas(64) T part_[kLanes], power_[kLanes];  // scales of the present rows
  bool may_be_plain_ = false, has_usual_scales_ = true, has_power_ = false;
  bool alone_[kLanes];
  uint8_t visible_[kVectorsPerChunk * kLanes];
  alignas(64) T
      results_[kIsOwn ? kLanes + kRoom + kLanes : kLanes];  // an outbox reads around what it takes
};

}  // namespace
}  // namespace SOFTMAX_ISA
}  // namespace softmaxlib
