/* softmaxlib: softmax and its relatives on CPUs, the same bits on every ISA.
 *
 * A plain C11 header, valid C++. No function throws, aborts, prints, allocates (but for
 * softmaxlib_pool_create and softmaxlib_plan_create) or reads the environment. Every struct that
 * may grow starts with its own size; a caller compiled against an older header is understood.
 * Sizes and strides are 64-bit; strides are in bytes, may be negative or zero.
 *
 * docs/embedding.md shows the whole in use.
 */
#ifndef SOFTMAXLIB_H
#define SOFTMAXLIB_H

#include <stddef.h>
#include <stdint.h>

#define SOFTMAXLIB_VERSION_MAJOR 0
#define SOFTMAXLIB_VERSION_MINOR 1
#define SOFTMAXLIB_VERSION_PATCH 0

#if defined(_WIN32)
#if defined(SOFTMAXLIB_BUILDING_SHARED)
#define SOFTMAXLIB_API __declspec(dllexport)
#elif defined(SOFTMAXLIB_SHARED)
#define SOFTMAXLIB_API __declspec(dllimport)
#else
#define SOFTMAXLIB_API
#endif
#elif defined(__GNUC__)
#define SOFTMAXLIB_API __attribute__((visibility("default")))
#else
#define SOFTMAXLIB_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Enumerations travel as int32_t, so that their size is the same for every compiler. */

typedef int32_t softmaxlib_status;
enum {
  SOFTMAXLIB_OK = 0,
  SOFTMAXLIB_ERROR_NULL = 1,        /* a required pointer is NULL */
  SOFTMAXLIB_ERROR_STRUCT_SIZE = 2, /* struct_size is none that this library knows */
  SOFTMAXLIB_ERROR_FUNCTION = 3,    /* unknown function */
  SOFTMAXLIB_ERROR_DTYPE = 4,       /* a dtype is unknown or not allowed in its place */
  SOFTMAXLIB_ERROR_SHAPE = 5,       /* ndim or shape of x or out: negative, too large, mismatched */
  SOFTMAXLIB_ERROR_AXIS = 6,        /* an axis is out of range or repeated */
  SOFTMAXLIB_ERROR_TEMPERATURE =
      7,                      /* not positive, or varies along the axis, or does not broadcast */
  SOFTMAXLIB_ERROR_BIAS = 8,  /* bias does not broadcast against x */
  SOFTMAXLIB_ERROR_WHERE = 9, /* where does not broadcast against x */
  SOFTMAXLIB_ERROR_ALGORITHM = 10,       /* unknown algorithm */
  SOFTMAXLIB_ERROR_ISA = 11,             /* unknown ISA */
  SOFTMAXLIB_ERROR_ISA_UNSUPPORTED = 12, /* ISA not compiled in, or this CPU lacks it */
  SOFTMAXLIB_ERROR_STORE = 13,           /* unknown store kind */
  SOFTMAXLIB_ERROR_THREADS = 14,         /* number of threads out of range */
  SOFTMAXLIB_ERROR_SCRATCH = 15,         /* scratch is NULL, misaligned or too small */
  SOFTMAXLIB_ERROR_OVERLAP = 16,         /* out overlaps an input without being exactly x */
  SOFTMAXLIB_ERROR_MEMORY = 17,          /* no memory or no thread for a pool or a plan */
  SOFTMAXLIB_ERROR_SCALE = 18,           /* as ERROR_TEMPERATURE, or both per row */
  SOFTMAXLIB_ERROR_CAUSAL = 19,   /* query_axis out of range or the softmax's own, or many axes */
  SOFTMAXLIB_ERROR_ALIBI = 20,    /* slopes do not broadcast, or vary along the axis */
  SOFTMAXLIB_ERROR_SINK = 21,     /* sinks do not broadcast, or vary along the axis */
  SOFTMAXLIB_ERROR_STATE = 22,    /* a state of another version, function or dtype */
  SOFTMAXLIB_ERROR_K = 23,        /* k or top_k is out of range */
  SOFTMAXLIB_ERROR_SAMPLING = 24, /* top_p or min_p is out of range */
  SOFTMAXLIB_ERROR_UNIFORMS = 25, /* a uniform number is outside [0, 1), or a wrong shape */
  SOFTMAXLIB_ERROR_TARGET = 26,   /* a target or index is no element of the axis */
  SOFTMAXLIB_ERROR_LOSS = 27      /* label_smoothing, a weight or gradient_scale is out of range */
};

