// Not in the paper: many rows, two_pass_reload with the passes of neighbours in one loop. While the
// exponentials of a row are summed and stored in a buffer that stays in cache, those of the row
// before are read from the same place of it, scaled and written. So x is read once, y written once
// (2N), both all the time.
#pragma once

#include "isa/kernels/pipelined.hpp"
#include "isa/kernels/softmax_two_pass.hpp"
#include "isa/kernels/softmax_two_pass_reload.hpp"

namespace softmaxlib {
namespace SOFTMAX_ISA {
namespace {

// What rows leave of a vector of y that is not full yet: adjacent rows share it, and half a cache
// line written past the caches would have to be read first.
template <class D>
struct Edge {
  using V = typename vector_of<D>::type;
  D part[V::lanes];
  D* y = nullptr;  // where it goes
  int count = 0;

  void flush() {
    if (count) store_n(y, load(part), count);
    count = 0;
  }
  void begin(D* to, V v, int n) {
    flush();  // of a row whose neighbour was computed alone
    y = to;
    count = n;
    store_n(part, v, n);
  }
  // The first n elements of the row at `to`, which end at an aligned vector.
  void end(D* to, V v, int n) {
    if (count + n == V::lanes && y + count == to) {
      store_n(part + count, v, n);
      stream(y, load(part));
      count = 0;
    } else {
      flush();
      store_n(to, v, n);
    }
  }
};

// A row's exponentials on their way from the buffer to y: elements [i + head, i + head + group) at
// group i, where the head aligns streaming stores. They are read before the next row's replace
// them.
template <class D>
class Outgoing {
 public:
  using V = typename vector_of<D>::type;
  using T = typename V::elem;

  explicit Outgoing(Edge<D>* edge) : edge_(edge) {}
  Outgoing(Edge<D>* edge, const T* buffer, char* y, int64_t n, T scale, bool streaming)
      : edge_(edge), buffer_(buffer), y_(reinterpret_cast<D*>(y)), n_(n), scale_(scale) {
    constexpr int64_t kItem = sizeof(D), kVector = V::lanes * kItem;
    const int64_t past = static_cast<int64_t>(reinterpret_cast<uintptr_t>(y)) % kVector;
    streaming_ = streaming && past % kItem == 0 && n >= V::lanes;
    if (streaming_ && past) head_ = (kVector - past) / kItem;
  }

  void write_head() const {
    const int n = static_cast<int>(head_);
    if (n) edge_->end(y_, load_n(buffer_, n, 0) * V::set1(scale_), n);
  }
  bool streaming() const { return streaming_; }
  SOFTMAXLIB_INLINE void write_group(int64_t i) const {
    i += head_;
    if (i + kVectorsPerGroup * V::lanes > n_) return write_rest(i);
    for (int j = 0; j < kVectorsPerGroup; ++j, i += V::lanes) put(i);
  }
  void write_all() const { write_rest(head_); }

 private:
  SOFTMAXLIB_NOINLINE void write_rest(int64_t i) const {
    for (; i + V::lanes <= n_; i += V::lanes) put(i);
    if (i >= n_) return;
    const int n = static_cast<int>(n_ - i);
    const V y = load_n(buffer_ + i, n, 0) * V::set1(scale_);
    if (streaming_) edge_->begin(y_ + i, y, n);
    else store_n(y_ + i, y, n);
  }
  SOFTMAXLIB_INLINE void put(int64_t i) const {
    const V y = load(buffer_ + i) * V::set1(scale_);
    if (streaming_) stream(y_ + i, y);
    else store(y_ + i, y);
  }

  Edge<D>* edge_;
  const T* buffer_ = nullptr;
  D* y_ = nullptr;
  int64_t n_ = 0, head_ = 0;
  T scale_ = 0;
  bool streaming_ = false;
};

// Elements of a row that is read while the one before is written, which the hardware's prefetchers
// do not keep up with. Of shorter rows it would be too late from the second level.
template <class D>
struct ReadAhead : Contiguous<D> {
  using V = typename Contiguous<D>::V;
  FetchAhead fetch;

