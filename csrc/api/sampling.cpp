// The C interface of sampling and top-k.
#include "api/arrays.hpp"
#include "api/call.hpp"

extern "C" {

softmaxlib_status softmaxlib_sample(const softmaxlib_array* x, const softmaxlib_array* uniforms,
                                    const softmaxlib_array* indices, int32_t axis,
                                    const softmaxlib_filter* filter,
                                    const softmaxlib_options* options) {
  using namespace softmaxlib;
  if (!x || !uniforms || !indices) return SOFTMAXLIB_ERROR_NULL;
  const Versioned<softmaxlib_filter> f(filter, SOFTMAXLIB_FILTER_INIT, 0);
  Call call(options);
  call.require(f.valid(), SOFTMAXLIB_ERROR_STRUCT_SIZE);
  call.require(f->top_k >= 0, SOFTMAXLIB_ERROR_K);
  call.require(in_unit_interval(f->top_p) && !is_zero(f->top_p) && in_unit_interval(f->min_p),
               SOFTMAXLIB_ERROR_SAMPLING);
  call.refuse_attention();
  const Given list[] = {
      {kX, x, Shape::kOfX, Dtypes::kAny, Access::kReads},
      {kUniform, uniforms, Shape::kPerRow, Dtypes::kF64, Access::kReads, SOFTMAXLIB_ERROR_UNIFORMS},
      {kIndices, indices, Shape::kPerRow, Dtypes::kI64, Access::kWrites}};
  call.lay_out(SOFTMAXLIB_SOFTMAX, {1, &axis}, list, storage_of(x->dtype));
  call.check_data(list);
  call.require_that([&] { return call.job.rows == 0 || are_uniforms(*uniforms); },
                    SOFTMAXLIB_ERROR_UNIFORMS);
  call.job.filter = &*f;
  return call.run_rows(registry::sample);
}

softmaxlib_status softmaxlib_topk_softmax(const softmaxlib_array* x,
                                          const softmaxlib_array* weights,
                                          const softmaxlib_array* indices, int32_t axis,
                                          int32_t renormalize, const softmaxlib_options* options) {
  using namespace softmaxlib;
  if (!x || !weights || !indices) return SOFTMAXLIB_ERROR_NULL;
  Call call(options);
  call.refuse_attention();
  call.require(has_axis(*x, axis), SOFTMAXLIB_ERROR_AXIS);
  WithoutAxis w, i;
  call.require(weights->ndim == x->ndim && indices->ndim == x->ndim && w.set(*weights, axis) &&
                   i.set(*indices, axis) && w.size == i.size,
               SOFTMAXLIB_ERROR_SHAPE);
  if (!call.is_good()) return call.status();
  const TopK top = {w.size, w.stride, i.stride, renormalize != 0};
  const Given list[] = {{kX, x, Shape::kOfX, Dtypes::kAny, Access::kReads},
                        {kOut, &w.array, Shape::kPerRow, Dtypes::kFloats, Access::kWrites},
                        {kIndices, &i.array, Shape::kPerRow, Dtypes::kI64, Access::kWrites}};
  call.lay_out(SOFTMAXLIB_SOFTMAX, {1, &axis}, list, weights->dtype);
  call.require_that([&] { return top.k <= call.job.n; }, SOFTMAXLIB_ERROR_K);
  // Of no elements there is no memory, wherever it is said to be.
  if (!call.is_good() || top.k == 0) return call.status();
  call.check_data(list);
  call.require(!overlap(*weights, *x) && !overlap(*indices, *x) && !overlap(*weights, *indices),
               SOFTMAXLIB_ERROR_OVERLAP);
  call.job.top = &top;
  return call.run_rows(registry::topk_softmax);
}

}  // extern "C"
