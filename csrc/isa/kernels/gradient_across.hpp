// Gradients a row per lane: of rows of any length that lie side by side, and of short ones that
// follow each other, which are transposed on their way in and out.
#pragma once

#include "isa/kernels/gradient_row.hpp"

namespace softmaxlib {
namespace SOFTMAX_ISA {
namespace {

// A panel of rows at a time: whole vectors of rows, or less than one vector. Of a panel a slice at
// a time: as many elements as a vector has lanes, one element of all its rows after the other,
// since so they lie in memory. Short rows are one slice, of which a vector of rows is summed and
// written before the next. Where their columns would take each other's place in the first level
// cache, and where rows are of up to a group, all rows of a panel are summed first, a few elements
// of each at a time, which needs no room for a slice and so lets a panel be wide.
template <bool kLog, class T>
class GradientAcross {
 public:
  using V = typename vector_of<T>::type;
  using Element = ElementGradient<kLog, V>;
  using Plain = typename Element::Plain;
  static constexpr int kLanes = V::lanes;
  static constexpr bool kIsFloat = sizeof(T) == 4;

  static bool takes(const Job& job) {
    const GradientKind kind(job.function);
    if (kind.reduces || job.inner_ndim != 1 || job.outer_ndim == 0 ||
        (kind.reads_x() && job.base[kScale]))
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
        may_be_plain_(job.base[kScale] || Element::may_be_plain(scale_)),
        grad_(job, kGrad),
        y_(job, kResult),
        x_(job, kX),
        sender_(job),
        is_across_(sender_.access().across),
        has_halves_(sizeof(T) == 4 && is_across_ && may_be_plain_ && !job.base[kWhere] &&
                    job.dtype[kOut] != SOFTMAXLIB_F32 && is_like_out(kGrad) &&
                    is_like_out(kResult)) {
    for (int i = 0; i < kMostVectors * kLanes; i += kLanes) {
      store(part_ + i, V::set1(static_cast<T>(scale_.usual.part)));
      store(power_ + i, V::set1(static_cast<T>(scale_.usual.power)));
    }
    has_power_ = scale_.usual.power != 1;
    // Short rows and their tiles fit in the first level cache.
    is_group_ = is_group();
    most_ = kLanes * (is_group_ ? kWide : is_short() ? kMostVectors / job.n : kGroups);
  }

  void compute(int64_t row, int64_t stop) {
    const int64_t first = row;
    for (RowRun run(job_, row); row < stop;) {
      int64_t rows = run.rows < stop - row ? run.rows : stop - row;
      // The first vector shares rows with the next, which begins at a line of what is streamed.
      const int64_t to_line = rows > 8 * kLanes ? rows_to_line(run) : 0;
      if (rows > most_) rows = most_;
      if (rows > kLanes) rows -= rows % kLanes;
      if (to_line) rows = kLanes;
      const int64_t again = rows_again(run, rows, row - first);
      place_ = run.place;
      if (SOFTMAXLIB_UNLIKELY(again != 0))
        for (int k = 0; k < kOperands; ++k) place_.offset[k] -= again * run.step.stride[k];
      row_ = row - again;
      rows_ = static_cast<int>(rows + again);
      groups_ = (rows_ + kLanes - 1) / kLanes;
      if (job_.base[kScale] && !has_usual_scales()) compute_all_alone();
      else if (is_group_ && rows_ >= (is_short() ? kGroups : 1) * kLanes) compute_group();
      else if (is_short()) compute_slice();
      else compute_slices();
      if (to_line) rows = to_line;
      row += rows;
      run.advance(rows);
    }
    sender_.finish();
  }

 private:
  // Rows that follow each other are taken up to so many elements; longer ones are faster in tiles.
  static constexpr int64_t kMostAlong = kIsFloat ? 7 : 8, kMostShort = kLanes;
  static constexpr int kGroups = 8;  // vectors of rows in a panel
  static constexpr int kWide = 32;   // the same, where all are summed before one is written
  static constexpr int kParts = 8;   // a sum has eight partial ones: Lanes of isa/sum/sum.hpp
  static constexpr int64_t kSlice = kLanes, kRoom = kGroups * kSlice;
  static constexpr int64_t kMostVectors = kRoom / 2;  // of short rows
  static constexpr int64_t kGroup = kVectorsPerGroup * kLanes, kChunk = kVectorsPerChunk * kLanes;
  static constexpr int64_t kVector = kLanes * int64_t{sizeof(T)};

  // Rows at the end of a run that are less than a vector come with so many that are computed again,
  // so that they are one: but not where these have other elements by now, or are another task's
  // (`before`: how many of this one there are).
  int64_t rows_again(const RowRun& run, int64_t rows, int64_t before) const {
    const int64_t again = kLanes - rows;
    const int64_t in_run = job_.outer[job_.outer_ndim - 1].size - run.rows;
    return again > 0 && again <= in_run && again <= before && !job_.in_place ? again : 0;
  }

  // How many rows there are up to a line of what is streamed. In place some would be lost.
  int64_t rows_to_line(const RowRun& run) const {
    const Access& out = sender_.access();
    const bool streams = job_.streaming && !job_.in_place && out.across && out.item == sizeof(T);
    if (!streams || job_.inner[0].stride[kOut] % 64 != 0) return 0;
    return elements_to_line(job_.base[kOut] + run.place.offset[kOut], out.item);
  }

  template <class Storage>
  static SOFTMAXLIB_INLINE void put(Storage* to, V result, bool streams) {
    if (streams) stream(to, result);
    else store(to, result);
  }

  // Elements of a vector of rows, so many bytes from each other.
  struct Column {
    const char* first;
    int64_t step;

    SOFTMAXLIB_INLINE V operator[](int64_t j) const {
      return load(at(j, static_cast<const T*>(nullptr)));
    }
    // Element j of these rows and of those beside them.
    template <class Storage>
    SOFTMAXLIB_INLINE const Storage* at(int64_t j, const Storage*) const {
      return reinterpret_cast<const Storage*>(first + j * step);
    }
  };
  // Whether rows that follow each other are transposed from where they are, or to where they
  // belong: nothing around them is read or written.
  static bool can_transpose_in_place(const Access& access, int n, int rows) {
    return access.item == sizeof(T) && n >= 4 && rows % kLanes == 0;
  }
  // An operand of a panel: vectors of its rows, element by element, in memory or in a tile.
  struct PanelOperand {
    Reader<V> reader;
    Operand operand;
    char* first;
    int64_t stride;
    alignas(64) T tile[kRoom * kLanes];

    PanelOperand(const Job& job, Operand k) : reader(job, k), operand(k) {}
    SOFTMAXLIB_NOINLINE void fetch(const Job& job, const Place& place, int64_t start, int64_t count,
                                   int rows, bool in_place, T* room) {
      const int64_t pitch = (rows + kLanes - 1) / kLanes * kLanes;
      stride = job.inner[0].stride[operand];
      first = job.base[operand] + place.offset[operand] + start * stride;
      if (!reader.access().across) {
        const int n = static_cast<int>(job.n);
        const T* from = room;
        if (can_transpose_in_place(reader.access(), n, rows)) from = reinterpret_cast<T*>(first);
        else reader.convert(first, rows * n, room);
        for (int r = 0; r < rows; r += kLanes)
          rows_to_columns<V>(from + r * n, n, n, tile + r, pitch);
        first = reinterpret_cast<char*>(tile);
        stride = pitch * static_cast<int64_t>(sizeof(T));
        return;
      }
      if (in_place) return;
      reader.convert(first, rows, tile, count, stride, pitch);
      first = reinterpret_cast<char*>(tile);
      stride = pitch * static_cast<int64_t>(sizeof(T));
    }
    SOFTMAXLIB_INLINE Column column(int g) const { return {first + g * kVector, stride}; }
  };
  bool has_usual_scales() {
    return fetch_usual_scales(job_, kLog, job_.base[kScale] + place_.offset[kScale],
                              job_.outer[job_.outer_ndim - 1].stride[kScale], rows_, part_, power_,
                              has_power_);
  }
  template <class Sum>
  SOFTMAXLIB_INLINE Plain plain(int g, Sum sum) const {
    return Plain(sum, load(part_ + g * kLanes), load(power_ + g * kLanes));
  }
  // Whether a vector of rows is written as soon as it is summed. Halves that are read where they
  // are pay for slices sooner.
  bool is_short() const { return job_.n <= (has_halves_ ? 8 : kMostShort); }
  // Whether all rows of a panel are summed before one is written.
  bool is_group() const {
    const auto is_own = [this](Operand k) {
      return Access(job_, k).across && job_.dtype[k] == kOwnDtype<T>;
    };
    return job_.n <= kGroup && may_be_plain_ && !job_.base[kWhere] && job_.n >= 4 &&
           is_own(kGrad) && is_own(kResult) && is_own(kOut) &&
           lines_in_a_set(at_a_time()) <= (job_.streaming ? 16 : 8) &&
           !(is_short() && lines_in_a_set(3 * job_.n) <= 8);  // of a vector of rows and its results
  }
  // How many lines are read at a time while all rows are summed.
  int64_t at_a_time() const {
    return 2 * ((job_.n + kLanes - 1) / kLanes) * (kLanes > kParts ? 4 : 1);
  }
  // Of so many lines, how many have the same place in their pages, and so in a first level cache,
  // if that has eight ways.
  int64_t lines_in_a_set(int64_t lines) const {
    const int64_t stride = job_.inner[0].stride[kGrad], lowest = stride & -stride;
    return lines * (lowest < 4096 ? lowest : 4096) / 4096;
  }
  // Whether an operand is read or written where it is.
  bool is_in_place(const Access& access) const {
    return access.across && rows_ % kLanes == 0 && (access.item == sizeof(T) || in_halves_);
  }

  SOFTMAXLIB_NOINLINE void fetch(int64_t start, int64_t count) {
    T* const room = room_ + kLanes;
    const auto fetch_one = [&](PanelOperand& of, bool hides) {
      const bool in_place = !hides && is_in_place(of.reader.access());
      of.fetch(job_, place_, start, count, rows_, in_place, room);
    };
    fetch_one(grad_, false);
    fetch_one(y_, job_.base[kWhere]);
    if (job_.base[kWhere]) hide_columns(start, count);
    if (scale_.kind.stable) fetch_one(x_, false);
    out_stride_ = job_.inner[0].stride[kOut];
    out_ = to_ = job_.base[kOut] + place_.offset[kOut] + start * out_stride_;
    streams_ = job_.streaming && is_direct() && out_stride_ % 64 == 0 &&
               reinterpret_cast<uintptr_t>(out_) % 64 == 0;
    if (is_direct()) return;
    to_ = reinterpret_cast<char*>(results_);
    out_stride_ = groups_ * kVector;
  }
  SOFTMAXLIB_NOINLINE void hide_columns(int64_t start, int64_t count) {
    const int64_t stride = job_.inner[0].stride[kWhere];
    const char* p = job_.base[kWhere] + place_.offset[kWhere] + start * stride;
    for (int64_t j = 0; j < count; ++j, p += stride) {
      T* const y = y_.tile + j * groups_ * kLanes;
      hide<V>(reinterpret_cast<const uint8_t*>(p), rows_, y, kLog ? -INFINITY : 0, y);
    }
  }
  bool is_direct() const { return is_in_place(sender_.access()); }
  SOFTMAXLIB_NOINLINE void send(int64_t count) {
    if (is_direct()) return;
    const int pitch = groups_ * kLanes, n = static_cast<int>(job_.n);
    if (is_across_) return sender_.put_columns(out_, rows_, results_, pitch, count);
    const bool in_place = can_transpose_in_place(sender_.access(), n, rows_) && !sender_.collects();
    T* const to = in_place ? reinterpret_cast<T*>(out_) : room_ + kLanes;
    for (int r = 0; r < rows_; r += kLanes)
      columns_to_rows<V>(results_ + r, pitch, n, V::set1(1), to + r * n, n);
    if (!in_place) sender_.put_adjacent(out_, to, rows_ * n);
  }

  static SOFTMAXLIB_INLINE void add(InLanes<f32x16>& sum, InLanes<f32x16>&, InLanes<f32x16> x) {
    sum = sum + x;
  }
  static SOFTMAXLIB_INLINE void add(InLanes<f64x8>& sum, InLanes<f64x8>& error, InLanes<f64x8> x) {
    two_sum(sum.all, error.all, x.all);
  }
  // What an element adds to a sum, quickly or with care.
  template <bool kQuick>
  static SOFTMAXLIB_INLINE auto term(V g, V result) {
    if constexpr (kQuick) {
      return plus_element<kLog>(V::set1(0), true, g, result);
    } else {
      const InLanes<V> x = InLanes<V>::of(of_visible<kLog>(g, result));
      return kLog ? x : x * InLanes<V>::of(result);
    }
  }
  // What the elements of a slice, of which term(j) is one, add to partial sum i.
  template <class Term>
  static SOFTMAXLIB_INLINE InLanes<V> part_of(int i, int count, Term term) {
    if (kLanes > kParts && i + kParts < count) return term(i) + term(i + kParts);
    return term(i);
  }

  // A sum on its way, as isa/sum/sum.hpp has it. Lanes are doubles in memory: older compilers copy
  // structs of vectors in halves, and a load of the whole vector then waits (SoftmaxlibIsa.cmake).
  struct Sum {
    alignas(64) double part[kParts][kLanes], lost[kParts][kLanes];
    double total[kLanes], error[kLanes];

    void start() {
      store_lanes(total, in_all(0, V()));
      store_lanes(error, in_all(0, V()));
    }
    // is_first: since a chunk began.
    SOFTMAXLIB_INLINE void add(int i, bool is_first, InLanes<V> x) {
      InLanes<V> of_part = in_all(0, V()), of_lost = of_part;
      if (!is_first) of_part = at(part[i]), of_lost = at(lost[i]);
      GradientAcross::add(of_part, of_lost, x);
      store_lanes(part[i], of_part);
      if (sizeof(T) == 8) store_lanes(lost[i], of_lost);
    }
    SOFTMAXLIB_NOINLINE void end_chunk() {
      InLanes<V> of_total = at(total), of_error = at(error);
      fold<true>(*this, kParts, of_total, of_error);
      store_lanes(total, of_total);
      store_lanes(error, of_error);
    }
    InLanes<V> value() const { return at(total) + at(error); }
  };
  static SOFTMAXLIB_INLINE InLanes<V> at(const double* lanes) {
    InLanes<V> v;
    load_lanes(lanes, v);
    return v;
  }
  // As Lanes folds its own into a Total. Parts that a row is too short for are zeros.
  static SOFTMAXLIB_INLINE InLanes<V> fold_eight_of(const double (&x)[kParts][kLanes]) {
    const InLanes<V> all[kParts] = {at(x[0]), at(x[1]), at(x[2]), at(x[3]),
                                    at(x[4]), at(x[5]), at(x[6]), at(x[7])};
    return fold_eight(all);
  }
  // kHasLost: more than one group was added, and something may have been rounded away.
  template <bool kHasLost>
  static SOFTMAXLIB_INLINE void fold(const Sum& s, int, InLanes<f32x16>& sum,
                                     InLanes<f32x16>& error) {
    const InLanes<f32x16> all = fold_eight_of(s.part);
    two_sum(sum.low, error.low, all.low);
    two_sum(sum.high, error.high, all.high);
  }
  template <bool kHasLost>
  static SOFTMAXLIB_INLINE void fold(const Sum& s, int parts, InLanes<f64x8>& sum,
                                     InLanes<f64x8>& error) {
    for (int i = 0; i < parts; ++i) two_sum(sum.all, error.all, at(s.part[i]).all);
    if (kHasLost) error = error + fold_eight_of(s.lost);
  }

  // The sum of a row of up to a slice, of which term_of(j) is an element, or of up to a group, of
  // which it is a lane.
  template <class Term>
  static SOFTMAXLIB_INLINE InLanes<V> sum_of(int n, Term term_of) {
    const InLanes<V> zero = in_all(0, V());
    const int parts = n < kParts ? n : kParts;
    Sum s;
    SOFTMAXLIB_NO_UNROLL
    for (int i = 0; i < parts; ++i) store_lanes(s.part[i], part_of(i, n, term_of));
    SOFTMAXLIB_NO_UNROLL
    for (int i = parts; i < kParts; ++i) store_lanes(s.part[i], zero);
    InLanes<V> total = zero, error = zero;
    fold<false>(s, parts, total, error);
    return total + error;
  }
  // The groups of a short row, and their sum. add(sum, is_first, j) is element j and, but for the
  // first, sum.
  template <class Add>
  static SOFTMAXLIB_INLINE V brief_group(int i, int n, Add add) {
    V sum = add(V::set1(0), true, i);
    for (int j = i + 4; j < n; j += 4) sum = add(sum, false, j);
    return sum;
  }
  template <class Group>
  static SOFTMAXLIB_INLINE auto brief_sum(int n, Group group) {
    V of[4];
    for (int i = 0; i < 4; ++i) of[i] = i < n ? group(i) : V::set1(0);
    return Element::own(sum_of_groups(of));
  }
  // The sum of a short row.
  static SOFTMAXLIB_INLINE auto sum_of_slice(Column g, Column y, int n) {
    const auto add = [=](V sum, bool is_first, int j) SOFTMAXLIB_INLINE_LAMBDA {
      return plus_element<kLog>(sum, is_first, g[j], y[j]);
    };
    return brief_sum(n, [=](int i) SOFTMAXLIB_INLINE_LAMBDA { return brief_group(i, n, add); });
  }
  void compute_slice() {
    const int n = static_cast<int>(job_.n);
    fetch(0, n);
    const bool few = n <= (kLog ? 1 : 3) && may_be_plain_ && rows_ >= kLanes;
    bool all = true;
    for (int g = 0; g < groups_; ++g) {
      const Column grad = grad_.column(g), y = y_.column(g);
      if (few && write_few(g)) continue;
      const auto sum = in_rows(sum_of_slice(grad, y, n));
      if (!write_if_plain(g, sum)) all &= finish(g, in_double(sum));
    }
    if (all) send(n);
    else if (!is_direct()) compute_all_alone();
    if (SOFTMAXLIB_UNLIKELY(has_alone_)) compute_those_alone();
  }
  // Rows that fit in registers are read once.
  bool write_few(int g) const {
    if constexpr (kLog) return write_few_of<1>(g);  // of more, exponentials cost more than reading
    if (job_.n == 1) return write_few_of<1>(g);
    return job_.n == 2 ? write_few_of<2>(g) : write_few_of<3>(g);
  }
  template <int kCount>
  SOFTMAXLIB_INLINE bool write_few_of(int g) const {
    const Column grad = grad_.column(g), y = y_.column(g);
    V of_grad[kCount], of_y[kCount];
    for (int j = 0; j < kCount; ++j) of_grad[j] = grad[j], of_y[j] = y[j];
    const auto sum = brief_sum(
        kCount, [&](int j) SOFTMAXLIB_INLINE_LAMBDA { return term<true>(of_grad[j], of_y[j]); });
    if (SOFTMAXLIB_UNLIKELY(!Element::is_good(sum))) return false;
    const typename Element::WithPower element(plain(g, sum));
    char* to = to_ + g * kVector;
    for (int j = 0; j < kCount; ++j, to += out_stride_)
      put(reinterpret_cast<T*>(to), plain_result(element, of_grad[j], of_y[j]), streams_);
    return true;
  }
  template <class Sum>
  SOFTMAXLIB_INLINE bool write_if_plain(int g, Sum sum) const {
    if (SOFTMAXLIB_UNLIKELY(!may_be_plain_ || !Element::is_good(sum))) return false;
    Element::with_plain(has_power_, [&](auto made_of) SOFTMAXLIB_INLINE_LAMBDA {
      const auto element = made_of(plain(g, sum));
      const Column grad = grad_.column(g), y = y_.column(g);
      const bool streams = streams_;
      char* to = to_ + g * kVector;
      for (int64_t j = 0; j < job_.n; ++j, to += out_stride_)
        put(reinterpret_cast<T*>(to), plain_result(element, grad[j], y[j]), streams);
    });
    return true;
  }
  // Sums, but 1 for rows without a probability other than 0: theirs are 0 and may not be trusted as
  // they are, but their results are 0 whatever is taken for them.
  InLanes<V> with_ones(int g, InLanes<V> sum) const {
    const Column y = y_.column(g);
    const V one = V::set1(1);
    V some = of_visible<kLog>(one, y[0]);
    for (int64_t j = 1; j < job_.n; ++j) some = max(some, of_visible<kLog>(one, y[j]));
    return sum + InLanes<V>::of(one - some);
  }
  SOFTMAXLIB_NOINLINE bool write_again_if_plain(int g, InLanes<V> sum) const {
    return write_if_plain(g, sum);
  }
  // A vector of rows that are not as usual; false where they were computed alone.
  SOFTMAXLIB_NOINLINE bool finish(int g, InLanes<V> sum) {
    if (write_again_if_plain(g, with_ones(g, sum))) return true;
    if (can_be_again()) return write_again_if_plain(g, without_those_alone(g, sum));
    const bool quick = Element::is_good(sum);
    if (!quick)
      sum =
          trusted(sum, sum_of(static_cast<int>(job_.n),
                              [grad = grad_.column(g), y = y_.column(g)](int j)
                                  SOFTMAXLIB_INLINE_LAMBDA { return term<false>(grad[j], y[j]); }));
    if (job_.base[kScale] || !all_in_unit(sum)) {
      if (is_direct()) compute_alone(g);
      return false;
    }
    write_any(g, job_.n, Element(scale_, sum, quick));
    return true;
  }
  // Where rows have scales of their own all are written as if their sums could be trusted, and
  // those whose sum cannot are computed again, alone, once all are sent: but not in place.
  bool can_be_again() const { return job_.base[kScale] && !job_.in_place && may_be_plain_; }
  SOFTMAXLIB_NOINLINE InLanes<V> without_those_alone(int g, InLanes<V> sum) {
    double each[kLanes];
    store_lanes(each, sum);
    for (int i = 0; i < kLanes; ++i) {
      is_alone_[g * kLanes + i] = !Element::is_good(in_all(each[i], V()));
      if (is_alone_[g * kLanes + i]) each[i] = 1;
    }
    has_alone_ = true;
    return at(each);
  }
  SOFTMAXLIB_NOINLINE void compute_those_alone() {
    sender_.finish();
    for (int r = 0; r < rows_; ++r)
      if (is_alone_[r]) gradient_of_row<kLog, T>(job_, row_ + r);
    memset(is_alone_, 0, sizeof(is_alone_));
    has_alone_ = false;
  }

  // Rows of up to a group: lane by lane, in the order in which their sums are folded, of all rows.
  void compute_group() {
    const int n = static_cast<int>(job_.n);
    fetch(0, n);
    bool quick = true;
    const auto use = [&](int g, auto sum) SOFTMAXLIB_INLINE_LAMBDA {
      quick &= Element::is_good(sum);
      plain_[g] = plain(g, sum);
    };
    if (is_brief(job_.n)) {
      add_up_groups();
      for (int g = 0; g < groups_; ++g)
        use(g, brief_sum(4, [&](int i) SOFTMAXLIB_INLINE_LAMBDA {
              return load(brief_group_[i] + g * kLanes);
            }));
    } else {
      add_up_lanes();
      for (int g = 0; g < groups_; ++g) use(g, at(wide_sum_[g]));
    }
    if (SOFTMAXLIB_UNLIKELY(!quick)) return compute_in_slices();
    write_slice(n);
  }
  // The same rows, as many at a time as slices are wide.
  SOFTMAXLIB_NOINLINE void compute_in_slices() {
    const Dim& beside = job_.outer[job_.outer_ndim - 1];
    for (int left = rows_; left > 0; left -= rows_) {
      rows_ = left < kGroups * kLanes ? left : kGroups * kLanes;
      groups_ = rows_ / kLanes;
      if (job_.base[kScale]) has_usual_scales();
      if (is_short()) compute_slice();
      else compute_slices();
      row_ += rows_;
      for (int k = 0; k < kOperands; ++k) place_.offset[k] += rows_ * beside.stride[k];
    }
  }
  // The groups of short rows.
  SOFTMAXLIB_NOINLINE void add_up_groups() {
    const T* const like = nullptr;
    const int n = static_cast<int>(job_.n), width = groups_ * kLanes;
    const Column grad = grad_.column(0), y = y_.column(0);
    for (int i = 0; i < 4; ++i) {
      T* const to = brief_group_[i];
      const auto add = [&](auto more) SOFTMAXLIB_INLINE_LAMBDA {
        for (int r = 0; r < width; r += kLanes)
          store(to + r, brief_group(i, i + 4 * more + 1,
                                    [=](V sum, bool is_first, int j) SOFTMAXLIB_INLINE_LAMBDA {
                                      return plus_element<kLog>(sum, is_first,
                                                                load(grad.at(j, like) + r),
                                                                load(y.at(j, like) + r));
                                    }));
      };
      const int more = (n - 1 - i) / 4;
      if (more == 0) add(Elements<0>());
      else if (more == 1) add(Elements<1>());
      else if (more == 2) add(Elements<2>());
      else add(Elements<3>());
    }
  }
  // Of longer ones.
  SOFTMAXLIB_NOINLINE void add_up_lanes() {
    const T* const like = nullptr;
    const int n = static_cast<int>(job_.n), width = groups_ * kLanes;
    const Column grad = grad_.column(0), y = y_.column(0);
    // Lane i of a vector of rows at r, and the one that is added to it in double.
    const auto lane = [=](int i, int r) SOFTMAXLIB_INLINE_LAMBDA {
      V group =
          plus_element<kLog>(V::set1(0), true, load(grad.at(i, like) + r), load(y.at(i, like) + r));
      for (int j = i + kLanes; j < n; j += kLanes)
        group =
            plus_element<kLog>(group, false, load(grad.at(j, like) + r), load(y.at(j, like) + r));
      return InLanes<V>::of(group);
    };
    if constexpr (kIsFloat) {
      double(*const even)[kLanes] = wide_sum_, (*const odd)[kLanes] = wide_error_;
      constexpr int kOrder[4] = {0, 2, 1, 3};
      const auto part = [=](int i, int r)
                            SOFTMAXLIB_INLINE_LAMBDA { return lane(i, r) + lane(i + kParts, r); };
      for (const int i : kOrder)
        for (int r = 0; r < width; r += kLanes) {
          const int g = r / kLanes;
          const InLanes<V> x = part(i, r) + part(i + 4, r);
          if (i == 0) store_lanes(even[g], x);
          else if (i == 1) store_lanes(odd[g], x);
          else if (i == 2) store_lanes(even[g], at(even[g]) + x);
          else store_lanes(even[g], at(even[g]) + (at(odd[g]) + x));
        }
    } else {
      for (int i = 0; i < kParts; ++i)
        for (int r = 0; r < width; r += kLanes) {
          const int g = r / kLanes;
          InLanes<V> sum = in_all(0, V()), error = sum;
          if (i > 0) sum = at(wide_sum_[g]), error = at(wide_error_[g]);
          add(sum, error, lane(i, r));
          store_lanes(wide_sum_[g], i == kParts - 1 ? sum + error : sum);
          store_lanes(wide_error_[g], error);
        }
    }
  }

  bool is_like_out(Operand k) const {
    return Access(job_, k).across && job_.dtype[k] == job_.dtype[kOut];
  }

  // Longer rows.
  void compute_slices() {
    InLanes<V> sum[kGroups];
    in_halves_ = has_halves_ && rows_ % kLanes == 0;
    add_up<true>(sum);
    bool quick = true;
    for (int g = 0; g < groups_; ++g) quick &= Element::is_good(sum[g]);
    if (SOFTMAXLIB_UNLIKELY(!quick)) {
      add_ones(sum);
      quick = true;
      for (int g = 0; g < groups_; ++g) quick &= Element::is_good(sum[g]);
    }
    if (SOFTMAXLIB_UNLIKELY(!quick && can_be_again())) {
      for (int g = 0; g < groups_; ++g) sum[g] = without_those_alone(g, sum[g]);
      quick = true;
    }
    if (SOFTMAXLIB_UNLIKELY(!quick || !may_be_plain_)) return write_others(sum, quick);
    for (int g = 0; g < groups_; ++g) plain_[g] = plain(g, sum[g]);
    for (int64_t start = 0; start < job_.n; start += kSlice) {
      fetch(start, count_from(start));
      write_slice(count_from(start));
      send(count_from(start));
    }
    in_halves_ = false;
    if (SOFTMAXLIB_UNLIKELY(has_alone_)) compute_those_alone();
  }
  // As with_ones() has it.
  SOFTMAXLIB_NOINLINE void add_ones(InLanes<V>* sum) {
    const V one = V::set1(1);
    V some[kGroups];
    for (V& none : some) none = V::set1(0);
    for (int64_t start = 0; start < job_.n; start += kSlice) {
      const int count = count_from(start);
      fetch(start, count);
      with_storage(storage(), V(), [&](const auto* like) SOFTMAXLIB_INLINE_LAMBDA {
        const Column y = y_.column(0);
        for (int j = 0; j < count; ++j) SOFTMAXLIB_NO_UNROLL
        for (int g = 0; g < groups_; ++g)
          some[g] = max(some[g], of_visible<kLog>(one, load(y.at(j, like) + g * kLanes)));
      });
    }
    for (int g = 0; g < groups_; ++g) sum[g] = sum[g] + InLanes<V>::of(one - some[g]);
  }
  // Where elements need more than these sums.
  SOFTMAXLIB_NOINLINE void write_others(InLanes<V>* sum, bool quick) {
    in_halves_ = false;
    if (!quick) {
      InLanes<V> careful[kGroups];
      add_up<false>(careful);
      for (int g = 0; g < groups_; ++g) sum[g] = trusted(sum[g], careful[g]);
    }
    bool alone[kGroups], all = true;
    for (int g = 0; g < groups_; ++g) {
      alone[g] = job_.base[kScale] || !all_in_unit(sum[g]);
      if (alone[g]) compute_alone(g);
      all &= !alone[g];
    }
    for (int64_t start = 0; start < job_.n; start += kSlice) {
      const int count = count_from(start);
      fetch(start, count);
      for (int g = 0; g < groups_; ++g)
        if (!alone[g]) write_any(g, count, Element(scale_, sum[g], quick));
      // Where some are alone, the others are there already: only rows of doubles come here then,
      // and these are written in place, or they are less than a vector, which is alone as a whole.
      if (all) send(count);
    }
  }
  // The elements of the slice that begins there.
  int count_from(int64_t start) const {
    return static_cast<int>(job_.n - start < kSlice ? job_.n - start : kSlice);
  }
  template <bool kQuick>
  SOFTMAXLIB_NOINLINE void add_up(InLanes<V>* sum) {
    const auto of_group = [&](int g, int j) SOFTMAXLIB_INLINE_LAMBDA {
      return InLanes<V>::of(load(group_[j] + g * kLanes));
    };
    if (kQuick && job_.n <= kGroup) {
      for (int64_t start = 0; start < job_.n; start += kSlice) {
        fetch(start, count_from(start));
        add_to_group(start, count_from(start));
      }
      for (int g = 0; g < groups_; ++g) {
        const auto own = [&](int i)
                             SOFTMAXLIB_INLINE_LAMBDA { return load(group_[i] + g * kLanes); };
        const auto lane = [&](int i) SOFTMAXLIB_INLINE_LAMBDA { return of_group(g, i); };
        const int n = static_cast<int>(job_.n);
        sum[g] = in_rows(is_brief(job_.n) ? in_double(brief_sum(n, own)) : sum_of(kLanes, lane));
      }
      return;
    }
    for (int g = 0; g < groups_; ++g) sums_[g].start();
    bool is_first = true;
    for (int64_t start = 0; start < job_.n; start += kSlice) {
      const int count = count_from(start);
      const int64_t end = start + count, in_group = start % kGroup;
      fetch(start, count);
      if (kQuick) {
        add_to_group(start, count);
        if (end % kGroup != 0 && end != job_.n) continue;
        add_to_sums(is_first, in_group ? int{kSlice} : count, of_group);
      } else {
        const Column grad = grad_.column(0), y = y_.column(0);
        add_to_sums(is_first, count, [=](int g, int j) SOFTMAXLIB_INLINE_LAMBDA {
          const T* const like = nullptr;
          return term<false>(load(grad.at(j, like) + g * kLanes), load(y.at(j, like) + g * kLanes));
        });
      }
      is_first = end % kChunk == 0;
      if (!is_first && end != job_.n) continue;
      for (int g = 0; g < groups_; ++g) sums_[g].end_chunk();
    }
    for (int g = 0; g < groups_; ++g) sum[g] = in_rows(sums_[g].value());
  }
  // Elements j of the slices of a group are added in the arithmetic's own type, and of a short row
  // every fourth.
  SOFTMAXLIB_INLINE void add_to_group(int64_t start, int count) {
    const bool brief = is_brief(job_.n);
    with_storage(storage(), V(), [&](const auto* like) SOFTMAXLIB_INLINE_LAMBDA {
      const Column grad = grad_.column(0), y = y_.column(0);
      const int width = groups_ * kLanes;
      for (int j = 0; j < count; ++j) {
        T* const to = group_[brief ? j % 4 : j];
        const bool is_first = brief ? start + j < 4 : start % kGroup == 0;
        const auto *of_grad = grad.at(j, like), *of_y = y.at(j, like);
        for (int i = 0; i < width; i += kLanes)
          store(to + i, plus_element<kLog>(is_first ? V::set1(0) : load(to + i), is_first,
                                           load(of_grad + i), load(of_y + i)));
      }
    });
  }
  // Of less than eight parts the others are zeros.
  template <class Term>
  SOFTMAXLIB_INLINE void add_to_sums(bool is_first, int count, Term term) {
    for (int g = 0; g < groups_; ++g) {
      for (int i = 0; i < kParts && i < count; ++i)
        sums_[g].add(i, is_first,
                     part_of(i, count, [&](int j) SOFTMAXLIB_INLINE_LAMBDA { return term(g, j); }));
      for (int i = count; is_first && i < kParts; ++i) sums_[g].add(i, true, in_all(0, V()));
    }
  }

  // 1 for lanes without a row.
  SOFTMAXLIB_INLINE InLanes<V> in_rows(InLanes<V> sum) const {
    return SOFTMAXLIB_LIKELY(rows_ >= kLanes) ? sum : in_few_rows(sum);
  }
  SOFTMAXLIB_INLINE f32x16 in_rows(f32x16 sum) const {
    return SOFTMAXLIB_LIKELY(rows_ >= kLanes) ? sum : in_few_rows(in_double(sum)).value();
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
  void compute_all_alone() {
    sender_.finish();
    for (int g = 0; g < groups_; ++g) compute_alone(g);
  }
  // Where a sum needs a smaller unit; or rows have scales of their own, and a scale or a sum is not
  // usual.
  void compute_alone(int g) const {
    for (int i = 0; i < kLanes && g * kLanes + i < rows_; ++i)
      gradient_of_row<kLog, T>(job_, row_ + g * kLanes + i);
  }

  // Results, where there is nothing to look at, and others.
  template <class F>
  static SOFTMAXLIB_INLINE V plain_result(const F& element, V grad, V result) {
    const V d = element(grad, result);
    return Plain::kIsMasked ? of_visible<kLog>(d, result) : d;
  }
  SOFTMAXLIB_NOINLINE void write_slice(int count) const {
    Element::with_plain(
        has_power_, [&](auto made_of) SOFTMAXLIB_INLINE_LAMBDA { write_slice_of(count, made_of); });
  }
  template <class F>
  SOFTMAXLIB_INLINE void write_slice_of(int count, F made_of) const {
    with_storage(storage(), V(), [&](auto* like) SOFTMAXLIB_INLINE_LAMBDA {
      const Column grad = grad_.column(0), y = y_.column(0);
      const Plain* const plain = plain_;
      const int64_t step = out_stride_;
      const int groups = groups_;
      const bool streams = streams_;
      char* at = to_;
      for (int j = 0; j < count; ++j, at += step) {
        const auto *of_grad = grad.at(j, like), *of_y = y.at(j, like);
        auto* to = reinterpret_cast<decltype(like)>(at);
        for (int g = 0; g < groups; ++g, of_grad += kLanes, of_y += kLanes, to += kLanes)
          put(to, plain_result(made_of(plain[g]), load(of_grad), load(of_y)), streams);
      }
    });
  }
  // Of the elements that loops over slices see.
  softmaxlib_dtype storage() const { return in_halves_ ? job_.dtype[kOut] : SOFTMAXLIB_F32; }
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
  bool is_group_;
  PanelOperand grad_, y_, x_;
  Sender<V> sender_;
  const bool is_across_;
  // All operands are halves of one dtype and lie across: slices are read and written without tiles.
  const bool has_halves_;
  bool in_halves_ = false;  // now
  Place place_;
  int64_t row_ = 0;
  int rows_ = 0, groups_ = 0;
  char *out_ = nullptr, *to_ = nullptr;  // where results belong, and where they go first
  bool streams_ = false;                 // past the caches
  int64_t out_stride_ = 0;
  Sum sums_[kGroups];
  alignas(64) T group_[kSlice][kGroups * kLanes];
  alignas(64) double wide_sum_[kWide][kLanes], wide_error_[kWide][kLanes];
  alignas(64) T brief_group_[4][kWide * kLanes];
  Plain plain_[kWide];
  bool has_power_ = false, has_alone_ = false;
  bool is_alone_[kMostVectors * kLanes] = {};
  alignas(64) T part_[kMostVectors * kLanes], power_[kMostVectors * kLanes];  // scales of rows
  alignas(64) T results_[kRoom * kLanes];
  // Rows that follow each other, and what transposing and sending read around them.
  alignas(64) T room_[kLanes + kRoom * kLanes + kLanes];
};

}  // namespace
}  // namespace SOFTMAX_ISA
}  // namespace softmaxlib
