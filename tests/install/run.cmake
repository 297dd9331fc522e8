# Gets the library one way and uses it, below the directory WORK. SOURCE: the repository; BUILT: a
# build of it; GENERATOR, C_COMPILER, CXX_COMPILER, FLAGS: for what is built here. HOW:
#   prefix      cmake --install, with nothing but what belongs there, and moved afterwards
#   c, cpp      find_package, from that prefix
#   pkg_config  a compiler's command line, with that prefix
#   embedded    add_subdirectory, then FetchContent
cmake_policy(VERSION 3.20)

function(run)
  execute_process(COMMAND ${ARGN} RESULT_VARIABLE status)
  if(status)
    list(JOIN ARGN " " command)
    message(FATAL_ERROR "failed: ${command}")
  endif()
endfunction()

function(build_project name)
  run(${CMAKE_COMMAND} -S ${SOURCE}/tests/install/${name} -B ${WORK}/${name} -G ${GENERATOR}
    -DCMAKE_C_COMPILER=${C_COMPILER} -DCMAKE_CXX_COMPILER=${CXX_COMPILER}
    -DCMAKE_C_FLAGS=${FLAGS} -DCMAKE_CXX_FLAGS=${FLAGS} --no-warn-unused-cli
    -DCMAKE_BUILD_TYPE=Debug ${ARGN})  # Debug: the quickest to build
  run(${CMAKE_COMMAND} --build ${WORK}/${name})
  run(${CMAKE_CTEST_COMMAND} --test-dir ${WORK}/${name} --output-on-failure)
endfunction()

# The words that pkg-config answers.
function(pkg_config result)
  execute_process(COMMAND ${CMAKE_COMMAND} -E env PKG_CONFIG_PATH=${pc_dir} ${PKG_CONFIG} ${ARGN}
    softmaxlib OUTPUT_VARIABLE output OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
  separate_arguments(output)
  set(${result} ${output} PARENT_SCOPE)
endfunction()

set(prefix ${WORK}/prefix)
if(HOW STREQUAL "prefix")
  file(REMOVE_RECURSE ${prefix})
  run(${CMAKE_COMMAND} --install ${BUILT} --prefix ${WORK}/elsewhere)
  file(RENAME ${WORK}/elsewhere ${prefix})
  file(GLOB_RECURSE headers RELATIVE ${prefix} ${prefix}/*.h ${prefix}/*.hpp)
  if(NOT headers STREQUAL "include/softmaxlib/softmaxlib.h")
    message(FATAL_ERROR "installed headers: ${headers}")
  endif()
elseif(HOW STREQUAL "embedded")
  build_project(embedded -DSOFTMAXLIB=${SOURCE} -DFETCH=OFF)
  build_project(embedded -DSOFTMAXLIB=${SOURCE} -DFETCH=ON)  # the same objects
elseif(HOW STREQUAL "pkg_config")
  find_program(PKG_CONFIG NAMES pkg-config pkgconf)
  if(NOT PKG_CONFIG)
    message("SKIPPED: no pkg-config")
    return()
  endif()
  file(GLOB_RECURSE pc_dir ${prefix}/softmaxlib.pc)
  get_filename_component(pc_dir ${pc_dir} DIRECTORY)
  pkg_config(lib_dir --variable=libdir)
  pkg_config(shared --cflags --libs)
  pkg_config(static --cflags --static --libs)
  pkg_config(archive --cflags)
  list(APPEND shared -Wl,-rpath,${lib_dir})
  list(APPEND static -static)
  list(APPEND archive ${lib_dir}/libsoftmaxlib.a -lstdc++ -lm -pthread)
  set(warnings -Wall -Wextra -Wpedantic -Werror)
  foreach(kind shared static archive)
    run(${C_COMPILER} -std=c11 ${warnings} ${SOURCE}/tests/c/smoke.c ${${kind}} -lm
      -o ${WORK}/smoke_c_${kind})
    run(${CXX_COMPILER} -std=c++17 ${warnings} ${SOURCE}/tests/install/cpp/smoke.cpp ${${kind}}
      -o ${WORK}/smoke_cpp_${kind})
    run(${WORK}/smoke_c_${kind})
    run(${WORK}/smoke_cpp_${kind})
  endforeach()
else()
  file(REMOVE_RECURSE ${WORK}/${HOW})
  build_project(${HOW} -DCMAKE_PREFIX_PATH=${prefix})
endif()
