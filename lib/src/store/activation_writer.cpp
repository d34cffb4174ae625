#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>
#include <algorithm>
#include <array>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <limits>
#include <sstream>

#include "activation_layout.h"
#include "bad_value.h"
#include "check.h"
#include "half.h"
#include "hdf5_handles.h"
#include "lexico/activations.h"
#include "lexico/error.h"
#include "lexico/files.h"

namespace lexico {
namespace {

using store::Handle;
using store::hdf5_reason;
using store::Hdf5Session;

[[noreturn]] void throw_cannot(const std::string& path, const std::string& why) {
  throw ResourceError(path + ": cannot be written: " + why);
}
[[noreturn]] void throw_errno(const std::string& path) { throw_cannot(path, std::strerror(errno)); }

/// The .partial file: locked against other writers, removed unless it is published.
class PartialFile {
 public:
  explicit PartialFile(std::string path)
      : path_(std::move(path)), partial_(path_ + kPartialSuffix) {
    fd_ = ::open(partial_.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    if (fd_ < 0) throw_errno(partial_);
    if (::flock(fd_, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK) {
      ::close(fd_);
      throw_cannot(partial_, "another process is writing it");
    }
  }
  ~PartialFile() {
    if (!published_) ::unlink(partial_.c_str());
    ::close(fd_);
  }
  PartialFile(const PartialFile&) = delete;
  PartialFile& operator=(const PartialFile&) = delete;

  const std::string& name() const { return partial_; }

  /// Takes the space before the work; a file system that cannot do that finds out later.
  void reserve(std::int64_t bytes) {
    if (::fallocate(fd_, FALLOC_FL_KEEP_SIZE, 0, bytes) != 0 &&
        (errno == ENOSPC || errno == EDQUOT || errno == EFBIG))
      throw_cannot(
          partial_,
          std::string(std::strerror(errno)) + " (" + std::to_string(bytes) + " bytes needed)");
  }

  /// Lets the kernel write back in the background, so that the last sync is short.
  void start_writeback() { (void)::sync_file_range(fd_, 0, 0, SYNC_FILE_RANGE_WRITE); }

  void publish() {
    if (::fsync(fd_) != 0) throw_errno(partial_);
    if (::rename(partial_.c_str(), path_.c_str()) != 0) throw_errno(path_);
    published_ = true;
    sync_folder(std::filesystem::path(path_).parent_path().string());
  }

 private:
  std::string path_, partial_;
  int fd_ = -1;
  bool published_ = false;
};

/// Rows that fill a dataset from its start, handed to HDF5 as whole chunks: past its chunk cache,
/// twice as fast.
struct Stream {
  Handle dataset;
  std::size_t row_bytes = 0;
  std::int64_t chunk_rows = 0, chunk = 0, rows = 0;  // `rows` are held back in `pending`
  std::vector<std::byte> pending;

  std::byte* next_row() { return pending.data() + static_cast<std::size_t>(rows) * row_bytes; }
};

void write_chunk(Stream& stream) {
  const hsize_t offset[2] = {static_cast<hsize_t>(stream.chunk * stream.chunk_rows), 0};
  std::fill(stream.pending.begin() + static_cast<std::ptrdiff_t>(stream.rows) *
                                         static_cast<std::ptrdiff_t>(stream.row_bytes),
            stream.pending.end(),
            std::byte{0});
  const Hdf5Session session;
  if (H5Dwrite_chunk(stream.dataset.get(),
                     H5P_DEFAULT,
                     0,
                     offset,
                     stream.pending.size(),
                     stream.pending.data()) < 0)
    throw ResourceError(hdf5_reason());
  ++stream.chunk;
  stream.rows = 0;
}

Stream make_stream(hid_t file,
                   const std::string& name,
                   hid_t type,
                   std::int64_t rows,
                   std::int64_t columns,
                   std::int64_t chunk_rows) {
  const int rank = columns > 0 ? 2 : 1;
  const hsize_t size[2] = {static_cast<hsize_t>(rows), static_cast<hsize_t>(columns)};
  const hsize_t most[2] = {H5S_UNLIMITED,
                           static_cast<hsize_t>(columns)};  // a chunk may be larger than the data
  const hsize_t chunk[2] = {static_cast<hsize_t>(chunk_rows), static_cast<hsize_t>(columns)};
  const Handle space(H5Screate_simple(rank, size, most), H5Sclose);
  const Handle creation(H5Pcreate(H5P_DATASET_CREATE), H5Pclose);
  H5Pset_chunk(creation.get(), rank, chunk);
  H5Pset_fill_time(creation.get(), H5D_FILL_TIME_NEVER);
  H5Pset_obj_track_times(creation.get(), false);  // equal runs give equal files
  Stream stream;
  stream.dataset = Handle(
      H5Dcreate2(file, name.c_str(), type, space.get(), H5P_DEFAULT, creation.get(), H5P_DEFAULT),
      H5Dclose);
  if (!stream.dataset) throw ResourceError(hdf5_reason());
  stream.row_bytes =
      H5Tget_size(type) * static_cast<std::size_t>(std::max<std::int64_t>(columns, 1));
  stream.chunk_rows = chunk_rows;
  stream.pending.resize(stream.row_bytes * static_cast<std::size_t>(chunk_rows));
  return stream;
}

void check_info(const ActivationInfo& info) {
  const auto positive = [](const char* name, std::int64_t value) {
    if (value < 1)
      detail::throw_invalid("activation file: ", name, " is ", value, ", must be at least 1");
  };
  positive("num_layers", info.num_layers);
  positive("kv_heads", info.kv_heads);
  positive("head_dim", info.head_dim);
  positive("num_tokens", info.num_tokens);
}

}  // namespace

struct ActivationWriter::Impl {
  std::string path;
  ActivationInfo info;
  PartialFile partial;
  Handle file;
  std::vector<Stream> vectors;   // [layer * 2 + kind]
  std::array<Stream, 3> tokens;  // id, position, document
  std::int64_t tokens_written = 0;
  std::int64_t bytes_since_writeback = 0;

