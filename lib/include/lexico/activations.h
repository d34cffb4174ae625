#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "lexico/kind.h"
#include "lexico/rope.h"

namespace lexico {

/// What an activation file says of itself ("lexico-activations 1"; docs/formats.md).
struct ActivationInfo {
  std::string model;  ///< name in the model file
  std::string model_sha256;
  std::vector<std::string> corpora;  ///< names of the texts
  std::vector<std::int64_t>
      corpus_documents;  ///< documents in each text: they are numbered through
  KeyStage key_stage = KeyStage::kPostRope;
  std::string rope;  ///< of the model, as Rope::to_json writes it; empty: not known
  bool half = true;  ///< vectors are stored as float16, else as float32
  int num_layers = 0, kv_heads = 0, head_dim = 0;
  std::int64_t num_tokens = 0;  ///< rows of a layer = num_tokens * kv_heads
  std::uint64_t seed = 0;
  int sequence_length = 0;  ///< tokens the model saw at once, at most
  int batch_sequences = 0;  ///< sequences it ran together, at most (BatchRule); 0: not known
  std::string bos;          ///< "always", "document" or "none": what BOS tokens start
  std::string version;      ///< of the program that wrote the file
  std::string command_line;
  std::string plan_hash;                 ///< equal in all shards of one run
  int shard_index = 0, shard_count = 1;  ///< this file's place among them
  bool complete = false;
};

/// Which sequences a model runs together: neighbours of one length, up to `most`. A dump and a run
/// without one make the same batches, so that they get the same floats.
class BatchRule {
 public:
  explicit BatchRule(std::int64_t most) : most_(most) {}
  /// Whether the next sequence, of `length` tokens, starts a new batch.
  bool starts_batch(std::int64_t length) {
    if (count_ == 0 || count_ == most_ || length != length_) count_ = 0;
    length_ = length;
    return count_++ == 0;
  }

 private:
  std::int64_t most_, length_ = 0, count_ = 0;
};

/// Keys and values of a model's layers, row by row, wherever they come from: a dump
/// (ActivationReader) or the model itself (ModelActivations). Row r of a layer is token r /
/// kv_heads, head r % kv_heads. One thread at a time.
class ActivationSource {
 public:
  struct Rows {
    std::int64_t first = 0, count = 0;
  };
  using Dataset = std::pair<int, Kind>;  ///< layer and kind

  virtual ~ActivationSource() = default;

  const ActivationInfo& info() const { return info_; }
  /// What the rows are made of: files of activations; or the model, then the texts.
  const std::vector<std::string>& files() const { return files_; }
  std::int64_t num_rows() const { return info_.num_tokens * info_.kv_heads; }  ///< of each dataset
  bool is_half() const { return info_.half; }

  /// Keys come in this stage from now on, whatever is stored; info() says so too. Rotating costs
  /// little, and a float16 is rounded once more. What `query_second_moment` gives stays in the
  /// stored frame.
  /// @throws IoError if that takes a RoPE and positions, and they are not known.
  void set_key_stage(KeyStage stage);
  KeyStage stored_key_stage() const { return stored_stage_; }

  /// Copies rows [first, first + count) as float32 to `out` [count, head_dim].
  /// @throws IoError if they cannot be had; InvalidArgument if the range or the layer is out of
  /// bounds.
  void read(int layer, Kind kind, std::int64_t first, std::int64_t count, float* out);
  /// The same rows as they are stored: IEEE half bits. @throws InvalidArgument if float32 is
  /// stored.
  void read_half(int layer, Kind kind, std::int64_t first, std::int64_t count, std::uint16_t* out);

  /// Mean of q q^T over tokens and the query heads of each group, [kv_heads, head_dim, head_dim],
  /// in the frame of the keys. Empty if it is not known.
  virtual std::vector<float> query_second_moment(int layer) = 0;
  /// First tokens, ascending from 0, of the batches that the model ran (BatchRule); empty: not
  /// known. A batch costs a model as much as any row of it.
  virtual std::vector<std::int64_t> batch_starts() = 0;
  /// These rows will be read more than once, or one dataset after the other: a source for which
  /// rows are dear keeps those of `datasets` in memory from when it first has them.
  virtual void hold(const std::vector<Rows>& rows, const std::vector<Dataset>& datasets);

 protected:
  ActivationSource() = default;
  ActivationSource(ActivationSource&&) = default;
  ActivationSource& operator=(ActivationSource&&) = default;
  /// To be called once, before anything else.
  void describe(const ActivationInfo& info, const std::vector<std::string>& files);

