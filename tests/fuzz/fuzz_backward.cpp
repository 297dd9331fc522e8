// softmaxlib_backward and softmaxlib_scale_rows on valid calls, against plain ones on the scalar
// leaf; the plain ones against the reference. grad is any numbers; y, too, or a result of the
// function.
#include "reference.hpp"

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

// Numbers near the end of a format's range, whose sums are beyond it.
void make_huge(Input& in, Array* array) {
  std::mt19937_64 random(in.bytes(2));
  const double largest = test::format_of(array->dtype()).largest;
  for_indices(array->shape(), [&](const Shape& i) {
    const double share = 0.5 + std::ldexp(static_cast<double>(random() >> 11), -54);
    test::encode(random() % 2 ? share * largest : -share * largest, array->dtype(), array->at(i));
  });
}

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
  fill(in, *g->grad);
  if (in.one_in(6)) make_huge(in, g->grad.get());
  const bool genuine = in.one_in(2);
  g->y = std::make_unique<Array>(in, any_float(), results,
                                 genuine ? Elements::kOwnMemory : Elements::kMayOverlap);
  if (genuine)
    require(softmaxlib_run(g->function, g->x->view(), g->y->view(), g->naxes(), g->axes.data(),
                           &g->options) == SOFTMAXLIB_OK,
            "no results to differentiate");
  else fill(in, *g->y);
  g->in_place = in.one_in(4) && !g->reduces() && g->grad->dtype() == to && g->grad->own_elements();
  g->out = g->in_place ? std::make_unique<Array>(*g->grad)
                       : std::make_unique<Array>(in, to, g->shape, Elements::kOwnMemory);
}

// An array of results, plainly.
struct Copy {
  bool reduces;
  std::vector<char> bytes;
  softmaxlib_array view;
  Copy(const Gradient& g, const Array& array, const Plain& plain)
      : reduces(g.reduces()), bytes(g.reduces() ? g.plain_rows(array) : g.plain_copy(array)) {
    bytes.reserve(1);
    view = {bytes.data(), array.dtype(), g.reduces() ? 2 : 3, plain.shape, nullptr};
  }
  Copy(const Copy&) = delete;
  Copy& operator=(const Copy&) = delete;

  // A row's values as the arithmetic of `to` sees them; one for a row is a double.
  std::vector<Real> row(int64_t number, int64_t size, softmaxlib_dtype to) const {
    const char* p = bytes.data() + number * size * test::item_size_of(view.dtype);
    std::vector<Real> values = test::decode_all(p, size, view.dtype);
    if (!reduces)
      for (Real& v : values) v = test::converted(v, to);
    return values;
  }
};

void check_gradient(const Gradient& g, const Plain& plain, const Copy& grad, const Copy& y,
                    const std::vector<char>& out) {
  const softmaxlib_dtype dtype = g.out->dtype();
  const int64_t n = plain.columns(), results = g.reduces() ? 1 : n;
  if (n == 0) return;
  for_plain_rows(plain, [&](int64_t number, int64_t other, int64_t query) {
    const ReferenceRow row = row_of(g.function, dtype, *plain.x, plain.options, n, other, query);
    std::vector<Real> x;
    for (int64_t c = 0; c < n; ++c)
      x.push_back(test::converted(value_at(plain.x, {other, query, c}, 0), dtype));
    const RowGradient want = gradient_of(g.function, dtype, grad.row(number, results, dtype), x,
                                         y.row(number, results, dtype), row.in, row.factor);
    const auto got =
        test::decode_all(out.data() + number * n * test::item_size_of(dtype), n, dtype);
    for (size_t i = 0; i < got.size(); ++i)
      if (want.judged[i])
        require_near(got[i], want.value[i],
                     tolerance_of(gradient_ulps(g.function, dtype), want.size[i], dtype), dtype,
                     std::string("gradient of ") + test::kFunctionNames[g.function], number,
                     static_cast<int64_t>(i));
  });
}

void try_gradient(Input& in) {
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
  check_gradient(g, plain, grad, y, wanted);

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
}

// ---- softmaxlib_scale_rows

// The elements, all of whose NaN are the same.
std::vector<char> with_one_nan(std::vector<char> elements, softmaxlib_dtype dtype) {
  const auto item = static_cast<size_t>(item_size(dtype));
  for (size_t i = 0; i < elements.size(); i += item) {
    const Real value = decode(dtype, &elements[i]);
    if (value != value) memset(&elements[i], 0xff, item);
  }
  return elements;
}

