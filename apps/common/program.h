#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <string>

namespace lexico::apps {

/// Runs `body` and turns what it throws into one line on stderr and the exit code of docs/cli.md:
/// 0 done, 1 bug, 2 usage or config, 3 input that does not fit, 4 no space or memory, 75
/// interrupted but resumable.
int run_program(const char* name, const std::function<int()>& body);

/// Ctrl-C, SIGTERM and SIGUSR1 only raise a flag from now on; a second Ctrl-C ends the process at
/// once with 130.
void watch_stop_signals();
bool stop_requested();

/// The command as the user could type it again, less the words in `without`.
std::string typed_command(int argc, char** argv, std::initializer_list<const char*> without = {});
std::string utc_time();  ///< now: "2026-01-31 12:00:00 UTC"

/// Free bytes where `path` is or will be, whether or not it and its folders exist yet; -1: unknown.
std::int64_t free_bytes(const std::string& path);

/// Only warnings and errors are said from now on, in the name of this rank: another one speaks for
/// all.
void speak_as_rank(int rank, int num_ranks);

/// A line to stderr with the time: what is going on, and what the user should know about.
void log_info(const std::string& line);
void log_warning(const std::string& line);

std::string format_count(double count);       ///< 950, 12.3k, 4.50M
std::string format_bytes(double bytes);       ///< 512 B, 12.3 MB (powers of 1000)
std::string format_duration(double seconds);  ///< 4.2 s, 3 min 05 s, 2 h 10 min

/// Progress of one long loop on stderr: a line redrawn at most 5 times a second on a terminal, a
/// plain line every 30 s elsewhere, with rate and time left.
class Progress {
 public:
  Progress(std::string title, double total, std::string unit);
  ~Progress();  ///< ends the line on a terminal
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  /// @param done  of the total, in its unit.  @param detail  appended to the line, e.g.
  /// "rel_err=0.21".
  void update(double done, const std::string& detail = {});
  /// Work done before this process began (a resumed run): it does not count for the rate.
  void start_from(double done) { start_ = done; }
  double seconds() const;

 private:
  using Clock = std::chrono::steady_clock;
  void draw(double done, const std::string& detail);

  std::string title_, unit_;
  double total_ = 0, start_ = 0;
  bool is_terminal_ = false, line_open_ = false;
  Clock::time_point begin_, last_draw_;
};

}  // namespace lexico::apps