typedef int32_t softmaxlib_function;
enum {
  SOFTMAXLIB_SOFTMAX = 0,
  SOFTMAXLIB_LOG_SOFTMAX = 1,
  SOFTMAXLIB_LOGSUMEXP = 2,
  SOFTMAXLIB_STABLEMAX = 3,
  SOFTMAXLIB_LOG_STABLEMAX = 4
};

/* All schedules of a function return the same bits. Where a function has no use for a schedule
 * (a logarithm has nothing to reload), its nearest relative runs; the report says which. */
typedef int32_t softmaxlib_algorithm;
enum {
  SOFTMAXLIB_ALGORITHM_AUTO = 0,
  SOFTMAXLIB_THREE_PASS_RECOMPUTE = 1,
  SOFTMAXLIB_THREE_PASS_RELOAD = 2,
  SOFTMAXLIB_TWO_PASS = 3,
  SOFTMAXLIB_TWO_PASS_RELOAD = 4
};

typedef int32_t softmaxlib_isa;
enum {
  SOFTMAXLIB_ISA_AUTO = 0,
  SOFTMAXLIB_ISA_SCALAR = 1,
  SOFTMAXLIB_ISA_AVX2 = 2,  /* AVX2, FMA, F16C */
  SOFTMAXLIB_ISA_AVX512 = 3 /* AVX-512 F, BW, DQ, VL */
};

typedef int32_t softmaxlib_store;
enum {
  SOFTMAXLIB_STORE_AUTO = 0,
  SOFTMAXLIB_STORE_PLAIN = 1,
  SOFTMAXLIB_STORE_STREAMING = 2 /* bypasses the caches; contiguous, element-aligned output only */
};

typedef int32_t softmaxlib_dtype;
enum {
  SOFTMAXLIB_F32 = 0,
  SOFTMAXLIB_F64 = 1,
  SOFTMAXLIB_F16 = 2,
  SOFTMAXLIB_BF16 = 3,
  /* inputs only; computed in float64 where out is SOFTMAXLIB_F64 */
  SOFTMAXLIB_BOOL = 4,
  SOFTMAXLIB_I8 = 5,
  SOFTMAXLIB_I16 = 6,
  SOFTMAXLIB_I32 = 7,
  SOFTMAXLIB_I64 = 8,
  SOFTMAXLIB_U8 = 9,
  SOFTMAXLIB_U16 = 10,
  SOFTMAXLIB_U32 = 11,
  SOFTMAXLIB_U64 = 12
};

#define SOFTMAXLIB_MAX_NDIM 64

/* A view of memory that the caller owns. strides NULL: C-contiguous. Elements need no alignment.
 * Arrays passed as inputs are never written to. */
typedef struct softmaxlib_array {
  void* data;
  softmaxlib_dtype dtype;
  int32_t ndim;
  const int64_t* shape;
  const int64_t* strides;
} softmaxlib_array;

/* A caller's own threads. Calls task(argument, i) once for every 0 <= i < count, in any order, on
 * any threads, and returns when all are done. */
typedef void (*softmaxlib_task)(void* argument, int64_t index);
typedef void (*softmaxlib_parallel_for)(void* context, int64_t count, softmaxlib_task task,
                                        void* argument);

/* What ran; filled in by every call that runs a kernel. */
typedef struct softmaxlib_report {
  size_t struct_size;
  softmaxlib_isa isa;
  softmaxlib_algorithm algorithm;
  softmaxlib_store store;
  int32_t tasks;      /* how many tasks parallel_for was given; 1: serial */
  const char* kernel; /* such as "softmax_two_pass_f32", static */
} softmaxlib_report;
#define SOFTMAXLIB_REPORT_INIT {sizeof(softmaxlib_report), 0, 0, 0, 0, NULL}

