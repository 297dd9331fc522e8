// The C interface: checks, then rows, then kernels.
#include "call.hpp"

namespace softmaxlib {
namespace {

softmaxlib_status prepare(const Request& request, const Options& given, bool runs, Call* call) {
  if (const softmaxlib_status status = check(given)) return status;
  const softmaxlib_options& options = *given;
  if (const softmaxlib_status status = lay_out(request, options, &call->job)) return status;
  if (const softmaxlib_status status = check_data(&call->job)) return status;
  const bool frugal = runs && !options.scratch && options.algorithm == SOFTMAXLIB_ALGORITHM_AUTO;
  call->schedule = choose_schedule(request.function, call->job, options, frugal);
  return SOFTMAXLIB_OK;
}

Request request_of(softmaxlib_function function, const softmaxlib_array* x,
                   const softmaxlib_array* out, int32_t naxes, const int32_t* axes) {
  return {function, x, out, naxes, axes, function == SOFTMAXLIB_LOGSUMEXP};
}

// Task i of the rows: a share of them, with scratch of its own.
struct RowTasks {
  const Call* call;
  Kernel kernel;
  char* scratch;

  static void run(void* self, int64_t i) {
    const RowTasks& t = *static_cast<const RowTasks*>(self);
    const int64_t rows = t.call->job.rows, tasks = t.call->schedule.tasks;
    const int64_t share = rows / tasks, more = rows % tasks;
    const int64_t start = i * share + (i < more ? i : more);
    t.kernel(t.call->job, start, start + share + (i < more ? 1 : 0),
             t.scratch ? t.scratch + i * t.call->schedule.scratch : nullptr);
  }
};

}  // namespace

softmaxlib_status run(Call& call, Kernel kernel, const Means& means) {
  const Schedule& schedule = call.schedule;
  Job& job = call.job;
  if (const int64_t need = call.scratch()) {
    if (!means.scratch || reinterpret_cast<uintptr_t>(means.scratch) % 64 ||
        means.scratch_size < static_cast<size_t>(need))
      return SOFTMAXLIB_ERROR_SCRATCH;
  }
  if (means.report) {
    *means.report = {sizeof(softmaxlib_report),
                     SOFTMAXLIB_ISA_AUTO,
                     SOFTMAXLIB_ALGORITHM_AUTO,
                     SOFTMAXLIB_STORE_AUTO,
                     static_cast<int32_t>(schedule.tasks),
                     "nothing to compute"};
  }
  if (job.rows == 0 || (job.n == 0 && !job.reduces)) return SOFTMAXLIB_OK;

  job.tile = schedule.tile;
  job.streaming = schedule.streaming;
  job.split = schedule.split ? schedule.tasks : 0;
  job.parallel_for = means.parallel_for;
  job.parallel_context = means.parallel_context;
  job.report = means.report;
  char* scratch = static_cast<char*>(means.scratch);
  if (schedule.split || schedule.tasks == 1) {
    kernel(job, 0, job.rows, scratch);
  } else {
    RowTasks tasks = {&call, kernel, scratch};
    means.parallel_for(means.parallel_context, schedule.tasks, RowTasks::run, &tasks);
  }
  return SOFTMAXLIB_OK;
}

softmaxlib_status explain(softmaxlib_function function, const softmaxlib_array* x,
                          const softmaxlib_array* out, int32_t naxes, const int32_t* axes,
                          const softmaxlib_options* options, Explanation* explanation) {
  const Options o(options);
  Call call;
  if (const softmaxlib_status status =
          prepare(request_of(function, x, out, naxes, axes), o, false, &call))
    return status;
  const Schedule& s = call.schedule;
  const KernelTable& table = *table_of(o->isa);
  const KernelEntry& kernel = table.kernels[function][s.kernel][call.job.dtype[kOut]];
  *explanation = {table.isa,   kernel.algorithm, kernel.name, s.why_kernel,
                  s.streaming, s.why_stores,     s.split,     s.tasks,
                  s.why_tasks, call.job.rows,    call.job.n,  call.scratch()};
  return SOFTMAXLIB_OK;
}

}  // namespace softmaxlib

