// Plans: a call with everything decided but where its memory is.
#include <new>

#include "api/call.hpp"

struct softmaxlib_plan {
  const softmaxlib::KernelTable* table;
  softmaxlib::NamedKernel kernels[2];
  softmaxlib::Schedule schedules[2];  // out apart from x, and out being x
  softmaxlib::Job job;
};

namespace softmaxlib {
namespace {

// A Job is mostly room for dimensions that few calls have.
void copy_job(const Job& from, Job* to) {
  static_cast<Scalars&>(*to) = from;
  static_cast<Parameters&>(*to) = from;
  to->function = from.function;
  memcpy(static_cast<Layout*>(to), static_cast<const Layout*>(&from), offsetof(Layout, outer));
  memcpy(to->outer, from.outer, static_cast<size_t>(from.outer_ndim) * sizeof(Dim));
  memcpy(to->inner, from.inner, static_cast<size_t>(from.inner_ndim) * sizeof(Dim));
}

void run_serially(void*, int64_t count, softmaxlib_task task, void* argument) {
  for (int64_t i = 0; i < count; ++i) task(argument, i);
}

// Anything, so that num_threads of the plan count.
void use_threads(void*, int64_t, softmaxlib_task, void*) {}

}  // namespace
}  // namespace softmaxlib

extern "C" {

softmaxlib_status softmaxlib_plan_create(softmaxlib_function function, const softmaxlib_array* x,
                                         const softmaxlib_array* out, int32_t naxes,
                                         const int32_t* axes, const softmaxlib_options* options,
                                         softmaxlib_plan** plan) {
  using namespace softmaxlib;
  if (!plan) return SOFTMAXLIB_ERROR_NULL;
  *plan = nullptr;
  const Options given(options);
  if (const softmaxlib_status status = check(given, false)) return status;
  softmaxlib_options o = *given;
  o.report = nullptr;
  o.parallel_for = use_threads;

  if (!x || !out) return SOFTMAXLIB_ERROR_NULL;
  if (!is_function(function)) return SOFTMAXLIB_ERROR_FUNCTION;

  softmaxlib_plan* const made = new (std::nothrow) softmaxlib_plan;
  if (!made) return SOFTMAXLIB_ERROR_MEMORY;
  Job& job = made->job;
  const Given list[] = {x_of(x), out_of(out, function)};
  if (const softmaxlib_status status =
          lay_out(function, {naxes, axes}, list, out->dtype, o, &job)) {
    delete made;
    return status;
  }
  made->table = table_of(o.isa);
  for (int i = 0; i < 2; ++i) {
    job.in_place = i == 1 && job.same_layout;
    made->schedules[i] = choose_schedule(function, job, o, false);
    made->kernels[i] =
        kernel_of(*made->table, function, made->schedules[i].kernel, job.dtype[kOut]);
  }
  *plan = made;
  return SOFTMAXLIB_OK;
}

void softmaxlib_plan_destroy(softmaxlib_plan* plan) { delete plan; }

size_t softmaxlib_plan_scratch_size(const softmaxlib_plan* plan) {
  if (!plan) return 0;
  size_t most = 0;
  for (const softmaxlib::Schedule& s : plan->schedules) {
    const auto bytes = static_cast<size_t>(s.scratch_in_all());
    most = bytes > most ? bytes : most;
  }
  return most;
}

softmaxlib_status softmaxlib_plan_run(const softmaxlib_plan* plan,
                                      const softmaxlib_buffers* buffers) {
  using namespace softmaxlib;
  if (!plan || !buffers) return SOFTMAXLIB_ERROR_NULL;
  const softmaxlib_buffers& b = *buffers;
  if (b.struct_size != sizeof(softmaxlib_buffers) ||
      (b.report && b.report->struct_size != sizeof(softmaxlib_report)))
    return SOFTMAXLIB_ERROR_STRUCT_SIZE;
  Job job;
  copy_job(plan->job, &job);
  const void* data[kOperands] = {};
  data[kX] = b.x, data[kOut] = b.out, data[kBias] = b.bias, data[kWhere] = b.where;
  data[kScale] = b.temperatures, data[kSlope] = b.alibi_slopes, data[kSink] = b.sinks;
  for (int k = 0; k < kOperands; ++k)
    job.base[k] = job_has(job, k) ? static_cast<char*>(const_cast<void*>(data[k])) : nullptr;
  if (const softmaxlib_status status = check_data(&job)) return status;
  return run(job, plan->schedules[job.in_place], *plan->table, plan->kernels[job.in_place],
             {b.parallel_for ? b.parallel_for : run_serially, b.parallel_context, b.report,
              b.scratch, b.scratch_size});
}

}  // extern "C"
