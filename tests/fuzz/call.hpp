// Calls drawn from the input, and the same calls plainly: every operand copied to C-contiguous
// (others, queries, columns), one row after the other.
#pragma once

#include <stddef.h>

#include <thread>

#include "fuzz.hpp"

namespace softmaxlib::fuzz {

// ---- Ways to run tasks.

inline void backwards(void*, int64_t count, softmaxlib_task task, void* argument) {
  for (int64_t i = count; i-- > 0;) task(argument, i);
}
inline void odd_ones_first(void*, int64_t count, softmaxlib_task task, void* argument) {
  for (int64_t i = 1; i < count; i += 2) task(argument, i);
  for (int64_t i = 0; i < count; i += 2) task(argument, i);
}
inline void in_new_threads(void*, int64_t count, softmaxlib_task task, void* argument) {
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < count; ++i) threads.emplace_back(task, argument, i);
  for (std::thread& thread : threads) thread.join();
}
inline void in_pool(void*, int64_t count, softmaxlib_task task, void* argument) {
  static softmaxlib_pool* const pool = [] {
    softmaxlib_pool* created = nullptr;
    require(softmaxlib_pool_create(3, &created) == SOFTMAXLIB_OK, "no pool");
    return created;
  }();
  softmaxlib_pool_parallel_for(pool, count, task, argument);
}
constexpr softmaxlib_parallel_for kWays[] = {nullptr, backwards, odd_ones_first, in_pool,
                                             in_new_threads};
constexpr const char* kWayNames[] = {"NULL", "backwards", "odd ones first", "pool", "new threads"};

// ---- A call.

struct Operand {
  const char* name;
  const softmaxlib_array* softmaxlib_options::*member;
  bool per_row;  // constant along the axes
  std::unique_ptr<Array> array;
};

struct Call {
  Shape shape;
  std::vector<int32_t> axes;
  std::vector<bool> reduced;
  size_t query_axis = 0;  // where causal or ALiBi say so
  std::unique_ptr<Array> x;
  std::vector<Operand> operands;
  size_t way = 0;
  softmaxlib_options options = SOFTMAXLIB_OPTIONS_INIT;

  int32_t naxes() const { return static_cast<int32_t>(axes.size()); }
  bool has_queries() const { return options.causal || options.alibi_slopes; }

  // The call's shape, with ones but for the columns, the queries, or the other axes.
  enum Side { kOthers, kQueries, kColumns };
  Shape side(Side which) const {
    Shape s = shape;
    for (size_t d = 0; d < s.size(); ++d) {
      const Side its = reduced[d]                         ? kColumns
                       : has_queries() && d == query_axis ? kQueries
                                                          : kOthers;
      if (its != which) s[d] = 1;
    }
    return s;
  }
  // Calls f(index) for every row, the columns at 0, and for every element.
  template <class F>
  void for_rows(F f) const {
    const Shape queries = side(kQueries);
    for_indices(side(kOthers), [&](const Shape& other) {
      for_indices(queries, [&](const Shape& query) {
        Shape row = other;
        for (size_t d = 0; d < row.size(); ++d) row[d] += query[d];
        f(row);
      });
    });
  }
  template <class F>
  void for_elements(F f) const {
    const Shape columns = side(kColumns);
    Shape index(shape.size());
    for_rows([&](const Shape& row) {
      for_indices(columns, [&](const Shape& column) {
        for (size_t d = 0; d < index.size(); ++d) index[d] = row[d] + column[d];
        f(index);
      });
    });
  }
  Shape without_axes(const Shape& of) const {
    Shape s;
    for (size_t d = 0; d < of.size(); ++d)
      if (!reduced[d]) s.push_back(of[d]);
    return s;
  }

  // The elements of an array like x, or of one without the axes, in the order of a plain one.
  std::vector<char> plain_copy(const Array& array) const {
    std::vector<char> copy;
    const int64_t item = item_size(array.dtype());
    copy.reserve(static_cast<size_t>(size_of(shape) * item) + 1);
    for_elements([&](const Shape& i) { copy.insert(copy.end(), array.at(i), array.at(i) + item); });
    return copy;
  }
  std::vector<char> plain_rows(const Array& array) const {
    std::vector<char> copy;
    const int64_t item = item_size(array.dtype());
    for_rows([&](const Shape& i) {
      const char* p = array.at(without_axes(i));
      copy.insert(copy.end(), p, p + item);
    });
    return copy;
  }

  std::string text() const;
};

inline std::string Call::text() const {
  std::string s = "axes (";
  for (const int32_t a : axes) s += std::to_string(a) + ", ";
  s += ")\n" + x->text("x");
  for (const Operand& o : operands) s += o.array->text(o.name);
  char line[400];
  snprintf(line, sizeof(line),
           "algorithm %d, store %d, num_threads %d, parallel_for %s, temperature %a, scale %a, "
           "causal %d, causal_offset %lld, query_axis %d, struct_size %zu\n",
           options.algorithm, options.store, options.num_threads, kWayNames[way],
           options.temperature, options.scale, options.causal,
           static_cast<long long>(options.causal_offset), options.query_axis, options.struct_size);
  return s + line;
}