typedef struct softmaxlib_options {
  size_t struct_size;
  softmaxlib_algorithm algorithm;
  softmaxlib_isa isa;
  softmaxlib_store store;
  int32_t num_threads; /* threads behind parallel_for; 0 or 1: serial */
  double temperature;  /* x / temperature; > 0; ignored where temperatures is set */
  const softmaxlib_array* temperatures; /* F32 or F64, broadcasts to x, constant along the axes */
  const softmaxlib_array* bias;  /* any float dtype, broadcasts to x, added after the scale */
  const softmaxlib_array* where; /* BOOL, broadcasts to x; false: takes no part */
  softmaxlib_parallel_for parallel_for; /* NULL: serial */
  void* parallel_context;
  void* scratch; /* softmaxlib_scratch_size() bytes, 64-byte aligned; NULL: a named algorithm must
                    need none, ALGORITHM_AUTO takes one that does not, slower for some shapes. Of
                    the calls below softmaxlib_run, those for states, losses and language models
                    need none, and are faster with 256 (n + 64) bytes per thread, n being a row's
                    elements, where rows are strided */
  size_t scratch_size;
  softmaxlib_report* report; /* NULL, or filled in */

  /* For attention. Softmax is over one axis here, along which columns j count from 0; rows i count
   * along query_axis. Members above alone are a valid, older struct. */
  double scale;                   /* x * scale (/ temperature); > 0; ignored where scales is set */
  const softmaxlib_array* scales; /* as temperatures, instead of them */
  int32_t causal;                 /* not 0: row i sees the columns j <= i + causal_offset only */
  int32_t query_axis;             /* of x; negative: from the end */
  int64_t causal_offset;          /* such as the number of keys in a cache before query 0 */
  const softmaxlib_array* alibi_slopes; /* as temperatures: adds slope (j - i - causal_offset) */
  const softmaxlib_array* sinks; /* any float dtype, else as temperatures: one more logit in every
                                    sum, not scaled, without an output of its own */
} softmaxlib_options;

/* Every member at its default; C and C++. */
#define SOFTMAXLIB_OPTIONS_INIT \
  {sizeof(softmaxlib_options),  \
   0,                           \
   0,                           \
   0,                           \
   1,                           \
   1.0,                         \
   NULL,                        \
   NULL,                        \
   NULL,                        \
   NULL,                        \
   NULL,                        \
   NULL,                        \
   0,                           \
   NULL,                        \
   1.0,                         \
   NULL,                        \
   0,                           \
   -2,                          \
   0,                           \
   NULL,                        \
   NULL}

/* y = function(x) over the named axes of x (naxes 0: the whole array is one distribution).
 *
 * out has the shape of x, or for SOFTMAXLIB_LOGSUMEXP the shape of x with the axes left out.
 * Its dtype (F16, BF16, F32 or F64) decides the arithmetic: double for F64, float for the others;
 * x is converted to that on reading. out may be x itself (same data, dtype and strides); any other
 * overlap of out with x, bias, where or temperatures is the caller's error and gives unspecified
 * values (ERROR_OVERLAP where it is seen). options NULL: all defaults. */
SOFTMAXLIB_API softmaxlib_status softmaxlib_run(softmaxlib_function function,
                                                const softmaxlib_array* x,
                                                const softmaxlib_array* out, int32_t naxes,
                                                const int32_t* axes,
                                                const softmaxlib_options* options);

/* How much scratch softmaxlib_run takes for the same arguments; *bytes is 0 for many calls. */
SOFTMAXLIB_API softmaxlib_status softmaxlib_scratch_size(
    softmaxlib_function function, const softmaxlib_array* x, const softmaxlib_array* out,
    int32_t naxes, const int32_t* axes, const softmaxlib_options* options, size_t* bytes);

/* ---- Plans: checks and choices once, then many runs
 *
 * A plan keeps everything but memory: function, dtypes, shapes, strides, options. It is immutable:
 * any number of threads may run one at the same time, each with scratch of its own. Pointers to
 * data, scratch, parallel_for and report in the arguments of softmaxlib_plan_create are not used,
 * may be NULL, and are given to softmaxlib_plan_run instead. */
typedef struct softmaxlib_plan softmaxlib_plan;

/* Members for which the plan has no use are ignored. */
typedef struct softmaxlib_buffers {
  size_t struct_size;
  const void* x;
  void* out; /* may be x, if dtype and strides are the same */
  const void* bias;
  const void* where;
  const void* temperatures; /* or scales */
  const void* alibi_slopes;
  const void* sinks;
  void* scratch; /* softmaxlib_plan_scratch_size() bytes, 64-byte aligned */
  size_t scratch_size;
  softmaxlib_parallel_for parallel_for; /* NULL: serial, however many threads the plan is for */
  void* parallel_context;
  softmaxlib_report* report;
} softmaxlib_buffers;
#define SOFTMAXLIB_BUFFERS_INIT \
  {sizeof(softmaxlib_buffers), NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, 0, NULL, NULL, NULL}

