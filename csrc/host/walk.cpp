#include "walk.hpp"

#include <string.h>

#include <algorithm>

namespace softmaxlib {
namespace {

template <class From, class To>
void convert_all(const char* p, int64_t stride, int64_t count, To* to) {
  for (int64_t i = 0; i < count; ++i) {
    From x;
    memcpy(&x, p + i * stride, sizeof(From));
    to[i] = static_cast<To>(x);
  }
}
template <class To>
void convert_integers(softmaxlib_dtype dtype, const char* p, int64_t stride, int64_t count,
                      To* to) {
  switch (dtype) {
#define SOFTMAXLIB_FLOAT(name, NAME, numpy, bytes)
#define SOFTMAXLIB_INTEGER(NAME, numpy, type) \
  case SOFTMAXLIB_##NAME: return convert_all<type>(p, stride, count, to);
#include "registry/dtypes.def"
#undef SOFTMAXLIB_FLOAT
#undef SOFTMAXLIB_INTEGER
    default: return;
  }
}

// Row `row` over the first dimensions of a job's rows, and the one after a row.
void locate(const Layout& job, int ndim, int64_t row, Place* place, int64_t* index) {
  for (int d = ndim - 1; d >= 0; row /= job.outer[d].size, --d) {
    index[d] = row % job.outer[d].size;
    for (int k = 0; k < kOperands; ++k) place->offset[k] += index[d] * job.outer[d].stride[k];
  }
}
void step_on(const Layout& job, int ndim, Place* place, int64_t* index) {
  for (int d = ndim - 1; d >= 0; --d) {
    const Dim& dim = job.outer[d];
    const bool wraps = ++index[d] == dim.size;
    for (int k = 0; k < kOperands; ++k)
      place->offset[k] += wraps ? dim.stride[k] - dim.size * dim.stride[k] : dim.stride[k];
    if (!wraps) return;
    index[d] = 0;
  }
}

}  // namespace

Rows::Rows(const Layout& job, int64_t row) : place(), job_(job) {
  locate(job, job.outer_ndim, row, &place, index_);
}

void Rows::next() { step_on(job_, job_.outer_ndim, &place, index_); }

RowRun::RowRun(const Job& j, int64_t row) : job(j), start_() {
  const int last = job.outer_ndim - 1;
  if (last < 0) step = {1, {}};
  else step = job.outer[last];
  locate(job, last, row / step.size, &start_, index_);
  begin(row % step.size);
}

void RowRun::advance(int64_t count) {
  rows -= count;
  if (rows == 0) return next();
  for (int k = 0; k < kOperands; ++k) place.offset[k] += count * step.stride[k];
}

void RowRun::begin(int64_t in_run) {
  rows = step.size - in_run;
  for (int k = 0; k < kOperands; ++k) place.offset[k] = start_.offset[k] + in_run * step.stride[k];
}

void RowRun::next() {
  step_on(job, job.outer_ndim - 1, &start_, index_);
  begin(0);
}

Stretches::Stretches(const Layout& job, const Place& place, Operand operand, int64_t start,
                     int64_t n)
    : p(job.base[operand] + place.offset[operand]), done(0), job_(job), operand_(operand), n_(n) {
  const int last = job.inner_ndim - 1;
  for (int d = last; d >= 0; --d) {
    index_[d] = start % job.inner[d].size;
    start /= job.inner[d].size;
    p += index_[d] * job.inner[d].stride[operand];
  }
  stride = job.inner[last].stride[operand];
  count = std::min(job.inner[last].size - index_[last], n);
}

void Stretches::next() {
  done += count;
  p += count * stride;
  const int last = job_.inner_ndim - 1;
  index_[last] += count;
  for (int d = last; d > 0 && index_[d] == job_.inner[d].size; --d) {
    p += job_.inner[d - 1].stride[operand_] - job_.inner[d].size * job_.inner[d].stride[operand_];
    index_[d] = 0;
    ++index_[d - 1];
  }
  count = std::min(job_.inner[last].size - index_[last], n_ - done);
}

void gather_visible(const Layout& job, const Place& place, int64_t start, int64_t n, uint8_t* to) {
  for (Stretches s(job, place, kWhere, start, n); s.count; s.next())
    if (s.stride == 1) memcpy(to + s.done, s.p, static_cast<size_t>(s.count));
    else
      for (int64_t i = 0; i < s.count; ++i)
        to[s.done + i] = static_cast<uint8_t>(s.p[i * s.stride]);
}

int64_t count_visible(const Layout& job, const Place& place, int64_t n, int64_t most) {
  int64_t seen = 0;
  for (Stretches s(job, place, kWhere, 0, n); s.count && seen < most; s.next())
    for (int64_t i = 0; i < s.count && seen < most; ++i) seen += s.p[i * s.stride] != 0;
  return seen;
}

void gather_integers(softmaxlib_dtype dtype, const char* p, int64_t stride, int64_t count,
                     float* to) {
  convert_integers(dtype, p, stride, count, to);
}
void gather_integers(softmaxlib_dtype dtype, const char* p, int64_t stride, int64_t count,
                     double* to) {
  convert_integers(dtype, p, stride, count, to);
}

int64_t visible_elements(const Job& job, const Place& place) {
  const int64_t i = place.offset[kQuery], offset = job.causal_offset;
  if (!job.causal || offset >= job.n - 1 - i) return job.n;
  return offset < -i ? 0 : i + offset + 1;
}

}  // namespace softmaxlib
