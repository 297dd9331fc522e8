// Rows one after the other: as they lie, or some at a time by way of a tile.
#pragma once

#include "isa/stage/stage_rows.hpp"

namespace softmaxlib {
namespace SOFTMAX_ISA {
namespace {

// What is done with a row, once compiled, whether rows come in a tile or not.
template <class T>
struct RowVisitor {
  void (*visit)(const void* f, const Row<T>& row, const Place& place);
  const void* f;

  template <class F>
  explicit RowVisitor(const F& function)
      : visit([](const void* of, const Row<T>& row, const Place& place) {
          (*static_cast<const F*>(of))(row, place);
        }),
        f(&function) {}
  void operator()(const Row<T>& row, const Place& place) const { visit(f, row, place); }
};

// Rows that lie side by side come into a tile together, and their results leave it together: every
// line of memory is read and written once.
template <class T>
SOFTMAXLIB_NOINLINE void visit_in_tiles(const Job& job, int64_t row, int64_t stop, char* scratch,
                                        RowVisitor<T> visit) {
  using V = typename vector_of<T>::type;
  constexpr int64_t kItem = sizeof(T);
  const int64_t pitch = tile_pitch(job.n * kItem) / kItem;
  T* const hi = reinterpret_cast<T*>(scratch + scratch_bytes(job.n, job.dtype[kOut], false, true));
  T* const lo = job.has_low ? hi + job.tile * pitch : nullptr;
  int32_t one_block[kVectorsPerBlock / kVectorsPerChunk];
  Stager<V> stager(job);
  Sender<V> sender(job);
  for (RowRun run(job, row); row < stop;) {
    int64_t rows = job.tile < stop - row ? job.tile : stop - row;
    if (rows > run.rows) rows = run.rows;
    const int count = static_cast<int>(rows);
    stager.fetch(run, count, hi, lo, pitch, nullptr);
    Place place = run.place;
    for (int r = 0; r < count; ++r) {
      const InTile<T> tile = {hi + r * pitch, lo ? lo + r * pitch : nullptr};
      visit(Row<T>(job, place, scratch, one_block, &tile), place);
      for (int k = 0; k < kOperands; ++k) place.offset[k] += run.step.stride[k];
    }
    char* const y = job.base[kOut] + run.place.offset[kOut];
    if (!job.reduces && sender.sends_squares()) {
      sender.put_squares(y, hi, pitch, count, nullptr);
    } else if (!job.reduces) {
      for (int r = 0; r < count; ++r) sender.put(y + r * run.step.stride[kOut], hi + r * pitch, 1);
    }
    row += rows;
    run.advance(rows);
  }
  sender.finish();
}
template <class T>
SOFTMAXLIB_NOINLINE void visit_rows(const Job& job, int64_t row, int64_t stop, char* scratch,
                                    RowVisitor<T> visit) {
  int32_t one_block[kVectorsPerBlock / kVectorsPerChunk];
  for (Rows rows(job, row); row < stop; ++row, rows.next())
    visit(Row<T>(job, rows.place, scratch, one_block), rows.place);
}

// f(row, its place) for rows [start, stop).
template <class T, class F>
inline void for_each_row(const Job& job, int64_t start, int64_t stop, char* scratch, const F& f) {
  const DefaultFloatingPoint environment;
  const auto visit_all = job.tile ? visit_in_tiles<T> : visit_rows<T>;
  visit_all(job, start, stop, scratch, RowVisitor<T>(f));
  stream_fence();
}

}  // namespace
}  // namespace SOFTMAX_ISA
}  // namespace softmaxlib
