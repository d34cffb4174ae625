# The core library for find_package(lexico): cmake --install BUILD --component lexico --prefix PREFIX
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)
set(package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/lexico)
set_target_properties(lexico_kernels PROPERTIES EXPORT_NAME kernels)
install(TARGETS lexico lexico_kernels EXPORT lexico_targets COMPONENT lexico
  FILE_SET HEADERS DESTINATION ${CMAKE_INSTALL_INCLUDEDIR} COMPONENT lexico)
install(EXPORT lexico_targets FILE lexicoTargets.cmake NAMESPACE lexico:: DESTINATION ${package_dir} COMPONENT lexico)
configure_package_config_file(${CMAKE_CURRENT_LIST_DIR}/lexicoConfig.cmake.in ${PROJECT_BINARY_DIR}/lexicoConfig.cmake
  INSTALL_DESTINATION ${package_dir})
write_basic_package_version_file(${PROJECT_BINARY_DIR}/lexicoConfigVersion.cmake COMPATIBILITY SameMinorVersion)  # until 1.0
install(FILES ${PROJECT_BINARY_DIR}/lexicoConfig.cmake ${PROJECT_BINARY_DIR}/lexicoConfigVersion.cmake
  DESTINATION ${package_dir} COMPONENT lexico)