  Impl(const std::string& at, const ActivationInfo& what) : path(at), info(what), partial(at) {}

  ~Impl() {
    const Hdf5Session session;
    close();
  }

  bool close() {
    for (Stream& stream : vectors) stream.dataset.close();
    for (Stream& stream : tokens) stream.dataset.close();
    return file.close();
  }

  Handle make_group(const std::string& name) {
    const Handle creation(H5Pcreate(H5P_GROUP_CREATE), H5Pclose);
    H5Pset_obj_track_times(creation.get(), false);
    Handle group(H5Gcreate2(file.get(), name.c_str(), H5P_DEFAULT, creation.get(), H5P_DEFAULT),
                 H5Gclose);
    if (!group) throw ResourceError(hdf5_reason());
    return group;
  }

  void create() {
    const Hdf5Session session;
    const Handle access(H5Pcreate(H5P_FILE_ACCESS), H5Pclose);
    // From HDF5 1.10 on, metadata carry checksums: damage is told from data.
    H5Pset_libver_bounds(access.get(), H5F_LIBVER_V110, H5F_LIBVER_V110);
    H5Pset_file_locking(access.get(), false, true);  // PartialFile holds the lock
    H5Pset_fclose_degree(access.get(), H5F_CLOSE_STRONG);
    const Handle creation(H5Pcreate(H5P_FILE_CREATE), H5Pclose);
    H5Pset_obj_track_times(creation.get(), false);
    H5Pset_attr_phase_change(
        creation.get(), 64, 32);  // all attributes stay in the checksummed header
    file = Handle(H5Fcreate(partial.name().c_str(), H5F_ACC_TRUNC, creation.get(), access.get()),
                  H5Fclose);
    if (!file) throw ResourceError(hdf5_reason());
    store::write_info(file.get(), info);
    store::write_attribute(file.get(), "complete", std::int64_t{0});

    const Handle half = store::half_type();
    make_group("/layers");
    for (int layer = 0; layer < info.num_layers; ++layer) {
      make_group(store::layer_group(layer));
      for (Kind kind : kBothKinds)
        vectors.push_back(make_stream(file.get(),
                                      store::vectors_name(layer, kind),
                                      info.half ? half.get() : H5T_IEEE_F32LE,
                                      info.num_tokens * info.kv_heads,
                                      info.head_dim,
                                      store::kChunkRows));
    }
    make_group("/tokens");
    for (std::size_t i = 0; i < tokens.size(); ++i)
      tokens[i] = make_stream(file.get(),
                              store::tokens_name(store::kTokenFields[i]),
                              H5T_STD_I32LE,
                              info.num_tokens,
                              0,
                              store::kChunkTokens);
  }

