// One call, as kernels see it: rows of n elements, every array as an operand with strides in bytes.
#pragma once

#include <stdint.h>

#include "softmaxlib/softmaxlib.h"

namespace softmaxlib {

// The arrays of a call. From kScale on one value per row, but for kOfCall and kOfCall2, which are
// what a call has beside x, out and the options. kScale: scales or temperatures. kQuery is no
// memory: its offset is the row's index along query_axis.
enum Operand : int {
  kX,
  kOut,
  kBias,
  kWhere,
  kScale,
  kSlope,
  kSink,
  kQuery,
  kOfCall,
  kOfCall2,
  kOperands,
  kState = kOfCall,     // of streaming states
  kUniform = kOfCall,   // of sample
  kLoss = kOfCall,      // of cross_entropy
  kLogSum = kOfCall,    // of take_log_softmax
  kGrad = kOfCall,      // of gradients: what comes in
  kWeights = kOfCall,   // of the orthogonal gradient, whose x is the gradient that comes in
  kFactor = kOfCall,    // of scale_rows
  kIndices = kOfCall2,  // of sample, topk_softmax, take_log_softmax; the classes of cross_entropy
  kTarget = kOfCall2,   // or its probabilities
  kResult = kOfCall2    // of gradients: y
};

struct Dim {
  int64_t size;
  int64_t stride[kOperands];  // bytes
};

// Bytes that a view takes, relative to its data pointer.
struct Range {
  int64_t low, high;
  int64_t span() const { return high - low; }
};

// Where the elements are: what host/layout.cpp makes of arrays and axes.
struct Layout {
  char* base[kOperands];  // NULL: not given
  // That of kOut is what results are computed for, also where no array takes them.
  softmaxlib_dtype dtype[kOperands];
  uint32_t given;    // bits of operands, whose data may come later
  uint32_t per_row;  // of those given: they have no axes
  int64_t rows, n;

  bool reduces;        // no result per element
  bool elements_of_x;  // no scale, bias or mask: arguments are the elements of x
  bool has_low;        // arguments are sums of two: for a scale or a bias, not for a mask alone
  bool plain;          // the elements of x, all of them, and nothing else is in the sum
  bool linear;         // not direct for its options alone: x, bias, where, out contiguous in a row
  bool direct;         // x and out contiguous within a row, of one dtype, the elements those of x
  bool same_layout;    // of x and out: they may be one
  bool in_place;       // and are
  bool dense;          // x and out have no gaps
  Range range[2];      // kX, kOut

