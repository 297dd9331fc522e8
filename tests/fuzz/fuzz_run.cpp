// softmaxlib_run on valid calls of every kind, against plain ones: the rows copied to C-contiguous
// memory, computed on the scalar leaf by the simplest algorithm. The same bits, no other byte.
#include <thread>

#include "fuzz.hpp"

namespace softmaxlib::fuzz {
namespace {

// ---- Ways to run tasks.

void backwards(void*, int64_t count, softmaxlib_task task, void* argument) {
  for (int64_t i = count; i-- > 0;) task(argument, i);
}
void odd_ones_first(void*, int64_t count, softmaxlib_task task, void* argument) {
  for (int64_t i = 1; i < count; i += 2) task(argument, i);
  for (int64_t i = 0; i < count; i += 2) task(argument, i);
}
void in_new_threads(void*, int64_t count, softmaxlib_task task, void* argument) {
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < count; ++i) threads.emplace_back(task, argument, i);
  for (std::thread& thread : threads) thread.join();
}
void in_pool(void*, int64_t count, softmaxlib_task task, void* argument) {
  static softmaxlib_pool* const pool = [] {
    softmaxlib_pool* created = nullptr;
    require(softmaxlib_pool_create(3, &created) == SOFTMAXLIB_OK, "a pool starts");
    return created;
  }();
  softmaxlib_pool_parallel_for(pool, count, task, argument);
}

// ---- A call.

struct Operand {
  const char* name;
  const softmaxlib_array* softmaxlib_options::*member;
  bool per_row;  // constant along the axes
  std::unique_ptr<Array> array;
};

struct Call {
  softmaxlib_function function;
  Shape shape;
  std::vector<int32_t> axes;
  std::vector<bool> reduced;
  std::unique_ptr<Array> x, out;
  std::vector<Operand> operands;
  bool in_place = false, short_of_scratch = false;
  softmaxlib_options options = SOFTMAXLIB_OPTIONS_INIT;

  bool reduces() const { return function == SOFTMAXLIB_LOGSUMEXP; }
  int32_t naxes() const { return static_cast<int32_t>(axes.size()); }

