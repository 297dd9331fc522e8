// softmaxlib_sample and softmaxlib_topk_softmax on valid calls, against plain ones on the scalar
// leaf: the same draws, weights and places, on every ISA, in every layout and split.
#include "call.hpp"

namespace softmaxlib::fuzz {
namespace {

struct Rows : Call {
  bool sampling;
  int32_t renormalize = 0;
  int64_t k = 0;  // weights' length along the axis
  softmaxlib_filter filter = SOFTMAXLIB_FILTER_INIT;
  std::unique_ptr<Array> numbers;  // uniforms, or weights
  std::unique_ptr<Array> indices;

  std::string description() const {
    char line[200];
    snprintf(line, sizeof(line), "%s, k %lld, renormalize %d, top_k %lld, top_p %a, min_p %a, ",
             sampling ? "softmaxlib_sample" : "softmaxlib_topk_softmax", static_cast<long long>(k),
             renormalize, static_cast<long long>(filter.top_k), filter.top_p, filter.min_p);
    return line + text() + numbers->text(sampling ? "uniforms" : "weights") +
           indices->text("indices");
  }
};

void draw_rows(Input& in, Rows* rows) {
  rows->sampling = !in.one_in(2);
  draw_call(in, true, false, static_cast<softmaxlib_dtype>(in.below(in.one_in(3) ? 13 : 4)), rows);
  const auto axis = static_cast<size_t>(
      std::find(rows->reduced.begin(), rows->reduced.end(), true) - rows->reduced.begin());
  const int64_t n = rows->shape[axis];
  Shape results = rows->without_axes(rows->shape);
  if (rows->sampling) {
    static constexpr int64_t kTop[] = {0, 1, 2, 5, 40, 1 << 20, INT64_MAX};
    static constexpr double kP[] = {1, 0.9, 0.5, 0.1, 1e-3, 1e-300, 5e-324};
    rows->filter.top_k = in.pick(kTop);
    rows->filter.top_p = in.pick(kP);
    rows->filter.min_p = in.one_in(2) ? 1 - in.pick(kP) : 0;
    rows->numbers = std::make_unique<Array>(in, SOFTMAXLIB_F64, results, Elements::kOwnMemory);
    std::mt19937_64 random(in.bytes(2));
    const bool edges = in.one_in(3);
    for_indices(results, [&](const Shape& i) {
      static constexpr double kEdges[] = {0, 5e-324, 0.5, 0x1.fffffffffffffp-1};
      const double u = edges ? kEdges[random() % 4] : static_cast<double>(random() >> 11) * 0x1p-53;
      memcpy(rows->numbers->at(i), &u, sizeof(u));
    });
  } else {
    rows->k = n ? in.below(std::min<int64_t>(n, 300) + 1) : 0;
    rows->renormalize = in.one_in(2);
    results = rows->shape;
    results[axis] = rows->k;
    rows->numbers = std::make_unique<Array>(in, static_cast<softmaxlib_dtype>(in.below(4)), results,
                                            Elements::kOwnMemory);
  }
  rows->indices = std::make_unique<Array>(in, SOFTMAXLIB_I64, results, Elements::kOwnMemory);
}

softmaxlib_status call_rows(const Rows& rows, const softmaxlib_array* x,
                            const softmaxlib_array* numbers, const softmaxlib_array* indices,
                            int32_t axis, const softmaxlib_options& o) {
  return rows.sampling ? softmaxlib_sample(x, numbers, indices, axis, &rows.filter, &o)
                       : softmaxlib_topk_softmax(x, numbers, indices, axis, rows.renormalize, &o);
}

// The results as (rows, k): those of one row side by side.
std::vector<char> plain_results(const Rows& rows, const Array& array) {
  if (rows.sampling) return rows.plain_rows(array);
  std::vector<char> copy;
  const int64_t item = item_size(array.dtype());
  rows.for_rows([&](const Shape& row) {
    for (int64_t i = 0; i < rows.k; ++i) {
      Shape index = row;
      for (size_t d = 0; d < index.size(); ++d) index[d] += rows.reduced[d] ? i : 0;
      const char* p = array.at(index);
      copy.insert(copy.end(), p, p + item);
    }
  });
  return copy;
}

}  // namespace
}  // namespace softmaxlib::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace softmaxlib::fuzz;
  Input in(data, size);
  Rows rows;
  draw_rows(in, &rows);
  describe = [&rows] { return rows.description(); };

  const Plain plain(rows);
  const int64_t results = plain.rows() * (rows.sampling ? 1 : rows.k);
  const softmaxlib_dtype dtype = rows.numbers->dtype();
  std::vector<int64_t> indices(static_cast<size_t>(results));
  std::vector<char> numbers(static_cast<size_t>(results * softmaxlib::item_size(dtype)));
  if (rows.sampling) numbers = rows.plain_rows(*rows.numbers);
  indices.reserve(1), numbers.reserve(1);
  const int64_t shape[] = {plain.shape[0], plain.shape[1], rows.k};
  const int32_t ndim = rows.sampling ? 2 : 3;
  const softmaxlib_array na = {numbers.data(), dtype, ndim, shape, nullptr};
  const softmaxlib_array ia = {indices.data(), SOFTMAXLIB_I64, ndim, shape, nullptr};
  softmaxlib_status status = call_rows(rows, plain.x, &na, &ia, Plain::kAxis, plain.options);
  if (status) fail(std::string("the plain call is refused: ") + softmaxlib_status_text(status));
  for (const int64_t i : indices)
    require(i >= (rows.sampling ? -1 : 0) && i < std::max<int64_t>(plain.columns(), 1),
            "no such index");
  std::vector<char> places(indices.size() * sizeof(int64_t));
  if (!places.empty()) memcpy(places.data(), indices.data(), places.size());

  for (int32_t rank = 0; const softmaxlib_isa isa = softmaxlib_isa_available(rank); ++rank) {
    const Inputs inputs(rows);
    softmaxlib_options o = rows.options;
    o.isa = isa;
    Array n = *rows.numbers, i = *rows.indices;
    status = call_rows(rows, rows.x->view(), n.view(), i.view(), rows.axes[0], o);
    require(status == SOFTMAXLIB_OK, softmaxlib_status_text(status));
    inputs.check();
    check_same(plain_results(rows, i), places, SOFTMAXLIB_I64, softmaxlib_isa_name(isa));
    check_gaps(*rows.indices, i);
    if (rows.sampling) {
      require(n.same_memory(*rows.numbers), "uniforms were written to");
    } else {
      check_same(plain_results(rows, n), numbers, dtype, softmaxlib_isa_name(isa));
      check_gaps(*rows.numbers, n);
    }
  }
  describe = nullptr;
  return 0;
}
