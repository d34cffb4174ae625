#pragma once

#include <string>

namespace lexico::apps {

/// The folder of the report, found wanting before the work rather than after it. One that was made
/// here and is still empty in the end goes away again.
class OutputFolder {
 public:
  /// @throws InvalidArgument if it holds a report and `overwrite` is false, or is a file;
  ///         ResourceError if nothing can be written there.
  OutputFolder(const std::string& path, bool overwrite);
  ~OutputFolder();
  OutputFolder(const OutputFolder&) = delete;
  OutputFolder& operator=(const OutputFolder&) = delete;

 private:
  std::string path_;
  bool made_ = false;
};

}  // namespace lexico::apps
