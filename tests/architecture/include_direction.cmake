# Fails when a source includes what its layer may not. Run: cmake -DROOT=. -P include_direction.cmake
set(apps_only "CLI/|yaml-cpp/|spdlog/")
set(torch "torch/|ATen/|c10/")
set(rules  # folder | what it must not include
  "kernels|lexico/|${torch}|hdf5|H5|nlohmann/|${apps_only}"
  "lib/include|kernels/|${torch}|hdf5|H5|cuda|nlohmann/|${apps_only}"
  "lib/src/core|${torch}|hdf5|H5|${apps_only}|cuda_runtime"
  "lib/src/text|${torch}|hdf5|H5|${apps_only}|cuda_runtime"
  "lib/src/store|${torch}|${apps_only}|cuda_runtime"
  "lib/src/model|hdf5|H5|${apps_only}|cuda_runtime"
  "lib/src/training|hdf5|H5|${apps_only}|cuda_runtime"
  "apps|kernels/|${torch}|hdf5|H5|cuda"
  "examples/consumer|kernels/|${torch}|hdf5|H5|cuda|nlohmann/|${apps_only}"
  "examples|kernels/|${torch}|hdf5|H5|cuda")
set(broken "")
foreach(rule IN LISTS rules)
  string(REGEX MATCH "^([^|]*)\\|(.*)$" _ "${rule}")
  set(folder ${CMAKE_MATCH_1})
  set(forbidden ${CMAKE_MATCH_2})
  file(GLOB_RECURSE files ${ROOT}/${folder}/*.h ${ROOT}/${folder}/*.cpp ${ROOT}/${folder}/*.cu ${ROOT}/${folder}/*.cuh)
  foreach(file IN LISTS files)
    file(STRINGS ${file} includes REGEX "^#include [<\"](${forbidden})")
    foreach(include IN LISTS includes)
      list(APPEND broken "${file}: ${include}")
    endforeach()
  endforeach()
endforeach()
if(broken)
  list(JOIN broken "\n  " text)
  message(FATAL_ERROR "includes against the layer order:\n  ${text}")
endif()
