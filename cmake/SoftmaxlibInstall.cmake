# cmake --install: header, library and find_package(softmaxlib).
include(CMakePackageConfigHelpers)

set(softmaxlib_cmake_dir ${CMAKE_INSTALL_LIBDIR}/cmake/softmaxlib)
install(TARGETS softmaxlib EXPORT softmaxlib-targets
  RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR}
  LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR}
  ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR})
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