SOFTMAXLIB_API softmaxlib_status softmaxlib_plan_create(
    softmaxlib_function function, const softmaxlib_array* x, const softmaxlib_array* out,
    int32_t naxes, const int32_t* axes, const softmaxlib_options* options, softmaxlib_plan** plan);
SOFTMAXLIB_API void softmaxlib_plan_destroy(softmaxlib_plan* plan); /* NULL: nothing */
SOFTMAXLIB_API size_t softmaxlib_plan_scratch_size(const softmaxlib_plan* plan);
SOFTMAXLIB_API softmaxlib_status softmaxlib_plan_run(const softmaxlib_plan* plan,
                                                     const softmaxlib_buffers* buffers);

/* ---- Streaming: rows that come in chunks
 *
 * A state is the sum of a row's terms so far as (mantissa, exponent): plain bytes, to be copied,
 * stored and sent as they are. begin; then for every chunk of columns update, or merge the states
 * of others; then finish, and scale chunk by chunk. The result is within the bounds of the whole
 * row's, whatever the chunks and their order; of chunks (but the last) of a multiple of
 * SOFTMAXLIB_STATE_CHUNK elements, in order and within 32,768 of 0, it has the same bits. */
#define SOFTMAXLIB_STATE_VERSION 1
#define SOFTMAXLIB_STATE_CHUNK 16384

/* Version 1; native byte order. The sum of function's terms is
 *   e^shift ((sum + error) 2^(reference - bias) + term(largest + largest_low)),
 * where bias and the last part belong to the function's arithmetic. */
typedef struct softmaxlib_state {
  uint8_t version;
  uint8_t function; /* softmaxlib_function */
  uint8_t dtype;    /* of the arithmetic: SOFTMAXLIB_F32 or SOFTMAXLIB_F64 */
  uint8_t special;  /* 0: finite, 1: +inf among the elements, 2: NaN among them */
  int32_t reference;
  double sum, error;
  double largest, largest_low; /* logarithms keep it out of the sum */
  double shift;                /* 0 but for rows beyond 32,768 */
  int64_t count;               /* terms so far; 2 stands for more */
  uint64_t reserved;           /* 0 */
} softmaxlib_state;

/* dtype: that of the outputs to come (a half computes as SOFTMAXLIB_F32). */
SOFTMAXLIB_API softmaxlib_status softmaxlib_state_begin(softmaxlib_function function,
                                                        softmaxlib_dtype dtype, int64_t rows,
                                                        softmaxlib_state* states);

/* Adds the elements of x to states: one per row, in C order of the axes of x that are not named.
 * Options as for softmaxlib_run. causal_offset counts from the chunk's first column; sinks are to
 * be given once per row. */
SOFTMAXLIB_API softmaxlib_status softmaxlib_state_update(const softmaxlib_array* x,
                                                         softmaxlib_state* states, int32_t naxes,
                                                         const int32_t* axes,
                                                         const softmaxlib_options* options);
SOFTMAXLIB_API softmaxlib_status softmaxlib_state_merge(int64_t rows, softmaxlib_state* into,
                                                        const softmaxlib_state* from);

/* The logarithm of each sum; of states of LOG_SOFTMAX and LOGSUMEXP its rounding to float is the
 * result of SOFTMAXLIB_LOGSUMEXP. */
SOFTMAXLIB_API softmaxlib_status softmaxlib_state_finish(int64_t rows,
                                                         const softmaxlib_state* states,
                                                         double* log_sums);

/* out = function(x) of the chunk x under the states of whole rows; not for SOFTMAXLIB_LOGSUMEXP.
 * Options as for the chunk's update, but sinks, which are ignored. */
SOFTMAXLIB_API softmaxlib_status softmaxlib_state_scale(const softmaxlib_array* x,
                                                        const softmaxlib_array* out,
                                                        const softmaxlib_state* states,
                                                        int32_t naxes, const int32_t* axes,
                                                        const softmaxlib_options* options);

/* ---- Gradients
 * -----------------------------------------------------------------------------------
 *
 * out = the gradient of sum(grad * function(x)) with respect to x: a vector-Jacobian product. y:
 * function's result. x may be NULL for SOFTMAX and LOG_SOFTMAX, which do not read it. For LOGSUMEXP
 * grad and y have the shape of x without the axes, else all have one shape. Exactly 0 where y is 0
 * (of a logarithm: -inf) or where is false, whatever grad holds there. out may be grad, x or y.
 *
 * Options: isa, threads, where, and temperature or scale (also per row) as they were for y;
 * LOGSUMEXP and the stablemax functions take no bias. */
