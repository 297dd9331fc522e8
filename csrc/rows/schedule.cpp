#include "rows/schedule.hpp"

#include <algorithm>

#include "cpu.hpp"
#include "rows/layout.hpp"

namespace softmaxlib {
namespace {

// A parallel call pays from about this many elements per task on.
constexpr int64_t kElementsPerTask = 65536;

// Strided rows are gathered so many bytes side by side, in a tile of at most so many bytes in all.
constexpr int64_t kTileWidth = 64, kTileBytes = int64_t{1} << 21;

// So that a thread that is held up delays the others by little.
constexpr int64_t kTasksPerThread = 4;

int64_t cache_or(int level, int64_t fallback) {
  const int64_t size = cache_size(level);
  return size ? size : fallback;
}
int64_t last_level() {
  static const int64_t size = std::max(cache_or(3, int64_t{32} << 20), cache_or(2, 0));
  return size;
}

bool reloads(softmaxlib_algorithm a) {
  return a == SOFTMAXLIB_THREE_PASS_RELOAD || a == SOFTMAXLIB_TWO_PASS_RELOAD;
}

// How many rows to gather at once: those whose elements share cache lines. Only what a direct row
// could be but for its strides.
int64_t tile_of(const Job& job, const softmaxlib_options& options) {
  const int64_t item = item_size(job.dtype[kX]);
  if (job.direct || job.dtype[kX] != job.dtype[kOut] || job.inner_ndim != 1 || !job.outer_ndim ||
      options.bias || options.where || options.temperatures || options.temperature != 1)
    return 0;
  const Dim& across = job.outer[job.outer_ndim - 1];
  if (across.stride[kX] != item) return 0;
  const int64_t rows =
      std::min({kTileWidth / item, across.size, kTileBytes / tile_pitch(job.n * item)});
  return rows > 1 ? rows : 0;
}

// The nearest relative that the registry has for this function and job.
softmaxlib_algorithm registered(softmaxlib_function function, const Job& job, bool tiled,
                                softmaxlib_algorithm a) {
  const bool softmax = function == SOFTMAXLIB_SOFTMAX, stablemax = function == SOFTMAXLIB_STABLEMAX;
  const softmaxlib_dtype out = job.dtype[kOut];
  const bool in_place = job.in_place || tiled;  // a tile is
  const bool can_store = (job.direct || tiled) && (out == SOFTMAXLIB_F32 || out == SOFTMAXLIB_F64);
  if (function == SOFTMAXLIB_LOG_STABLEMAX) return SOFTMAXLIB_TWO_PASS;
  if (stablemax)  // has no maximum pass; in place it must be able to start over
    return reloads(a) && can_store && !in_place ? SOFTMAXLIB_TWO_PASS_RELOAD : SOFTMAXLIB_TWO_PASS;
  if (softmax && can_store && a == SOFTMAXLIB_TWO_PASS_RELOAD && in_place)
    return SOFTMAXLIB_THREE_PASS_RELOAD;
  if (softmax && can_store) return a;
  if (a == SOFTMAXLIB_THREE_PASS_RELOAD) return SOFTMAXLIB_THREE_PASS_RECOMPUTE;
  if (a == SOFTMAXLIB_TWO_PASS_RELOAD) return SOFTMAXLIB_TWO_PASS;
  return a;
}

}  // namespace

Schedule choose_schedule(softmaxlib_function function, const Job& job,
                         const softmaxlib_options& options) {
  Schedule s;
  const int64_t x_item = item_size(job.dtype[kX]), out_item = item_size(job.dtype[kOut]);
  const int64_t row_bytes = job.n * (x_item + out_item);

  // One exponential per element where x and y stay in cache (the last is shared with others), else
  // the least traffic.
  softmaxlib_algorithm algorithm = options.algorithm;
  if (algorithm == SOFTMAXLIB_ALGORITHM_AUTO)
    algorithm = row_bytes <= last_level() / 2 ? SOFTMAXLIB_TWO_PASS_RELOAD : SOFTMAXLIB_TWO_PASS;
  s.tile = tile_of(job, options);
  s.kernel = registered(function, job, s.tile > 0, algorithm);

  // Past the caches a plain store first reads the line it overwrites. In place it was read anyway.
  const bool can_stream = job.direct && function != SOFTMAXLIB_LOGSUMEXP;
  s.streaming = can_stream && (options.store == SOFTMAXLIB_STORE_STREAMING ||
                               (options.store == SOFTMAXLIB_STORE_AUTO && !job.in_place &&
                                row_bytes * job.rows > last_level()));

  const int64_t item = job.dtype[kOut] == SOFTMAXLIB_F64 ? 8 : 4;
  const bool pipelined = options.algorithm == SOFTMAXLIB_ALGORITHM_AUTO &&
                         function == SOFTMAXLIB_SOFTMAX && job.direct &&
                         (job.rows > 1 || x_item == 2) && job.n > 1 &&
                         job.n * item <= (int64_t{1} << 20);
  if (pipelined) s.kernel = registry::pipelined;
  const int64_t threads = options.parallel_for ? std::max(options.num_threads, 1) : 1;
  const int64_t blocks =
      (job.n + block_elements(job.dtype[kOut]) - 1) / block_elements(job.dtype[kOut]);
  const int64_t worth = std::max<int64_t>(job.rows * job.n / kElementsPerTask, 1);
  s.tasks = threads == 1 ? 1 : std::min({job.rows, worth, threads * kTasksPerThread});
  s.split = threads > 1 && !s.tile && blocks >= 2 * threads && job.rows < 2 * threads && worth > 1;
  if (s.split) s.tasks = std::min(blocks, threads * kTasksPerThread);
  s.scratch = scratch_bytes(job.n, job.dtype[kOut], s.split, s.tile || reloads(s.kernel)) +
              s.tile * tile_pitch(job.n * x_item);
  if (pipelined) s.scratch = pipelined_scratch(job);
  return s;
}

}  // namespace softmaxlib
