// Gradients of rows of any length that lie side by side in all operands: a row per lane.
#pragma once

#include "isa/kernels/gradient_row.hpp"

namespace softmaxlib {
namespace SOFTMAX_ISA {
namespace {

template <bool kLog, class T>
class GradientAcross {
 public:
  using V = typename vector_of<T>::type;
  using Element = ElementGradient<kLog, V>;
  static constexpr int kLanes = V::lanes;

  static bool takes(const Job& job) {
    const GradientKind kind(job.function);
    const auto crosses = [&](Operand k) { return Access(job, k).across; };
    return !kind.reduces && job.inner_ndim == 1 && crosses(kGrad) && crosses(kResult) &&
           crosses(kOut) && (!kind.stable || crosses(kX)) && !job.base[kScale] &&
           (!job.base[kWhere] || job.outer[job.outer_ndim - 1].stride[kWhere] == 1);
  }

  explicit GradientAcross(const Job& job)
      : job_(job),
        scale_(GradientKind(job.function), affine_of(job, RowRun(job, 0).place, {0, 0})),
        grad_(job, kGrad),
        y_(job, kResult),
        x_(job, kX),
        out_(job, kOut) {
    // Panels that stay in the second level cache, if they do not get too narrow.
    constexpr int64_t kBytes = 1 << 19;
    most_ = kBytes / (job.n * (grad_.group + y_.group));
    most_ = (most_ < 4 ? kGroups : most_ > kGroups ? kGroups : most_) * kLanes;
  }

  void compute(int64_t row, int64_t stop) {
    for (RowRun run(job_, row); row < stop;) {
      int64_t rows = run.rows < stop - row ? run.rows : stop - row;
      if (rows > most_) rows = most_;
      place_ = run.place;
      grad_.first = job_.base[kGrad] + place_.offset[kGrad];
      y_.first = job_.base[kResult] + place_.offset[kResult];
      x_.first = job_.base[kX] + place_.offset[kX];
      out_.first = job_.base[kOut] + place_.offset[kOut];
      rows_ = static_cast<int>(rows);
      groups_ = (rows_ + kLanes - 1) / kLanes;
      if (sum_up()) {
        write();
      } else {
        for (int64_t r = 0; r < rows; ++r) gradient_of_row<kLog, T>(job_, row + r);
      }
      row += rows;
      run.advance(rows);
    }
  }

 private:
  static constexpr int kGroups = 8,
                       kParts = 8;  // a sum has eight partial ones: Lanes of isa/sum/sum.hpp

  int rows_of(int group) const {
    const int left = rows_ - group * kLanes;
    return left < kLanes ? left : kLanes;
  }
  // An operand: element j of every row is a contiguous strip.
  struct Strips {
    softmaxlib_dtype dtype;
    char* first;
    int64_t stride, group;

    Strips(const Job& job, Operand k)
        : dtype(job.dtype[k]),
          first(nullptr),
          stride(job.inner[0].stride[k]),
          group(kLanes * float_item(job.dtype[k])) {}
    int64_t item() const { return group / kLanes; }
    SOFTMAXLIB_INLINE V load(int g, int64_t j, int rows) const {
      return load_some(dtype, first + j * stride + g * group, rows, V());
    }
    // The rows after these often follow them.
    SOFTMAXLIB_INLINE void prefetch_next(int g, int64_t j, int64_t n) const {
      prefetch(first + (j + n) * stride + g * group);
    }
  };
  SOFTMAXLIB_INLINE V masked(V v, V result, int group, int64_t j) const {
    using Mask = typename V::Mask;
    if (!job_.base[kWhere]) return of_visible<kLog>(v, result, static_cast<Mask*>(nullptr));
    const auto* const where =
        reinterpret_cast<const uint8_t*>(job_.base[kWhere] + place_.offset[kWhere] +
                                         j * job_.inner[0].stride[kWhere] + group * kLanes);
    Mask in;
    if (rows_of(group) == kLanes) {
      in = load_mask(where, v);
    } else {
      uint8_t bytes[kLanes] = {};
      memcpy(bytes, where, static_cast<size_t>(rows_of(group)));
      in = load_mask(bytes, v);
    }
    return of_visible<kLog>(v, result, &in);
  }