inline Shape draw_shape(Input& in) {
  Shape shape(static_cast<size_t>(in.below(6)));
  for (int64_t& d : shape) d = in.one_in(32) ? 0 : 1 + in.below(shape.size() > 2 ? 6 : 40);
  if (shape.empty() || !in.one_in(6)) return shape;
  // One long axis: beyond a chunk, beyond a block, or enough for tasks.
  static constexpr int64_t kLong[] = {1024, 1024, 2048, 2048, 8192, 16384, 20000, 140000};
  const int64_t size = in.pick(kLong) - 20 + in.below(40);
  const int64_t rows = size > 100000 ? 1 + in.below(2) : size > 10000 ? 1 + in.below(4) : 40;
  int64_t others = 1;
  const auto which = static_cast<size_t>(in.below(static_cast<int64_t>(shape.size())));
  for (size_t d = 0; d < shape.size(); ++d) {
    if (d == which) shape[d] = size;
    else if (others * shape[d] > rows) shape[d] = 1;
    else others *= std::max<int64_t>(shape[d], 1);
  }
  if (in.one_in(4)) shape.insert(shape.begin(), in.one_in(2) ? 140000 / (size * others) + 1 : 1);
  return shape;
}

// A shape that broadcasts to the call's x.
inline Shape draw_broadcast(Input& in, const Call& call, bool per_row) {
  Shape shape;
  const size_t ndim = call.shape.size();
  for (size_t d = static_cast<size_t>(in.below(static_cast<int64_t>(ndim) + 1)); d < ndim; ++d)
    shape.push_back((per_row && call.reduced[d]) || in.one_in(3) ? 1 : call.shape[d]);
  return shape;
}

// An optional operand.
inline void add_operand(Input& in, Call& call, const char* name,
                        const softmaxlib_array* softmaxlib_options::*member, softmaxlib_dtype dtype,
                        bool per_row, bool positive = false) {
  if (!in.one_in(4)) return;
  auto array = std::make_unique<Array>(in, dtype, draw_broadcast(in, call, per_row),
                                       positive ? Elements::kOwnMemory : Elements::kMayOverlap);
  fill(in, *array, positive);
  call.options.*member = array->view();
  call.operands.push_back({name, member, per_row, std::move(array)});
}

// Everything but out. one_axis: exactly one; attention: its options too.
inline void draw_call(Input& in, bool one_axis, bool attention, softmaxlib_dtype x_type,
                      Call* drawn) {
  Call& call = *drawn;
  call.shape = draw_shape(in);
  if (one_axis && call.shape.empty()) call.shape = {1};
  const size_t ndim = call.shape.size();
  call.reduced.assign(ndim, false);
  const int64_t only = one_axis ? in.below(static_cast<int64_t>(ndim)) : -1;
  for (size_t d = 0; d < ndim; ++d) {
    if (one_axis ? static_cast<int64_t>(d) != only : in.one_in(2)) continue;
    call.reduced[d] = true;
    call.axes.push_back(static_cast<int32_t>(d) - (in.one_in(4) ? static_cast<int32_t>(ndim) : 0));
  }
  if (call.axes.empty()) call.reduced.assign(ndim, true);
  call.x = std::make_unique<Array>(in, x_type, call.shape, Elements::kMayOverlap);
  fill(in, *call.x);

  softmaxlib_options& o = call.options;
  static constexpr double kScales[] = {1, 0.7, 4, 1e-3, 1e30, 1e-310, 5e-324, 1.7e308};
  o.temperature = in.pick(kScales);
  const auto f32_or_f64 = in.one_in(2) ? SOFTMAXLIB_F64 : SOFTMAXLIB_F32;
  const auto any_float = static_cast<softmaxlib_dtype>(in.below(4));
  using Options = softmaxlib_options;
  add_operand(in, call, "temperatures", &Options::temperatures, f32_or_f64, true, true);
  add_operand(in, call, "bias", &Options::bias, any_float, false);
  add_operand(in, call, "where", &Options::where, SOFTMAXLIB_BOOL, false);
  if (attention && in.one_in(2)) {
    o.scale = in.pick(kScales);
    if (!o.temperatures) add_operand(in, call, "scales", &Options::scales, f32_or_f64, true, true);
    add_operand(in, call, "sinks", &Options::sinks, any_float, true);
    if (call.axes.size() == 1 && ndim > 1) {
      call.query_axis = static_cast<size_t>(in.below(static_cast<int64_t>(ndim) - 1));
      if (call.reduced[call.query_axis]) call.query_axis = ndim - 1;
      o.query_axis =
          static_cast<int32_t>(call.query_axis) - (in.one_in(2) ? static_cast<int32_t>(ndim) : 0);
      o.causal = in.one_in(2);
      static constexpr int64_t kOffsets[] = {0, 1, -1, 7, -40, 16384, INT64_MAX, INT64_MIN};
      o.causal_offset = in.one_in(3) ? in.pick(kOffsets) : in.below(40) - 20;
      add_operand(in, call, "alibi_slopes", &Options::alibi_slopes, f32_or_f64, true);
    }
  } else if (in.one_in(8)) {
    o.struct_size = offsetof(softmaxlib_options, scale);  // a caller's of an older header
  }
  call.way = static_cast<size_t>(in.below(std::size(kWays)));
  o.parallel_for = kWays[call.way];
  o.num_threads = static_cast<int32_t>(in.below(6));
}

