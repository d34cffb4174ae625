add_library(lexico_warnings INTERFACE)
target_compile_options(lexico_warnings INTERFACE
  $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra -Wshadow -Wconversion>
  $<$<AND:$<COMPILE_LANGUAGE:CXX>,$<CXX_COMPILER_ID:GNU>>:-Wno-restrict>  # wrong about std::string in GCC 12 (bug 105651)
  $<$<AND:$<COMPILE_LANGUAGE:CXX>,$<BOOL:${LEXICO_WERROR}>>:-Werror>
  $<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wall,-Wextra>
  $<$<AND:$<COMPILE_LANGUAGE:CUDA>,$<BOOL:${LEXICO_WERROR}>>:-Werror=all-warnings>)

# lexico_add_test(lib/tokenizer LIBS lexico_text [LABELS slow] [SLOW_CASES *Long*])
# builds tests/lib/tokenizer_test.cpp and registers its cases as lib/tokenizer.*; those that SLOW_CASES names are labelled slow.
# Every test gets the repository and the build as LEXICO_SOURCE_DIR and LEXICO_BINARY_DIR.
function(lexico_add_test name)
  cmake_parse_arguments(arg "" "SLOW_CASES" "LIBS;LABELS" ${ARGN})
  if(NOT EXISTS ${PROJECT_SOURCE_DIR}/tests/${name}_test.cpp)
    message(FATAL_ERROR "tests/${name}_test.cpp is listed and not there")
  endif()
  string(REPLACE "/" "_" target "test_${name}")
  add_executable(${target} ${PROJECT_SOURCE_DIR}/tests/${name}_test.cpp)
  target_link_libraries(${target} PRIVATE ${arg_LIBS} lexico_warnings GTest::gtest_main)
  target_include_directories(${target} PRIVATE ${PROJECT_SOURCE_DIR}/tests)
  target_compile_definitions(${target} PRIVATE
    LEXICO_SOURCE_DIR="${PROJECT_SOURCE_DIR}" LEXICO_BINARY_DIR="${PROJECT_BINARY_DIR}")
  lexico_discover_tests(${target} "${name}." "${arg_SLOW_CASES}" "${arg_LABELS}")
endfunction()

# Registers the cases of a program; those that the filter `slow_cases` names, if any, are labelled slow.
function(lexico_discover_tests target prefix slow_cases labels)
  if(slow_cases)
    gtest_discover_tests(${target} TEST_PREFIX "${prefix}" TEST_FILTER "${slow_cases}" DISCOVERY_TIMEOUT 60 DISCOVERY_MODE PRE_TEST
      PROPERTIES LABELS slow)
    set(fast TEST_FILTER "-${slow_cases}")
  endif()
  gtest_discover_tests(${target} TEST_PREFIX "${prefix}" ${fast} DISCOVERY_TIMEOUT 60 DISCOVERY_MODE PRE_TEST
    PROPERTIES LABELS "${labels}")
endfunction()

# The Python of scripts/setup, or the system's; as a last resort a command that says it is missing and exits with 77 (skipped).
function(lexico_find_python result)
  set(python "${PROJECT_SOURCE_DIR}/.venv/bin/python")
  if(NOT EXISTS "${python}")
    find_package(Python3 COMPONENTS Interpreter QUIET)
    set(python "${Python3_EXECUTABLE}")
  endif()
  if(NOT python)
    set(python sh -c "echo 'skipped: no Python 3; run scripts/setup'; exit 77" sh)
  endif()
  set(${result} "${python}" PARENT_SCOPE)
endfunction()

# lexico_add_python_test(apps/train/journeys [WITH_SLOW] [LABELS slow]) runs tests/apps/train/journeys_test.py with pytest;
# it finds the programs in the folder LEXICO_BIN. WITH_SLOW: its cases marked pytest.mark.slow are a test of their own,
# apps/train/journeys_slow. Skipped, and said so, where Python or a package is missing.
function(lexico_add_python_test name)
  cmake_parse_arguments(arg "WITH_SLOW" "" "LABELS" ${ARGN})
  lexico_find_python(python)
  set(run ${python} ${PROJECT_SOURCE_DIR}/tests/support/run_pytest.py ${PROJECT_SOURCE_DIR}/tests/${name}_test.py)
  if(arg_WITH_SLOW)
    add_test(NAME ${name} COMMAND ${run} -m "not slow")
    add_test(NAME ${name}_slow COMMAND ${run} -m slow)
    set_tests_properties(${name}_slow PROPERTIES LABELS slow)
    set(slow ${name}_slow)
  else()
    add_test(NAME ${name} COMMAND ${run})
    set_tests_properties(${name} PROPERTIES LABELS "${arg_LABELS}")
  endif()
  set_tests_properties(${name} ${slow} PROPERTIES SKIP_RETURN_CODE 77 TIMEOUT 900
    ENVIRONMENT "LEXICO_BIN=${CMAKE_RUNTIME_OUTPUT_DIRECTORY}")
endfunction()
