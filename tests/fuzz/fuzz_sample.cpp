// softmaxlib_sample and softmaxlib_topk_softmax on valid calls, against plain ones on the scalar
// leaf: the same draws, weights and places, on every ISA, in every layout and split. The plain ones
// against the reference.
#include "reference.hpp"

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

void check_values_of(const Rows& rows, const Plain& plain, const std::vector<char>& numbers,
                     const std::vector<int64_t>& indices) {
  const softmaxlib_options& o = plain.options;
  const bool has_options = o.temperatures || o.bias || o.temperature != 1;
  const softmaxlib_dtype x_type = plain.x->dtype, of_numbers = rows.numbers->dtype();
  const softmaxlib_dtype dtype = !rows.sampling     ? of_numbers
                                 : is_float(x_type) ? x_type
                                                    : SOFTMAXLIB_F64;
  const int64_t each = rows.sampling ? 1 : rows.k;
  for_plain_rows(plain, [&](int64_t number, int64_t other, int64_t query) {
    const ReferenceRow row =
        row_of(SOFTMAXLIB_SOFTMAX, dtype, *plain.x, o, plain.columns(), other, query);
    const std::vector<Real> values = test::decode_all(
        numbers.data() + number * each * test::item_size_of(of_numbers), each, of_numbers);
    const std::vector<int64_t> places(indices.begin() + number * each,
                                      indices.begin() + (number + 1) * each);
    const Order order(row, dtype, has_options);
    if (rows.sampling)
      return check_draw(row, dtype, order, rows.filter, values[0], places[0], number);

    if (!row.judged || row.beyond) return;
    const test::Distribution all = test::distribution_of(SOFTMAXLIB_SOFTMAX, row.z, row.in);
    const bool valid = all.valid();
    // An open finding: README.md.
    if (valid && doubt_of_sum(row, all) > kMostDoubt) return;
    std::vector<bool> kept(row.z.size(), false);
    for (size_t i = 0; i < places.size(); ++i) {
      const auto place = static_cast<size_t>(places[i]);
      require(!kept[place], "a place twice");
      kept[place] = true;
      if (!valid) require(place == i, "a place where there is no distribution");
      else if (i > 0)
        require(order.is_before(static_cast<size_t>(places[i - 1]), place), "not in order");
    }
    if (valid && !places.empty())
      for (size_t i = 0; i < kept.size(); ++i)
        require(kept[i] || order.is_before(static_cast<size_t>(places.back()), i),
                "not the largest");
    for (size_t i = 0; i < kept.size(); ++i) kept[i] = row.in[i] && (kept[i] || !rows.renormalize);
    if (valid)
      check_elements(SOFTMAXLIB_SOFTMAX, dtype, row, kept, places, values, "weight", number);
    else
      for (const Real w : values)
        require_near(w, row.terms() ? Real{kNaN} : 0, 0, dtype, "weight", number);
  });
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
  check_values_of(rows, plain, numbers, indices);
  std::vector<char> places(indices.size() * sizeof(int64_t));
  if (!places.empty()) memcpy(places.data(), indices.data(), places.size());

  for (int32_t rank = 0; const softmaxlib_isa isa = softmaxlib_isa_available(rank); ++rank) {
    const Inputs inputs(rows);
    softmaxlib_options o = rows.options;
    o.isa = isa;
    const OfferedScratch scratch(plain.columns(), static_cast<size_t>(rank), &o);
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
