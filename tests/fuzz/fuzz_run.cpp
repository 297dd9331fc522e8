// softmaxlib_run and plans on valid calls of every kind, against plain ones on the scalar leaf: the
// same bits, no other byte. The plain ones against the reference.
#include "call.hpp"
#include "reference.hpp"

namespace softmaxlib::fuzz {
namespace {

struct Run : Call {
  softmaxlib_function function;
  std::unique_ptr<Array> out;
  bool in_place = false, by_plan = false, short_of_scratch = false;

  bool reduces() const { return function == SOFTMAXLIB_LOGSUMEXP; }
  std::string description() const {
    return "function " + std::to_string(function) + (in_place ? ", in place" : "") +
           (by_plan ? ", by a plan" : "") + (short_of_scratch ? ", no scratch" : "") + ", " +
           text() + out->text("out");
  }
};

void draw_run(Input& in, Run* run) {
  run->function = static_cast<softmaxlib_function>(in.below(5));
  const auto to = static_cast<softmaxlib_dtype>(in.below(4));
  const auto from = in.one_in(2) ? static_cast<softmaxlib_dtype>(in.below(13)) : to;
  draw_call(in, false, true, from, run);
  run->in_place = in.one_in(4) && from == to && !run->reduces() && run->x->own_elements();
  run->out = run->in_place
                 ? std::make_unique<Array>(*run->x)
                 : std::make_unique<Array>(
                       in, to, run->reduces() ? run->without_axes(run->shape) : run->shape,
                       Elements::kOwnMemory);
  run->options.algorithm = static_cast<softmaxlib_algorithm>(in.one_in(2) ? in.below(5) : 0);
  run->options.store = static_cast<softmaxlib_store>(in.below(3));
  run->by_plan = in.one_in(4);
  run->short_of_scratch = in.one_in(4);
}

std::vector<char> expected(const Run& run) {
  const Plain plain(run);
  const int64_t elements = plain.rows() * (run.reduces() ? 1 : plain.columns());
  std::vector<char> y(static_cast<size_t>(elements * item_size(run.out->dtype())));
  y.reserve(1);
  const softmaxlib_array out = {y.data(), run.out->dtype(), run.reduces() ? 2 : 3, plain.shape,
                                nullptr};
  const softmaxlib_status status =
      softmaxlib_run(run.function, plain.x, &out, 1, &Plain::kAxis, &plain.options);
  if (status) fail(std::string("the plain call is refused: ") + softmaxlib_status_text(status));
  check_values(run.function, plain, y.data(), run.out->dtype());
  return y;
}

softmaxlib_status call_plan(const Run& run, const softmaxlib_array& x, const softmaxlib_array& out,
                            const softmaxlib_options& o) {
  softmaxlib_plan* plan = nullptr;
  softmaxlib_status status =
      softmaxlib_plan_create(run.function, &x, &out, run.naxes(), run.axes.data(), &o, &plan);
  if (status) return status;
  const auto data = [](const softmaxlib_array* a) { return a ? a->data : nullptr; };
  softmaxlib_buffers b = SOFTMAXLIB_BUFFERS_INIT;
  b.x = x.data, b.out = out.data, b.bias = data(o.bias), b.where = data(o.where);
  b.temperatures = data(o.temperatures ? o.temperatures : o.scales);
  if (o.struct_size == sizeof(o)) b.alibi_slopes = data(o.alibi_slopes), b.sinks = data(o.sinks);
  b.parallel_for = o.parallel_for;
  b.report = o.report;
  const size_t bytes = softmaxlib_plan_scratch_size(plan);
  const Scratch scratch(bytes);
  b.scratch = run.short_of_scratch ? nullptr : scratch.data();
  b.scratch_size = bytes;
  status = softmaxlib_plan_run(plan, &b);
  if (status == SOFTMAXLIB_ERROR_SCRATCH) require(bytes > 0, "scratch is missing where none is");
  softmaxlib_plan_destroy(plan);
  return status;
}

softmaxlib_status call_run(const Run& run, const softmaxlib_array& x, const softmaxlib_array& out,
                           softmaxlib_options o) {
  size_t bytes = 0;
  const softmaxlib_status status =
      softmaxlib_scratch_size(run.function, &x, &out, run.naxes(), run.axes.data(), &o, &bytes);
  if (status) return status;
  const Scratch scratch(bytes);
  o.scratch = run.short_of_scratch ? nullptr : scratch.data();
  o.scratch_size = bytes;
  return softmaxlib_run(run.function, &x, &out, run.naxes(), run.axes.data(), &o);
}

void check(const Run& run, softmaxlib_isa isa, const std::vector<char>& wanted) {
  const Inputs inputs(run);
  softmaxlib_report report = SOFTMAXLIB_REPORT_INIT;
  softmaxlib_options o = run.options;
  o.isa = isa;
  o.report = &report;
  Array out = *run.out;
  const softmaxlib_array& from = run.in_place ? *out.view() : *run.x->view();
  const softmaxlib_status status =
      run.by_plan ? call_plan(run, from, *out.view(), o) : call_run(run, from, *out.view(), o);
  if (status == SOFTMAXLIB_ERROR_SCRATCH) {
    require(run.short_of_scratch && (run.by_plan || o.algorithm != SOFTMAXLIB_ALGORITHM_AUTO),
            "scratch is missing where none is");
    require(out.same_memory(*run.out), "out was written to by a call that failed");
    return;
  }
  require(status == SOFTMAXLIB_OK, softmaxlib_status_text(status));
  require(report.kernel && report.tasks >= 1, "no report");
  require(report.isa == isa || size_of(run.shape) == 0, "another ISA ran");
  inputs.check();
  check_same(run.reduces() ? run.plain_rows(out) : run.plain_copy(out), wanted, out.dtype(),
             std::string(report.kernel) + " on " + softmaxlib_isa_name(isa));
  check_gaps(*run.out, out);
}

}  // namespace
}  // namespace softmaxlib::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace softmaxlib::fuzz;
  Input in(data, size);
  Run run;
  draw_run(in, &run);
  describe = [&run] { return run.description(); };
  const std::vector<char> wanted = expected(run);
  for (int32_t rank = 0; const softmaxlib_isa isa = softmaxlib_isa_available(rank); ++rank)
    check(run, isa, wanted);
  describe = nullptr;
  return 0;
}
