#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <sstream>
#include <string>

#include "lexico/error.h"
#include "lexico/kind.h"

namespace lexico::store {

/// Says which component of a vector cannot be stored, and why.
/// @param place  of the token: a file or a text.
[[noreturn]] inline void throw_bad_value(const float* vector,
                                         int dim,
                                         bool half,
                                         int layer,
                                         Kind kind,
                                         std::int64_t token,
                                         int head,
                                         const std::string& place) {
  const float* bad = std::find_if(vector, vector + dim, [&](float value) {
    return !(std::fabs(value) < (half ? 65520.0f : std::numeric_limits<float>::infinity()));
  });
  std::ostringstream text;
  text << "the model's " << name_of(kind) << " of layer " << layer << ", token " << token << " of "
       << place << ", head " << head << ", component " << bad - vector << ": " << *bad;
  if (std::isfinite(*bad))
    text << " is beyond float16's range of +-65504: store float32 instead (--dtype float32)";
  else
    text << " is not a finite number";
  throw IoError(text.str());
}

}  // namespace lexico::store
