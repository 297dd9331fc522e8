/* softmaxlib: softmax and its relatives on CPUs, the same bits on every ISA.
 *
 * A plain C11 header, valid C++. No function throws, aborts, prints, allocates (but for
 * softmaxlib_pool_create) or reads the environment. Every struct that may grow starts with its
 * own size. Sizes and strides are 64-bit; strides are in bytes, may be negative or zero.
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
  SOFTMAXLIB_ERROR_MEMORY = 17           /* no memory or no thread for a pool */
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

/* Calls task(argument, i) once for every 0 <= i < count, in any order, on any threads, and returns
 * when all are done. */
typedef void (*softmaxlib_task)(void* argument, int64_t index);
typedef void (*softmaxlib_parallel_for)(void* context, int64_t count, softmaxlib_task task,
                                        void* argument);

/* What really ran; filled in by the kernel itself. */
typedef struct softmaxlib_report {
  size_t struct_size;
  softmaxlib_isa isa;
  softmaxlib_algorithm algorithm;
  softmaxlib_store store;
  int32_t tasks;      /* how many tasks parallel_for was given; 1: serial */
  const char* kernel; /* such as "softmax_two_pass_f32", static */
} softmaxlib_report;

typedef struct softmaxlib_options {
  size_t struct_size;
  softmaxlib_algorithm algorithm;
  softmaxlib_isa isa;
  softmaxlib_store store;
  int32_t num_threads; /* threads behind parallel_for; 0 or 1: serial */
  double temperature;  /* x / temperature; > 0; ignored where temperatures is set */
  const softmaxlib_array* temperatures; /* F32 or F64, broadcasts to x, constant along the axes */
  const softmaxlib_array* bias;  /* any float dtype, broadcasts to x, added after temperature */
  const softmaxlib_array* where; /* BOOL, broadcasts to x; false: takes no part */
  softmaxlib_parallel_for parallel_for; /* NULL: serial */
  void* parallel_context;
  void* scratch; /* softmaxlib_scratch_size() bytes, 64-byte aligned; NULL: a named algorithm must
                    need none, ALGORITHM_AUTO takes one that does not, slower for some shapes */
  size_t scratch_size;
  softmaxlib_report* report; /* NULL, or filled in */
} softmaxlib_options;

/* Every member at its default; C and C++. */
#define SOFTMAXLIB_OPTIONS_INIT \
  {sizeof(softmaxlib_options), 0, 0, 0, 1, 1.0, NULL, NULL, NULL, NULL, NULL, NULL, 0, NULL}

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
 * fork. */
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
