# cmake --install: header, both libraries, find_package(softmaxlib), pkg-config. In a wheel all of
# it is inside the Python package.
include(CMakePackageConfigHelpers)
if(SOFTMAXLIB_BUILD_PYTHON)
  set(CMAKE_INSTALL_LIBDIR softmaxlib/lib)
  set(CMAKE_INSTALL_BINDIR softmaxlib)  # where Windows looks for what a module beside it needs
  set(CMAKE_INSTALL_INCLUDEDIR softmaxlib/include)
endif()
include(GNUInstallDirs)

list(TRANSFORM softmaxlib_kinds REPLACE "(.+)" "set(softmaxlib_\\1_FOUND TRUE)"
  OUTPUT_VARIABLE softmaxlib_found)
list(JOIN softmaxlib_found "\n" softmaxlib_found)
set(softmaxlib_cmake_dir ${CMAKE_INSTALL_LIBDIR}/cmake/softmaxlib)
list(TRANSFORM softmaxlib_kinds PREPEND softmaxlib_ OUTPUT_VARIABLE softmaxlib_libraries)
install(TARGETS ${softmaxlib_libraries} EXPORT softmaxlib-targets
  RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR}
  LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR}
  ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR}
  INCLUDES DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(DIRECTORY csrc/include/softmaxlib DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(EXPORT softmaxlib-targets NAMESPACE softmaxlib:: DESTINATION ${softmaxlib_cmake_dir})
configure_package_config_file(cmake/softmaxlib-config.cmake.in
  ${CMAKE_CURRENT_BINARY_DIR}/softmaxlib-config.cmake INSTALL_DESTINATION ${softmaxlib_cmake_dir})
write_basic_package_version_file(${CMAKE_CURRENT_BINARY_DIR}/softmaxlib-config-version.cmake
  COMPATIBILITY SameMinorVersion)
install(FILES
  ${CMAKE_CURRENT_BINARY_DIR}/softmaxlib-config.cmake
  ${CMAKE_CURRENT_BINARY_DIR}/softmaxlib-config-version.cmake
  DESTINATION ${softmaxlib_cmake_dir})

# Paths from the file itself, so that the prefix can be moved.
set(softmaxlib_pc_dir ${CMAKE_INSTALL_FULL_LIBDIR}/pkgconfig)
file(RELATIVE_PATH softmaxlib_includedir ${softmaxlib_pc_dir} ${CMAKE_INSTALL_FULL_INCLUDEDIR})
list(TRANSFORM softmaxlib_runtime PREPEND "-l" OUTPUT_VARIABLE softmaxlib_libs_private)
list(JOIN softmaxlib_libs_private " " softmaxlib_libs_private)
configure_file(cmake/softmaxlib.pc.in ${CMAKE_CURRENT_BINARY_DIR}/softmaxlib.pc @ONLY)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/softmaxlib.pc
  DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig)