SOFTMAXLIB_API softmaxlib_status softmaxlib_backward(
    softmaxlib_function function, const softmaxlib_array* grad, const softmaxlib_array* x,
    const softmaxlib_array* y, const softmaxlib_array* out, int32_t naxes, const int32_t* axes,
    const softmaxlib_options* options);

/* out = grad less its part along weights, all elements as one vector:
 *   d = grad - (weights.grad / weights.weights) weights,
 * times |grad| / |d| where rescale is not 0 (Prieto et al., 2025). One shape, float dtypes; F64
 * only where out is F64. out may be grad itself, and else be apart from both.
 *
 * Where |d| is at most the machine epsilon of the coarser input times |grad|, d is rounding noise
 * and out is 0. Weights of 0 leave grad as it is. A NaN or an infinity anywhere: all of out is NaN.
 *
 * Options: isa, store, threads, report; the others are ignored. The same bits on every ISA and
 * thread count. */
SOFTMAXLIB_API softmaxlib_status softmaxlib_orthogonal_gradient(const softmaxlib_array* grad,
                                                                const softmaxlib_array* weights,
                                                                const softmaxlib_array* out,
                                                                int32_t rescale,
                                                                const softmaxlib_options* options);

/* ---- Losses
 *
 * Rows are along one axis. Options: isa, threads, store (of grad), temperature and scale (also per
 * row), bias, where; not causal, alibi_slopes or sinks. */

typedef int32_t softmaxlib_reduction;
enum {
  SOFTMAXLIB_REDUCTION_NONE = 0,
  SOFTMAXLIB_REDUCTION_SUM = 1,
  SOFTMAXLIB_REDUCTION_MEAN = 2 /* over the weights of the labels that count; of probabilities over
                                   the rows; NaN where these are 0 */
};

typedef struct softmaxlib_loss_options {
  size_t struct_size;
  int64_t ignore_index;   /* a target whose row is not read: loss and gradient 0 */
  double label_smoothing; /* in [0, 1]: this share of the target spread over the classes */
  double gradient_scale;  /* a factor of the gradient */
  const double* weight;   /* of each class, finite and not negative; NULL: 1 */

  /* Members above alone are a valid, older struct. */
  softmaxlib_reduction reduction; /* other than NONE: also a total of the losses */
  const softmaxlib_array* total;  /* which takes it: one element of any float dtype */
} softmaxlib_loss_options;
#define SOFTMAXLIB_LOSS_OPTIONS_INIT \
  {sizeof(softmaxlib_loss_options), -100, 0.0, 1.0, NULL, 0, NULL}

/* losses (any float dtype, in the shape of x without the axis) = cross-entropy of every row with
 * target: a class (I64, of that shape) or probabilities (floating, of the shape of x). activation:
 * SOFTMAX or STABLEMAX. With q_j = weight_j times the (smoothed) target: sum of q_j (-log p_j).
 *
 * With a reduction losses must be F64. They are the terms of the total then: of a mean in a unit of
 * the call's own, a power of two. The total is their compensated sum, rounded once, the same for
 * every ISA and number of threads; MEAN divides the gradient, too.
 *
 * grad (floating, of the shape of x; NULL: none) = gradient of the losses' sum, or of their mean,
 * with respect to x, times gradient_scale. It may be x, or target if those are probabilities. Both
 * keep their relative accuracy where p is nearly 1: the gradient of a label is minus the sum of the
 * others. Where `where` is false it is 0, there is no class to spread to, and a target there has an
 * infinite loss. */
SOFTMAXLIB_API softmaxlib_status softmaxlib_cross_entropy(
    softmaxlib_function activation, const softmaxlib_array* x, const softmaxlib_array* target,
    const softmaxlib_array* losses, const softmaxlib_array* grad, int32_t axis,
    const softmaxlib_loss_options* loss_options, const softmaxlib_options* options);

/* out = x times factors: the chain rule for a gradient that came with its loss. x: any dtype; out:
 * floating, of the shape of x, and x itself or apart from it; factors: floating, broadcasts to x.
 * Exactly 0 where x is 0, whatever the factor. With factors of 1 it converts x to out's dtype,
 * rounded once, and touches nothing where out is x. Options: isa, store, threads; the others are
 * ignored. */
