// What every program does around its own work: exit codes, signals, the log, progress.
#include "common/program.h"

#include <spdlog/sinks/stdout_color_sinks.h>
#include <spdlog/spdlog.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <ctime>
#include <filesystem>
#include <iostream>
#include <new>

#include "lexico/error.h"

namespace lexico::apps {
namespace {

std::atomic<int> stop_signals{0};

extern "C" void on_stop_signal(int signal) {
  if (stop_signals.fetch_add(1) > 0 && signal == SIGINT) _exit(130);
}

spdlog::logger& logger() {
  static const auto instance = [] {
    auto log = spdlog::stderr_color_mt("lexico");
    log->set_pattern("%^[%H:%M:%S]%$ %v");
    return log;
  }();
  return *instance;
}

std::string printed(const char* format, double value) {
  char text[64];
  std::snprintf(text, sizeof text, format, value);
  return text;
}

/// "rank 1 of 4: ", where this process is not the one that speaks.
std::string& speaker() {
  static std::string name;
  return name;
}

int report(const char* name, const char* what, int code) {
  std::cerr << name << ": " << speaker() << what << std::endl;
  return code;
}

}  // namespace

int run_program(const char* name, const std::function<int()>& body) {
  std::signal(SIGPIPE, SIG_IGN);  // a closed pipe becomes a write error with a message
  try {
    const int code = body();
    std::cout.flush();
    if (!std::cout) return report(name, "cannot write the result to standard output", 4);
    return code;
  } catch (const InvalidArgument& e) {
    return report(name, e.what(), 2);
  } catch (const IoError& e) {
    return report(name, e.what(), 3);
  } catch (const ResourceError& e) {
    return report(name, e.what(), 4);
  } catch (const Interrupted& e) {
    return report(name, e.what(), 75);
  } catch (const std::bad_alloc&) {
    return report(name, "out of memory; smaller --threads, batches or --max-vectors need less", 4);
  } catch (const std::exception& e) {
    return report(name, (std::string("internal error: ") + e.what()).c_str(), 1);
  }
}

void watch_stop_signals() {
  struct sigaction action {};
  action.sa_handler = on_stop_signal;
  sigemptyset(&action.sa_mask);
  action.sa_flags = SA_RESTART;
  for (int signal : {SIGINT, SIGTERM, SIGUSR1}) sigaction(signal, &action, nullptr);
}

bool stop_requested() { return stop_signals.load() > 0; }

std::string typed_command(int argc, char** argv, std::initializer_list<const char*> without) {
  std::string text;
  for (int i = 0; i < argc; ++i) {
    const std::string word = argv[i];
    if (std::find(without.begin(), without.end(), word) != without.end()) continue;
    const bool plain =
        !word.empty() && word.find_first_of(" \t\r\n'\"\\$*?[]&;|<>()`!#~{}") == std::string::npos;
    std::string quoted = "'";
    for (const char c : word) quoted += c == '\'' ? std::string("'\\''") : std::string(1, c);
    text += (i > 0 ? " " : "") + (plain ? word : quoted + "'");
  }
  return text;
}

std::string utc_time() {
  char text[32];
  const std::time_t now = std::time(nullptr);
  std::strftime(text, sizeof text, "%Y-%m-%d %H:%M:%S UTC", std::gmtime(&now));
  return text;
}

std::int64_t free_bytes(const std::string& path) {
  namespace fs = std::filesystem;
  std::error_code error;
  fs::path place = fs::absolute(path, error);
  while (!place.empty() && !fs::exists(place, error) && place != place.parent_path())
    place = place.parent_path();
  const fs::space_info space = fs::space(place, error);
  return error ? -1 : static_cast<std::int64_t>(space.available);
}

void speak_as_rank(int rank, int num_ranks) {
  logger().set_level(spdlog::level::warn);
  speaker() = "rank " + std::to_string(rank) + " of " + std::to_string(num_ranks) + ": ";
  logger().set_pattern("%^[%H:%M:%S]%$ " + speaker() + "%v");
}

void log_info(const std::string& line) { logger().info(line); }
void log_warning(const std::string& line) { logger().warn("warning: " + line); }

std::string format_count(double count) {
  if (count < 1e3) return printed("%.0f", count);
  if (count < 1e6) return printed("%.3gk", count / 1e3);
  if (count < 1e9) return printed("%.3gM", count / 1e6);
  return printed("%.3gG", count / 1e9);
}

std::string format_bytes(double bytes) {
  if (bytes < 1e3) return printed("%.0f B", bytes);
  if (bytes < 1e6) return printed("%.1f kB", bytes / 1e3);
  if (bytes < 1e9) return printed("%.1f MB", bytes / 1e6);
  if (bytes < 1e12) return printed("%.1f GB", bytes / 1e9);
  return printed("%.2f TB", bytes / 1e12);
}

std::string format_duration(double seconds) {
  char text[64];
  const long whole = std::lround(seconds);
  if (seconds < 60)
    std::snprintf(text, sizeof text, "%.1f s", seconds);
  else if (whole < 3600)
    std::snprintf(text, sizeof text, "%ld min %02ld s", whole / 60, whole % 60);
  else
    std::snprintf(text, sizeof text, "%ld h %02ld min", whole / 3600, whole % 3600 / 60);
  return text;
}

Progress::Progress(std::string title, double total, std::string unit)
    : title_(std::move(title)),
      unit_(std::move(unit)),
      total_(total),
      is_terminal_(isatty(STDERR_FILENO) == 1 && logger().should_log(spdlog::level::info)),
      begin_(Clock::now()),
      last_draw_(begin_) {}

Progress::~Progress() {
  if (line_open_) std::fputc('\n', stderr);
}

double Progress::seconds() const {
  return std::chrono::duration<double>(Clock::now() - begin_).count();
}

void Progress::update(double done, const std::string& detail) {
  const double since = std::chrono::duration<double>(Clock::now() - last_draw_).count();
  const bool finished = done >= total_;
  if (since < (is_terminal_ ? 0.2 : 30.0) && !(finished && is_terminal_)) return;
  last_draw_ = Clock::now();
  draw(done, detail);
}

void Progress::draw(double done, const std::string& detail) {
  const double rate = (done - start_) / std::max(seconds(), 1e-9);
  std::string line = title_ + printed(" %5.1f %%", 100.0 * done / std::max(total_, 1.0)) + "  " +
                     format_count(done) + "/" + format_count(total_) + " " + unit_ + "  " +
                     format_count(rate) + "/s";
  if (rate > 0 && done < total_) line += "  " + format_duration((total_ - done) / rate) + " left";
  if (!detail.empty()) line += "  " + detail;
  if (!is_terminal_) {
    log_info(line);
    return;
  }
  std::fprintf(stderr, "\r%s\033[K", line.c_str());
  std::fflush(stderr);
  line_open_ = true;
}

}  // namespace lexico::apps