  virtual void read_stored(
      int layer, Kind kind, std::int64_t first, std::int64_t count, float* out) = 0;
  virtual void read_stored_half(
      int layer, Kind kind, std::int64_t first, std::int64_t count, std::uint16_t* out) = 0;
  virtual void read_positions(std::int64_t first_token, std::int64_t count, std::int32_t* out) = 0;

 private:
  void rotate(int layer, std::int64_t first, std::int64_t count, float* rows);

  ActivationInfo info_;
  std::vector<std::string> files_;
  KeyStage stored_stage_ = KeyStage::kPostRope;
  Rope rope_;  // once the stage was changed
};

/// Reads K/V vectors dumped by lexico-extract: one file, a folder of shards, or a glob, seen as
/// one. One reader serves one thread; several readers may be used at once (HDF5 calls take turns).
class ActivationReader : public ActivationSource {
 public:
  /// A folder must hold all shards of its run; a glob or a file may be a part. Files are taken in
  /// name order. Of all files together: info().num_tokens is the sum, corpora the union; the rest
  /// is the first file's.
  /// @throws IoError naming the file: missing, truncated, not complete, not this format, or shards
  /// that do not fit
  ///         each other (names both files and the attribute).
  explicit ActivationReader(const std::string& file_folder_or_glob);
  ~ActivationReader() override;
  ActivationReader(ActivationReader&&) noexcept;
  ActivationReader& operator=(ActivationReader&&) noexcept;

  /// Tokens [first, first + count): any of the three may be null. Documents keep the numbers their
  /// file gives them.
  /// @throws IoError if the file holds no /tokens.
  void read_tokens(std::int64_t first,
                   std::int64_t count,
                   std::int32_t* id,
                   std::int32_t* position,
                   std::int32_t* document);
  /// Averaged over shards by their tokens.
  std::vector<float> query_second_moment(int layer) override;
  /// From the positions in the files. @throws IoError if they cannot be read.
  std::vector<std::int64_t> batch_starts() override;

 private:
  void read_stored(
      int layer, Kind kind, std::int64_t first, std::int64_t count, float* out) override;
  void read_stored_half(
      int layer, Kind kind, std::int64_t first, std::int64_t count, std::uint16_t* out) override;
  void read_positions(std::int64_t first_token, std::int64_t count, std::int32_t* out) override;

  struct Impl;
  std::unique_ptr<Impl> impl_;
};

/// Keys and values of `batch` sequences of `length` tokens, as the model gives them.
struct ActivationBatch {
  std::int64_t batch = 0, length = 0;
  const float* keys = nullptr;              ///< [layers, batch, kv_heads, length, head_dim]
  const float* values = nullptr;            ///< the same
  const std::int32_t* ids = nullptr;        ///< [batch, length]
  const std::int32_t* documents = nullptr;  ///< [batch, length]
};

/// Writes one activation file as `path`.partial, which gets its name only when it is complete and
/// on the disk. Equal calls give equal bytes. One writer serves one thread.
class ActivationWriter {
 public:
  /// Makes the file (over an older `path`.partial) and reserves its space, where the file system
  /// can.
  /// @param info  all of it is stored; `num_tokens` is how many will be appended.
  /// @throws ResourceError naming the path: no space, no permission, another process is writing it.
  ActivationWriter(const std::string& path, const ActivationInfo& info);
  /// Without `finish` the .partial is removed.
  ~ActivationWriter();
  ActivationWriter(ActivationWriter&&) noexcept;
  ActivationWriter& operator=(ActivationWriter&&) noexcept;

  /// @throws IoError naming layer, kind, token and head of a value that is NaN, infinite, or beyond
  /// float16's range;
  ///         InvalidArgument if these are more tokens than planned; ResourceError if the disk is
  ///         full.
  void append(const ActivationBatch& batch);

  /// Writes what is left, marks the file complete, syncs it and gives it its name.
  /// @param query_second_moment  [layers, kv_heads, head_dim, head_dim], or null: the file has
  /// none.
  /// @throws InvalidArgument if fewer tokens than planned were appended; ResourceError if the disk
  /// is full.
  void finish(const float* query_second_moment = nullptr);

  /// Bytes such a file takes, within a few per cent and never less.
  static std::int64_t file_bytes(const ActivationInfo& info);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

/// Of the HDF5 library in use.
std::string hdf5_version();

}  // namespace lexico
