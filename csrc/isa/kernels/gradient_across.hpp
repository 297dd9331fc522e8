// Gradients a row per lane: of rows of any length that lie side by side, and of short ones that
// follow each other, which are transposed on their way in and out.
#pragma once

#include "isa/kernels/gradient_row.hpp"

namespace softmaxlib {
namespace SOFTMAX_ISA {
namespace {

// A panel of rows at a time: whole vectors of them, or less than one. A piece of a panel is at most
// a group of elements, read where it is or from tiles. Rows of a single piece are written as soon
// as they are summed.
template <bool kLog, class T>
class GradientAcross {
 public:
  using V = typename vector_of<T>::type;
  using Element = ElementGradient<kLog, V>;
  using Plain = typename Element::Plain;
  static constexpr int kLanes = V::lanes;

  static bool takes(const Job& job) {
    const GradientKind kind(job.function);
    if (kind.reduces || job.inner_ndim != 1 || job.outer_ndim == 0 || job.base[kScale])
      return false;
    const Dim& beside = job.outer[job.outer_ndim - 1];
    const auto fits = [&](Operand k) {
      const Access access(job, k);
      const bool follows = access.along && beside.stride[k] == job.n * access.item;
      return access.across || (follows && job.n <= kMostAlong && !job.base[kWhere]);
    };
    return fits(kGrad) && fits(kResult) && fits(kOut) && (!kind.stable || fits(kX)) &&
           (!job.base[kWhere] || beside.stride[kWhere] == 1);
  }

  explicit GradientAcross(const Job& job)
      : job_(job),
        scale_(GradientKind(job.function), affine_of(job, RowRun(job, 0).place, {0, 0})),
        may_be_plain_(Element::may_be_plain(scale_)),
        grad_(job, kGrad),
        y_(job, kResult),
        x_(job, kX),
        sender_(job),
        is_across_(sender_.access().across) {
    // Short rows and their tiles fit in the first level cache.
    most_ = kLanes * (job.n <= kPiece / 4 ? kRoom / 4 / job.n : kGroups);
  }

  void compute(int64_t row, int64_t stop) {
    for (RowRun run(job_, row); row < stop;) {
      int64_t rows = run.rows < stop - row ? run.rows : stop - row;
      if (rows > most_) rows = most_;
      if (rows > kLanes) rows -= rows % kLanes;
      place_ = run.place;
      row_ = row;
      rows_ = static_cast<int>(rows);
      groups_ = (rows_ + kLanes - 1) / kLanes;
      if (job_.n <= kPiece) compute_piece();
      else compute_pieces();
      row += rows;
      run.advance(rows);
    }
    sender_.finish();
  }

 private:
  // Of longer rows that follow each other, those of a tile are faster.
  static constexpr int64_t kMostAlong = 12;
  static constexpr int kGroups = 4,
                       kParts = 8;  // a sum has eight partial ones: Lanes of isa/sum/sum.hpp
  static constexpr int64_t kPiece = kVectorsPerGroup * kLanes, kRoom = kGroups * kPiece;
  static constexpr int64_t kVector = kLanes * int64_t{sizeof(T)};
  // Whether a quick sum may be other than a careful one. Where doubles are only added it is not.
  static constexpr bool kHasCareful = !kLog || sizeof(T) == 4;

  // Elements of a vector of rows, so many bytes from each other.
  struct Column {
    const char* first;
    int64_t step;

    SOFTMAXLIB_INLINE V operator[](int64_t j) const {
      return load(reinterpret_cast<const T*>(first + j * step));
    }
  };
  // An operand: element j of a panel's rows is a strip of vectors.
  struct Strips {
    Reader<V> reader;
    Operand operand;
    char* first;
    int64_t stride;
    alignas(64) T tile[kRoom * kLanes];