  // What one element adds to a sum, and what that rounds away.
  SOFTMAXLIB_INLINE InLanes<V> term(int group, int64_t j, InLanes<V>& error) const {
    const V result = y_.load(group, j, rows_of(group));
    const V g = masked(grad_.load(group, j, rows_of(group)), result, group, j);
    if constexpr (kLog) return InLanes<V>::of(g);
    else return product(g, result, error);
  }
  static SOFTMAXLIB_INLINE InLanes<f32x16> product(f32x16 a, f32x16 b, InLanes<f32x16>&) {
    return InLanes<f32x16>::of(a) * InLanes<f32x16>::of(b);
  }
  static SOFTMAXLIB_INLINE InLanes<f64x8> product(f64x8 a, f64x8 b, InLanes<f64x8>& error) {
    const f64x8 product = a * b;
    error = {error.all + fma(a, b, f64x8::set1(0) - product)};
    return {product};
  }
  // The same of a group, a vector of the row from each other.
  SOFTMAXLIB_INLINE InLanes<V> four(int group, int64_t j, int64_t stop) const {
    V sum = V::set1(0);
    for (int64_t i = j; i < stop && i < j + kVectorsPerGroup * kLanes; i += kLanes) {
      const V result = y_.load(group, i, rows_of(group));
      V g = grad_.load(group, i, rows_of(group));
      y_.prefetch_next(group, i, job_.n);
      grad_.prefetch_next(group, i, job_.n);
      if (job_.base[kWhere]) g = masked(g, result, group, i);
      sum = plus_element<kLog>(sum, i == j, g, result);
    }
    return InLanes<V>::of(sum);
  }
  static SOFTMAXLIB_INLINE void add(InLanes<f32x16>& sum, InLanes<f32x16>&, InLanes<f32x16> x) {
    sum = sum + x;
  }
  static SOFTMAXLIB_INLINE void add(InLanes<f64x8>& sum, InLanes<f64x8>& error, InLanes<f64x8> x) {
    two_sum(sum.all, error.all, x.all);
  }

  // The sums of all rows; false where one needs a smaller unit.
  bool sum_up() {
    InLanes<V> sum[kGroups];
    if (sizeof(T) == 4 && job_.n <= kVectorsPerGroup * kLanes)
      for (int g = 0; g < groups_; ++g) sum[g] = sum_of_group(g);
    else add_up<sizeof(T) == 4>(sum);
    bool quick = true;
    for (int g = 0; g < groups_; ++g) quick &= all_trusted(in_rows(sum[g], g));
    if (SOFTMAXLIB_UNLIKELY(!quick)) {
      InLanes<V> careful[kGroups];
      add_up<false>(careful);
      for (int g = 0; g < groups_; ++g) sum[g] = trusted(sum[g], careful[g]);
    }
    bool good = true;
    for (int g = 0; g < groups_; ++g) {
      element_[g] = Element(scale_, in_rows(sum[g], g), quick);
      if constexpr (sizeof(T) == 8) {
        double each[kLanes];
        store_lanes(each, sum[g]);
        for (int i = 0; i < rows_of(g); ++i) good &= !needs_smaller_unit(each[i]);
      }
    }
    return good;
  }
  // 1 for lanes without a row.
  InLanes<V> in_rows(InLanes<V> sum, int group) const {
    if (rows_of(group) == kLanes) return sum;
    double each[kLanes];
    store_lanes(each, sum);
    for (int i = rows_of(group); i < kLanes; ++i) each[i] = 1;
    load_lanes(each, sum);
    return sum;
  }
  static InLanes<V> trusted(InLanes<V> sum, InLanes<V> careful) {
    double each[kLanes], better[kLanes];
    store_lanes(each, sum);
    store_lanes(better, careful);
    for (int i = 0; i < kLanes; ++i)
      if (!all_trusted(in_all(each[i], V()))) each[i] = better[i];
    load_lanes(each, sum);
    return sum;
  }
  // Rows of a single group of floats.
  InLanes<V> sum_of_group(int g) const {
    const int64_t n = job_.n;
    InLanes<V> part[kParts];
    for (int i = 0; i < kParts; ++i) {
      part[i] = in_all(0, V());
      if (i < n) part[i] = four(g, i, n);
      if (kLanes > kParts && i + kParts < n) part[i] = part[i] + four(g, i + kParts, n);
    }
    return fold_eight(part);
  }
  template <bool kQuick>
  SOFTMAXLIB_NOINLINE void add_up(InLanes<V> (&sum)[kGroups]) {
    constexpr int64_t kChunk = kVectorsPerChunk * kLanes;
    InLanes<V> error[kGroups];
    for (int g = 0; g < groups_; ++g) sum[g] = error[g] = in_all(0, V());
    for (int64_t start = 0; start < job_.n; start += kChunk) {
      const int64_t stop = job_.n - start < kChunk ? job_.n : start + kChunk;
      for (int g = 0; g < groups_; ++g)
        for (int i = 0; i < kParts; ++i) sums_[g][i] = errors_[g][i] = in_all(0, V());
      for (int64_t j = start; j < stop; j += kLanes * (kQuick ? kVectorsPerGroup : 1))
        for (int i = 0; i < kParts && j + i < stop; ++i)
          for (int g = 0; g < groups_; ++g) {
            const bool two = kLanes > kParts && j + i + kParts < stop;
            InLanes<V>& lost = errors_[g][i];
            InLanes<V> x = kQuick ? four(g, j + i, stop) : term(g, j + i, lost);
            if (two)
              x = x + (kQuick ? four(g, j + i + kParts, stop) : term(g, j + i + kParts, lost));
            add(sums_[g][i], lost, x);
          }
      for (int g = 0; g < groups_; ++g) fold(g, sum[g], error[g]);
    }
    for (int g = 0; g < groups_; ++g) sum[g] = sum[g] + error[g];
  }
  // As Lanes folds its own into a Total.
  void fold(int g, InLanes<f32x16>& sum, InLanes<f32x16>& error) const {
    const InLanes<f32x16> all = fold_eight(sums_[g]);
    two_sum(sum.low, error.low, all.low);
    two_sum(sum.high, error.high, all.high);
  }
  void fold(int g, InLanes<f64x8>& sum, InLanes<f64x8>& error) const {
    for (const InLanes<f64x8>& part : sums_[g]) two_sum(sum.all, error.all, part.all);
    error = error + fold_eight(errors_[g]);
  }

