// The C interface of sampling and top-k.
#include "call.hpp"
#include "rows/without_axis.hpp"

namespace softmaxlib {
namespace {

bool valid_uniforms(const softmaxlib_array& array) {
  bool valid = true;
  for_each_element(array, item_size(SOFTMAXLIB_F64), [&](const char* p) {
    double u;
    memcpy(&u, p, sizeof(u));
    return valid = in_unit_interval(u) && !is_one(u);
  });
  return valid;
}

// The checks and the run that both calls share.
softmaxlib_status run_along(const Request& request, const softmaxlib_options& o,
                            const softmaxlib_filter* filter, const TopK* top) {
  if (o.causal) return SOFTMAXLIB_ERROR_CAUSAL;
  if (o.alibi_slopes) return SOFTMAXLIB_ERROR_ALIBI;
  if (o.sinks) return SOFTMAXLIB_ERROR_SINK;
  Call call;
  if (const softmaxlib_status status = lay_out(request, o, &call.job)) return status;
  if (top && (top->k < 0 || top->k > call.job.n)) return SOFTMAXLIB_ERROR_K;
  if (top && top->k == 0) return SOFTMAXLIB_OK;  // no memory, so wherever that is
  if (const softmaxlib_status status = check_data(&call.job)) return status;
  if (filter && call.job.rows && !valid_uniforms(*request.extra)) return SOFTMAXLIB_ERROR_UNIFORMS;
  if (call.job.rows == 0) return SOFTMAXLIB_OK;
  call.job.filter = filter;
  call.job.top = top;
  call.schedule = share_rows(call.job, o, true);
  const KernelTable& table = *table_of(o.isa);
  return run(call, (top ? table.topk : table.sample)[call.job.dtype[kOut]],
             {o.parallel_for, o.parallel_context, o.report, o.scratch, o.scratch_size});
}

}  // namespace
}  // namespace softmaxlib

extern "C" {

softmaxlib_status softmaxlib_sample(const softmaxlib_array* x, const softmaxlib_array* uniforms,
                                    const softmaxlib_array* indices, int32_t axis,
                                    const softmaxlib_filter* filter,
                                    const softmaxlib_options* options) {
  using namespace softmaxlib;
  if (!x || !uniforms || !indices) return SOFTMAXLIB_ERROR_NULL;
  const Options given(options);
  if (const softmaxlib_status status = check(given)) return status;
  const Versioned<softmaxlib_filter> versioned(filter, SOFTMAXLIB_FILTER_INIT, 0);
  if (!versioned.valid()) return SOFTMAXLIB_ERROR_STRUCT_SIZE;
  const softmaxlib_filter& f = *versioned;
  if (f.top_k < 0) return SOFTMAXLIB_ERROR_K;
  if (!in_unit_interval(f.top_p) || is_zero(f.top_p) || !in_unit_interval(f.min_p))
    return SOFTMAXLIB_ERROR_SAMPLING;
  if (uniforms->dtype != SOFTMAXLIB_F64 || indices->dtype != SOFTMAXLIB_I64)
    return SOFTMAXLIB_ERROR_DTYPE;

  // What is not a float computes in double.
  softmaxlib_array out = *indices;
  out.dtype = is_float(x->dtype) ? x->dtype : SOFTMAXLIB_F64;
  Request request = {SOFTMAXLIB_SOFTMAX, x, &out, 1, &axis, true};
  request.extra = uniforms;
  request.indices = indices;
  return run_along(request, *given, &f, nullptr);
}

softmaxlib_status softmaxlib_topk_softmax(const softmaxlib_array* x,
                                          const softmaxlib_array* weights,
                                          const softmaxlib_array* indices, int32_t axis,
                                          int32_t renormalize, const softmaxlib_options* options) {
  using namespace softmaxlib;
  if (!x || !weights || !indices) return SOFTMAXLIB_ERROR_NULL;
  const Options given(options);
  if (const softmaxlib_status status = check(given)) return status;
  if (!is_float(weights->dtype) || indices->dtype != SOFTMAXLIB_I64) return SOFTMAXLIB_ERROR_DTYPE;
  WithoutAxis w, i;
  if (x->ndim < 1 || axis < -x->ndim || axis >= x->ndim) return SOFTMAXLIB_ERROR_AXIS;
  if (weights->ndim != x->ndim || indices->ndim != x->ndim ||
      !w.set(*weights, axis, item_size(weights->dtype)) ||
      !i.set(*indices, axis, item_size(SOFTMAXLIB_I64)) || w.size != i.size)
    return SOFTMAXLIB_ERROR_SHAPE;
  const TopK top = {w.size, w.stride, i.stride, renormalize != 0};
  Request request = {SOFTMAXLIB_SOFTMAX, x, &w.array, 1, &axis, true};
  request.indices = &i.array;
  return run_along(request, *given, nullptr, &top);
}

}  // extern "C"
