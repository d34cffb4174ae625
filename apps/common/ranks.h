#pragma once

#include <condition_variable>
#include <functional>
#include <mutex>
#include <string>
#include <thread>

namespace lexico::apps {

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

/// While it lives, a file in the shared folder says that this rank does: its time changes every
/// second.
class SignOfLife {
 public:
  /// Nothing happens where there is one rank.
  SignOfLife(const std::string& folder, const Ranks& ranks);
  ~SignOfLife();
  SignOfLife(const SignOfLife&) = delete;
  SignOfLife& operator=(const SignOfLife&) = delete;

 private:
  std::string path_;
  std::mutex mutex_;
  std::condition_variable stop_;
  bool stopping_ = false;
  std::thread thread_;
};

/// For the leading rank: returns when `missing` gives an empty text for every other rank.
/// @param missing  what a rank has not yet done, in words.
/// @throws Interrupted naming the ranks that ended or were not heard of for `timeout` seconds, and
/// what they lack.
void wait_for_ranks(const std::string& folder,
                    const Ranks& ranks,
                    double timeout,
                    const std::function<std::string(int rank)>& missing);

}  // namespace lexico::apps