    Strips(const Job& job, Operand k) : reader(job, k), operand(k) {}
    SOFTMAXLIB_NOINLINE void fetch(const Job& job, const Place& place, int64_t start, int64_t count,
                                   int rows, bool to_tile, T* room) {
      const int64_t pitch = (rows + kLanes - 1) / kLanes * kLanes;
      stride = job.inner[0].stride[operand];
      first = job.base[operand] + place.offset[operand] + start * stride;
      if (!reader.access().across) {
        const int n = static_cast<int>(job.n);
        reader.convert(first, rows * n, room);
        for (int r = 0; r < rows; r += kLanes)
          rows_to_columns<V>(room + r * n, n, n, tile + r, pitch);
        first = reinterpret_cast<char*>(tile);
        stride = pitch * static_cast<int64_t>(sizeof(T));
        return;
      }
      if (!to_tile && is_in_place(reader.access(), rows)) return;
      reader.convert(first, rows, tile, count, stride, pitch);
      first = reinterpret_cast<char*>(tile);
      stride = pitch * static_cast<int64_t>(sizeof(T));
    }
    SOFTMAXLIB_INLINE Column column(int g) const { return {first + g * kVector, stride}; }
  };
  static bool is_in_place(const Access& access, int rows) {
    return access.across && access.item == sizeof(T) && rows % kLanes == 0;
  }

  void fetch(int64_t start, int64_t count) {
    T* const room = room_ + kLanes;
    grad_.fetch(job_, place_, start, count, rows_, job_.base[kWhere], room);
    y_.fetch(job_, place_, start, count, rows_, job_.base[kWhere], room);
    if (job_.base[kWhere]) hide(start, count);
    if (scale_.kind.stable) x_.fetch(job_, place_, start, count, rows_, false, room);
    out_stride_ = job_.inner[0].stride[kOut];
    out_ = to_ = job_.base[kOut] + place_.offset[kOut] + start * out_stride_;
    if (is_direct()) return;
    to_ = reinterpret_cast<char*>(results_);
    out_stride_ = groups_ * kVector;
  }
  // What `where` hides has a probability of 0, whose gradient is not even looked at.
  SOFTMAXLIB_NOINLINE void hide(int64_t start, int64_t count) {
    const V none = V::set1(static_cast<T>(kLog ? -INFINITY : 0));
    const int64_t stride = job_.inner[0].stride[kWhere];
    const char* where = job_.base[kWhere] + place_.offset[kWhere] + start * stride;
    T *y = y_.tile, *g = grad_.tile;
    for (int64_t j = 0; j < count; ++j, where += stride)
      for (int r = 0; r < rows_; r += kLanes, y += kLanes, g += kLanes) {
        uint8_t bytes[kLanes] = {};
        memcpy(bytes, where + r, static_cast<size_t>(rows_ - r < kLanes ? rows_ - r : kLanes));
        const V result = select(load_mask(bytes, none), load(y), none);
        store(y, result);
        store(g, of_visible<kLog>(load(g), result));
      }
  }
  bool is_direct() const { return is_in_place(sender_.access(), rows_); }
  void send(int64_t count) {
    if (is_direct()) return;
    const int pitch = groups_ * kLanes, n = static_cast<int>(job_.n);
    if (is_across_) return sender_.put_columns(out_, rows_, results_, pitch, count);
    T* const room = room_ + kLanes;
    for (int r = 0; r < rows_; r += kLanes)
      columns_to_rows<V>(results_ + r, pitch, n, V::set1(1), room + r * n, n);
    sender_.put_adjacent(out_, room, rows_ * n);
  }