SOFTMAXLIB_API softmaxlib_status softmaxlib_scale_rows(const softmaxlib_array* x,
                                                       const softmaxlib_array* factors,
                                                       const softmaxlib_array* out,
                                                       const softmaxlib_options* options);

/* out = log_softmax(x) at indices (I64, in [0, n)) along the axis, k of them per row, in one read
 * of x: the bits that SOFTMAXLIB_LOG_SOFTMAX has there. indices and out have the shape of x but for
 * the axis' length k. logsumexp (of out's dtype, in the shape of x without the axis; may be NULL):
 * that of every row. */
SOFTMAXLIB_API softmaxlib_status softmaxlib_take_log_softmax(
    const softmaxlib_array* x, const softmaxlib_array* indices, const softmaxlib_array* out,
    const softmaxlib_array* logsumexp, int32_t axis, const softmaxlib_options* options);

/* ---- Language models
 *
 * Rows are along one axis. Options: isa, threads, temperature and scale (also per row), bias,
 * where; not causal, alibi_slopes or sinks. The same result on every ISA and thread count, whatever
 * the batch. */

typedef struct softmaxlib_filter {
  size_t struct_size;
  int64_t top_k; /* keeps the so many largest; 0: all */
  double top_p;  /* then the fewest largest that hold this share of what is left; 1: all */
  double min_p;  /* then those with at least this share of the largest one's; 0: all */
} softmaxlib_filter;
#define SOFTMAXLIB_FILTER_INIT {sizeof(softmaxlib_filter), 0, 1.0, 0.0}

/* Draws one index per row from softmax(x), filtered (NULL: all), by inversion: uniforms (F64, in
 * [0, 1)) and indices (I64) have the shape of x without the axis. Of equal elements the one with
 * the smaller index counts as larger. Rows that have no distribution (NaN, +inf, or nothing but
 * -inf) give -1. */
SOFTMAXLIB_API softmaxlib_status softmaxlib_sample(const softmaxlib_array* x,
                                                   const softmaxlib_array* uniforms,
                                                   const softmaxlib_array* indices, int32_t axis,
                                                   const softmaxlib_filter* filter,
                                                   const softmaxlib_options* options);

/* The k = weights->shape[axis] largest elements of every row, largest first, of equal ones the
 * smaller index first: their softmax(x) in weights (any float dtype), their places in indices
 * (I64, of the same shape). renormalize not 0: the softmax of these k alone. Rows without a
 * distribution give NaN and 0, 1, 2... */
SOFTMAXLIB_API softmaxlib_status softmaxlib_topk_softmax(const softmaxlib_array* x,
                                                         const softmaxlib_array* weights,
                                                         const softmaxlib_array* indices,
                                                         int32_t axis, int32_t renormalize,
                                                         const softmaxlib_options* options);

/* ---- The library */

/* English, static, never NULL. */
SOFTMAXLIB_API const char* softmaxlib_status_text(softmaxlib_status status);

SOFTMAXLIB_API const char* softmaxlib_version(void);
SOFTMAXLIB_API const char* softmaxlib_compiler(void);

/* ISAs best first: rank 0, 1, ... until SOFTMAXLIB_ISA_AUTO comes back. */
SOFTMAXLIB_API softmaxlib_isa softmaxlib_isa_compiled(int32_t rank);
SOFTMAXLIB_API softmaxlib_isa softmaxlib_isa_available(int32_t rank); /* what this CPU can run */
SOFTMAXLIB_API const char* softmaxlib_isa_name(softmaxlib_isa isa);   /* NULL where unknown */

/* Bytes of the data cache of a level (1, 2, 3) that one core sees; 0 where there is none. */
SOFTMAXLIB_API int64_t softmaxlib_cache_size(int32_t level);

/* An optional thread pool, for callers that have none of their own: pass
 * softmaxlib_pool_parallel_for and the pool as parallel_for and parallel_context. Calls from
 * several threads at once are safe (one uses the pool, the others run serially); so is use after
 * fork. NULL in place of a pool runs serially. */
typedef struct softmaxlib_pool softmaxlib_pool;
SOFTMAXLIB_API softmaxlib_status softmaxlib_pool_create(int32_t num_threads,
                                                        softmaxlib_pool** pool);
SOFTMAXLIB_API void softmaxlib_pool_destroy(softmaxlib_pool* pool);
SOFTMAXLIB_API void softmaxlib_pool_parallel_for(void* pool, int64_t count, softmaxlib_task task,
                                                 void* argument);

#ifdef __cplusplus
}
#endif

#endif
