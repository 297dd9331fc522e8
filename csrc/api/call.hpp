// One call between its checks and its kernel: what the entries of the C interface share.
#pragma once

#include <math.h>
#include <stddef.h>
#include <string.h>

#include "bits.hpp"
#include "host/layout.hpp"
#include "host/schedule.hpp"
#include "registry/table.hpp"

namespace softmaxlib {

// A caller's struct that says its own size. NULL is all defaults; `older` is the size that an older
// header gives it (0: there is none), and what that lacks is at its default. Of a struct of any
// other size nothing but the size is read: it may end where the caller's memory does.
template <class S>
class Versioned {
 public:
  Versioned(const S* given, const S& defaults, size_t older) : use_(given) {
    if (given && given->struct_size == sizeof(S)) return;
    local_ = defaults;
    use_ = &local_;
    if (!given) return;
    if (older && given->struct_size == older) memcpy(&local_, given, older);
    else valid_ = false;
    local_.struct_size = sizeof(S);
  }
  Versioned(const Versioned&) = delete;
  Versioned& operator=(const Versioned&) = delete;

  bool valid() const { return valid_; }
  const S& operator*() const { return *use_; }
  const S* operator->() const { return use_; }
  // A copy of them, which counts from here on.
  S& change() {
    if (use_ != &local_) local_ = *use_;
    use_ = &local_;
    return local_;
  }

 private:
  const S* use_;
  S local_;
  bool valid_ = true;
};

class Options : public Versioned<softmaxlib_options> {
 public:
  explicit Options(const softmaxlib_options* given)
      : Versioned(given, SOFTMAXLIB_OPTIONS_INIT, offsetof(softmaxlib_options, scale)) {}
};

// Those that say how to run. `reports`: the report is used.
inline softmaxlib_status check(const Options& options, bool reports = true) {
  if (!options.valid()) return SOFTMAXLIB_ERROR_STRUCT_SIZE;
  const softmaxlib_options& o = *options;
  if (reports && o.report && o.report->struct_size != sizeof(softmaxlib_report))
    return SOFTMAXLIB_ERROR_STRUCT_SIZE;
  if (o.algorithm < 0 || o.algorithm >= kAlgorithms) return SOFTMAXLIB_ERROR_ALGORITHM;
  if (!softmaxlib_isa_name(o.isa) && o.isa != SOFTMAXLIB_ISA_AUTO) return SOFTMAXLIB_ERROR_ISA;
  if (o.store < 0 || o.store > SOFTMAXLIB_STORE_STREAMING) return SOFTMAXLIB_ERROR_STORE;
  if (o.num_threads < 0) return SOFTMAXLIB_ERROR_THREADS;
  return table_of(o.isa) ? SOFTMAXLIB_OK : SOFTMAXLIB_ERROR_ISA_UNSUPPORTED;
}

// What a run of a job needs beside its layout.
struct Means {
  softmaxlib_parallel_for parallel_for;
  void* parallel_context;
  softmaxlib_report* report;
  void* scratch;
  size_t scratch_size;
};
inline Means means_of(const softmaxlib_options& o) {
  return {o.parallel_for, o.parallel_context, o.report, o.scratch, o.scratch_size};
}

// Runs a kernel over all rows, shared out as the schedule says, and reports.
softmaxlib_status run(Job& job, const Schedule& schedule, const KernelTable& table,
                      const NamedKernel& kernel, const Means& means);

// The two arrays that most calls have.
inline Given x_of(const softmaxlib_array* x) {
  return {kX, x, Shape::kOfX, Dtypes::kAny, Access::kReadsUnder};
}
inline Given out_of(const softmaxlib_array* out, softmaxlib_function function) {
  return {kOut, out, reduces(function) ? Shape::kPerRow : Shape::kOfX, Dtypes::kFloats,
          Access::kWrites};
}

// A call from its arguments to its kernel. After the first thing that is wrong nothing more is
// looked at, and status() says what it was.
class Call {
 public:
  Options options;
  Job job;

  explicit Call(const softmaxlib_options* given) : options(given), status_(check(options)) {}

  softmaxlib_status status() const { return status_; }
  bool is_good() const { return status_ == SOFTMAXLIB_OK; }
  const KernelTable& table() const { return *table_of(options->isa); }

  void require(bool holds, softmaxlib_status otherwise) {
    if (is_good() && !holds) status_ = otherwise;
  }
  // condition(): whose arguments are valid only if all that was required before holds.
  template <class Condition>
  void require_that(Condition condition, softmaxlib_status otherwise) {
    if (is_good() && !condition()) status_ = otherwise;
  }
  void require_ok(softmaxlib_status status) {
    if (is_good()) status_ = status;
  }
  // Of calls that have no use for them.
  void refuse_attention() {
    require(!options->causal, SOFTMAXLIB_ERROR_CAUSAL);
    require(!options->alibi_slopes, SOFTMAXLIB_ERROR_ALIBI);
    require(!options->sinks, SOFTMAXLIB_ERROR_SINK);
  }
  // Of calls that use none but those that say how to run: all others are at their defaults.
  void ignore_arithmetic() {
    const softmaxlib_options given = *options;
    softmaxlib_options& o = options.change();
    o = SOFTMAXLIB_OPTIONS_INIT;
    o.isa = given.isa;
    o.store = given.store;
    o.num_threads = given.num_threads;
    o.parallel_for = given.parallel_for;
    o.parallel_context = given.parallel_context;
    o.report = given.report;
  }
  void lay_out(softmaxlib_function function, Axes axes, GivenList list, softmaxlib_dtype storage) {
    if (is_good()) status_ = softmaxlib::lay_out(function, axes, list, storage, *options, &job);
  }
  void check_data(GivenList list) {
    if (is_good()) status_ = softmaxlib::check_data(&job);
    require_that([&] { return are_apart(list); }, SOFTMAXLIB_ERROR_OVERLAP);
  }
  softmaxlib_status run(const NamedKernel& kernel, const Schedule& schedule) {
    if (is_good()) status_ = softmaxlib::run(job, schedule, table(), kernel, means_of(*options));
    return status_;
  }
  // A kernel that takes rows as they come.
  softmaxlib_status run_rows(registry::OtherCall kernel) {
    if (!is_good()) return status_;
    return run(kernel_of(table(), kernel, job.dtype[kOut]), share_rows(job, *options, true));
  }

 private:
  softmaxlib_status status_;
};

}  // namespace softmaxlib
