// softmaxlib_backward on valid calls, against plain ones on the scalar leaf. grad and y are any
// numbers: what they mean has other tests.
#include "call.hpp"

namespace softmaxlib::fuzz {
namespace {

struct Gradient : Call {
  softmaxlib_function function;
  std::unique_ptr<Array> grad, y, out;
  bool in_place = false;  // out is grad

  bool reduces() const { return function == SOFTMAXLIB_LOGSUMEXP; }
  std::string description() const {
    return "softmaxlib_backward, function " + std::to_string(function) +
           (in_place ? ", out is grad, " : ", ") + text() + grad->text("grad") + y->text("y") +
           out->text("out");
  }
};

void draw_gradient(Input& in, Gradient* g) {
  g->function = static_cast<softmaxlib_function>(in.below(5));
  const auto to = static_cast<softmaxlib_dtype>(in.below(4));
  draw_call(in, false, false, static_cast<softmaxlib_dtype>(in.below(in.one_in(3) ? 13 : 4)), g);
  g->options.bias = nullptr;
  g->operands.erase(
      std::remove_if(g->operands.begin(), g->operands.end(),
                     [](const Operand& o) { return o.member == &softmaxlib_options::bias; }),
      g->operands.end());
  const Shape results = g->reduces() ? g->without_axes(g->shape) : g->shape;
  const auto any_float = [&] {
    return in.one_in(2) ? static_cast<softmaxlib_dtype>(in.below(4)) : to;
  };
  g->grad = std::make_unique<Array>(in, any_float(), results, Elements::kMayOverlap);
  g->y = std::make_unique<Array>(in, any_float(), results, Elements::kMayOverlap);
  fill(in, *g->grad);
  fill(in, *g->y);
  g->in_place = in.one_in(4) && !g->reduces() && g->grad->dtype() == to && g->grad->own_elements();
  g->out = g->in_place ? std::make_unique<Array>(*g->grad)
                       : std::make_unique<Array>(in, to, g->shape, Elements::kOwnMemory);
}

// An array of results, plainly.
struct Copy {
  std::vector<char> bytes;
  softmaxlib_array view;
  Copy(const Gradient& g, const Array& array, const Plain& plain)
      : bytes(g.reduces() ? g.plain_rows(array) : g.plain_copy(array)) {
    bytes.reserve(1);
    view = {bytes.data(), array.dtype(), g.reduces() ? 2 : 3, plain.shape, nullptr};
  }
  Copy(const Copy&) = delete;
  Copy& operator=(const Copy&) = delete;
};

}  // namespace
}  // namespace softmaxlib::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace softmaxlib::fuzz;
  Input in(data, size);
  Gradient g;
  draw_gradient(in, &g);
  describe = [&g] { return g.description(); };

  const Plain plain(g);
  const Copy grad(g, *g.grad, plain), y(g, *g.y, plain);
  std::vector<char> wanted = g.plain_copy(*g.out);
  wanted.reserve(1);
  const softmaxlib_array out_view = {wanted.data(), g.out->dtype(), 3, plain.shape, nullptr};
  softmaxlib_status status = softmaxlib_backward(g.function, &grad.view, plain.x, &y.view,
                                                 &out_view, 1, &Plain::kAxis, &plain.options);
  if (status) fail(std::string("the plain call is refused: ") + softmaxlib_status_text(status));

  for (int32_t rank = 0; const softmaxlib_isa isa = softmaxlib_isa_available(rank); ++rank) {
    const Inputs inputs(g);
    const Array kept_grad = *g.grad, kept_y = *g.y;
    softmaxlib_options o = g.options;
    o.isa = isa;
    Array out = *g.out;
    status = softmaxlib_backward(g.function, g.in_place ? out.view() : g.grad->view(), g.x->view(),
                                 g.y->view(), out.view(), g.naxes(), g.axes.data(), &o);
    require(status == SOFTMAXLIB_OK, softmaxlib_status_text(status));
    inputs.check();
    require(kept_grad.same_memory(*g.grad) && kept_y.same_memory(*g.y), "grad or y was written to");
    check_same(g.plain_copy(out), wanted, out.dtype(), softmaxlib_isa_name(isa));
    check_gaps(*g.out, out);
  }
  describe = nullptr;
  return 0;
}
