// Ranks of one job: who is who, and who is still there. All that they share is a folder.
#include "common/ranks.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <optional>
#include <vector>

#include "common/options.h"
#include "common/program.h"
#include "lexico/error.h"

namespace lexico::apps {
namespace {

using Clock = std::chrono::steady_clock;

struct Launcher {
  const char *name, *rank, *size;
};
constexpr Launcher kLaunchers[] = {
    {"torchrun", "RANK", "WORLD_SIZE"},
    {"srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"},
    {"mpirun", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"},
    {"mpirun", "PMI_RANK", "PMI_SIZE"},
};

int whole_number(const char* variable) {
  int value = 0;
  try {
    parse_value(std::getenv(variable), value);
  } catch (const InvalidArgument& e) {
    throw InvalidArgument(std::string("environment variable ") + variable + " " + e.what());
  }
  return value;
}

Ranks checked(Ranks ranks) {
  if (ranks.size < 1 || ranks.rank < 0 || ranks.rank >= ranks.size)
    throw InvalidArgument("rank is " + std::to_string(ranks.rank) + " of " +
                          std::to_string(ranks.size) + " (" + ranks.source +
                          "), must be in [0, number of ranks)");
  return ranks;
}

std::string alive_file(const std::string& folder, int rank) {
  char name[40];
  std::snprintf(name, sizeof name, "/.rank-%05d.alive", rank);
  return folder + name;
}

/// Anything that changes while a rank lives; nothing if there is no file.
std::optional<std::string> sign_in(const std::string& path) {
  // Opening it first makes network file systems look again.
  const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (file < 0) return {};
  char text[64] = {};
  const ssize_t length = read(file, text, sizeof text - 1);
  close(file);
  return std::string(text, static_cast<std::size_t>(length > 0 ? length : 0));
}

/// What the leading rank knows of another.
struct Heard {
  std::optional<std::string> sign;
  Clock::time_point when = Clock::now();
  bool ever = false, gone = false, done = false;
  std::string why;
};

}  // namespace

Ranks RankConfig::resolve() const {
  if (!(rank_timeout > 0))
    throw InvalidArgument("rank_timeout is " + value_text(rank_timeout) + ", must be > 0");
  if (num_ranks < 0)
    throw InvalidArgument("num_ranks is " + std::to_string(num_ranks) + ", must be >= 0");
  if (num_ranks > 0 || rank >= 0) {
    if (num_ranks == 0 || rank < 0)
      throw InvalidArgument("--rank and --num-ranks go together: one of them is missing");
    return checked({rank, num_ranks, "--rank and --num-ranks"});
  }
  for (const Launcher& launcher : kLaunchers)
    if (std::getenv(launcher.rank) != nullptr && std::getenv(launcher.size) != nullptr)
      return checked({whole_number(launcher.rank),
                      whole_number(launcher.size),
                      std::string(launcher.name) + ": " + launcher.rank + ", " + launcher.size});
  return {};
}

SignOfLife::SignOfLife(const std::string& folder, const Ranks& ranks) {
  if (!ranks.many()) return;
  path_ = alive_file(folder, ranks.rank);
  thread_ = std::thread([this] {
    std::unique_lock lock(mutex_);
    for (long beat = 0; !stopping_; ++beat) {
      const int file = open(path_.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
      if (file >= 0) {  // a disk that is full for a moment is no death
        char text[64];
        const int length =
            std::snprintf(text, sizeof text, "%ld %ld\n", static_cast<long>(getpid()), beat);
        if (write(file, text, static_cast<std::size_t>(length)) < 0) { /* heard at the next beat */
        }
        close(file);
      }
      stop_.wait_for(lock, std::chrono::seconds(1));
    }
  });
}

SignOfLife::~SignOfLife() {
  if (!thread_.joinable()) return;
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  stop_.notify_all();
  thread_.join();
  unlink(path_.c_str());
}

void wait_for_ranks(const std::string& folder,
                    const Ranks& ranks,
                    double timeout,
                    const std::function<std::string(int rank)>& missing) {
  std::vector<Heard> all(static_cast<std::size_t>(ranks.size));
  bool said = false;
  for (;;) {
    int waiting = 0;
    for (int rank = 1; rank < ranks.size; ++rank) {
      Heard& heard = all[static_cast<std::size_t>(rank)];
      if (heard.done || heard.gone) continue;
      const std::optional<std::string> sign = sign_in(alive_file(folder, rank));
      heard.why = missing(rank);  // after the sign: a rank that ended in between has done its work
      if (heard.why.empty()) {
        heard.done = true;
        continue;
      }
      if (sign != heard.sign) {
        heard.ever |=
            sign.has_value() && heard.sign.has_value();  // it changed: not one from an earlier run
        heard.sign = sign;
        heard.when = Clock::now();
      }
      const double silence = std::chrono::duration<double>(Clock::now() - heard.when).count();
      heard.gone = silence > timeout || (heard.ever && !sign && silence > 2);
      waiting += !heard.gone;
    }
    if (waiting == 0) break;
    if (stop_requested())
      throw Interrupted("stopped while waiting for the other ranks; --resume goes on");
    if (!said)
      log_info("done with the own part; waiting for " + std::to_string(waiting) + " other ranks");
    said = true;
    std::this_thread::sleep_for(std::chrono::milliseconds(200));
  }
  std::string lost;
  for (int rank = 1; rank < ranks.size; ++rank) {
    const Heard& heard = all[static_cast<std::size_t>(rank)];
    if (heard.gone)
      lost += (lost.empty() ? "rank " : "; rank ") + std::to_string(rank) + " of " +
              std::to_string(ranks.size) + (heard.ever ? " is gone" : " was never heard of") +
              ", missing: " + heard.why;
    unlink(alive_file(folder, rank).c_str());
  }
  if (!lost.empty()) throw Interrupted(lost + ". The same command with --resume goes on");
}

}  // namespace lexico::apps
