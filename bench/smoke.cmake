# Runs one benchmark of each kind for a moment and reads its JSON; times are not judged.
#   cmake -DBENCH=<softmaxlib_bench> -DOUT=<file.json> -P smoke.cmake
string(JOIN "|" filter
  "^stream/copy/.*/L1/" "^pass/.*/L1/" "^rows/softmax/auto/f32/.*/65536x8/"
  "^[a-z_]*/two_pass/.*/(L1|cold)/n:(1024|2048|4096)/")
execute_process(
  COMMAND ${BENCH} --offset=16 --benchmark_min_time=0.001 --benchmark_filter=${filter}
    --benchmark_out=${OUT} --benchmark_out_format=json
  OUTPUT_VARIABLE output ERROR_VARIABLE output RESULT_VARIABLE result)
if(result)
  message(FATAL_ERROR "${BENCH} ended with ${result}:\n${output}")
endif()
file(READ ${OUT} json)

foreach(key num_cpus caches load_avg cpu governor cache_l1d page_size transparent_hugepages compiler
        softmaxlib isas_compiled isas_available all_threads offset roofline_share)
  string(JSON value GET "${json}" context ${key})  # stops where there is none
endforeach()

set(stream_counters ns_per_1000 moved_GB_per_s)
set(pass_counters ${stream_counters} roofline_share)
set(row_counters ${pass_counters} algorithmic_GB_per_s tasks)
set(rows_counters ns_per_1000 roofline_share algorithmic_GB_per_s tasks)
set(seen "")
string(JSON count LENGTH "${json}" benchmarks)
math(EXPR last "${count} - 1")
foreach(i RANGE ${last})
  string(JSON one GET "${json}" benchmarks ${i})
  string(JSON name GET "${one}" name)
  string(JSON failed ERROR_VARIABLE absent GET "${one}" error_message)
  if(NOT absent)
    message(FATAL_ERROR "${name}: ${failed}")
  endif()
  string(REGEX MATCH "^(stream|pass|rows)/" kind "${name}")
  string(REPLACE "/" "" kind "${kind}")
  if(NOT kind)
    set(kind row)
  endif()
  list(APPEND seen ${kind})
  if(name MATCHES "/cold/")
    list(APPEND seen cold)
  endif()
  foreach(counter ${${kind}_counters})
    string(JSON value GET "${one}" ${counter})
    if(NOT value GREATER 0)
      message(FATAL_ERROR "${name}: ${counter} is ${value}")
    endif()
  endforeach()
endforeach()
list(REMOVE_DUPLICATES seen)
list(LENGTH seen kinds)
if(NOT kinds EQUAL 5)
  message(FATAL_ERROR "stream, pass, row, cold and rows were asked for; there is only: ${seen}")
endif()
message("${count} benchmarks")