  void advance(Stream& stream) {
    if (++stream.rows < stream.chunk_rows) return;
    bytes_since_writeback += static_cast<std::int64_t>(stream.pending.size());
    write_chunk(stream);
  }

  void append_token(std::size_t field, std::int32_t value) {
    std::memcpy(tokens[field].next_row(), &value, sizeof value);
    advance(tokens[field]);
  }

  /// One vector of one head. @returns whether all of it can be stored.
  bool append_vector(Stream& stream, const float* vector) {
    const auto dim = static_cast<std::size_t>(info.head_dim);
    bool fits = true;
    if (info.half) {
      fits = store::to_half(vector, dim, reinterpret_cast<std::uint16_t*>(stream.next_row()));
    } else {
      std::memcpy(stream.next_row(), vector, dim * sizeof(float));
      for (std::size_t i = 0; i < dim; ++i) fits &= std::isfinite(vector[i]);
    }
    if (fits) advance(stream);
    return fits;
  }

  void append(const ActivationBatch& batch) {
    const std::int64_t count = batch.batch * batch.length;
    if (batch.batch < 0 || batch.length < 0 || tokens_written + count > info.num_tokens)
      detail::throw_invalid(
          path, ": ", tokens_written, " + ", count, " tokens, planned were ", info.num_tokens);
    const std::int64_t heads = info.kv_heads, dim = info.head_dim;
    for (int layer = 0; layer < info.num_layers; ++layer)
      for (Kind kind : kBothKinds) {
        Stream& stream =
            vectors[static_cast<std::size_t>(layer) * 2 + static_cast<std::size_t>(kind)];
        const float* all =
            (kind == Kind::kKeys ? batch.keys : batch.values) + layer * count * heads * dim;
        for (std::int64_t b = 0; b < batch.batch; ++b)
          for (std::int64_t t = 0; t < batch.length; ++t)
            for (std::int64_t h = 0; h < heads; ++h) {
              const float* vector = all + ((b * heads + h) * batch.length + t) * dim;
              if (!append_vector(stream, vector))
                store::throw_bad_value(vector,
                                       info.head_dim,
                                       info.half,
                                       layer,
                                       kind,
                                       tokens_written + b * batch.length + t,
                                       static_cast<int>(h),
                                       path);
            }
      }
    for (std::int64_t i = 0; i < count; ++i) {
      append_token(0, batch.ids[i]);
      append_token(1, static_cast<std::int32_t>(i % batch.length));
      append_token(2, batch.documents[i]);
    }
    tokens_written += count;
    if (bytes_since_writeback >= (64 << 20)) {
      partial.start_writeback();
      bytes_since_writeback = 0;
    }
  }

