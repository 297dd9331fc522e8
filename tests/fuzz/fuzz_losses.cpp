// softmaxlib_cross_entropy and softmaxlib_take_log_softmax on valid calls, against plain ones on
// the scalar leaf; the plain ones against the reference. Probabilities are any numbers.
#include "reference.hpp"

namespace softmaxlib::fuzz {
namespace {

struct Losses : Call {
  bool takes;  // selected log-probabilities
  softmaxlib_function activation = SOFTMAXLIB_SOFTMAX;
  bool probabilities = false, in_place = false;  // grad is x
  int64_t k = 0;                                 // indices per row
  softmaxlib_loss_options loss = SOFTMAXLIB_LOSS_OPTIONS_INIT;
  std::vector<double> weight;
  std::unique_ptr<Array> target;   // or indices
  std::unique_ptr<Array> results;  // losses, or log-probabilities
  std::unique_ptr<Array> more;     // grad, or logsumexp; may be missing
  std::unique_ptr<Array> total;    // where a reduction asks for it

  std::string description() const {
    char line[300];
    snprintf(line, sizeof(line),
             "%s, activation %d, k %lld, smoothing %a, gradient_scale %a, weights %d, in place %d, "
             "reduction %d, ",
             takes ? "softmaxlib_take_log_softmax" : "softmaxlib_cross_entropy", activation,
             static_cast<long long>(k), loss.label_smoothing, loss.gradient_scale,
             loss.weight != nullptr, in_place, loss.reduction);
    std::string s = line;
    for (size_t i = 0; i < std::min<size_t>(weight.size(), 12); ++i) {
      snprintf(line, sizeof(line), "%s%a", i ? " " : "weights ", weight[i]);
      s += line;
    }
    return s + "\n" + text() + target->text("target") + results->text("results") +
           (more ? more->text("more") : "") + (total ? total->text("total") : "");
  }
  // Their elements as (rows, columns or k), or one per row.
  std::vector<char> plain(const Array& array, bool per_row) const {
    if (per_row) return plain_rows(array);
    if (!takes) return plain_copy(array);
    std::vector<char> copy;
    const int64_t item = item_size(array.dtype());
    for_rows([&](const Shape& row) {
      for (int64_t i = 0; i < k; ++i) {
        Shape index = row;
        for (size_t d = 0; d < index.size(); ++d) index[d] += reduced[d] ? i : 0;
        copy.insert(copy.end(), array.at(index), array.at(index) + item);
      }
    });
    return copy;
  }
};

// A probability of 1 for one class of each row.
void make_one_hot(Input& in, size_t axis, Array* target) {
  const int64_t n = target->shape()[axis], at = n ? in.below(n) : 0;
  for_indices(target->shape(), [&](const Shape& i) {
    test::encode(i[axis] == at ? 1 : 0, target->dtype(), target->at(i));
  });
}

void draw_losses(Input& in, Losses* l) {
  l->takes = in.one_in(3);
  draw_call(in, true, false, static_cast<softmaxlib_dtype>(in.below(in.one_in(3) ? 13 : 4)), l);
  const auto to = static_cast<softmaxlib_dtype>(in.below(4));
  const auto axis = static_cast<size_t>(std::find(l->reduced.begin(), l->reduced.end(), true) -
                                        l->reduced.begin());
  const int64_t n = l->shape[axis];
  const Shape rows = l->without_axes(l->shape);
  Shape selected = l->shape;
  if (l->takes) {
    l->k = n ? in.below(6) : 0;
    selected[axis] = l->k;
    l->results = std::make_unique<Array>(in, to, selected, Elements::kOwnMemory);
    if (in.one_in(2)) l->more = std::make_unique<Array>(in, to, rows, Elements::kOwnMemory);
  } else {
    l->activation = in.one_in(2) ? SOFTMAXLIB_STABLEMAX : SOFTMAXLIB_SOFTMAX;
    l->probabilities = in.one_in(2);
    static constexpr double kSmoothing[] = {0, 0, 0.1, 1, 0.999999, 1 - 0x1p-53, 5e-324};
    l->loss.label_smoothing = in.pick(kSmoothing);
    static constexpr double kScales[] = {1, -0.25, 0, 1e-300, 1e300};
    l->loss.gradient_scale = in.pick(kScales);
    l->loss.reduction = static_cast<softmaxlib_reduction>(in.below(3));
    const auto any_float = static_cast<softmaxlib_dtype>(in.below(4));
    l->results = std::make_unique<Array>(in, l->loss.reduction ? SOFTMAXLIB_F64 : any_float, rows,
                                         Elements::kOwnMemory);
    if (l->loss.reduction)
      l->total = std::make_unique<Array>(in, any_float, Shape(static_cast<size_t>(in.below(3)), 1),
                                         Elements::kOwnMemory);
    l->in_place = in.one_in(6) && l->x->dtype() == to && l->x->own_elements();
    if (l->in_place) l->more = std::make_unique<Array>(*l->x);
    else if (in.one_in(2))
      l->more = std::make_unique<Array>(in, to, l->shape, Elements::kOwnMemory);
  }
  if (l->probabilities) {
    l->target = std::make_unique<Array>(in, static_cast<softmaxlib_dtype>(in.below(4)), l->shape,
                                        Elements::kMayOverlap);
    fill(in, *l->target, in.one_in(2));
    if (in.one_in(4)) make_one_hot(in, axis, l->target.get());
  } else {
    l->target = std::make_unique<Array>(in, SOFTMAXLIB_I64, l->takes ? selected : rows,
                                        Elements::kOwnMemory);
  }
  std::mt19937_64 random(in.bytes(2));
  if (!l->probabilities)
    for_indices(l->target->shape(), [&](const Shape& i) {
      int64_t index = n ? static_cast<int64_t>(random() % static_cast<uint64_t>(n)) : -100;
      if (!l->takes && random() % 8 == 0) index = l->loss.ignore_index;
      memcpy(l->target->at(i), &index, sizeof(index));
    });
  if (!l->takes && in.one_in(3)) {
    l->weight.resize(static_cast<size_t>(n) + 1);
    const bool extreme = in.one_in(3);
    for (double& w : l->weight)
      w = extreme && random() % 4 ? std::pow(10.0, static_cast<double>(random() % 601) - 300)
                                  : static_cast<double>(random() % 5) / 3;
    l->loss.weight = l->weight.data();
  }
}

softmaxlib_status call_losses(const Losses& l, const softmaxlib_array* x,
                              const softmaxlib_array* target, const softmaxlib_array* results,
                              const softmaxlib_array* more, const softmaxlib_array* total,
                              int32_t axis, const softmaxlib_options& o) {
  if (l.takes) return softmaxlib_take_log_softmax(x, target, results, more, axis, &o);
  softmaxlib_loss_options loss = l.loss;
  loss.total = total;
  return softmaxlib_cross_entropy(l.activation, x, target, results, more, axis, &loss, &o);
}

// What a plain call returned, its rows one after the other.
struct Results {
  std::vector<char> target, results, more, total;
};

void check_taken(const Losses& l, const Plain& plain, const Results& given) {
  const softmaxlib_dtype to = l.results->dtype();
  for_plain_rows(plain, [&](int64_t number, int64_t other, int64_t query) {
    const ReferenceRow row =
        row_of(SOFTMAXLIB_LOG_SOFTMAX, to, *plain.x, plain.options, plain.columns(), other, query);
    const auto part = [&](const std::vector<char>& bytes, int64_t count, softmaxlib_dtype dtype) {
      return test::decode_all(bytes.data() + number * count * test::item_size_of(dtype), count,
                              dtype);
    };
    if (l.more) check_row(SOFTMAXLIB_LOGSUMEXP, to, row, part(given.more, 1, to), "sum", number);
    std::vector<int64_t> places;
    for (const Real place : part(given.target, l.k, SOFTMAXLIB_I64))
      places.push_back(static_cast<int64_t>(place));
    check_elements(SOFTMAXLIB_LOG_SOFTMAX, to, row, row.in, places, part(given.results, l.k, to),
                   "taken", number);
  });
}

void check_losses(const Losses& l, const Plain& plain, const Results& given) {
  const softmaxlib_dtype x_type = plain.x->dtype, of_losses = l.results->dtype();
  const bool writes = l.more && plain.columns() > 0;
  const softmaxlib_dtype dtype = writes             ? l.more->dtype()
                                 : is_float(x_type) ? x_type
                                                    : SOFTMAXLIB_F64;
  const int64_t n = plain.columns(), rows = plain.rows();
  const bool mean = l.loss.reduction == SOFTMAXLIB_REDUCTION_MEAN;
  const auto label_of = [&](int64_t row) {
    int64_t label;
    memcpy(&label, given.target.data() + row * 8, sizeof(label));
    return label;
  };
  Wide divisor = 1;
  if (mean) {
    divisor = l.probabilities ? static_cast<Wide>(rows) : Wide{0};
    for (int64_t r = 0; r < rows && !l.probabilities; ++r) {
      const int64_t label = label_of(r);
      if (label != l.loss.ignore_index) divisor += l.loss.weight ? l.loss.weight[label] : 1;
    }
  }
  const Wide by = divisor > 0 ? l.loss.gradient_scale / divisor : Wide{kNaN};

  Wide total = 0, sum_of_terms = 0, sizes_of_terms = 0;
  Real total_tolerance = 0;
  bool all_judged = true, has_unit = false;
  int unit = 0;
  for_plain_rows(plain, [&](int64_t number, int64_t other, int64_t query) {
    const ReferenceRow row = row_of(l.activation, dtype, *plain.x, plain.options, n, other, query);
    LossTarget target;
    target.weight = l.loss.weight;
    target.smoothing = l.loss.label_smoothing;
    if (l.probabilities) {
      target.share =
          test::decode_all(given.target.data() + number * n * test::item_size_of(l.target->dtype()),
                           n, l.target->dtype());
    } else {
      target.label = label_of(number);
      target.ignored = target.label == l.loss.ignore_index;
      target.share.assign(static_cast<size_t>(n), 0);
      if (!target.ignored) target.share[static_cast<size_t>(target.label)] = 1;
    }
    const RowLoss want = loss_of(l.activation, dtype, row, target, by);
    const Real term =
        decode(of_losses, given.results.data() + number * test::item_size_of(of_losses));
    sum_of_terms += term;
    sizes_of_terms += std::fabs(term);
    if (!want.judged || !row.judged || row.beyond) {
      all_judged = false;
      return;
    }
    total += want.loss;
    total_tolerance += want.tolerance;
    // Of a mean in a unit of the call's own.
    if (mean && !has_unit && term != 0 && want.loss != 0 && std::isfinite(term) &&
        std::isfinite(want.loss)) {
      has_unit = true;
      unit = static_cast<int>(std::lround(std::log2(std::fabs(term / want.loss))));
    }
    const Real loss = std::ldexp(want.loss, unit);
    Real tolerance = std::ldexp(want.tolerance, unit);
    if (of_losses != SOFTMAXLIB_F64) tolerance += rounding_of(loss, of_losses);
    // There a weight may be below the normal range.
    if (mean) tolerance += std::ldexp(1 + want.logarithms, -1074);
    require_near(term, loss, tolerance, of_losses, "loss", number);
    if (!writes) return;
    const auto gradient =
        test::decode_all(given.more.data() + number * n * test::item_size_of(dtype), n, dtype);
    for (size_t j = 0; j < gradient.size(); ++j) {
      const bool undefined = !(divisor > 0) && row.in[j] && !target.ignored;
      require_near(gradient[j], undefined ? Real{kNaN} : want.gradient[j],
                   undefined ? 0 : want.gradient_tolerance[j], dtype, "gradient of a loss", number,
                   static_cast<int64_t>(j));
    }
  });
  if (!l.total) return;
  const softmaxlib_dtype of_total = l.total->dtype();
  const Real got = decode(of_total, given.total.data());
  if (!mean) {  // of what the call itself returned, rounded once
    const Real sum = static_cast<Real>(sum_of_terms);
    const Real tolerance =
        (is_half(of_total) ? 0.5L + 0x1p-10L : 0.5L) * ulp_of(sum, format_of(of_total)) +
        static_cast<Real>(sizes_of_terms) * 0x1p-80L;
    require_near(got, sum, std::isfinite(sum) ? tolerance : 0, of_total, "total of the terms", 0);
  }
  if (!(divisor > 0)) return require_near(got, kNaN, 0, of_total, "total of nothing", 0);
  if (!all_judged) return;
  const Real want = static_cast<Real>(total / divisor);
  Real tolerance = total_tolerance / static_cast<Real>(divisor) + rounding_of(want, of_total);
  if (std::isfinite(want)) tolerance += 2 * ulp_of(want, format_of(SOFTMAXLIB_F64));
  require_near(got, want, std::isfinite(tolerance) ? tolerance : 0, of_total, "total", 0);
}

}  // namespace
}  // namespace softmaxlib::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace softmaxlib::fuzz;
  Input in(data, size);
  Losses l;
  draw_losses(in, &l);
  describe = [&l] { return l.description(); };

  const Plain plain(l);
  const int64_t selected[] = {plain.shape[0], plain.shape[1], l.k};
  const bool rows_target = !l.takes && !l.probabilities, rows_more = l.takes;
  Results plainly;
  plainly.target = l.plain(*l.target, rows_target);
  plainly.results = l.plain(*l.results, !l.takes);
  if (l.more) plainly.more = l.plain(*l.more, rows_more);
  if (l.total) plainly.total.resize(static_cast<size_t>(softmaxlib::item_size(l.total->dtype())));
  for (auto* bytes : {&plainly.target, &plainly.results, &plainly.more, &plainly.total})
    bytes->reserve(1);
  const int64_t* const wide = l.takes ? selected : plain.shape;
  const softmaxlib_array ta = {plainly.target.data(), l.target->dtype(), rows_target ? 2 : 3, wide,
                               nullptr},
                         ra = {plainly.results.data(), l.results->dtype(), l.takes ? 3 : 2, wide,
                               nullptr},
                         ma = {plainly.more.data(), l.more ? l.more->dtype() : 0, rows_more ? 2 : 3,
                               plain.shape, nullptr},
                         sum = {plainly.total.data(), l.total ? l.total->dtype() : 0, 0, nullptr,
                                nullptr};
  softmaxlib_status status = call_losses(l, plain.x, &ta, &ra, l.more ? &ma : nullptr,
                                         l.total ? &sum : nullptr, Plain::kAxis, plain.options);
  if (status) fail(std::string("the plain call is refused: ") + softmaxlib_status_text(status));
  if (l.takes) check_taken(l, plain, plainly);
  else check_losses(l, plain, plainly);

  for (int32_t rank = 0; const softmaxlib_isa isa = softmaxlib_isa_available(rank); ++rank) {
    const Inputs inputs(l);
    const Array kept = *l.target;
    softmaxlib_options o = l.options;
    o.isa = isa;
    const OfferedScratch scratch(plain.columns(), static_cast<size_t>(rank), &o);
    Array r = *l.results;
    std::unique_ptr<Array> m = l.more ? std::make_unique<Array>(*l.more) : nullptr;
    std::unique_ptr<Array> t = l.total ? std::make_unique<Array>(*l.total) : nullptr;
    status = call_losses(l, l.in_place ? m->view() : l.x->view(), l.target->view(), r.view(),
                         m ? m->view() : nullptr, t ? t->view() : nullptr, l.axes[0], o);
    require(status == SOFTMAXLIB_OK, softmaxlib_status_text(status));
    inputs.check();
    require(kept.same_memory(*l.target), "target was written to");
    check_same(l.plain(r, !l.takes), plainly.results, r.dtype(), softmaxlib_isa_name(isa));
    check_gaps(*l.results, r);
    if (m) {
      check_same(l.plain(*m, rows_more), plainly.more, m->dtype(), softmaxlib_isa_name(isa));
      check_gaps(*l.more, *m);
    }
    if (t) {
      const char* const p = t->at(Shape(t->shape().size()));
      check_same({p, p + softmaxlib::item_size(t->dtype())}, plainly.total, t->dtype(),
                 std::string("total on ") + softmaxlib_isa_name(isa));
      check_gaps(*l.total, *t);
    }
  }
  describe = nullptr;
  return 0;
}
