#include "host/schedule.hpp"

#include <algorithm>

#include "host/cpu.hpp"
#include "host/layout.hpp"

namespace softmaxlib {
namespace {

// A parallel call pays from about this many elements per task on.
constexpr int64_t kElementsPerTask = 32768;

// Rows that lie side by side come into tiles of at most so many bytes.
constexpr int64_t kTileBytes = int64_t{1} << 28;
// Of the last cache, which others use too, a tile takes this part.
constexpr int64_t kTileShare = 8;

// Plain rows of less than a group are computed in lanes, if there are enough of them to share the
// work of a whole batch; then in batches, up to so many bytes in the kernel's own dtype. All others
// are computed in batches up to a chunk.
constexpr int64_t kShare = 8, kBatched = 2048;

// So that a thread that is held up delays the others by little.
constexpr int64_t kTasksPerThread = 4;

// What one core sees, as the CPU says; where it does not, what most have.
struct Caches {
  int64_t l2, last;
};
Caches caches() {
  static const Caches found = [] {
    const int64_t l2 = cache_size(2), l3 = cache_size(3);
    Caches c = {l2 ? l2 : int64_t{1} << 20, l3 ? l3 : int64_t{32} << 20};
    if (l2 && !l3) c.last = l2;
    return c;
  }();
  return found;
}

// A choice and its reason.
struct Choice {
  int kernel;
  const char* why;
};

int64_t threads_of(const softmaxlib_options& options) {
  return options.parallel_for ? std::max(options.num_threads, 1) : 1;
}
int64_t worth(const Job& job) { return job.rows * job.n / kElementsPerTask; }

constexpr bool reloads(int kernel) {
  return kernel == registry::three_pass_reload || kernel == registry::two_pass_reload;
}

// Whether the rows of an operand of floats lie side by side.
bool lies_across(const Job& job, Operand k) {
  const int64_t item = item_size(job.dtype[k]);
  return job.base[k] && job.inner_ndim == 1 && job.outer_ndim &&
         (job.n == 1 || job.inner[0].stride[k] != item) &&
         job.outer[job.outer_ndim - 1].stride[k] == item;
}

// Whether vectors across rows can be read and written where these are, in all operands.
bool lies_side_by_side(const Job& job) {
  const bool fits = (job.dtype[kX] == SOFTMAXLIB_F64) == (job.dtype[kOut] == SOFTMAXLIB_F64);
  if (!fits || !is_float(job.dtype[kX]) || !lies_across(job, kX)) return false;
  const Dim& beside = job.outer[job.outer_ndim - 1];
  const auto crosses = [&](Operand k, int64_t item) {
    return !job.base[k] || beside.stride[k] == item || beside.stride[k] == 0;
  };
  return (job.reduces || lies_across(job, kOut)) && !job.causal && !job.base[kSlope] &&
         crosses(kBias, item_size(job.dtype[kBias])) && crosses(kWhere, 1);
}

// How many groups rows may have that are computed a row per lane.
int groups_in_lanes(const Job& job) {
  const bool keeps_terms = kFunctionInfo[job.function].finish == Finish::ratio;
  const bool is_log = kFunctionInfo[job.function].element == Element::exp && !keeps_terms;
  if (!(is_log || keeps_terms) || !lies_side_by_side(job)) return 1;
  const bool in_place =
      job.plain && !is_half(job.dtype[kX]) && (job.reduces || job.dtype[kOut] == job.dtype[kX]);
  return in_place && !keeps_terms ? kGroupsInPlace : kGroupsInTile;
}

// Of rows that lie side by side, the longest that are computed a row per lane.
int64_t most_in_lanes(const Job& job) {
  return groups_in_lanes(job) * kVectorsPerGroup * (job.dtype[kOut] == SOFTMAXLIB_F64 ? 8 : 16);
}

// Whether batches transpose rows that lie side by side, and their room in the first level cache is
// too small for as many as a vector takes.
bool transposes(const Job& job) {
  const int64_t item = item_size(job.dtype[kX]);
  return !job.direct && !job.linear && job.outer_ndim && job.inner_ndim == 1 &&
         job.inner[0].stride[kX] != item && job.outer[job.outer_ndim - 1].stride[kX] == item &&
         job.n > 2 * kVectorsPerChunk;
}

// How many rows that lie side by side come into a tile at once: those whose elements share a
// vector, and some of their neighbours, so that memory is read in longer pieces, as far as a part
// of the last cache has room for them.
int64_t tile_of(const Job& job, int64_t most_vectors) {
  if (!lies_across(job, kX) || job.n == 1) return 0;
  const int64_t lanes = job.dtype[kOut] == SOFTMAXLIB_F64 ? 8 : 16;
  const int64_t bytes = bytes_in_tile(job), room = caches().last / kTileShare / (lanes * bytes);
  const int64_t vectors = std::clamp<int64_t>(room, 1, most_vectors);
  const int64_t rows =
      std::min({lanes * vectors, job.outer[job.outer_ndim - 1].size, kTileBytes / bytes});
  return rows > 1 ? rows : 0;
}

// Of rows in a tile.
int64_t row_scratch(const Job& job, int64_t tile) {
  return scratch_bytes(job.n, job.dtype[kOut], false, true) + tile * bytes_in_tile(job);
}

// Whether there are enough rows to share the work of those that are computed together.
bool are_many(const Job& job) { return job.rows * kShare >= job.n; }

// How many columns to compute at once, where rows lie side by side in all operands, a vector of
// them at least, and are longer than those that are computed in lanes; else 0.
int64_t panel_of(const Job& job) {
  if (!lies_side_by_side(job) || job_has(job, kSink)) return 0;
  const int64_t lanes = job.dtype[kOut] == SOFTMAXLIB_F64 ? 8 : 16;
  const int64_t in_lanes = are_many(job) ? most_in_lanes(job) : kVectorsPerGroup * lanes;
  if (job.n <= in_lanes || job.outer[job.outer_ndim - 1].size < lanes) return 0;
  // They should stay in the second level cache for their second pass, or else be as wide as memory
  // likes.
  int64_t vectors = caches().l2 / 4 / (job.n * item_size(job.dtype[kX]) * lanes);
  if (vectors < kColumnVectors / 2 || vectors > kColumnVectors) vectors = kColumnVectors;
  return lanes * vectors;
}

// What of a job decides whether an algorithm applies.
struct Facts {
  softmaxlib_function function;
  softmaxlib_dtype storage;
  bool can_store;  // exponentials can wait in y
  bool in_place;   // results replace arguments
};

// The nearest relative of an algorithm that the registry has for a job.
constexpr Choice nearest(const Facts& facts, softmaxlib_algorithm algorithm, const char* why) {
  const auto has = [&](int kernel) {
    return registered(facts.function, kernel, facts.storage) != nullptr;
  };
  const bool three =
      algorithm == SOFTMAXLIB_THREE_PASS_RECOMPUTE || algorithm == SOFTMAXLIB_THREE_PASS_RELOAD;
  // Without the exponentials that would wait in y.
  const int without = three && has(registry::three_pass_recompute) ? registry::three_pass_recompute
                                                                   : registry::two_pass;
  if (!reloads(algorithm)) {
    if (has(algorithm)) return {algorithm, why};
    return {without, "this function has no maximum pass"};
  }
  if (!has(registry::two_pass_reload) && !has(registry::three_pass_reload) &&
      !is_half(facts.storage))
    return {without, "logarithms have nothing to reload"};
  if (!facts.can_store || is_half(facts.storage))
    return {without, "exponentials cannot wait in y: strided or half"};
  if (facts.in_place && algorithm == SOFTMAXLIB_TWO_PASS_RELOAD) {
    if (has(registry::three_pass_reload))
      return {registry::three_pass_reload, "in place: x must last until the maximum is known"};
    return {without, "in place: x must last until the sum is known to be in range"};
  }
  if (has(algorithm)) return {algorithm, why};
  if (facts.in_place)
    return {without, "in place: x must last until the sum is known to be in range"};
  return {registry::two_pass_reload, "this function has no maximum pass"};
}

// The table has no empty entry that dispatch can reach: whatever an algorithm is asked of, and
// every schedule of many rows.
constexpr bool is_complete() {
  for (int f = 0; f < kFunctions; ++f)
    for (int storage = 0; storage < kStorages; ++storage) {
      for (int a = registry::three_pass_recompute; a < kAlgorithms; ++a)
        for (int bits = 0; bits < 4; ++bits) {
          const int kernel = nearest({f, storage, (bits & 1) != 0, (bits & 2) != 0}, a, "").kernel;
          if (!registered(f, kernel, storage)) return false;
        }
      for (const int many : {registry::in_lanes, registry::batched, registry::columns})
        if (!registered(f, many, storage)) return false;
      if (f != SOFTMAXLIB_LOGSUMEXP && !registered(f, registry::pipelined, storage)) return false;
    }
  return true;
}
static_assert(is_complete(), "registry/kernels.def lacks a kernel that dispatch can choose");

Choice nearest(const Job& job, bool tiled, softmaxlib_algorithm algorithm, const char* why) {
  return nearest(
      {job.function, job.dtype[kOut], job.direct || job.linear || tiled, job.in_place || tiled},
      algorithm, why);
}

// Whether batches can compute it.
bool batches(const Job& job) {
  return !job_has(job, kSink) && job.n > 0 && job.n <= chunk_elements(job.dtype[kOut]);
}

// Whether a row that is pipelined would rather be written as soon as it is summed.
bool writes_at_once(softmaxlib_function function, const Job& job) {
  static const bool on_this_cpu = tuning_of_cpu().writes_at_once;
  const bool waits_in_floats =
      is_half(job.dtype[kOut]) && kFunctionInfo[function].finish == Finish::ratio;
  return on_this_cpu && job.direct && function != SOFTMAXLIB_SOFTMAX && !waits_in_floats;
}

Choice choose_kernel(softmaxlib_function function, const Job& job,
                     const softmaxlib_options& options, const Schedule& s, bool frugal) {
  if (options.algorithm != SOFTMAXLIB_ALGORITHM_AUTO)
    return nearest(job, s.tile > 0, options.algorithm, "the caller's choice");

  if (s.kernel == registry::columns)
    return {registry::columns, "rows side by side in memory: vectors across them"};
  const int64_t item = job.dtype[kOut] == SOFTMAXLIB_F64 ? 8 : 4;
  const double row_bytes =
      static_cast<double>(job.n) *
      static_cast<double>(item_size(job.dtype[kX]) + item_size(job.dtype[kOut]));
  const bool half = is_half(job.dtype[kOut]);

  // Kernels over many rows leave threads without work where there are more of them than rows.
  const bool idle = threads_of(options) > job.rows && worth(job) > 1;
  const bool plain_softmax = function == SOFTMAXLIB_SOFTMAX && job.direct && job.plain;
  const KernelTable& table = *table_of(options.isa);
  const bool many_rows = table.many_rows && !idle;
  const int64_t in_lanes_below = table.in_lanes_below[item == 8];
  if (plain_softmax && job.n > 0 && many_rows) {
    const bool fits = job.n > 1 && job.n * item <= caches().l2 * 3 / 4;
    if (job.n < in_lanes_below && are_many(job))
      return {registry::in_lanes, "rows of a few elements: every lane is a row"};
    if (job.rows > 1 && job.n >= in_lanes_below && job.n <= kBatched / item)
      return {registry::batched, "short rows: their maxima and sums all at once"};
    if (half && fits && !frugal)
      return {registry::pipelined, "halves: exponentials wait as floats in a buffer in L2"};
    if (job.rows > 1 && fits && s.streaming && !frugal)
      return {registry::pipelined, "rows fit in L2, their sum does not in the caches"};
    if (job.rows > 1 && fits && job.n * item <= 8192 && job.rows * job.n >= 4096 && !frugal)
      return {registry::pipelined, "short rows in cache: the next row hides the end of this"};
  }
  const int64_t group = kVectorsPerGroup * (item == 8 ? 8 : 16);
  const int64_t most = lies_across(job, kX) ? most_in_lanes(job) : in_lanes_below - 1;
  if (batches(job) && many_rows && !plain_softmax && are_many(job) && job.n <= most)
    return {registry::in_lanes, job.n <= group ? "rows of a few elements: every lane is a row"
                                               : "rows side by side: every lane is a row"};
  if (batches(job) && many_rows && (half || !plain_softmax))
    return {registry::batched, "rows of up to a chunk: many at once, through tiles in cache"};
  // What a row leaves for its second pass should stay in cache: of the last, which others use too,
  // it takes little.
  if (many_rows && !job.reduces && !s.tile && job.rows > 1 && s.streaming && !frugal &&
      !writes_at_once(function, job) &&
      job.n * item <= std::max(caches().l2 * 3 / 4, caches().last / 16))
    return {registry::pipelined, "the results of a row leave while the next is read"};
  // One exponential per element where x and y stay in cache (the last is shared with others), else
  // the least traffic.
  if (frugal && job.n > block_elements(job.dtype[kOut]))
    return nearest(job, false, SOFTMAXLIB_TWO_PASS, "the caller gives no scratch");
  if (s.streaming && job.direct && is_stable(function))
    return nearest(job, s.tile > 0, SOFTMAXLIB_TWO_PASS,
                   "rows leave the caches, and their terms are cheap: least traffic");
  if (row_bytes <= static_cast<double>(caches().last) / 2)
    return nearest(job, s.tile > 0, SOFTMAXLIB_TWO_PASS_RELOAD,
                   "x and y of a row stay in cache: fewest exponentials");
  return nearest(job, s.tile > 0, SOFTMAXLIB_TWO_PASS,
                 "x and y of a row leave the caches: least traffic");
}

void choose_stores(const Job& job, const softmaxlib_options& options, Schedule& s) {
  const double bytes = static_cast<double>(job.rows * job.n) *
                       static_cast<double>(item_size(job.dtype[kX]) + item_size(job.dtype[kOut]));
  const auto choose = [&](bool streaming, const char* why) {
    s.streaming = streaming;
    s.why_stores = why;
  };
  if (job.reduces) choose(false, "one result per row");
  else if (!job.direct && !job.linear && !lies_across(job, kOut)) choose(false, "not contiguous");
  else if (options.store == SOFTMAXLIB_STORE_PLAIN) choose(false, "the caller's choice");
  else if (options.store == SOFTMAXLIB_STORE_STREAMING) choose(true, "the caller's choice");
  else if (job.in_place) choose(false, "in place: the lines are in cache already");
  else if (bytes > static_cast<double>(caches().last) * 0.75)  // others use it too
    choose(true, "x and y exceed 3/4 of the last cache: a plain store would first read y");
  else choose(false, "x and y fit in 3/4 of the last cache");
}

void choose_tasks(const Job& job, const softmaxlib_options& options, Schedule& s, bool frugal) {
  const auto choose = [&](bool split, int64_t tasks, const char* why) {
    s.split = split;
    s.tasks = tasks;
    s.why_tasks = why;
  };
  const int64_t threads = threads_of(options);
  if (threads == 1) return choose(false, 1, "one thread");
  if (worth(job) < 2) return choose(false, 1, "too small to share");
  const int64_t blocks =
      (job.n + block_elements(job.dtype[kOut]) - 1) / block_elements(job.dtype[kOut]);
  if (!frugal && !s.tile && s.kernel < registry::in_lanes && blocks >= 2 * threads &&
      job.rows < 2 * threads)
    return choose(true, std::min(blocks, threads * kTasksPerThread),
                  "few long rows: the blocks of each are shared");
  // Rows that lie side by side are computed as vectors of them, which are not shared.
  const bool in_vectors =
      s.kernel == registry::columns || (s.kernel == registry::in_lanes && lies_across(job, kX));
  const int64_t lanes = !in_vectors ? 1 : job.dtype[kOut] == SOFTMAXLIB_F64 ? 8 : 16;
  const int64_t parts = (job.rows + lanes - 1) / lanes;
  choose(false, std::min({parts, worth(job), threads * kTasksPerThread}), "rows are shared");
}

}  // namespace

Schedule choose_schedule(softmaxlib_function function, const Job& job,
                         const softmaxlib_options& options, bool frugal) {
  Schedule s = {};
  s.tile = frugal ? 0 : tile_of(job, kTileVectors);
  if (!frugal && options.algorithm == SOFTMAXLIB_ALGORITHM_AUTO && table_of(options.isa)->many_rows)
    if (const int64_t panel = panel_of(job)) {
      s.tile = panel;
      s.kernel = registry::columns;
    }
  choose_stores(job, options, s);
  const Choice kernel = choose_kernel(function, job, options, s, frugal);
  s.kernel = kernel.kernel;
  s.why_kernel = kernel.why;
  if (s.kernel == registry::in_lanes) s.tile = 0;
  if (s.kernel == registry::batched) s.tile = !frugal && transposes(job) ? 1 : 0;
  choose_tasks(job, options, s, frugal);
  if (s.kernel == registry::columns) s.scratch = kColumnScratch;
  else if (s.kernel == registry::pipelined) s.scratch = pipelined_scratch(job);
  else if (s.kernel == registry::batched) s.scratch = s.tile ? batched_scratch(job) : 0;
  else
    s.scratch = s.tile ? row_scratch(job, s.tile)
                       : scratch_bytes(job.n, job.dtype[kOut], s.split, reloads(s.kernel));
  return s;
}

Schedule share_rows(const Job& job, const softmaxlib_options& options, bool tiles) {
  Schedule s = {};
  choose_stores(job, options, s);
  s.tasks = 1;
  if (threads_of(options) > 1 && worth(job) > 1)
    s.tasks = std::min({job.rows, worth(job), threads_of(options) * kTasksPerThread});
  // These calls need no scratch, but are faster with some where rows lie side by side: softmaxlib.h
  // asks for as much as one vector of rows takes.
  const int64_t tile = tiles && options.scratch ? tile_of(job, 1) : 0;
  if (!tile) return s;
  const int64_t bytes = std::max(row_scratch(job, tile), batched_scratch(job));
  const int64_t tasks = std::min(s.tasks, threads_of(options));
  if (reinterpret_cast<uintptr_t>(options.scratch) % 64 == 0 &&
      static_cast<uint64_t>(bytes) <= options.scratch_size / static_cast<uint64_t>(tasks))
    s.tile = tile, s.tasks = tasks, s.scratch = bytes;
  return s;
}

Schedule share_blocks(const Job& job, const softmaxlib_options& options) {
  Schedule s = {};
  choose_stores(job, options, s);
  s.tasks = std::min(worth(job), threads_of(options) * kTasksPerThread);
  s.split = threads_of(options) > 1 && s.tasks > 1;
  if (!s.split) s.tasks = 1;
  return s;
}

}  // namespace softmaxlib
