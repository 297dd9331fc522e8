# What add_subdirectory(softmaxlib) may change for the project around it: nothing but variables named
# after it, and what CMake itself keeps of project() and of looking for threads.
macro(remember_variables)
  get_cmake_property(variables_before VARIABLES)
  foreach(variable IN LISTS variables_before)
    set(was_${variable} "${${variable}}")
  endforeach()
endmacro()

macro(expect_no_changes)
  get_cmake_property(variables_after VARIABLES)
  list(FILTER variables_after EXCLUDE REGEX
    "^(softmaxlib_|SOFTMAXLIB_|was_|variables?(_|$)|CMAKE_HAVE_|FIND_PACKAGE_MESSAGE_DETAILS_Threads)")
  foreach(variable IN LISTS variables_after)
    if(NOT DEFINED was_${variable})
      message(SEND_ERROR "softmaxlib sets ${variable} to ${${variable}}")
    elseif(NOT "${${variable}}" STREQUAL "${was_${variable}}")
      message(SEND_ERROR "softmaxlib changes ${variable} from ${was_${variable}} to ${${variable}}")
    endif()
  endforeach()
endmacro()