  void write_moments(const float* moments) {
    const Hdf5Session session;
    const hsize_t shape[3] = {static_cast<hsize_t>(info.kv_heads),
                              static_cast<hsize_t>(info.head_dim),
                              static_cast<hsize_t>(info.head_dim)};
    const Handle space(H5Screate_simple(3, shape, nullptr), H5Sclose);
    const Handle creation(H5Pcreate(H5P_DATASET_CREATE), H5Pclose);
    H5Pset_obj_track_times(creation.get(), false);
    for (int layer = 0; layer < info.num_layers; ++layer) {
      const Handle dataset(H5Dcreate2(file.get(),
                                      store::moment_name(layer).c_str(),
                                      H5T_IEEE_F32LE,
                                      space.get(),
                                      H5P_DEFAULT,
                                      creation.get(),
                                      H5P_DEFAULT),
                           H5Dclose);
      if (!dataset ||
          H5Dwrite(dataset.get(),
                   H5T_NATIVE_FLOAT,
                   H5S_ALL,
                   H5S_ALL,
                   H5P_DEFAULT,
                   moments + static_cast<hsize_t>(layer) * shape[0] * shape[1] * shape[2]) < 0)
        throw ResourceError(hdf5_reason());
    }
  }

  void finish(const float* moments) {
    if (tokens_written != info.num_tokens)
      detail::throw_invalid(
          path, ": ", tokens_written, " tokens were written, planned were ", info.num_tokens);
    for (Stream& stream : vectors)
      if (stream.rows > 0) write_chunk(stream);
    for (Stream& stream : tokens)
      if (stream.rows > 0) write_chunk(stream);
    if (moments != nullptr) write_moments(moments);
    {
      const Hdf5Session session;
      H5Adelete(file.get(), "complete");
      store::write_attribute(file.get(), "complete", std::int64_t{1});
      if (!close()) throw ResourceError(hdf5_reason());
    }
    partial.publish();
  }

  /// HDF5's reasons know no path.
  template <typename Body>
  void with_name(const Body& body) {
    try {
      body();
    } catch (const ResourceError& error) {
      const std::string what = error.what();
      if (what.find(path) != std::string::npos) throw;
      throw_cannot(path, what);
    }
  }
};

ActivationWriter::ActivationWriter(const std::string& path, const ActivationInfo& info) {
  check_info(info);
  impl_ = std::make_unique<Impl>(path, info);
  impl_->with_name([&] {
    impl_->create();
    impl_->partial.reserve(file_bytes(info));
  });
}
ActivationWriter::~ActivationWriter() = default;
ActivationWriter::ActivationWriter(ActivationWriter&&) noexcept = default;
ActivationWriter& ActivationWriter::operator=(ActivationWriter&&) noexcept = default;

void ActivationWriter::append(const ActivationBatch& batch) {
  impl_->with_name([&] { impl_->append(batch); });
}

void ActivationWriter::finish(const float* query_second_moment) {
  impl_->with_name([&] { impl_->finish(query_second_moment); });
  impl_.reset();
}

std::int64_t ActivationWriter::file_bytes(const ActivationInfo& info) {
  const auto chunked = [](std::int64_t rows, std::int64_t chunk, std::int64_t row_bytes) {
    const std::int64_t chunks = (rows + chunk - 1) / chunk;
    return chunks * chunk * row_bytes + chunks * 16;  // data and index
  };
  const std::int64_t vectors = chunked(info.num_tokens * info.kv_heads,
                                       store::kChunkRows,
                                       std::int64_t{info.head_dim} * (info.half ? 2 : 4));
  const std::int64_t moments = std::int64_t{info.kv_heads} * info.head_dim * info.head_dim * 4;
  // Measured, rounded up: objects, groups and attributes; the longest texts among these.
  constexpr std::int64_t kDatasetHeader = 512, kFileHeader = 10 << 10;
  std::size_t texts = info.command_line.size() + info.rope.size() + info.model.size();
  for (const std::string& name : info.corpora) texts += name.size() + 64;
  return static_cast<std::int64_t>(texts) +
         info.num_layers * (2 * (vectors + kDatasetHeader) + moments + kDatasetHeader) +
         3 * (chunked(info.num_tokens, store::kChunkTokens, 4) + kDatasetHeader) + kFileHeader;
}

std::string hdf5_version() {
  const Hdf5Session session;
  unsigned major = 0, minor = 0, release = 0;
  H5get_libversion(&major, &minor, &release);
  return std::to_string(major) + "." + std::to_string(minor) + "." + std::to_string(release);
}

}  // namespace lexico