struct Scaling : Call {
  std::unique_ptr<Array> factors, out;
  bool in_place = false;

  std::string description() const {
    return std::string("softmaxlib_scale_rows, ") + (in_place ? "in place, " : "") + text() +
           factors->text("factors") + out->text("out");
  }
};

void check_scaling(const Scaling& s, const std::vector<char>& factors,
                   const std::vector<char>& out) {
  const softmaxlib_dtype dtype = s.out->dtype(), of_factors = s.factors->dtype();
  const auto read = [](const std::vector<char>& bytes, size_t i, softmaxlib_dtype type) {
    return decode(type, bytes.data() + i * static_cast<size_t>(test::item_size_of(type)));
  };
  const std::vector<char> x = s.plain_copy(*s.x);
  for (size_t i = 0; i < static_cast<size_t>(size_of(s.shape)); ++i) {
    const Real factor = read(factors, i, of_factors), given = read(x, i, s.x->dtype());
    const Real value = test::converted(given, dtype);
    const Real want = factor == 1  ? given
                      : value == 0 ? 0
                                   : static_cast<Real>(Wide{value} * factor);
    // A product of floats is a double, rounded to float, then to a half.
    const bool once = factor == 1 || dtype == SOFTMAXLIB_F64;
    const Real ulps = once ? 0.5L : is_half(dtype) ? 0.5L + 0x1p-10L : 0.5L + 0x1p-28L;
    const Real tolerance = std::isfinite(want) ? ulps * ulp_of(want, format_of(dtype)) : 0;
    require_near(read(out, i, dtype), want, tolerance, dtype, "scaled element",
                 static_cast<int64_t>(i));
  }
}

void try_scaling(Input& in) {
  Scaling s;
  const auto to = static_cast<softmaxlib_dtype>(in.below(4));
  draw_call(in, false, false, in.one_in(2) ? static_cast<softmaxlib_dtype>(in.below(13)) : to, &s);
  s.factors = std::make_unique<Array>(in, static_cast<softmaxlib_dtype>(in.below(4)),
                                      draw_broadcast(in, s, false), Elements::kMayOverlap);
  fill(in, *s.factors);
  if (in.one_in(4))
    for_indices(s.factors->shape(),
                [&](const Shape& i) { test::encode(1, s.factors->dtype(), s.factors->at(i)); });
  s.in_place = in.one_in(3) && s.x->dtype() == to && s.x->own_elements();
  s.out = s.in_place ? std::make_unique<Array>(*s.x)
                     : std::make_unique<Array>(in, to, s.shape, Elements::kOwnMemory);
  s.options.store = static_cast<softmaxlib_store>(in.below(3));
  describe = [&s] { return s.description(); };

  const Plain plain(s);
  std::vector<char> factors = s.plain_copy(*s.factors), wanted = s.plain_copy(*s.out);
  factors.reserve(1), wanted.reserve(1);
  const softmaxlib_array fa = {factors.data(), s.factors->dtype(), 3, plain.shape, nullptr};
  const softmaxlib_array out_view = {wanted.data(), to, 3, plain.shape, nullptr};
  softmaxlib_status status = softmaxlib_scale_rows(plain.x, &fa, &out_view, &plain.options);
  if (status) fail(std::string("the plain call is refused: ") + softmaxlib_status_text(status));
  check_scaling(s, factors, wanted);
  for (int32_t rank = 0; const softmaxlib_isa isa = softmaxlib_isa_available(rank); ++rank) {
    const Inputs inputs(s);
    const Array kept = *s.factors;
    softmaxlib_options o = s.options;
    o.isa = isa;
    Array out = *s.out;
    status = softmaxlib_scale_rows(s.in_place ? out.view() : s.x->view(), s.factors->view(),
                                   out.view(), &o);
    require(status == SOFTMAXLIB_OK, softmaxlib_status_text(status));
    inputs.check();
    require(kept.same_memory(*s.factors), "factors were written to");
    // In place, factors of 1 touch nothing: a NaN stays the one that it was.
    check_same(with_one_nan(s.plain_copy(out), to), with_one_nan(wanted, to), to,
               softmaxlib_isa_name(isa));
    check_gaps(*s.out, out);
  }
  describe = nullptr;
}

}  // namespace
}  // namespace softmaxlib::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace softmaxlib::fuzz;
  Input in(data, size);
  if (in.one_in(4)) try_scaling(in);
  else try_gradient(in);
  return 0;
}