  void write() const {
    bool plain = !job_.base[kWhere];
    for (int g = 0; g < groups_; ++g) plain &= element_[g].is_plain();
    if (!plain)
      return write_each([this](int g, int64_t j, int rows) SOFTMAXLIB_INLINE_LAMBDA {
        const V y = y_.load(g, j, rows), x = scale_.kind.stable ? x_.load(g, j, rows) : V::set1(0);
        return masked(element_[g](grad_.load(g, j, rows), y, x), y, g, j);
      });
    write_each([this](int g, int64_t j, int rows) SOFTMAXLIB_INLINE_LAMBDA {
      const typename Element::Plain element = {element_[g].hi(), element_[g].lo()};
      const V y = y_.load(g, j, rows), d = element(grad_.load(g, j, rows), y);
      using Mask = typename V::Mask;
      if (!Element::Plain::kIsMasked) return d;
      return of_visible<kLog>(d, y, static_cast<Mask*>(nullptr));
    });
  }
  // result(group, j, rows): element j of the rows of a group.
  template <class Result>
  SOFTMAXLIB_INLINE void write_each(Result result) const {
    constexpr softmaxlib_dtype kOwn = sizeof(T) == 4 ? SOFTMAXLIB_F32 : SOFTMAXLIB_F64;
    alignas(64) T results[kGroups * kLanes];
    const int done = out_.dtype == kOwn ? rows_ / kLanes * kLanes : 0;
    for (int64_t j = 0; j < job_.n; ++j) {
      char* const out = out_.first + j * out_.stride;
      int g = 0;
      for (; g < done / kLanes; ++g)
        store(reinterpret_cast<T*>(out) + g * kLanes, result(g, j, kLanes));
      for (; g < groups_; ++g) store(results + g * kLanes, result(g, j, rows_of(g)));
      if (done < rows_)
        store_all(out_.dtype, out + done * out_.item(), out_.item(), rows_ - done, results + done);
    }
  }

  const Job& job_;
  const GradientScale scale_;
  int64_t most_;
  Strips grad_, y_, x_, out_;
  Place place_;
  int rows_ = 0, groups_ = 0;
  InLanes<V> sums_[kGroups][kParts], errors_[kGroups][kParts];
  Element element_[kGroups];
};

}  // namespace
}  // namespace SOFTMAX_ISA
}  // namespace softmaxlib
