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

/* By a plan, and from a state: the bits of the plain call. */
static void plan_and_state(softmaxlib_array x, const float* expected) {
  softmaxlib_buffers buffers = SOFTMAXLIB_BUFFERS_INIT;
  softmaxlib_plan* plan = NULL;
  softmaxlib_state state;
  softmaxlib_array out = x;
  double log_sum = 0;
  float y[3];

  out.data = NULL;
  expect(!softmaxlib_plan_create(SOFTMAXLIB_SOFTMAX, &x, &out, 0, NULL, NULL, &plan), "a plan");
  expect(softmaxlib_plan_scratch_size(plan) == 0, "a small plan needs no scratch");
  buffers.x = x.data;
  buffers.out = y;
  expect(!softmaxlib_plan_run(plan, &buffers), "the plan runs");
  expect(!memcmp(y, expected, sizeof(y)), "the plan's bits");
  softmaxlib_plan_destroy(plan);

  out.data = y;
  expect(!softmaxlib_state_begin(SOFTMAXLIB_SOFTMAX, SOFTMAXLIB_F32, 1, &state), "a state");
  expect(!softmaxlib_state_update(&x, &state, 0, NULL, NULL), "the state takes elements");
  expect(!softmaxlib_state_scale(&x, &out, &state, 0, NULL, NULL), "the state scales elements");
  expect(!memcmp(y, expected, sizeof(y)), "the state's bits");
  expect(!softmaxlib_state_merge(1, &state, &state), "a state takes a state");
  expect(!softmaxlib_state_finish(1, &state, &log_sum), "the state's sum");
  expect(fabs(log_sum - (3 + log(2 * (1 + exp(-1.0) + exp(-2.0))))) < 1e-6, "twice the terms");
}

static void sampling(softmaxlib_array x, const float* expected) {
  const double half = 0.5;
  const int64_t two = 2;
  int64_t index = -1, indices[2];
  float weights[2];
  softmaxlib_array uniform = {NULL, SOFTMAXLIB_F64, 0, NULL, NULL};
  softmaxlib_array drawn = {NULL, SOFTMAXLIB_I64, 0, NULL, NULL};
  softmaxlib_array best = {NULL, SOFTMAXLIB_F32, 1, NULL, NULL};
  softmaxlib_array places = {NULL, SOFTMAXLIB_I64, 1, NULL, NULL};

  uniform.data = (void*)&half;
  drawn.data = &index;
  expect(!softmaxlib_sample(&x, &uniform, &drawn, 0, NULL, NULL), "sample runs");
  expect(index == 2, "the sample is where half of the distribution lies");
  best.data = weights;
  places.data = indices;
  best.shape = places.shape = &two;
  expect(!softmaxlib_topk_softmax(&x, &best, &places, 0, 0, NULL), "top-k runs");
  expect(indices[0] == 2 && indices[1] == 1, "the largest first");
  expect(weights[0] == expected[2] && weights[1] == expected[1], "the weights' bits");
}

int main(int argc, char** argv) {
  const float x[2][3] = {{1.0f, 2.0f, 3.0f}, {-1000.0f, 0.0f, 1000.0f}};
  float y[2][3], sums[2];
  const int64_t shape[2] = {2, 3};
  const int32_t axis = -1;
  softmaxlib_array in = {NULL, SOFTMAXLIB_F32, 2, NULL, NULL};
  softmaxlib_array out = {NULL, SOFTMAXLIB_F32, 2, NULL, NULL};
  softmaxlib_report report = SOFTMAXLIB_REPORT_INIT;
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

  in.ndim = 1;
  in.shape = &shape[1];
  plan_and_state(in, y[0]);
  sampling(in, y[0]);
  in.ndim = 2;
  in.shape = shape;

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
