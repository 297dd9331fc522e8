// How a job's rows follow each other in memory, and the elements of a row. What is here is compiled
// once for all leaves, so it has nothing inline: a copy from a unit with AVX-512 might be the one
// that every CPU runs.
#pragma once

#include "job.hpp"

namespace softmaxlib {

// Where a row begins: its offset in bytes in every operand.
struct Place {
  int64_t offset[kOperands];
};

// Rows in order, one at a time.
class Rows {
 public:
  Place place;  // of the current one

  Rows(const Layout& job, int64_t row);
  void next();

 private:
  const Layout& job_;
  int64_t index_[SOFTMAXLIB_MAX_NDIM];
};

// Rows at one distance from each other: those from one row on to the end of the last dimension.
class RowRun {
 public:
  const Job& job;
  Place place;  // of the first
  Dim step;     // to the next
  int64_t rows;

  RowRun(const Job& job, int64_t row);
  // Past so many of these rows; behind the last, to the next run.
  void advance(int64_t count);

 private:
  void begin(int64_t in_run);
  void next();

  Place start_;  // of the run
  int64_t index_[SOFTMAXLIB_MAX_NDIM];
};

// The elements [start, start + n) of one operand of a row as stretches of constant stride.
class Stretches {
 public:
  char* p;         // the first element of the current stretch
  int64_t stride;  // from one to the next, in bytes
  int64_t done;    // elements before this stretch
  int64_t count;   // elements of it; 0: the end

  Stretches(const Layout& job, const Place& place, Operand operand, int64_t start, int64_t n);
  void next();

 private:
  const Layout& job_;
  const Operand operand_;
  const int64_t n_;
  int64_t index_[SOFTMAXLIB_MAX_NDIM];
};

// How many elements a row sees: causal ones those up to column i + causal_offset.
int64_t visible_elements(const Job& job, const Place& place);

// Whether elements [start, start + n) of a row take part: `where`, as bytes.
void gather_visible(const Layout& job, const Place& place, int64_t start, int64_t n, uint8_t* to);
// How many of a row's first n elements do, counted as far as `most`.
int64_t count_visible(const Layout& job, const Place& place, int64_t n, int64_t most);

// Elements of an integer dtype, so many bytes from each other; rounded once.
void gather_integers(softmaxlib_dtype dtype, const char* p, int64_t stride, int64_t count,
                     float* to);
void gather_integers(softmaxlib_dtype dtype, const char* p, int64_t stride, int64_t count,
                     double* to);

}  // namespace softmaxlib