  ReadAhead(const D* x, FetchAhead how) : Contiguous<D>{x, 0}, fetch(how) {}
  V load(int64_t i) const {
    fetch(reinterpret_cast<const char*>(this->p + i) + kFetchAhead);
    return SOFTMAX_ISA::load(this->p + i);
  }
};

// The sum of a row whose exponentials go to the buffer, each chunk under its reference.
template <class D, class T, class Beside>
inline auto sum_into(T* buffer, const D* x, int64_t n, int32_t* references, Beside beside) {
  using E = Exp<typename vector_of<D>::type>;
  constexpr int64_t kBlock = Row<T>::kBlock;
  constexpr int64_t kShort = 8192;
  const FetchAhead fetch(n * static_cast<int64_t>(sizeof(D)) < kShort);
  RowSum<E> total;
  for (int64_t start = 0; start < n; start += kBlock) {
    BlockState<typename E::V> state;
    sum_piece_of<E, false, true>(ReadAhead<D>(x + start, fetch), buffer + start,
                                 n - start < kBlock ? n - start : kBlock, Unknown(), state,
                                 references + start / Row<T>::kChunk,
                                 [&](int64_t i) SOFTMAXLIB_INLINE_LAMBDA { beside(start + i); });
    RowSum<E> block;
    static_cast<Total&>(block) = state.total;
    if (start == 0) total = block;
    else total.merge(block);
  }
  return total;
}

// The same of a row with options, whose arguments are made in a stage, a chunk at a time. While a
// chunk is summed, operands are fetched further ahead than the stage does it, so that memory goes
// on being read. Not inline: the stage would lie on the stack of the loop for plain rows, which
// then is slower.
template <class E, class T, class Beside>
SOFTMAXLIB_NOINLINE RowSum<E> sum_with_options(const Job& job, const Place& place, T* buffer,
                                               char* references, Beside beside) {
  constexpr int64_t kGroup = kVectorsPerGroup * E::V::lanes;
  constexpr int64_t kBytes = kFetchAhead + Row<T>::kChunk * int64_t{sizeof(T)};
  int32_t* const of_chunks = reinterpret_cast<int32_t*>(references);
  const Row<T> row(job, place, references, of_chunks, nullptr, {nullptr, nullptr, buffer});
  const OperandsAhead ahead(job, place, true, kBytes);
  return store_of<E>(row, Unknown(), [beside, ahead](int64_t i) SOFTMAXLIB_INLINE_LAMBDA {
    beside(i);
    ahead.fetch(i, kGroup);
  });
}

template <class D>
inline void softmax_pipelined_as(D*, const Job& job, int64_t first, int64_t last, char* scratch) {
  using T = typename vector_of<D>::type::elem;
  using E = Exp<typename vector_of<D>::type>;
  constexpr int64_t kChunk = Row<T>::kChunk;
  const int64_t n = job.n;
  T* const buffer = reinterpret_cast<T*>(scratch);
  char* const kept = scratch + pipelined_buffer(job);
  int32_t* const references = reinterpret_cast<int32_t*>(kept);
  int32_t one_block[kVectorsPerBlock / kVectorsPerChunk];

  Edge<D> edge;
  Outgoing<D> before(&edge);
  Rows rows(job, first);
  for (int64_t r = first; r < last; ++r, rows.next()) {
    const Place& place = rows.place;
    const auto* const x = reinterpret_cast<const D*>(job.base[kX] + place.offset[kX]);
    char* const y = job.base[kOut] + place.offset[kOut];
    before.write_head();
    if (!job.plain && !before.streaming()) {  // with options only what streams is written beside
      before.write_all();
      before = Outgoing<D>(&edge);
    }
    const auto beside = [before](int64_t i) SOFTMAXLIB_INLINE_LAMBDA { before.write_group(i); };
    RowSum<E> total;
    if (job.plain) total = sum_into(buffer, x, n, references, beside);
    else if constexpr (sizeof(D) == sizeof(T))
      total = sum_with_options<E>(job, place, buffer, kept, beside);
    before = Outgoing<D>(&edge);
    const bool is_one = job.base[kWhere] && count_visible(job, place, n, 2) == 1;
    if (!usable(total) || is_one) {
      run_softmax(Row<T>(job, place, nullptr, one_block), softmax_two_pass<T>);
      continue;
    }
    for (int64_t i = 0; i < n; i += kChunk) {
      if (references[i / kChunk] == total.reference) continue;
      const ScaleDown<typename vector_of<D>::type> down(references[i / kChunk] - total.reference);
      map_elements(Contiguous<T>{buffer + i}, buffer + i, n - i < kChunk ? n - i : kChunk, false,
                   down);
    }
    before = Outgoing<D>(&edge, buffer, y, n, static_cast<T>(reciprocal(total)), job.streaming);
  }
  before.write_head();
  before.write_all();
  edge.flush();
}

template <class T>
inline void softmax_pipelined(const Job& job, int64_t first, int64_t last, char* scratch) {
  const bool with_options =
      job.linear && job.dtype[kOut] == kOwnDtype<T> && !job.causal && !job.base[kSink];
  if (!with_options && !(job.direct && job.plain))
    return rows_pipelined<T>(job, first, last, scratch, run_row<T, softmax_two_pass_reload<T>>);
  with_storage(job.dtype[kOut], typename vector_of<T>::type(),
               [&](auto* storage) { softmax_pipelined_as(storage, job, first, last, scratch); });
}

}  // namespace
}  // namespace SOFTMAX_ISA
}  // namespace softmaxlib
