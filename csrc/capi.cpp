// The C interface: checks, then rows, then kernels.
#include "kernel_table.hpp"
#include "rows/layout.hpp"
#include "rows/schedule.hpp"
#include "softmaxlib/softmaxlib.h"

namespace softmaxlib {
namespace {

constexpr softmaxlib_options kDefaults = SOFTMAXLIB_OPTIONS_INIT;

softmaxlib_status check(const softmaxlib_options& o) {
  if (o.struct_size != sizeof(softmaxlib_options)) return SOFTMAXLIB_ERROR_STRUCT_SIZE;
  if (o.report && o.report->struct_size != sizeof(softmaxlib_report))
    return SOFTMAXLIB_ERROR_STRUCT_SIZE;
  if (o.algorithm < 0 || o.algorithm >= kAlgorithms) return SOFTMAXLIB_ERROR_ALGORITHM;
  if (!softmaxlib_isa_name(o.isa) && o.isa != SOFTMAXLIB_ISA_AUTO) return SOFTMAXLIB_ERROR_ISA;
  if (o.store < 0 || o.store > SOFTMAXLIB_STORE_STREAMING) return SOFTMAXLIB_ERROR_STORE;
  if (o.num_threads < 0) return SOFTMAXLIB_ERROR_THREADS;
  return table_of(o.isa) ? SOFTMAXLIB_OK : SOFTMAXLIB_ERROR_ISA_UNSUPPORTED;
}

struct Call {
  Job job;
  Schedule schedule;

  int64_t scratch() const { return schedule.scratch * (schedule.split ? 1 : schedule.tasks); }
};

softmaxlib_status prepare(softmaxlib_function function, const softmaxlib_array* x,
                          const softmaxlib_array* out, int32_t naxes, const int32_t* axes,
                          const softmaxlib_options& options, bool runs, Call* call) {
  if (const softmaxlib_status status = check(options)) return status;
  if (const softmaxlib_status status = lay_out(function, x, out, naxes, axes, options, &call->job))
    return status;
  const bool frugal = runs && !options.scratch && options.algorithm == SOFTMAXLIB_ALGORITHM_AUTO;
  call->schedule = choose_schedule(function, call->job, options, frugal);
  Job& job = call->job;
  job.tile = call->schedule.tile;
  job.streaming = call->schedule.streaming;
  job.split = call->schedule.split ? call->schedule.tasks : 0;
  job.parallel_for = options.parallel_for;
  job.parallel_context = options.parallel_context;
  job.report = options.report;
  return SOFTMAXLIB_OK;
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

softmaxlib_status explain(softmaxlib_function function, const softmaxlib_array* x,
                          const softmaxlib_array* out, int32_t naxes, const int32_t* axes,
                          const softmaxlib_options* options, Explanation* explanation) {
  const softmaxlib_options& o = options ? *options : kDefaults;
  Call call;
  if (const softmaxlib_status status = prepare(function, x, out, naxes, axes, o, false, &call))
    return status;
  const Schedule& s = call.schedule;
  const KernelTable& table = *table_of(o.isa);
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
      prepare(function, x, out, naxes, axes, options ? *options : kDefaults, false, &call);
  *bytes = status ? 0 : static_cast<size_t>(call.scratch());
  return status;
}

softmaxlib_status softmaxlib_run(softmaxlib_function function, const softmaxlib_array* x,
                                 const softmaxlib_array* out, int32_t naxes, const int32_t* axes,
                                 const softmaxlib_options* options) {
  using namespace softmaxlib;
  const softmaxlib_options& o = options ? *options : kDefaults;
  Call call;
  if (const softmaxlib_status status = prepare(function, x, out, naxes, axes, o, true, &call))
    return status;
  const Job& job = call.job;
  const Schedule& schedule = call.schedule;

  if (const int64_t need = call.scratch()) {
    if (!o.scratch || reinterpret_cast<uintptr_t>(o.scratch) % 64 ||
        o.scratch_size < static_cast<size_t>(need))
      return SOFTMAXLIB_ERROR_SCRATCH;
  }
  if (o.report) {
    *o.report = {sizeof(softmaxlib_report),
                 SOFTMAXLIB_ISA_AUTO,
                 SOFTMAXLIB_ALGORITHM_AUTO,
                 SOFTMAXLIB_STORE_AUTO,
                 static_cast<int32_t>(schedule.tasks),
                 "nothing to compute"};
  }
  if (job.rows == 0 || (job.n == 0 && function != SOFTMAXLIB_LOGSUMEXP)) return SOFTMAXLIB_OK;

  const Kernel kernel = table_of(o.isa)->kernels[function][schedule.kernel][job.dtype[kOut]].run;
  char* scratch = static_cast<char*>(o.scratch);
  if (schedule.split || schedule.tasks == 1) {
    kernel(job, 0, job.rows, scratch);
  } else {
    RowTasks tasks = {&call, kernel, scratch};
    o.parallel_for(o.parallel_context, schedule.tasks, RowTasks::run, &tasks);
  }
  return SOFTMAXLIB_OK;
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
    default: return "unknown status";
  }
}

}  // extern "C"
