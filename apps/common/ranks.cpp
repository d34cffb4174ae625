// Ranks of one job: who is who, and who is still there. All that they share is a folder.
#include "common/ranks.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <optional>
#include <random>
#include <sstream>
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
  std::snprintf(name, sizeof name, "/%s%05d.alive", kRankFiles, rank);
  return folder + name;
}

std::string answers_file(const std::string& folder) {
  return folder + "/" + kRankFiles + "answers";
}

/// The text of a small file; nothing if it is not there.
std::optional<std::string> text_of(const std::string& path) {
  // Opening it makes network file systems look again.
  const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (file < 0) return {};
  std::string text;
  char piece[4096];
  for (ssize_t length; (length = read(file, piece, sizeof piece)) > 0;)
    text.append(piece, static_cast<std::size_t>(length));
  close(file);
  return text;
}

/// A whole file or none; a disk that is full for a moment is no death, it comes with the next beat.
void put(const std::string& path, const std::string& text) {
  const std::string beside = path + ".partial";
  const int file = open(beside.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  if (file < 0) return;
  const bool whole = write(file, text.data(), text.size()) == static_cast<ssize_t>(text.size());
  if (close(file) != 0 || !whole || rename(beside.c_str(), path.c_str()) != 0)
    unlink(beside.c_str());
}

/// What a rank says of itself every second.
struct Sign {
  std::string machine, nonce;
  long pid = 0, beat = 0;
};

Sign parsed(const std::string& text) {
  Sign sign;
  std::istringstream(text) >> sign.machine >> sign.pid >> sign.nonce >> sign.beat;
  return sign;
}

/// Where a process number means this very process: the machine and its namespace of processes.
std::string this_machine() {
  char host[256] = "", space[64] = "";
  gethostname(host, sizeof host - 1);
  if (readlink("/proc/self/ns/pid", space, sizeof space - 1) < 0) return std::string(host) + "?";
  return std::string(host) + ":" + space;
}

bool is_of_this_machine(const Sign& sign) {
  return sign.pid > 0 && sign.machine == this_machine() && !sign.machine.ends_with("?");
}

bool is_running(long pid) {
  const std::optional<std::string> stat = text_of("/proc/" + std::to_string(pid) + "/stat");
  if (!stat) return false;
  const std::size_t name_end = stat->rfind(')');  // "pid (name) state ..."
  return name_end == std::string::npos || stat->compare(name_end, 3, ") Z") != 0;
}

/// As far as this machine can tell.
bool was_killed(const Sign& sign) { return is_of_this_machine(sign) && !is_running(sign.pid); }
bool is_alive(const Sign& sign) { return is_of_this_machine(sign) && is_running(sign.pid); }

std::string name_of(int rank, const Ranks& ranks) {
  return "rank " + std::to_string(rank) + " of " + std::to_string(ranks.size);
}

/// What one rank knows of another.
struct Heard {
  std::optional<std::string> sign;
  Clock::time_point when = Clock::now();
  bool ever = false, gone = false, done = false;
  std::string why;

  void listen(const std::optional<std::string>& now) {
    if (now == sign) return;
    ever |= now.has_value() && sign.has_value();  // it changed: not one from an earlier run
    sign = now;
    when = Clock::now();
  }
  double silence() const { return std::chrono::duration<double>(Clock::now() - when).count(); }
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

void take_own_gpu(const Ranks& ranks, const std::string& device) {
  if (!ranks.many() || (device != "cuda" && device != "auto")) return;
  const char* place = nullptr;
  for (const char* variable :
       {"LOCAL_RANK", "SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID"})
    if (place == nullptr && std::getenv(variable) != nullptr) place = variable;
  if (place == nullptr) return;
  std::vector<std::string> gpus;
  if (const char* visible = std::getenv("CUDA_VISIBLE_DEVICES")) {
    gpus = split_commas({visible});
  } else {
    std::error_code error;
    for (std::filesystem::directory_iterator gpu("/proc/driver/nvidia/gpus", error), end;
         !error && gpu != end;
         gpu.increment(error))
      gpus.push_back(std::to_string(gpus.size()));
  }
  const int local_rank = whole_number(place);
  if (gpus.size() < 2 || local_rank < 0) return;
  setenv(
      "CUDA_VISIBLE_DEVICES", gpus[static_cast<std::size_t>(local_rank) % gpus.size()].c_str(), 1);
}

SignOfLife::SignOfLife(const std::string& folder, const Ranks& ranks)
    : folder_(folder), ranks_(ranks) {
  if (ranks.leads()) {
    std::error_code error;
    for (const auto& entry : std::filesystem::directory_iterator(folder, error))
      if (entry.path().filename().string().starts_with(kRankFiles) &&
          !is_alive(parsed(text_of(entry.path()).value_or(""))))  // elsewhere: back in a second
        unlink(entry.path().c_str());
  }
  if (!ranks.many()) return;
  std::random_device random;
  nonce_ = std::to_string((std::uint64_t{random()} << 32) | random());
  thread_ = std::thread([this] {
    std::unique_lock lock(mutex_);
    while (!stopping_) {
      beat();
      if (word_) answer();
      const bool others_wait = word_ && !all_answered();
      wake_.wait_for(lock, std::chrono::milliseconds(others_wait || waiting_ ? 100 : 1000));
    }
  });
}

SignOfLife::~SignOfLife() {
  if (!thread_.joinable()) return;
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  wake_.notify_all();
  thread_.join();
  unlink(alive_file(folder_, ranks_.rank).c_str());
  if (ranks_.leads()) unlink(answers_file(folder_).c_str());
}

void SignOfLife::beat() {
  put(alive_file(folder_, ranks_.rank),
      this_machine() + " " + std::to_string(getpid()) + " " + nonce_ + " " +
          std::to_string(beats_++) + "\n");
}

void SignOfLife::say(const std::string& word) {
  {
    const std::lock_guard lock(mutex_);
    word_ = word;
  }
  wake_.notify_all();
}

/// One line for each rank heard of: its nonce, and the word.
void SignOfLife::answer() {
  std::string answers;
  for (int rank = 1; rank < ranks_.size; ++rank)
    if (const auto sign = text_of(alive_file(folder_, rank)))
      answers += parsed(*sign).nonce + " " + *word_ + "\n";
  if (answers == answers_) return;
  put(answers_file(folder_), answers);
  answers_ = answers;
}

bool SignOfLife::all_answered() const {
  return std::count(answers_.begin(), answers_.end(), '\n') == ranks_.size - 1;
}

std::string SignOfLife::wait_for_word(double timeout) {
  waiting_ = true;
  Heard leader;
  for (;;) {
    std::istringstream answers(text_of(answers_file(folder_)).value_or(""));
    for (std::string line; std::getline(answers, line);)
      if (line.starts_with(nonce_ + " ")) {
        waiting_ = false;
        return line.substr(nonce_.size() + 1);
      }
    leader.listen(text_of(alive_file(folder_, 0)));
    if (stop_requested()) throw Interrupted("stopped while waiting for rank 0; --resume goes on");
    if (leader.silence() > timeout)
      throw Interrupted("rank 0 of " + std::to_string(ranks_.size) + ", which prepares " + folder_ +
                        ", was not heard of for " + value_text(timeout) +
                        " seconds (--rank-timeout)");
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
  }
}

void wait_for_ranks(const std::string& folder,
                    const Ranks& ranks,
                    double timeout,
                    const std::function<std::string(int rank)>& missing) {
  std::vector<Heard> all(static_cast<std::size_t>(ranks.size));
  bool said = false;
  for (;;) {
    std::string waiting;
    for (int rank = 1; rank < ranks.size; ++rank) {
      Heard& heard = all[static_cast<std::size_t>(rank)];
      if (heard.done || heard.gone) continue;
      const std::optional<std::string> sign = text_of(alive_file(folder, rank));
      heard.why = missing(rank);  // after the sign: a rank that ended in between has done its work
      if (heard.why.empty()) {
        heard.done = true;
        continue;
      }
      heard.listen(sign);
      heard.gone = heard.silence() > timeout || (heard.ever && !sign && heard.silence() > 2);
      if (sign && was_killed(parsed(*sign))) heard.gone = heard.ever = true;
      if (!heard.gone)
        waiting += (waiting.empty() ? "" : "; ") + name_of(rank, ranks) + ", missing: " + heard.why;
    }
    if (waiting.empty()) break;
    if (stop_requested())
      throw Interrupted("stopped while waiting for " + waiting +
                        ". The same command with --resume goes on");
    if (!said) log_info("done with the own part; waiting for " + waiting);
    said = true;
    std::this_thread::sleep_for(std::chrono::milliseconds(200));
  }
  std::string lost;
  for (int rank = 1; rank < ranks.size; ++rank) {
    const Heard& heard = all[static_cast<std::size_t>(rank)];
    if (heard.gone)
      lost += (lost.empty() ? "" : "; ") + name_of(rank, ranks) +
              (heard.ever ? " is gone" : " was never heard of") + ", missing: " + heard.why;
    unlink(alive_file(folder, rank).c_str());
  }
  if (!lost.empty()) throw Interrupted(lost + ". The same command with --resume goes on");
}

std::string killed_ranks(const std::string& folder,
                         const Ranks& ranks,
                         const std::function<std::string(int rank)>& missing) {
  std::string text;
  for (int rank = 0; rank < ranks.size; ++rank) {
    if (rank == ranks.rank) continue;
    const std::optional<std::string> sign = text_of(alive_file(folder, rank));
    if (!sign || !was_killed(parsed(*sign))) continue;
    const std::string why = missing(rank);
    if (!why.empty())
      text += (text.empty() ? "" : "; ") + name_of(rank, ranks) + " is gone, missing: " + why;
  }
  return text;
}

}  // namespace lexico::apps