// ---- The same, plainly.

class Plain {
 public:
  explicit Plain(const Call& call) : options(call.options) {
    shape[0] = size_of(call.side(Call::kOthers));
    shape[1] = size_of(call.side(Call::kQueries));
    shape[2] = size_of(call.side(Call::kColumns));
    options.isa = SOFTMAXLIB_ISA_SCALAR;
    options.algorithm = SOFTMAXLIB_TWO_PASS;
    options.store = SOFTMAXLIB_STORE_PLAIN;
    options.parallel_for = nullptr;
    options.query_axis = 1;
    for (const Operand& operand : call.operands)
      options.*operand.member = copy(call, *operand.array, operand.per_row);
    x = copy(call, *call.x, false);
  }
  Plain(const Plain&) = delete;
  Plain& operator=(const Plain&) = delete;

  int64_t rows() const { return shape[0] * shape[1]; }
  int64_t columns() const { return shape[2]; }

  const softmaxlib_array* x;
  softmaxlib_options options;
  int64_t shape[3];
  static constexpr int32_t kAxis = 2;

 private:
  struct Copy {
    std::vector<char> bytes;
    int64_t strides[3];
    softmaxlib_array view;
  };
  const softmaxlib_array* copy(const Call& call, const Array& array, bool per_row) {
    const int64_t item = item_size(array.dtype());
    copies_.push_back(std::make_unique<Copy>());
    Copy& c = *copies_.back();
    if (per_row)
      call.for_rows(
          [&](const Shape& i) { c.bytes.insert(c.bytes.end(), array.at(i), array.at(i) + item); });
    else c.bytes = call.plain_copy(array);
    c.strides[2] = per_row ? 0 : item;
    c.strides[1] = per_row ? item : shape[2] * item;
    c.strides[0] = shape[1] * c.strides[1];
    c.view = {c.bytes.data(), array.dtype(), 3, shape, c.strides};
    return &c.view;
  }
  std::vector<std::unique_ptr<Copy>> copies_;
};

// Memory as a call asks for it, to the byte.
class Scratch {
 public:
  explicit Scratch(size_t bytes) {
    require(posix_memalign(&data_, 64, std::max<size_t>(bytes, 1)) == 0, "no memory");
    memset(data_, 0xff, bytes);
  }
  ~Scratch() { free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void* data() const { return data_; }

 private:
  void* data_ = nullptr;
};

// Scratch of exactly the size that calls are faster with which need none (softmaxlib.h); every
// other call gets it.
class OfferedScratch {
 public:
  OfferedScratch(int64_t n, size_t call, softmaxlib_options* o)
      : bytes_(256 * static_cast<size_t>(n + 64) *
               static_cast<size_t>(std::max(o->num_threads, 1))),
        scratch_(bytes_) {
    if (call % 2) return;
    o->scratch = scratch_.data();
    o->scratch_size = bytes_;
  }

 private:
  const size_t bytes_;
  const Scratch scratch_;
};

// Copies of what a call must not write to.
class Inputs {
 public:
  explicit Inputs(const Call& call) : call_(call) {
    kept_.push_back(*call.x);
    for (const Operand& operand : call.operands) kept_.push_back(*operand.array);
  }
  void check() const {
    require(kept_[0].same_memory(*call_.x), "x was written to");
    for (size_t i = 1; i < kept_.size(); ++i)
      require(kept_[i].same_memory(*call_.operands[i - 1].array), "an operand was written to");
  }

 private:
  const Call& call_;
  std::vector<Array> kept_;
};

// That nothing but elements of `after` differs from `before`; spoils both.
inline void check_gaps(Array before, Array& after) {
  before.erase_elements();
  after.erase_elements();
  require(after.same_memory(before), "bytes between the elements of a result were written to");
}

inline void check_same(const std::vector<char>& got, const std::vector<char>& wanted,
                       softmaxlib_dtype dtype, const std::string& how) {
  if (got == wanted) return;
  const auto differ = std::mismatch(got.begin(), got.end(), wanted.begin(), wanted.end());
  fail("element " + std::to_string((differ.first - got.begin()) / item_size(dtype)) +
       " (others, queries, columns) differs, by " + how);
}

}  // namespace softmaxlib::fuzz
