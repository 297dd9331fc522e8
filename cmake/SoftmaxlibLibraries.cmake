# softmaxlib::shared and softmaxlib::static from the same objects; softmaxlib::softmaxlib is the one
# that BUILD_SHARED_LIBS says. A wheel has the shared one alone, for its module and for programs that
# link it. There its file and the version of its symbols have names of their own, so that another
# softmaxlib in a process is not taken for it.
set(softmaxlib_name softmaxlib)
set(softmaxlib_kinds shared static)
set(softmaxlib_preferred static)
set(softmaxlib_other shared)
if(BUILD_SHARED_LIBS OR SOFTMAXLIB_BUILD_PYTHON)
  set(softmaxlib_preferred shared)
  set(softmaxlib_other static)
endif()
if(SOFTMAXLIB_BUILD_PYTHON)
  set(softmaxlib_name softmaxlib_python)
  set(softmaxlib_kinds shared)
endif()

foreach(kind ${softmaxlib_kinds})
  string(TOUPPER ${kind} KIND)
  add_library(softmaxlib_${kind} ${KIND} $<TARGET_OBJECTS:softmaxlib_objects>)
  add_library(softmaxlib::${kind} ALIAS softmaxlib_${kind})
  set_target_properties(softmaxlib_${kind} PROPERTIES
    OUTPUT_NAME ${softmaxlib_name} EXPORT_NAME ${kind} LINKER_LANGUAGE CXX)
  target_include_directories(softmaxlib_${kind} INTERFACE
    $<BUILD_INTERFACE:${CMAKE_CURRENT_SOURCE_DIR}/csrc/include>)
endforeach()
add_library(softmaxlib::softmaxlib ALIAS softmaxlib_${softmaxlib_preferred})
if(NOT SOFTMAXLIB_INSTALL)
  set_target_properties(softmaxlib_${softmaxlib_other} PROPERTIES EXCLUDE_FROM_ALL ON)
endif()

target_compile_definitions(softmaxlib_shared INTERFACE SOFTMAXLIB_SHARED)
target_link_libraries(softmaxlib_shared PRIVATE softmaxlib_flags Threads::Threads)
if(NOT SOFTMAXLIB_BUILD_PYTHON)  # a wheel holds no symbolic links
  # Before 1.0 a minor version may break the ABI, so it is part of the name.
  set_target_properties(softmaxlib_shared PROPERTIES
    VERSION ${PROJECT_VERSION} SOVERSION ${PROJECT_VERSION_MAJOR}.${PROJECT_VERSION_MINOR})
endif()
if(UNIX AND NOT APPLE)
  set(map ${CMAKE_CURRENT_BINARY_DIR}/softmaxlib.map)
  configure_file(cmake/${softmaxlib_name}.map.in ${map} @ONLY)
  target_link_options(softmaxlib_shared PRIVATE LINKER:--version-script=${map})
  set_target_properties(softmaxlib_shared PROPERTIES LINK_DEPENDS ${map})
endif()

# The C++ runtime (of the pool: threads, new), which a C compiler does not link: stdc++ and m.
set(softmaxlib_runtime ${CMAKE_CXX_IMPLICIT_LINK_LIBRARIES})
list(REMOVE_ITEM softmaxlib_runtime "" ${CMAKE_C_IMPLICIT_LINK_LIBRARIES})
if(TARGET softmaxlib_static)
  target_link_libraries(softmaxlib_static PRIVATE Threads::Threads ${softmaxlib_runtime})
  if(MSVC)  # softmaxlib.lib is the import library
    set_target_properties(softmaxlib_static PROPERTIES OUTPUT_NAME softmaxlib_static)
  endif()
endif()
