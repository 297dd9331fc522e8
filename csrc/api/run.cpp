// The C interface of the functions, and how any kernel is run.
#include "api/call.hpp"

namespace softmaxlib {
namespace {

// Task i of the rows: a share of them, with scratch of its own.
struct RowTasks {
  const Job* job;
  const Schedule* schedule;
  Kernel kernel;
  char* scratch;

  static void run(void* self, int64_t i) {
    const RowTasks& t = *static_cast<const RowTasks*>(self);
    const int64_t rows = t.job->rows, tasks = t.schedule->tasks;
    const int64_t share = rows / tasks, more = rows % tasks;
    const int64_t start = i * share + (i < more ? i : more);
    t.kernel(*t.job, start, start + share + (i < more ? 1 : 0),
             t.scratch ? t.scratch + i * t.schedule->scratch : nullptr);
  }
};

// A call of a function: checked, laid out, and with its schedule.
struct FunctionCall : Call {
  Schedule schedule;

  // runs: else only its schedule is asked for, as if there were scratch.
  FunctionCall(softmaxlib_function function, const softmaxlib_array* x, const softmaxlib_array* out,
               Axes axes, const softmaxlib_options* given, bool runs)
      : Call(given) {
    require(x && out, SOFTMAXLIB_ERROR_NULL);
    require(is_function(function), SOFTMAXLIB_ERROR_FUNCTION);
    if (!is_good()) return;
    const Given list[] = {x_of(x), out_of(out, function)};
    lay_out(function, axes, list, out->dtype);
    check_data(list);
    const bool frugal =
        runs && !options->scratch && options->algorithm == SOFTMAXLIB_ALGORITHM_AUTO;
    if (is_good()) schedule = choose_schedule(function, job, *options, frugal);
  }
  NamedKernel kernel() const {
    return kernel_of(table(), job.function, schedule.kernel, job.dtype[kOut]);
  }
};

}  // namespace

softmaxlib_status run(Job& job, const Schedule& schedule, const KernelTable& table,
                      const NamedKernel& kernel, const Means& means) {
  if (const int64_t need = schedule.scratch_in_all()) {
    if (!means.scratch || reinterpret_cast<uintptr_t>(means.scratch) % 64 ||
        means.scratch_size < static_cast<size_t>(need))
      return SOFTMAXLIB_ERROR_SCRATCH;
  }
  const bool is_empty = job.rows == 0 || (job.n == 0 && !job.reduces);
  if (softmaxlib_report* const report = means.report) {
    const bool streams = schedule.streaming && table.streaming_stores;
    *report = {sizeof(softmaxlib_report),
               is_empty ? SOFTMAXLIB_ISA_AUTO : table.isa,
               is_empty ? SOFTMAXLIB_ALGORITHM_AUTO : kernel.algorithm,
               is_empty  ? SOFTMAXLIB_STORE_AUTO
               : streams ? SOFTMAXLIB_STORE_STREAMING
                         : SOFTMAXLIB_STORE_PLAIN,
               static_cast<int32_t>(schedule.tasks),
               is_empty ? "nothing to compute" : kernel.name};
  }
  if (is_empty) return SOFTMAXLIB_OK;

  job.tile = schedule.tile;
  job.streaming = schedule.streaming;
  job.split = schedule.split ? schedule.tasks : 0;
  job.parallel_for = means.parallel_for;
  job.parallel_context = means.parallel_context;
  char* scratch = static_cast<char*>(means.scratch);
  if (schedule.split || schedule.tasks == 1) {
    kernel.run(job, 0, job.rows, scratch);
  } else {
    RowTasks tasks = {&job, &schedule, kernel.run, scratch};
    means.parallel_for(means.parallel_context, schedule.tasks, RowTasks::run, &tasks);
  }
  return SOFTMAXLIB_OK;
}

softmaxlib_status explain(softmaxlib_function function, const softmaxlib_array* x,
                          const softmaxlib_array* out, int32_t naxes, const int32_t* axes,
                          const softmaxlib_options* options, Explanation* explanation) {
  const FunctionCall call(function, x, out, {naxes, axes}, options, false);
  if (!call.is_good()) return call.status();
  const Schedule& s = call.schedule;
  const NamedKernel kernel = call.kernel();
  *explanation = {call.table().isa, kernel.algorithm, kernel.name, s.why_kernel,
                  s.streaming,      s.why_stores,     s.split,     s.tasks,
                  s.why_tasks,      call.job.rows,    call.job.n,  s.scratch_in_all()};
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
  const FunctionCall call(function, x, out, {naxes, axes}, options, false);
  *bytes = call.is_good() ? static_cast<size_t>(call.schedule.scratch_in_all()) : 0;
  return call.status();
}

softmaxlib_status softmaxlib_run(softmaxlib_function function, const softmaxlib_array* x,
                                 const softmaxlib_array* out, int32_t naxes, const int32_t* axes,
                                 const softmaxlib_options* options) {
  using namespace softmaxlib;
  FunctionCall call(function, x, out, {naxes, axes}, options, true);
  return call.is_good() ? call.run(call.kernel(), call.schedule) : call.status();
}

}  // extern "C"