extern "C" {

softmaxlib_status softmaxlib_scratch_size(softmaxlib_function function, const softmaxlib_array* x,
                                          const softmaxlib_array* out, int32_t naxes,
                                          const int32_t* axes, const softmaxlib_options* options,
                                          size_t* bytes) {
  using namespace softmaxlib;
  if (!bytes) return SOFTMAXLIB_ERROR_NULL;
  Call call;
  const softmaxlib_status status =
      prepare(request_of(function, x, out, naxes, axes), Options(options), false, &call);
  *bytes = status ? 0 : static_cast<size_t>(call.scratch());
  return status;
}

softmaxlib_status softmaxlib_run(softmaxlib_function function, const softmaxlib_array* x,
                                 const softmaxlib_array* out, int32_t naxes, const int32_t* axes,
                                 const softmaxlib_options* options) {
  using namespace softmaxlib;
  const Options o(options);
  Call call;
  if (const softmaxlib_status status =
          prepare(request_of(function, x, out, naxes, axes), o, true, &call))
    return status;
  const KernelEntry& kernel =
      table_of(o->isa)->kernels[function][call.schedule.kernel][call.job.dtype[kOut]];
  return run(call, kernel.run,
             {o->parallel_for, o->parallel_context, o->report, o->scratch, o->scratch_size});
}

const char* softmaxlib_status_text(softmaxlib_status status) {
  switch (status) {
    case SOFTMAXLIB_OK: return "ok";
    case SOFTMAXLIB_ERROR_NULL: return "a required pointer is NULL";
    case SOFTMAXLIB_ERROR_STRUCT_SIZE: return "struct_size is none that this version knows";
    case SOFTMAXLIB_ERROR_FUNCTION: return "unknown function";
    case SOFTMAXLIB_ERROR_DTYPE: return "a dtype is unknown or not allowed for its argument";
    case SOFTMAXLIB_ERROR_SHAPE: return "the shapes of x and out are invalid or do not match";
    case SOFTMAXLIB_ERROR_AXIS: return "an axis is out of range or repeated";
    case SOFTMAXLIB_ERROR_TEMPERATURE:
      return "temperature must be positive and finite, broadcast against x, and not vary along the "
             "axis";
    case SOFTMAXLIB_ERROR_BIAS: return "bias does not broadcast against x";
    case SOFTMAXLIB_ERROR_WHERE: return "where does not broadcast against x";
    case SOFTMAXLIB_ERROR_ALGORITHM: return "unknown algorithm";
    case SOFTMAXLIB_ERROR_ISA: return "unknown ISA";
    case SOFTMAXLIB_ERROR_ISA_UNSUPPORTED: return "the ISA is not compiled in or this CPU lacks it";
    case SOFTMAXLIB_ERROR_STORE: return "unknown store kind";
    case SOFTMAXLIB_ERROR_THREADS: return "the number of threads is out of range";
    case SOFTMAXLIB_ERROR_SCRATCH: return "scratch is NULL, not 64-byte aligned, or too small";
    case SOFTMAXLIB_ERROR_OVERLAP: return "out overlaps x without being x";
    case SOFTMAXLIB_ERROR_MEMORY: return "out of memory or threads";
    case SOFTMAXLIB_ERROR_SCALE:
      return "scale must be positive and finite, broadcast against x, not vary along the axis, and "
             "not be given per row beside temperatures";
    case SOFTMAXLIB_ERROR_CAUSAL:
      return "causal and alibi_slopes need one axis, and query_axis must be another one of x";
    case SOFTMAXLIB_ERROR_ALIBI:
      return "alibi_slopes must broadcast against x and not vary along the axis";
    case SOFTMAXLIB_ERROR_SINK: return "sinks must broadcast against x and not vary along the axis";
    case SOFTMAXLIB_ERROR_STATE:
      return "a state is of another version, function or dtype, or was never begun";
    case SOFTMAXLIB_ERROR_K: return "k or top_k is negative or exceeds the length of the axis";
    case SOFTMAXLIB_ERROR_SAMPLING: return "top_p must be in (0, 1], min_p in [0, 1]";
    case SOFTMAXLIB_ERROR_UNIFORMS:
      return "uniforms must be numbers in [0, 1), in the shape of x without the axis";
    case SOFTMAXLIB_ERROR_TARGET: return "a target or index is no element of the axis";
    case SOFTMAXLIB_ERROR_LOSS:
      return "label_smoothing must be in [0, 1], weights finite and not negative, gradient_scale "
             "finite";
    default: return "unknown status";
  }
}

}  // extern "C"
