/* The weights of causal attention, softmax(scale * scores) over the keys that a query may see, on
 * this program's own threads; checked against a double loop. */
#include <math.h>
#include <pthread.h>
#include <softmaxlib/softmaxlib.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>

/* The queries are the last of the keys: those before are in a cache. */
enum { kBatch = 2, kHeads = 3, kQueries = 300, kKeys = 428, kLayers = 4, kThreads = 4 };
enum { kCached = kKeys - kQueries, kRows = kBatch * kHeads * kQueries };
static const double kScale = 0.125;

/* ---- The caller's threads: started for a call, each takes the next task until none is left. */

typedef struct {
  softmaxlib_task task;
  void* argument;
  int64_t count;
  atomic_int_least64_t next;
} tasks;

static void* work(void* pointer) {
  tasks* all = pointer;
  int64_t i;
  while ((i = atomic_fetch_add(&all->next, 1)) < all->count) all->task(all->argument, i);
  return NULL;
}

static void parallel_for(void* context, int64_t count, softmaxlib_task task, void* argument) {
  const int helpers = *(const int*)context - 1;
  pthread_t threads[kThreads];
  int started = 0;
  tasks all = {task, argument, count, 0};
  while (started < helpers && started + 1 < count &&
         pthread_create(&threads[started], NULL, work, &all) == 0)
    ++started;
  work(&all); /* this thread too, all alone if no other could be started */
  while (started > 0) pthread_join(threads[--started], NULL);
}

/* ---- What the library must agree with. */

static void naive_softmax(const float* x, double* y, int seen) {
  double sum = 0;
  for (int j = 0; j < kKeys; ++j) {
    y[j] = j < seen ? exp(kScale * (double)x[j]) : 0;
    sum += y[j];
  }
  for (int j = 0; j < kKeys; ++j) y[j] /= sum;
}

static double largest_error(const float* scores, const float* weights) {
  static double exact[kKeys];
  double largest = 0;
  for (int row = 0; row < kRows; ++row) {
    const float* y = weights + (size_t)row * kKeys;
    const int seen = row % kQueries + 1 + kCached;
    naive_softmax(scores + (size_t)row * kKeys, exact, seen);
    for (int j = 0; j < seen; ++j)
      largest = fmax(largest, fabs((double)y[j] - exact[j]) / exact[j]);
    for (int j = seen; j < kKeys; ++j)
      if (y[j] != 0) return INFINITY; /* a weight for a key of the future */
  }
  return largest;
}

static float random_score(uint32_t* seed) { /* between -40 and 40 */
  *seed = *seed * 1664525u + 1013904223u;
  return (float)(*seed >> 8) * (80.0f / (1 << 24)) - 40.0f;
}

static int failed(softmaxlib_status status) {
  if (status != SOFTMAXLIB_OK) fprintf(stderr, "%s\n", softmaxlib_status_text(status));
  return status != SOFTMAXLIB_OK;
}

int main(void) {
  static float scores[kRows * kKeys], weights[kRows * kKeys];
  const int64_t shape[] = {kBatch, kHeads, kQueries, kKeys};
  const softmaxlib_array x = {NULL, SOFTMAXLIB_F32, 4, shape, NULL};
  const int32_t axis = -1;
  int threads = kThreads;
  uint32_t seed = 1;
  double error = 0;

  /* The shape is the same in every layer, so it is planned once. */
  softmaxlib_plan* plan = NULL;
  softmaxlib_options options = SOFTMAXLIB_OPTIONS_INIT;
  options.scale = kScale;
  options.causal = 1;
  options.causal_offset = kCached;
  options.num_threads = threads;
  if (failed(softmaxlib_plan_create(SOFTMAXLIB_SOFTMAX, &x, &x, 1, &axis, &options, &plan)))
    return 1;

  softmaxlib_report report = SOFTMAXLIB_REPORT_INIT;
  softmaxlib_buffers buffers = SOFTMAXLIB_BUFFERS_INIT;
  buffers.x = scores;
  buffers.out = weights;
  buffers.parallel_for = parallel_for;
  buffers.parallel_context = &threads;
  buffers.report = &report;
  buffers.scratch_size = (softmaxlib_plan_scratch_size(plan) + 63) / 64 * 64;
  buffers.scratch = aligned_alloc(64, buffers.scratch_size);

  for (int layer = 0; layer < kLayers; ++layer) {
    for (int i = 0; i < kRows * kKeys; ++i) scores[i] = random_score(&seed);
    if (failed(softmaxlib_plan_run(plan, &buffers))) return 1;
    error = fmax(error, largest_error(scores, weights));
  }
  free(buffers.scratch);
  softmaxlib_plan_destroy(plan);

  printf("%s, %s: (%d, %d, %d, %d) as %d tasks, largest relative error %.1e\n", report.kernel,
         softmaxlib_isa_name(report.isa), kBatch, kHeads, kQueries, kKeys, (int)report.tasks,
         error);
  return !(error < 5e-7) || report.tasks < 2;
}
