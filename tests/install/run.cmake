# Installs the library without Python into a fresh prefix, and builds and runs the consumer project
# there. KIND: shared or static; SOURCE: the repository; WORK: where to build. Optional: BUILT, a
# build of that kind (else one is made), GENERATOR, C_COMPILER, CXX_COMPILER, FLAGS. By hand:
#   cmake -DKIND=shared -DSOURCE=. -DWORK=/tmp/install -P tests/install/run.cmake
function(run)
  execute_process(COMMAND ${ARGN} RESULT_VARIABLE status)
  if(status)
    list(JOIN ARGN " " command)
    message(FATAL_ERROR "failed: ${command}")
  endif()
endfunction()

get_filename_component(SOURCE "${SOURCE}" ABSOLUTE)
set(options -DCMAKE_BUILD_TYPE=Debug)  # the quickest to build
if(GENERATOR)
  list(APPEND options -G ${GENERATOR})
endif()
if(C_COMPILER)
  list(APPEND options -DCMAKE_C_COMPILER=${C_COMPILER} -DCMAKE_CXX_COMPILER=${CXX_COMPILER}
       -DCMAKE_C_FLAGS=${FLAGS} -DCMAKE_CXX_FLAGS=${FLAGS})
endif()
if(KIND STREQUAL "shared")
  set(shared ON)
else()
  set(shared OFF)
endif()

file(REMOVE_RECURSE ${WORK}/prefix ${WORK}/consumer)
if(NOT BUILT)
  set(BUILT ${WORK}/library)
  run(${CMAKE_COMMAND} -S ${SOURCE} -B ${BUILT} ${options} -DBUILD_SHARED_LIBS=${shared}
      -DSOFTMAXLIB_BUILD_TESTS=OFF -DSOFTMAXLIB_BUILD_PYTHON=OFF)
  run(${CMAKE_COMMAND} --build ${BUILT})
endif()
run(${CMAKE_COMMAND} --install ${BUILT} --prefix ${WORK}/prefix)

file(GLOB_RECURSE headers RELATIVE ${WORK}/prefix ${WORK}/prefix/*.h ${WORK}/prefix/*.hpp)
if(NOT headers STREQUAL "include/softmaxlib/softmaxlib.h")
  message(FATAL_ERROR "installed headers: ${headers}")
endif()

run(${CMAKE_COMMAND} -S ${SOURCE}/tests/install -B ${WORK}/consumer ${options}
    -DCMAKE_PREFIX_PATH=${WORK}/prefix)
run(${CMAKE_COMMAND} --build ${WORK}/consumer)
run(${CMAKE_CTEST_COMMAND} --test-dir ${WORK}/consumer --output-on-failure)
