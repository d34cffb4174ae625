add_library(lexico_warnings INTERFACE)
target_compile_options(lexico_warnings INTERFACE
  $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra -Wshadow -Wconversion>
  $<$<AND:$<COMPILE_LANGUAGE:CXX>,$<CXX_COMPILER_ID:GNU>>:-Wno-restrict>  # wrong about std::string in GCC 12 (bug 105651)
  $<$<AND:$<COMPILE_LANGUAGE:CXX>,$<BOOL:${LEXICO_WERROR}>>:-Werror>
  $<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wall,-Wextra>
  $<$<AND:$<COMPILE_LANGUAGE:CUDA>,$<BOOL:${LEXICO_WERROR}>>:-Werror=all-warnings>)

# lexico_add_test(lib/tokenizer LIBS lexico_text [LABELS slow])
# builds tests/lib/tokenizer_test.cpp and registers its cases as lib/tokenizer.*
# Every test gets the repository and the build as LEXICO_SOURCE_DIR and LEXICO_BINARY_DIR.
function(lexico_add_test name)
  cmake_parse_arguments(arg "" "" "LIBS;LABELS" ${ARGN})
  string(REPLACE "/" "_" target "test_${name}")
  add_executable(${target} ${PROJECT_SOURCE_DIR}/tests/${name}_test.cpp)
  target_link_libraries(${target} PRIVATE ${arg_LIBS} lexico_warnings GTest::gtest_main)
  target_include_directories(${target} PRIVATE ${PROJECT_SOURCE_DIR}/tests)
  target_compile_definitions(${target} PRIVATE
    LEXICO_SOURCE_DIR="${PROJECT_SOURCE_DIR}" LEXICO_BINARY_DIR="${PROJECT_BINARY_DIR}")
  gtest_discover_tests(${target} TEST_PREFIX "${name}." DISCOVERY_TIMEOUT 60 DISCOVERY_MODE PRE_TEST
    PROPERTIES LABELS "${arg_LABELS}")
endfunction()
