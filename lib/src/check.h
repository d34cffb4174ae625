#pragma once

#include <sstream>

#include "kernels/common/status.h"
#include "lexico/error.h"

// The one place a broken precondition or a failed kernel becomes an exception.
namespace lexico::detail {

template <typename... Parts>
[[noreturn]] void throw_invalid(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw InvalidArgument(message.str());
}

inline void throw_if_failed(kernels::Status status, const char* doing) {
  if (!status.ok()) throw ResourceError(std::string(doing) + ": " + status.what);
}

}  // namespace lexico::detail
