#pragma once

#include <stdexcept>

namespace lexico {

/// Base of everything this library throws on purpose. The programs turn each kind into an exit
/// code.
class Error : public std::runtime_error {
  using std::runtime_error::runtime_error;
};
/// The caller broke a documented precondition; the message names the value and the bound. (exit
/// code 2)
class InvalidArgument : public Error {
  using Error::Error;
};
/// A file is missing, unreadable, damaged, not in the documented format, or does not fit the
/// others; the message names it. (exit code 3)
class IoError : public Error {
  using Error::Error;
};
/// No space, no permission to write, or not enough memory, on the host or the device. (exit code 4)
class ResourceError : public Error {
  using Error::Error;
};
/// A stop was asked for (Ctrl-C, SIGTERM); finished work is kept. (exit code 75)
class Interrupted : public Error {
  using Error::Error;
};

}  // namespace lexico