  // What one element adds to a sum, and what that rounds away. Quick: products with probabilities
  // of 0 too; if one of these is not 0 then the sum is not finite.
  template <bool kQuick>
  static SOFTMAXLIB_INLINE InLanes<V> term(V g, V result, InLanes<V>& error) {
    if (kLog || !kQuick) g = of_visible<kLog>(g, result);
    if constexpr (kLog) return InLanes<V>::of(g);
    else return product(g, result, error);
  }
  static SOFTMAXLIB_INLINE InLanes<f32x16> product(f32x16 a, f32x16 b, InLanes<f32x16>&) {
    return InLanes<f32x16>::of(a) * InLanes<f32x16>::of(b);
  }
  static SOFTMAXLIB_INLINE InLanes<f64x8> product(f64x8 a, f64x8 b, InLanes<f64x8>& error) {
    const f64x8 product = a * b;
    error = {error.all + fms(a, b, product)};
    return {product};
  }
  static SOFTMAXLIB_INLINE void add(InLanes<f32x16>& sum, InLanes<f32x16>&, InLanes<f32x16> x) {
    sum = sum + x;
  }
  static SOFTMAXLIB_INLINE void add(InLanes<f64x8>& sum, InLanes<f64x8>& error, InLanes<f64x8> x) {
    two_sum(sum.all, error.all, x.all);
  }
  // What `count` elements from i on, which are a vector apart in the row, add to a partial sum.
  // Quick floats are added as floats: they are a group's.
  template <bool kQuick>
  static SOFTMAXLIB_INLINE InLanes<V> one(Column g, Column y, int64_t i, int64_t count,
                                          InLanes<V>& error) {
    if constexpr (kQuick && sizeof(T) == 4) {
      V sum = plus_element<kLog>(V::set1(0), true, g[i], y[i]);
      for (int64_t j = i + kLanes; j < count; j += kLanes)
        sum = plus_element<kLog>(sum, false, g[j], y[j]);
      return InLanes<V>::of(sum);
    } else {
      return term<kQuick>(g[i], y[i], error);
    }
  }
  // What a piece adds to partial sum i of a vector of rows. kBegins: to 0.
  template <bool kQuick, bool kBegins>
  static SOFTMAXLIB_INLINE void add_part(Column g, Column y, int64_t i, int64_t count,
                                         InLanes<V>& sum, InLanes<V>& error) {
    for (int64_t j = i; j < count; j += kLanes) {
      InLanes<V> x = one<kQuick>(g, y, j, count, error);
      if (kLanes > kParts && j + kParts < count)
        x = x + one<kQuick>(g, y, j + kParts, count, error);
      if (kBegins && j == i) sum = x;
      else add(sum, error, x);
      if (kQuick && sizeof(T) == 4) break;
    }
  }

  // A sum on its way, as isa/sum/sum.hpp has it. Lanes are doubles in memory: older compilers copy
  // structs of vectors in halves, and a load of the whole vector then waits (SoftmaxlibIsa.cmake).
  struct Sum {
    alignas(64) double part[kParts][kLanes], lost[kParts][kLanes];
    double total[kLanes], error[kLanes];

    void clear() {
      store_lanes(total, in_all(0, V()));
      store_lanes(error, in_all(0, V()));
    }
    InLanes<V> value() const { return at(total) + at(error); }
  };
  static SOFTMAXLIB_INLINE InLanes<V> at(const double* lanes) {
    InLanes<V> v;
    load_lanes(lanes, v);
    return v;
  }
  // As Lanes folds its own into a Total. Of less than eight parts the others would be zeros.
  static SOFTMAXLIB_INLINE InLanes<V> fold_up_to(const double (&x)[kParts][kLanes], int64_t parts) {
    if (parts == 1) return at(x[0]);
    if (parts == 2) return at(x[0]) + at(x[1]);
    InLanes<V> all[kParts];
    for (int i = 0; i < kParts; ++i) {
      all[i] = in_all(0, V());
      if (i < parts) load_lanes(x[i], all[i]);
    }
    return fold_eight(all);
  }
  static SOFTMAXLIB_INLINE void fold(const Sum& s, int64_t parts, InLanes<f32x16>& sum,
                                     InLanes<f32x16>& error) {
    const InLanes<f32x16> all = fold_up_to(s.part, parts);
    two_sum(sum.low, error.low, all.low);
    two_sum(sum.high, error.high, all.high);
  }
  static SOFTMAXLIB_INLINE void fold(const Sum& s, int64_t parts, InLanes<f64x8>& sum,
                                     InLanes<f64x8>& error) {
    for (int64_t i = 0; i < parts; ++i) two_sum(sum.all, error.all, at(s.part[i]).all);
    error = error + fold_up_to(s.lost, parts);
  }

