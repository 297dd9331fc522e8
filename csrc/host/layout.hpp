// From arrays with axes to rows with strides.
#pragma once

#include <stddef.h>

#include "job.hpp"
#include "registry/registry.hpp"

namespace softmaxlib {

// The shape that an array of a call must have: that of x; that of x without the axes; one that
// broadcasts to x.
enum class Shape : uint8_t { kOfX, kPerRow, kBroadcast };
enum class Dtypes : uint8_t { kAny, kFloats, kF64, kI64, kStates };
// What is written must be apart from everything else. kReadsUnder: but may be this very array.
enum class Access : uint8_t { kReads, kReadsUnder, kWrites };

// An array that a caller gives, and what it must be. NULL: not given.
struct Given {
  Operand operand;
  const softmaxlib_array* array;
  Shape shape;
  Dtypes dtypes;
  Access access;
  softmaxlib_status shape_error = SOFTMAXLIB_ERROR_SHAPE;
};

// All of a call; the first is x.
struct GivenList {
  const Given* first;
  int count;

  template <size_t kCount>
  GivenList(const Given (&list)[kCount]) : first(list), count(int{kCount}) {}
  const Given* begin() const { return first; }
  const Given* end() const { return first + count; }
};

struct Axes {
  int32_t count;  // 0: all
  const int32_t* axes;
};

// Checks arrays, axes and options, and fills in everything of the job but its schedule and what
// check_data does. `storage`: what results are computed for, where kOut is not in the list. Data
// may be missing.
softmaxlib_status lay_out(softmaxlib_function function, Axes axes, GivenList list,
                          softmaxlib_dtype storage, const softmaxlib_options& options, Job* job);

// Whether all data is there, temperatures and scales are valid, and out is x or apart from it;
// finds in_place.
softmaxlib_status check_data(Job* job);

// Whether what is written is apart from everything else; of x and out check_data knows.
bool are_apart(GivenList list);

// Whether two arrays without gaps share memory; `unless_same`: but not if they are one.
bool overlap(const softmaxlib_array& a, const softmaxlib_array& b, bool unless_same = false);

}  // namespace softmaxlib
