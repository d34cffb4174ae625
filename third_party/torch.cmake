# libtorch as one imported target, lexico_torch. find_package(Torch) is not used: with CMake 3.25 and nvcc 13 it
# fails on a CUDA test program, and otherwise it overrides CMAKE_CUDA_ARCHITECTURES.
# Looked for in LEXICO_TORCH_ROOT, Torch_DIR, the Python that runs pip (if it does), then the virtual environment that
# scripts/setup makes.
set(LEXICO_TORCH_ROOT "" CACHE PATH "A libtorch: the folder that holds include/ and lib/")
set(torch_root "${LEXICO_TORCH_ROOT}")
if(NOT torch_root AND DEFINED ENV{LEXICO_TORCH_ROOT})
  set(torch_root "$ENV{LEXICO_TORCH_ROOT}")
endif()
if(NOT torch_root AND Torch_DIR)
  get_filename_component(torch_root "${Torch_DIR}/../../.." ABSOLUTE)  # <root>/share/cmake/Torch
endif()
if(NOT torch_root AND SKBUILD)
  # pip's isolated builds hide the packages of the environment, but not their folder.
  execute_process(COMMAND ${Python3_EXECUTABLE} -c "import importlib.util, sysconfig
torch = importlib.util.find_spec('torch')
print(torch.submodule_search_locations[0] if torch else sysconfig.get_path('purelib') + '/torch')"
                  OUTPUT_VARIABLE torch_root OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
endif()
if(NOT torch_root)
  file(GLOB torch_in_venv ${PROJECT_SOURCE_DIR}/.venv/lib/python3*/site-packages/torch)
  list(POP_BACK torch_in_venv torch_root)
endif()
if(NOT EXISTS "${torch_root}/lib/libtorch_cpu.so")
  message(FATAL_ERROR "libtorch not found (looked in '${torch_root}'). Run scripts/setup, or set LEXICO_TORCH_ROOT "
                      "to a folder with include/ and lib/libtorch_cpu.so, or configure with -DLEXICO_BUILD_APPS=OFF.")
endif()
message(STATUS "lexico: libtorch ${torch_root}")

# By name, not by path: by path CMake sets the rpath and warns that libgomp is in two places.
add_library(lexico_torch INTERFACE)
target_include_directories(lexico_torch SYSTEM INTERFACE
  "${torch_root}/include" "${torch_root}/include/torch/csrc/api/include")
target_link_options(lexico_torch INTERFACE -L${torch_root}/lib -Wl,-rpath,${torch_root}/lib)
# libtorch.so exports parts of an older libstdc++ (std::filesystem) that crash with ours: ours must be searched first.
target_link_libraries(lexico_torch INTERFACE
  -Wl,--no-as-needed stdc++ -ltorch -ltorch_cpu -lc10 -Wl,--as-needed  # the CUDA half registers itself
  -Wl,--allow-shlib-undefined)
