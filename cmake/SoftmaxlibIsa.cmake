# softmaxlib_add_isa(name feature...): compiles every kernel once for an ISA. The same list of
# features gives the compile flags and the check at run time, so that neither can be wider.
set(softmaxlib_isa_entries "")

function(softmaxlib_add_isa name)
  set(SOFTMAX_ISA ${name})
  string(TOUPPER ${name} SOFTMAX_ISA_UPPER)
  set(unit ${CMAKE_CURRENT_BINARY_DIR}/isa_${name}.cpp)
  configure_file(isa/unit.cpp.in ${unit} @ONLY)
  target_sources(softmaxlib_objects PRIVATE ${unit})
  if(MSVC)
    set(flags "")
    if(name STREQUAL "avx512")
      set(flags /arch:AVX512)
    elseif(name STREQUAL "avx2")
      set(flags /arch:AVX2)
    endif()
  else()
    set(flags ${ARGN})
    list(TRANSFORM flags PREPEND "-m")
    if(NOT ARGN AND softmaxlib_isa_entries)
      # CPUs that have none of the other ISAs are rare, and slow without fma anyhow: what counts of
      # the code for them is its size, which this halves.
      list(APPEND flags $<$<CONFIG:Release>:-Os>)
    endif()
    if(ARGN AND CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
      # The hot loops want their short inner loops unrolled, and nothing else that -O3 adds, which
      # makes the code larger. bench/ports.py compiles likewise and shows what the loops take.
      list(APPEND flags $<$<CONFIG:Release>:-O2> $<$<CONFIG:Release>:-fpeel-loops>)
      # What would only make the code larger is off: loops over the 16 lanes of a vector of floats,
      # which run once per batch, stay loops; and of what is jumped to or called only loops are
      # aligned.
      list(APPEND flags $<$<CONFIG:Release>:--param=max-completely-peel-times=8>
           $<$<CONFIG:Release>:-fno-align-jumps> $<$<CONFIG:Release>:-fno-align-labels>
           $<$<CONFIG:Release>:-falign-functions=1>)
      # Structs of vectors are copied as they are stored, in whole vectors: a load waits long for two
      # stores that it spans, and GCC's own choice is pieces of 16 bytes.
      if(CMAKE_CXX_COMPILER_VERSION VERSION_GREATER_EQUAL 12)
        set(vector_bits 256)
        if(name STREQUAL "avx512")
          set(vector_bits 512)
        endif()
        list(APPEND flags -mmove-max=${vector_bits} -mstore-max=${vector_bits})
      endif()
    endif()
    list(APPEND flags -fno-exceptions)  # the personality routine would be a weak symbol
    if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND name STREQUAL "avx512")
      # GCC's own AVX-512 headers (bug 105593).
      list(APPEND flags -Wno-uninitialized -Wno-maybe-uninitialized)
    endif()
  endif()
  set_source_files_properties(${unit} PROPERTIES COMPILE_OPTIONS "${flags}")
  set(bits "0")
  foreach(feature ${ARGN})
    string(APPEND bits " | kCpu_${feature}")
  endforeach()
  set(softmaxlib_isa_entries
    "${softmaxlib_isa_entries}SOFTMAXLIB_ISA_ENTRY(${name}, SOFTMAXLIB_ISA_${SOFTMAX_ISA_UPPER}, ${bits})\n"
    PARENT_SCOPE)
endfunction()

# The ordered list of ISAs that dispatch.cpp includes.
function(softmaxlib_write_isa_list)
  file(GENERATE OUTPUT ${CMAKE_CURRENT_BINARY_DIR}/generated/isas.def
       CONTENT "${softmaxlib_isa_entries}")
  target_include_directories(softmaxlib_objects PRIVATE ${CMAKE_CURRENT_BINARY_DIR}/generated)
endfunction()
