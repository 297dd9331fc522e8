// What a leaf can do, as functions over plain memory: one table per ISA.
#pragma once

#include "softmaxlib/softmaxlib.h"

namespace softmaxlib::test {

constexpr int kVectorBytes = 64;

// How results compare: as numbers, where any NaN equals any other, or as bits.
enum class Kind { kF32, kF64, kBits };

// One virtual vector per argument and result.
struct LeafOp {
  const char* name;
  Kind argument, result;
  void (*apply)(const void* a, const void* b, const void* c, void* y);
};

struct LeafStorage {
  softmaxlib_dtype dtype;
  int item, lanes;
  void (*load)(const void* p, void* y);
  void (*load_n)(const void* p, int n, double fill, void* y);
  void (*store)(void* p, const void* v);
  void (*store_n)(void* p, const void* v, int n);
  void (*stream)(void* p, const void* v);  // p aligned to the vector
};

// Rows as columns: `columns` of them, a vector each.
struct LeafColumns {
  int item, lanes, columns;
  void (*load)(const void* p, int64_t stride, void* y);
  void (*store)(void* p, int64_t stride, const void* v);
};

struct LeafTable {
  const LeafOp* ops;
  int count;
  const LeafStorage* storages;  // four of them
  const LeafColumns* columns;   // four of them
};

}  // namespace softmaxlib::test