  // Rows of one piece.
  template <bool kQuick>
  static SOFTMAXLIB_INLINE InLanes<V> sum_of_piece(Column g, Column y, int64_t n) {
    const int64_t parts = n < kParts ? n : kParts;
    if (kQuick && sizeof(T) == 4 && n == 2) {  // no need of memory
      InLanes<V> none = in_all(0, V());
      return one<kQuick>(g, y, 0, n, none) + one<kQuick>(g, y, 1, n, none);
    }
    Sum s;
    for (int64_t i = 0; i < parts; ++i) {
      InLanes<V> part = in_all(0, V()), lost = part;
      add_part<kQuick, true>(g, y, i, n, part, lost);
      store_lanes(s.part[i], part);
      if (sizeof(T) == 8) store_lanes(s.lost[i], lost);
    }
    if (kQuick && sizeof(T) == 4) return fold_up_to(s.part, parts);
    InLanes<V> total = in_all(0, V()), error = in_all(0, V());
    fold(s, parts, total, error);
    return total + error;
  }
  void compute_piece() {
    fetch(0, job_.n);
    const bool fetches = is_direct() && job_.n > 1 && job_.n <= kLanes;
    bool all = true;
    for (int g = 0; g < groups_; ++g) {
      const Column grad = grad_.column(g), y = y_.column(g);
      if (fetches) fetch_next(g);
      if constexpr (sizeof(T) == 4)  // nothing to add up
        if (job_.n == 1 && rows_ >= kLanes &&
            write_if_plain(g, plus_element<kLog>(V::set1(0), true, grad[0], y[0])))
          continue;
      const InLanes<V> sum = in_rows(sum_of_piece<true>(grad, y, job_.n));
      if (!write_if_plain(g, sum)) all &= finish(g, sum);
    }
    if (all) return send(job_.n);
    if (is_direct()) return;
    sender_.finish();
    for (int g = 0; g < groups_; ++g) compute_alone(g);
  }
  // The rows after a vector of these, which often follow them, closer than the hardware sees: where
  // results go too, since few stores at a time wait for memory.
  SOFTMAXLIB_INLINE void fetch_next(int g) const {
    const Column grad = grad_.column(g), y = y_.column(g), to = {to_ + g * kVector, out_stride_};
    for (int64_t j = job_.n; j < 2 * job_.n; ++j) {
      prefetch(grad.first + j * grad.step);
      prefetch(y.first + j * y.step);
      prefetch(to.first + j * to.step);
    }
  }
  template <class Sum>
  SOFTMAXLIB_INLINE bool write_if_plain(int g, Sum sum) const {
    if (SOFTMAXLIB_UNLIKELY(!may_be_plain_ || !Element::is_good(sum))) return false;
    write(g, 0, job_.n, Plain(sum));
    return true;
  }
  // A vector of rows that are not as usual; false where they were computed alone.
  SOFTMAXLIB_NOINLINE bool finish(int g, InLanes<V> sum) {
    const bool quick = Element::is_good(sum);
    if (kHasCareful && !quick)
      sum = trusted(sum, sum_of_piece<false>(grad_.column(g), y_.column(g), job_.n));
    if (!all_in_unit(sum)) {
      if (is_direct()) compute_alone(g);
      return false;
    }
    write_any(g, job_.n, Element(scale_, sum, quick));
    return true;
  }

  // Longer rows.
  void compute_pieces() {
    InLanes<V> sum[kGroups];
    add_up<true>();
    bool quick = true, alone[kGroups], all = true;
    for (int g = 0; g < groups_; ++g) {
      sum[g] = in_rows(sums_[g].value());
      quick &= Element::is_good(sum[g]);
    }
    if (kHasCareful && SOFTMAXLIB_UNLIKELY(!quick)) {
      add_up<false>();
      for (int g = 0; g < groups_; ++g) sum[g] = trusted(sum[g], sums_[g].value());
    }
    for (int g = 0; g < groups_; ++g) {
      alone[g] = !all_in_unit(sum[g]);
      if (alone[g]) compute_alone(g);
      all &= !alone[g];
      element_[g] = Element(scale_, sum[g], quick);
    }
    for (int64_t start = 0; start < job_.n; start += kPiece) {
      const int64_t count = job_.n - start < kPiece ? job_.n - start : kPiece;
      fetch(start, count);
      if (may_be_plain_ && quick) {
        for (int64_t j = 0; j < count; j += kParts)
          for (int g = 0; g < groups_; ++g)
            write(g, j, j + kParts < count ? j + kParts : count, element_[g].plain());
      } else {
        for (int g = 0; g < groups_; ++g)
          if (!alone[g]) write_any(g, count, element_[g]);
      }
      if (all) send(count);
    }
  }
  template <bool kQuick>
  SOFTMAXLIB_NOINLINE void add_up() {
    constexpr int64_t kChunk = kVectorsPerChunk * kLanes;
    for (int g = 0; g < groups_; ++g) sums_[g].clear();
    for (int64_t start = 0; start < job_.n; start += kPiece) {
      const int64_t count = job_.n - start < kPiece ? job_.n - start : kPiece;
      const bool begins = start % kChunk == 0;
      fetch(start, count);
      for (int i = 0; i < kParts && (i < count || begins); ++i)
        for (int g = 0; g < groups_; ++g) {
          Sum& s = sums_[g];
          InLanes<V> part = in_all(0, V()), lost = in_all(0, V());
          if (!begins) part = at(s.part[i]), lost = at(s.lost[i]);
          add_part<kQuick, false>(grad_.column(g), y_.column(g), i, count, part, lost);
          store_lanes(s.part[i], part);
          store_lanes(s.lost[i], lost);
        }
      if ((start + count) % kChunk != 0 && start + count != job_.n) continue;
      for (int g = 0; g < groups_; ++g) end_chunk(sums_[g]);
    }
  }