  // The shape of one side of the axes; ones elsewhere.
  Shape side(bool inner) const {
    Shape s = shape;
    for (size_t d = 0; d < s.size(); ++d)
      if (reduced[d] != inner) s[d] = 1;
    return s;
  }
  Shape out_shape() const {
    Shape s;
    for (size_t d = 0; d < shape.size(); ++d)
      if (!reduces() || !reduced[d]) s.push_back(shape[d]);
    return s;
  }
  std::string text() const;
};

std::string Call::text() const {
  std::string s = "softmaxlib_run, function " + std::to_string(function) + ", axes (";
  for (const int32_t a : axes) s += std::to_string(a) + ", ";
  s += in_place ? "), in place\n" : ")\n";
  s += x->text("x") + out->text("out");
  for (const Operand& o : operands) s += o.array->text(o.name);
  char line[300];
  snprintf(line, sizeof(line),
           "algorithm %d, isa %d, store %d, num_threads %d, parallel_for %s, temperature %a, "
           "scratch %s\n",
           options.algorithm, options.isa, options.store, options.num_threads,
           !options.parallel_for                    ? "NULL"
           : options.parallel_for == backwards      ? "backwards"
           : options.parallel_for == odd_ones_first ? "odd ones first"
           : options.parallel_for == in_pool        ? "pool"
                                                    : "new threads",
           options.temperature, short_of_scratch ? "NULL" : "as asked for");
  return s + line;
}

Shape draw_shape(Input& in) {
  Shape shape(static_cast<size_t>(in.below(6)));
  for (int64_t& d : shape) d = in.one_in(32) ? 0 : 1 + in.below(shape.size() > 2 ? 6 : 40);
  if (shape.empty() || !in.one_in(6)) return shape;
  // One long axis: beyond a chunk, beyond a block, or enough for tasks.
  static constexpr int64_t kLong[] = {1024, 2048, 16384, 40000, 140000};
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

// A shape that broadcasts to the call's; `constant`: along its axes.
Shape broadcastable(Input& in, const Call& call, bool constant) {
  Shape shape;
  const size_t ndim = call.shape.size();
  for (size_t d = static_cast<size_t>(in.below(static_cast<int64_t>(ndim) + 1)); d < ndim; ++d)
    shape.push_back((constant && call.reduced[d]) || in.one_in(3) ? 1 : call.shape[d]);
  return shape;
}

void add_operand(Input& in, Call& call, const char* name,
                 const softmaxlib_array* softmaxlib_options::*member, softmaxlib_dtype dtype,
                 bool per_row, bool positive = false) {
  if (!in.one_in(4)) return;
  auto array = std::make_unique<Array>(in, dtype, broadcastable(in, call, per_row),
                                       positive ? Elements::kOwnMemory : Elements::kMayOverlap);
  fill(in, *array, positive);
  call.options.*member = array->view();
  call.operands.push_back({name, member, per_row, std::move(array)});
}

Call draw_call(Input& in) {
  Call call;
  call.function = static_cast<softmaxlib_function>(in.below(5));
  call.shape = draw_shape(in);
  const size_t ndim = call.shape.size();
  call.reduced.assign(ndim, false);
  for (size_t d = 0; d < ndim; ++d) {
    if (in.one_in(2)) continue;
    call.reduced[d] = true;
    call.axes.push_back(static_cast<int32_t>(d) - (in.one_in(4) ? static_cast<int32_t>(ndim) : 0));
  }
  if (call.axes.empty()) call.reduced.assign(ndim, true);

  const auto out = static_cast<softmaxlib_dtype>(in.below(4));
  const auto x = in.one_in(2) ? static_cast<softmaxlib_dtype>(in.below(13)) : out;
  call.x = std::make_unique<Array>(in, x, call.shape, Elements::kMayOverlap);
  fill(in, *call.x);
  call.in_place = in.one_in(4) && x == out && !call.reduces() && call.x->own_elements();
  call.out = call.in_place
                 ? std::make_unique<Array>(*call.x)
                 : std::make_unique<Array>(in, out, call.out_shape(), Elements::kOwnMemory);

  softmaxlib_options& o = call.options;
  static constexpr double kTemperatures[] = {1, 0.7, 4, 1e-3, 1e30, 1e-310, 5e-324, 1.7e308};
  o.temperature = in.pick(kTemperatures);
  const auto f32_or_f64 = in.one_in(2) ? SOFTMAXLIB_F64 : SOFTMAXLIB_F32;
  const auto any_float = static_cast<softmaxlib_dtype>(in.below(4));
  using Options = softmaxlib_options;
  add_operand(in, call, "temperatures", &Options::temperatures, f32_or_f64, true, true);
  add_operand(in, call, "bias", &Options::bias, any_float, false);
  add_operand(in, call, "where", &Options::where, SOFTMAXLIB_BOOL, false);

  o.algorithm = static_cast<softmaxlib_algorithm>(in.one_in(2) ? in.below(5) : 0);
  o.store = static_cast<softmaxlib_store>(in.below(3));
  static constexpr softmaxlib_parallel_for kWays[] = {nullptr, backwards, odd_ones_first, in_pool,
                                                      in_new_threads};
  o.parallel_for = in.pick(kWays);
  o.num_threads = static_cast<int32_t>(in.below(6));
  call.short_of_scratch = in.one_in(4);
  return call;
}

// ---- The same rows, plainly: out of every layout, one row after the other.

template <class F>
void for_elements(const Call& call, F f) {
  for_indices(call.side(false), [&](const Shape& row) {
    for_indices(call.side(true), [&](const Shape& column) {
      Shape index = row;
      for (size_t d = 0; d < index.size(); ++d) index[d] += column[d];
      f(index);
    });
  });
}

std::vector<char> plain_copy(const Call& call, const Array& array) {
  std::vector<char> copy;
  const int64_t item = item_size(array.dtype());
  copy.reserve(static_cast<size_t>(size_of(call.shape) * item) + 1);
  for_elements(call,
               [&](const Shape& i) { copy.insert(copy.end(), array.at(i), array.at(i) + item); });
  return copy;
}

// The results, in the order of a plain array.
std::vector<char> results_of(const Call& call, const Array& out) {
  if (!call.reduces()) return plain_copy(call, out);
  std::vector<char> copy;
  for_indices(out.shape(), [&](const Shape& i) {
    copy.insert(copy.end(), out.at(i), out.at(i) + item_size(out.dtype()));
  });
  return copy;
}

std::vector<char> expected(const Call& call) {
  const int64_t shape[] = {size_of(call.side(false)), size_of(call.side(true))};
  struct Plain {
    std::vector<char> bytes;
    int64_t strides[2];
    softmaxlib_array view;
  };
  const auto plain = [&](const Array& array, bool per_row) {
    const int64_t item = item_size(array.dtype());
    auto p = std::make_unique<Plain>();
    p->bytes = plain_copy(call, array);
    p->strides[0] = shape[1] * item, p->strides[1] = per_row ? 0 : item;
    p->view = {p->bytes.data(), array.dtype(), 2, shape, p->strides};
    return p;
  };
  softmaxlib_options o = call.options;
  o.isa = SOFTMAXLIB_ISA_SCALAR;
  o.algorithm = SOFTMAXLIB_TWO_PASS;
  o.store = SOFTMAXLIB_STORE_PLAIN;
  o.parallel_for = nullptr;
  std::vector<std::unique_ptr<Plain>> operands;
  for (const Operand& operand : call.operands) {
    operands.push_back(plain(*operand.array, operand.per_row));
    o.*operand.member = &operands.back()->view;
  }
  const auto x = plain(*call.x, false);
  std::vector<char> out(static_cast<size_t>((call.reduces() ? 1 : shape[1]) * shape[0] *
                                            item_size(call.out->dtype())));
  out.reserve(1);
  const softmaxlib_array y = {out.data(), call.out->dtype(), call.reduces() ? 1 : 2, shape,
                              nullptr};
  const int32_t axis = 1;
  require(softmaxlib_run(call.function, &x->view, &y, 1, &axis, &o) == SOFTMAXLIB_OK,
          "the plain call is refused");
  return out;
}

// ---- The call on one ISA.

void check(const Call& call, softmaxlib_isa isa, const std::vector<char>& wanted) {
  softmaxlib_options o = call.options;
  softmaxlib_report report = {};
  report.struct_size = sizeof(report);
  o.isa = isa;
  o.report = &report;
  std::vector<Array> before;
  for (const Operand& operand : call.operands) before.push_back(*operand.array);
  const Array x = *call.x;
  Array out = *call.out;  // in place: x again
  const softmaxlib_array* from = call.in_place ? out.view() : x.view();

  size_t bytes = 0;
  softmaxlib_status status = softmaxlib_scratch_size(call.function, from, out.view(), call.naxes(),
                                                     call.axes.data(), &o, &bytes);
  require(status == SOFTMAXLIB_OK, softmaxlib_status_text(status));
  void* scratch = nullptr;
  require(posix_memalign(&scratch, 64, std::max<size_t>(bytes, 1)) == 0, "no memory");
  memset(scratch, 0xff, bytes);
  const std::unique_ptr<void, void (*)(void*)> owner(scratch, free);
  o.scratch = call.short_of_scratch ? nullptr : scratch;
  o.scratch_size = bytes;

  status = softmaxlib_run(call.function, from, out.view(), call.naxes(), call.axes.data(), &o);
  if (status == SOFTMAXLIB_ERROR_SCRATCH) {
    require(call.short_of_scratch && bytes && o.algorithm != SOFTMAXLIB_ALGORITHM_AUTO,
            "scratch is missing where none is");
    require(out.same_memory(*call.out), "out was written to by a call that failed");
    return;
  }
  require(status == SOFTMAXLIB_OK, softmaxlib_status_text(status));
  require(report.kernel && report.tasks >= 1, "no report");
  require(report.isa == isa || size_of(call.shape) == 0, "another ISA ran");

  for (size_t i = 0; i < before.size(); ++i)
    require(before[i].same_memory(*call.operands[i].array), "an operand was written to");
  require(x.same_memory(*call.x), "x was written to");
  const std::vector<char> got = results_of(call, out);
  if (got != wanted) {
    const auto differ = std::mismatch(got.begin(), got.end(), wanted.begin());
    const int64_t at = (differ.first - got.begin()) / item_size(out.dtype());
    fail("element " + std::to_string(at) + " (rows first, then the axes) differs, by " +
         report.kernel + " on " + softmaxlib_isa_name(isa));
  }
  Array untouched = *call.out;
  untouched.erase_elements();
  out.erase_elements();
  require(out.same_memory(untouched), "bytes between the elements of out were written to");
}

}  // namespace
}  // namespace softmaxlib::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace softmaxlib::fuzz;
  Input in(data, size);
  const Call call = draw_call(in);
  describe = [&call] { return call.text(); };
  const std::vector<char> wanted = expected(call);
  for (int32_t rank = 0; const softmaxlib_isa isa = softmaxlib_isa_available(rank); ++rank)
    check(call, isa, wanted);
  describe = nullptr;
  return 0;
}
