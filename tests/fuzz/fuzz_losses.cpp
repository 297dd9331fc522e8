// softmaxlib_cross_entropy and softmaxlib_take_log_softmax on valid calls, against plain ones on
// the scalar leaf. Probabilities are any numbers: what they mean has other tests.
#include "call.hpp"

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

  std::string description() const {
    char line[200];
    snprintf(
        line, sizeof(line),
        "%s, activation %d, k %lld, smoothing %a, gradient_scale %a, weights %d, in place %d, ",
        takes ? "softmaxlib_take_log_softmax" : "softmaxlib_cross_entropy", activation,
        static_cast<long long>(k), loss.label_smoothing, loss.gradient_scale,
        loss.weight != nullptr, in_place);
    return line + text() + target->text("target") + results->text("results") +
           (more ? more->text("more") : "");
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
    static constexpr double kSmoothing[] = {0, 0, 0.1, 1, 5e-324};
    l->loss.label_smoothing = in.pick(kSmoothing);
    static constexpr double kScales[] = {1, -0.25, 0, 1e-300, 1e300};
    l->loss.gradient_scale = in.pick(kScales);
    l->results = std::make_unique<Array>(in, SOFTMAXLIB_F64, rows, Elements::kOwnMemory);
    l->in_place = in.one_in(6) && l->x->dtype() == to && l->x->own_elements();
    if (l->in_place) l->more = std::make_unique<Array>(*l->x);
    else if (in.one_in(2))
      l->more = std::make_unique<Array>(in, to, l->shape, Elements::kOwnMemory);
  }
  if (l->probabilities) {
    l->target = std::make_unique<Array>(in, static_cast<softmaxlib_dtype>(in.below(4)), l->shape,
                                        Elements::kMayOverlap);
    fill(in, *l->target);
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
    for (double& w : l->weight) w = static_cast<double>(random() % 5) / 3;
    l->loss.weight = l->weight.data();
  }
}

softmaxlib_status call_losses(const Losses& l, const softmaxlib_array* x,
                              const softmaxlib_array* target, const softmaxlib_array* results,
                              const softmaxlib_array* more, int32_t axis,
                              const softmaxlib_options& o) {
  return l.takes
             ? softmaxlib_take_log_softmax(x, target, results, more, axis, &o)
             : softmaxlib_cross_entropy(l.activation, x, target, results, more, axis, &l.loss, &o);
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
  std::vector<char> target = l.plain(*l.target, rows_target),
                    results = l.plain(*l.results, !l.takes), more;
  if (l.more) more = l.plain(*l.more, rows_more);
  target.reserve(1), results.reserve(1), more.reserve(1);
  const int64_t* const wide = l.takes ? selected : plain.shape;
  const softmaxlib_array ta = {target.data(), l.target->dtype(), rows_target ? 2 : 3, wide,
                               nullptr},
                         ra = {results.data(), l.results->dtype(), l.takes ? 3 : 2, wide, nullptr},
                         ma = {more.data(), l.more ? l.more->dtype() : 0, rows_more ? 2 : 3,
                               plain.shape, nullptr};
  softmaxlib_status status =
      call_losses(l, plain.x, &ta, &ra, l.more ? &ma : nullptr, Plain::kAxis, plain.options);
  if (status) fail(std::string("the plain call is refused: ") + softmaxlib_status_text(status));

  for (int32_t rank = 0; const softmaxlib_isa isa = softmaxlib_isa_available(rank); ++rank) {
    const Inputs inputs(l);
    const Array kept = *l.target;
    softmaxlib_options o = l.options;
    o.isa = isa;
    Array r = *l.results;
    std::unique_ptr<Array> m = l.more ? std::make_unique<Array>(*l.more) : nullptr;
    status = call_losses(l, l.in_place ? m->view() : l.x->view(), l.target->view(), r.view(),
                         m ? m->view() : nullptr, l.axes[0], o);
    require(status == SOFTMAXLIB_OK, softmaxlib_status_text(status));
    inputs.check();
    require(kept.same_memory(*l.target), "target was written to");
    check_same(l.plain(r, !l.takes), results, r.dtype(), softmaxlib_isa_name(isa));
    check_gaps(*l.results, r);
    if (!m) continue;
    check_same(l.plain(*m, rows_more), more, m->dtype(), softmaxlib_isa_name(isa));
    check_gaps(*l.more, *m);
  }
  describe = nullptr;
  return 0;
}
