#pragma once

#include <atomic>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <optional>
#include <string>
#include <thread>

namespace lexico::apps {

/// Files of the ranks in the folder they share start with this.
constexpr const char* kRankFiles = ".rank-";

/// This process's place among those that share out one job.
struct Ranks {
  int rank = 0, size = 1;
  std::string source = "one process";  ///< where that is from, for messages

  bool many() const { return size > 1; }
  bool leads() const { return rank == 0; }
  bool owns(std::size_t item) const {
    return item % static_cast<std::size_t>(size) == static_cast<std::size_t>(rank);
  }
};

/// The options of a program that can share out its work.
struct RankConfig {
  int rank = -1, num_ranks = 0;
  double rank_timeout = 300;

  template <typename Self, typename Visitor>
  static void for_each_field(Self& self, Visitor&& visit) {
    visit("rank",
          self.rank,
          "this process's number among num_ranks; -1: as torchrun, srun or mpirun says");
    visit("num_ranks",
          self.num_ranks,
          "processes that share the work and OUTPUT; 0: as torchrun, srun or mpirun says, else 1");
    visit("rank_timeout",
          self.rank_timeout,
          "seconds without a sign of life after which a rank is given up");
  }

  /// Flags, or else what a launcher left in the environment: torchrun (RANK, WORLD_SIZE), srun
  /// (SLURM_PROCID, SLURM_STEP_NUM_TASKS; a batch script alone is one process), Open MPI
  /// (OMPI_COMM_WORLD_RANK, _SIZE) or another MPI (PMI_RANK, PMI_SIZE). @throws InvalidArgument
  /// naming the variable or flag and its bound.
  Ranks resolve() const;
};

/// Ranks of one machine take its GPUs in turn: where `device` is "cuda" or "auto", several ranks
/// run and several GPUs can be seen, this one sees from now on only that of its place on the
/// machine (LOCAL_RANK, SLURM_LOCALID, OMPI_COMM_WORLD_LOCAL_RANK or MPI_LOCALRANKID). Before CUDA
/// is used.
void take_own_gpu(const Ranks& ranks, const std::string& device);

/// While it lives, a file in the shared folder says that this rank does: its text changes every
/// second. The leading rank's also removes what ranks that were killed have left there.
class SignOfLife {
 public:
  /// @param folder  is there already. Nothing is written where there is one rank.
  SignOfLife(const std::string& folder, const Ranks& ranks);
  ~SignOfLife();
  SignOfLife(const SignOfLife&) = delete;
  SignOfLife& operator=(const SignOfLife&) = delete;

  /// Of the leading rank, once what the ranks share is prepared: tells `word` (of one line) to
  /// every other rank of this start, those that come later too.
  void say(const std::string& word);
  /// Of another rank: waits for that word. @throws Interrupted if the leading rank was not heard of
  /// for `timeout` seconds, or a stop is asked for.
  std::string wait_for_word(double timeout);

 private:
  void beat();
  void answer();
  bool all_answered() const;

  std::string folder_;
  Ranks ranks_;
  std::string nonce_;  // no other process has it, so that old files deceive nobody
  long beats_ = 0;
  std::string answers_;  // as the file holds them
  std::mutex mutex_;
  std::condition_variable wake_;
  bool stopping_ = false;
  std::atomic<bool> waiting_ = false;
  std::optional<std::string> word_;
  std::thread thread_;
};

/// For the leading rank: returns when `missing` gives an empty text for every other rank.
/// @param missing  what a rank has not yet done, in words.
/// @throws Interrupted naming the ranks that ended or were not heard of for `timeout` seconds, and
/// what they lack. A process killed on this machine is missed at once.
void wait_for_ranks(const std::string& folder,
                    const Ranks& ranks,
                    double timeout,
                    const std::function<std::string(int rank)>& missing);

/// The ranks that were killed on this machine, and what they lack, in words; empty: none.
std::string killed_ranks(const std::string& folder,
                         const Ranks& ranks,
                         const std::function<std::string(int rank)>& missing);

}  // namespace lexico::apps