  static SOFTMAXLIB_NOINLINE void end_chunk(Sum& s) {
    InLanes<V> total = at(s.total), error = at(s.error);
    fold(s, kParts, total, error);
    store_lanes(s.total, total);
    store_lanes(s.error, error);
  }

  // 1 for lanes without a row.
  SOFTMAXLIB_INLINE InLanes<V> in_rows(InLanes<V> sum) const {
    return SOFTMAXLIB_LIKELY(rows_ >= kLanes) ? sum : in_few_rows(sum);
  }
  SOFTMAXLIB_NOINLINE InLanes<V> in_few_rows(InLanes<V> sum) const {
    double each[kLanes];
    store_lanes(each, sum);
    for (int i = rows_; i < kLanes; ++i) each[i] = 1;
    return at(each);
  }
  static InLanes<V> trusted(InLanes<V> sum, InLanes<V> careful) {
    double each[kLanes], better[kLanes];
    store_lanes(each, sum);
    store_lanes(better, careful);
    for (int i = 0; i < kLanes; ++i)
      if (!Element::is_good(in_all(each[i], V()))) each[i] = better[i];
    return at(each);
  }
  // Where a sum needs a smaller unit.
  void compute_alone(int g) const {
    for (int i = 0; i < kLanes && g * kLanes + i < rows_; ++i)
      gradient_of_row<kLog, T>(job_, row_ + g * kLanes + i);
  }

  // Results of a vector of rows, where there is nothing to look at, and others.
  SOFTMAXLIB_INLINE void write(int g, int64_t start, int64_t stop, const Plain& of) const {
    const Plain element = of;
    const Column grad = grad_.column(g), y = y_.column(g);
    char* to = to_ + g * kVector + start * out_stride_;
    for (int64_t j = start; j < stop; ++j, to += out_stride_) {
      const V result = y[j], d = element(grad[j], result);
      store(reinterpret_cast<T*>(to), Plain::kIsMasked ? of_visible<kLog>(d, result) : d);
    }
  }
  SOFTMAXLIB_NOINLINE void write_any(int g, int64_t count, const Element& element) const {
    const Column grad = grad_.column(g), y = y_.column(g), x = x_.column(g);
    char* to = to_ + g * kVector;
    for (int64_t j = 0; j < count; ++j, to += out_stride_) {
      const V z = scale_.kind.stable ? x[j] : V::set1(0);
      store(reinterpret_cast<T*>(to), of_visible<kLog>(element(grad[j], y[j], z), y[j]));
    }
  }

  const Job& job_;
  const GradientScale scale_;
  const bool may_be_plain_;
  int64_t most_;  // rows of a panel
  Strips grad_, y_, x_;
  Sender<V> sender_;
  const bool is_across_;
  Place place_;
  int64_t row_ = 0;
  int rows_ = 0, groups_ = 0;
  char *out_ = nullptr, *to_ = nullptr;  // where results belong, and where they go first
  int64_t out_stride_ = 0;
  Sum sums_[kGroups];
  Element element_[kGroups];
  alignas(64) T results_[kRoom * kLanes];
  // Rows that follow each other, and what transposing and sending read around them.
  alignas(64) T room_[kLanes + kRoom * kLanes + kLanes];
};

}  // namespace
}  // namespace SOFTMAX_ISA
}  // namespace softmaxlib