  int outer_ndim, inner_ndim;  // over the rows; within a row
  Dim outer[SOFTMAXLIB_MAX_NDIM];
  Dim inner[SOFTMAXLIB_MAX_NDIM];
};

// Options that are not arrays.
struct Scalars {
  double temperature, scale;  // of every row, but for the one that kScale replaces
  bool divides;               // kScale are temperatures
  bool causal;                // row i ends after column i + causal_offset
  int64_t causal_offset;
};

// How it runs: what host/schedule.cpp chose and the caller lends.
struct Execution {
  int64_t tile;    // so many rows that lie side by side at once, in a tile or as columns; 0: none
  bool streaming;  // streaming stores in the last pass
  int64_t split;   // into how many runs of blocks parallel_for spreads each row; 0: not at all
  softmaxlib_parallel_for parallel_for;
  void* parallel_context;
};

// softmaxlib_topk_softmax's: strides along the axis, in bytes.
struct TopK {
  int64_t k, weight_stride, index_stride;
  bool renormalize;
};

// softmaxlib_cross_entropy's.
struct Loss {
  bool probabilities;  // kTarget has them, else kIndices a class per row
  bool writes;         // the gradient, to kOut
  double smoothing;
  const double* weight;  // NULL: 1
  int64_t ignore_index;
  // A mean's weights are in a unit of their own, a power of two: they count times unit[0] unit[1],
  // since one double may not hold it. The gradient's factor, likewise, is scale 2^exponent.
  double unit[2];
  double scale;
  int exponent;
};

// How the rows' losses become a total: their sum 2^exponent / divisor.
struct Reduction {
  double divisor;
  int exponent;
  softmaxlib_dtype dtype;  // of *total
  void* total;
};

// What some calls have beside arrays; of others NULL.
struct Parameters {
  const softmaxlib_filter* filter;  // of softmaxlib_sample
  const TopK* top;
  const Loss* loss;
  bool rescale;  // softmaxlib_orthogonal_gradient's
};

struct Job : Scalars, Execution, Parameters, Layout {
  softmaxlib_function function;
};

static inline double weight_of(const Loss& loss, int64_t i) {
  if (!loss.weight) return 1;
  const double weight = loss.weight[i] * loss.unit[0] * loss.unit[1];
  return weight == 0 && loss.weight[i] > 0 ? 0x1p-1074 : weight;  // its loss may be infinite
}

static inline bool job_has(const Layout& job, int operand) { return job.given >> operand & 1; }

// Computes rows [first, last). scratch: scratch_bytes(...) of it, 64-byte aligned.
using Kernel = void (*)(const Job& job, int64_t first, int64_t last, char* scratch);

// What is best on the CPU at hand (host/cpu.cpp).
struct Tuning {
  int64_t prefetch_distance;  // of passes over one long row, in bytes; 0: not ahead
  bool second_level;          // rows that are read while others are computed come there, not nearer
  // Results of plain rows from memory, but for softmax's and those that wait in a buffer of floats,
  // are better written at once than beside the next row.
  bool writes_at_once;
};

// Functions here are static: see isa/unit.cpp.in on what may leave an ISA's unit.

// The reference of a sum without terms: the lowest there is (isa/math/exp.hpp).
constexpr int32_t kNoReference = -47274;

// Blocks, in elements, are part of the arithmetic: sums are folded along them.
constexpr int kVectorsPerGroup = 4;
// Logarithms of rows of up to so many groups that lie side by side are computed a row per lane:
// where vectors across rows are read and written in place, and through a tile.
constexpr int kGroupsInPlace = 8, kGroupsInTile = 4;
constexpr int kVectorsPerChunk = 64;
constexpr int kVectorsPerBlock = 1024;

static constexpr int64_t chunk_elements(softmaxlib_dtype out) {
  return kVectorsPerChunk * (out == SOFTMAXLIB_F64 ? 8 : 16);
}
static constexpr int64_t block_elements(softmaxlib_dtype out) {
  return kVectorsPerBlock * (out == SOFTMAXLIB_F64 ? 8 : 16);
}

// What one block of a row leaves behind when blocks run in parallel.
struct BlockResult {
  double sum, error;        // unevaluated sum of two
  double held_hi, held_lo;  // the element kept out of the sum, or the maximum
  int32_t reference;
  int32_t padding[7];
};
static_assert(sizeof(BlockResult) == 64, "one cache line: no false sharing");

// A tile's rows start this many bytes apart: never at the same place of a page.
static constexpr int64_t tile_pitch(int64_t row_bytes) { return (row_bytes + 63) / 64 * 64 + 64; }

// Rows that lie side by side are in a tile at most so many vectors at once.
constexpr int kTileVectors = 8;

// A row's arguments in a tile: what the arithmetic's type holds of them and, with options, the
// rest.
static inline int64_t bytes_in_tile(const Job& job) {
  const int64_t bytes = tile_pitch(job.n * (job.dtype[kOut] == SOFTMAXLIB_F64 ? 8 : 4));
  return job.has_low ? 2 * bytes : bytes;
}

// A panel of longer columns is at most so many vectors wide, beside less than one at either end;
// what is kept for each.
constexpr int kColumnVectors = 16, kColumnStrips = kColumnVectors + 2;
constexpr int kColumnSumsBytes = 7168, kColumnResultsBytes = 1024;
constexpr int64_t kColumnScratch = kColumnStrips * int64_t{kColumnSumsBytes + kColumnResultsBytes};

// Scratch of one row at a time: results of blocks, then a reference exponent per chunk for the
// schedules that reload.
static inline int64_t scratch_bytes(int64_t n, softmaxlib_dtype out, bool split, bool reload) {
  const int64_t blocks = (n + block_elements(out) - 1) / block_elements(out);
  const int64_t references =
      reload && blocks > 1 ? blocks * kVectorsPerBlock / kVectorsPerChunk : 0;
  const int64_t results = split ? blocks : 0;
  return results * static_cast<int64_t>(sizeof(BlockResult)) + (references * 4 + 63) / 64 * 64;
}

// softmax_pipelined: a row of exponentials, then a reference per chunk.
static inline int64_t pipelined_buffer(const Job& job) {
  return (job.n * (job.dtype[kOut] == SOFTMAXLIB_F64 ? 8 : 4) + 63) / 64 * 64;
}
static inline int64_t pipelined_scratch(const Job& job) {
  const int64_t references = job.n / chunk_elements(job.dtype[kOut]) + 1;
  return pipelined_buffer(job) + (references * 4 + 63) / 64 * 64;
}

// Batches of rows that are transposed: sixteen rows (of doubles eight) and a vector on either side;
// two of these, and what the arguments lack.
static inline int64_t batch_room(const Job& job) {
  const int64_t item = job.dtype[kOut] == SOFTMAXLIB_F64 ? 8 : 4, lanes = 64 / item;
  return ((job.n + lanes - 1) / lanes * lanes * lanes + 2 * lanes) * item;
}
static inline int64_t batched_scratch(const Job& job) { return 3 * batch_room(job); }

}  // namespace softmaxlib
