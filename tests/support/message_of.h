#pragma once

#include <gtest/gtest.h>

#include <string>

namespace lexico::test {

/// What `action` throws, as text; a failure if it throws nothing.
template <typename Exception, typename Action>
std::string message_of(Action&& action) {
  try {
    action();
  } catch (const Exception& error) {
    return error.what();
  }
  ADD_FAILURE() << "nothing was thrown";
  return {};
}

}  // namespace lexico::test
