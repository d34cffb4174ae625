#include "lexico-eval/output_folder.h"

#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <system_error>

#include "lexico/error.h"

namespace lexico::apps {

namespace fs = std::filesystem;

OutputFolder::OutputFolder(const std::string& path, bool overwrite) : path_(path) {
  std::error_code error;
  const fs::file_status status = fs::status(path, error);
  if (fs::exists(status) && !fs::is_directory(status)) {
    if (fs::is_regular_file(status))
      throw InvalidArgument("output is '" + path + "', which is a file; it must be a folder");
    throw ResourceError(path + ": cannot write a report there: it is not a folder");
  }
  if (!overwrite)
    for (const char* name : {"report.json", "report.csv", "report.html", "cache_effects.csv"})
      if (fs::exists(fs::path(path) / name))
        throw InvalidArgument("output '" + path + "' has a " + name +
                              " already; --overwrite replaces it");
  made_ = fs::create_directories(path, error);
  if (error) throw ResourceError(path + ": cannot make the folder: " + error.message());
  if (::access(path.c_str(), W_OK | X_OK) != 0)
    throw ResourceError(path + ": cannot write there: " + std::strerror(errno));
}

OutputFolder::~OutputFolder() {
  std::error_code ignored;
  if (made_) fs::remove(path_, ignored);  // refuses if it holds anything
}

}  // namespace lexico::apps
