/* The header and the library from C11. The argument, if any: the ISA that must run. */
#include <math.h>
#include <softmaxlib/softmaxlib.h>
#include <stdio.h>
#include <string.h>

static int failures = 0;

static void expect(int condition, const char* what) {
  if (condition) return;
  printf("failed: %s\n", what);
  ++failures;
}

int main(int argc, char** argv) {
  const float x[2][3] = {{1.0f, 2.0f, 3.0f}, {-1000.0f, 0.0f, 1000.0f}};
  float y[2][3], sums[2];
  const int64_t shape[2] = {2, 3};
  const int32_t axis = -1;
  softmaxlib_array in = {NULL, SOFTMAXLIB_F32, 2, NULL, NULL};
  softmaxlib_array out = {NULL, SOFTMAXLIB_F32, 2, NULL, NULL};
  softmaxlib_report report = {sizeof(softmaxlib_report), 0, 0, 0, 0, NULL};
  softmaxlib_options options = SOFTMAXLIB_OPTIONS_INIT;
  softmaxlib_pool* pool = NULL;
  softmaxlib_status status;
  size_t scratch = 1;
  int32_t rank;

  in.data = (void*)x;
  in.shape = shape;
  out.data = y;
  out.shape = shape;
  options.report = &report;

  printf("softmaxlib %s, %s\n", softmaxlib_version(), softmaxlib_compiler());
  for (rank = 0; softmaxlib_isa_available(rank) != SOFTMAXLIB_ISA_AUTO; ++rank)
    printf("  %s\n", softmaxlib_isa_name(softmaxlib_isa_available(rank)));
  expect(rank > 0, "an ISA is available");

  status = softmaxlib_scratch_size(SOFTMAXLIB_SOFTMAX, &in, &out, 1, &axis, &options, &scratch);
  expect(status == SOFTMAXLIB_OK && scratch == 0, "a small call needs no scratch");
  status = softmaxlib_run(SOFTMAXLIB_SOFTMAX, &in, &out, 1, &axis, &options);
  printf("%s by %s on %s\n", softmaxlib_status_text(status), report.kernel,
         softmaxlib_isa_name(report.isa));
  expect(status == SOFTMAXLIB_OK, "softmax runs");
  if (argc > 1) expect(!strcmp(softmaxlib_isa_name(report.isa), argv[1]), argv[1]);
  expect(fabs((double)y[0][0] + (double)y[0][1] + (double)y[0][2] - 1.0) < 1e-6, "row 0 sums to 1");
  expect(fabs((double)y[0][2] / (double)y[0][1] - exp(1.0)) < 1e-5, "ratios are powers of e");
  expect(y[1][0] == 0.0f && y[1][1] == 0.0f && y[1][2] == 1.0f, "row 1 is saturated");

  out.data = sums;
  out.ndim = 1;
  status = softmaxlib_run(SOFTMAXLIB_LOGSUMEXP, &in, &out, 1, &axis, NULL);
  expect(status == SOFTMAXLIB_OK && sums[1] == 1000.0f, "logsumexp runs without options");

  options.temperature = 0.0;
  status = softmaxlib_run(SOFTMAXLIB_LOGSUMEXP, &in, &out, 1, &axis, &options);
  printf("temperature 0: %s\n", softmaxlib_status_text(status));
  expect(status == SOFTMAXLIB_ERROR_TEMPERATURE, "temperature 0 is refused");
  expect(strlen(softmaxlib_status_text(12345)) > 0, "every status has a text");

  expect(softmaxlib_pool_create(2, &pool) == SOFTMAXLIB_OK, "a pool starts");
  options.temperature = 1.0;
  options.num_threads = 2;
  options.parallel_for = softmaxlib_pool_parallel_for;
  options.parallel_context = pool;
  status = softmaxlib_run(SOFTMAXLIB_LOGSUMEXP, &in, &out, 1, &axis, &options);
  expect(status == SOFTMAXLIB_OK, "a call with a pool runs");
  softmaxlib_pool_destroy(pool);

  puts(failures ? "FAILED" : "passed");
  return failures != 0;
}
