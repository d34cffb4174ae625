#include <glob.h>
#include <sys/stat.h>
#include <algorithm>
#include <array>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <limits>
#include <map>
#include <optional>
#include <sstream>

#include "activation_layout.h"
#include "check.h"
#include "half.h"
#include "hdf5_handles.h"
#include "heap_check.h"
#include "lexico/activations.h"
#include "lexico/error.h"

namespace lexico {
namespace {

using store::Handle;
using store::hdf5_reason;
using store::Hdf5Session;

constexpr std::size_t kOpenFiles = 32;             // at once; a run may have thousands of shards
constexpr std::size_t kChunkCacheBytes = 4 << 20;  // per dataset: a few chunks

std::vector<std::string> glob_files(const std::string& pattern) {
  glob_t found{};
  const int status = ::glob(pattern.c_str(), 0, nullptr, &found);
  std::vector<std::string> files;
  for (std::size_t i = 0; status == 0 && i < found.gl_pathc; ++i)
    files.emplace_back(found.gl_pathv[i]);
  ::globfree(&found);
  return files;
}

std::vector<std::string> files_in(const std::string& path) {
  struct ::stat status {};
  if (::stat(path.c_str(), &status) != 0) {
    const int error = errno;
    std::vector<std::string> files = glob_files(path);
    if (files.empty())
      throw IoError(path + ": " +
                    (path.find_first_of("*?[") == std::string::npos ? std::strerror(error)
                                                                    : "no file matches"));
    return files;
  }
  if (!S_ISDIR(status.st_mode)) return {path};
  std::vector<std::string> files;
  std::error_code error;
  for (std::filesystem::directory_iterator entry(path, error), end; !error && entry != end;
       entry.increment(error))
    if (entry->path().extension() == ".h5") files.push_back(entry->path().string());
  if (error) throw IoError(path + ": " + error.message());
  if (files.empty()) throw IoError(path + ": the folder holds no .h5 file");
  std::sort(files.begin(), files.end());
  return files;
}

/// Errors lack the file's name.
Handle open_file(const std::string& path) {
  struct ::stat status {};
  if (::stat(path.c_str(), &status) != 0) throw IoError(std::strerror(errno));
  if (!S_ISREG(status.st_mode)) throw IoError("is not a regular file");
  if (status.st_size == 0) throw IoError("is empty");
  Handle access(H5Pcreate(H5P_FILE_ACCESS), H5Pclose);
  H5Pset_file_locking(access.get(), false, true);  // network file systems often cannot lock
  H5Pset_fclose_degree(access.get(), H5F_CLOSE_STRONG);
  H5Pset_cache(access.get(), 0, 521, kChunkCacheBytes, 1.0);
  Handle file(H5Fopen(path.c_str(), H5F_ACC_RDONLY, access.get()), H5Fclose);
  if (!file) throw IoError("cannot be opened as HDF5: " + hdf5_reason());
  return file;
}

/// Opens a dataset that must be a plain one of this file: no link may lead a reader elsewhere.
/// Nothing if it does not exist. Errors lack the file's name.
std::optional<Handle> open_dataset(hid_t file, const std::string& name) {
  for (std::size_t slash = name.find('/', 1);; slash = name.find('/', slash + 1)) {
    const std::string part = name.substr(0, slash);
    const htri_t exists = H5Lexists(file, part.c_str(), H5P_DEFAULT);
    if (exists < 0) throw IoError(part + " cannot be read: " + hdf5_reason());
    if (exists == 0) return std::nullopt;
    H5L_info_t link{};
    if (H5Lget_info(file, part.c_str(), &link, H5P_DEFAULT) < 0 || link.type != H5L_TYPE_HARD)
      throw IoError(part + " is a link to another place, want a dataset of this file");
    if (slash == std::string::npos) break;
  }
  Handle dataset(H5Dopen2(file, name.c_str(), H5P_DEFAULT), H5Dclose);
  if (!dataset) throw IoError(name + " cannot be opened: " + hdf5_reason());
  const Handle creation(H5Dget_create_plist(dataset.get()), H5Pclose);
  const H5D_layout_t layout = creation ? H5Pget_layout(creation.get()) : H5D_LAYOUT_ERROR;
  if ((layout != H5D_CHUNKED && layout != H5D_CONTIGUOUS && layout != H5D_COMPACT) ||
      H5Pget_external_count(creation.get()) != 0)
    throw IoError(name + " keeps its data in other files");
  return dataset;
}

std::string shape_text(const std::vector<hsize_t>& shape) {
  std::ostringstream text;
  for (std::size_t i = 0; i < shape.size(); ++i) text << (i == 0 ? "[" : ", ") << shape[i];
  text << "]";
  return text.str();
}

enum class Element { kHalf, kFloat, kInt32 };
const char* name_of(Element element) {
  return element == Element::kHalf ? "float16" : element == Element::kFloat ? "float32" : "int32";
}

/// Checks rank, shape, type, and that all of it was written.
void check_dataset(const Handle& dataset,
                   const std::string& name,
                   const std::vector<hsize_t>& want,
                   Element element) {
  const Handle space(H5Dget_space(dataset.get()), H5Sclose);
  const int rank = space ? H5Sget_simple_extent_ndims(space.get()) : -1;
  if (rank != static_cast<int>(want.size()))
    throw IoError("dataset " + name + " has rank " + std::to_string(rank) + ", want " +
                  std::to_string(want.size()));
  std::vector<hsize_t> shape(want.size());
  H5Sget_simple_extent_dims(space.get(), shape.data(), nullptr);
  if (shape != want)
    throw IoError("dataset " + name + " has shape " + shape_text(shape) + ", want " +
                  shape_text(want));
  const Handle type(H5Dget_type(dataset.get()), H5Tclose);
  const Handle half = store::half_type();
  const hid_t wanted = element == Element::kHalf    ? half.get()
                       : element == Element::kFloat ? H5T_IEEE_F32LE
                                                    : H5T_STD_I32LE;
  if (!type || H5Tequal(type.get(), wanted) <= 0)
    throw IoError("dataset " + name + " is not of type " + name_of(element) + " (little-endian)");
  const Handle creation(H5Dget_create_plist(dataset.get()), H5Pclose);
  if (H5Pget_nfilters(creation.get()) == 0) {
    hsize_t bytes = H5Tget_size(type.get());
    for (hsize_t dim : shape) bytes *= dim;
    const hsize_t stored = H5Dget_storage_size(dataset.get());
    if (stored < bytes)
      throw IoError("dataset " + name + " is damaged: " + std::to_string(stored) + " of " +
                    std::to_string(bytes) + " bytes were written");
  }
}

void read_rows(const Handle& dataset,
               const std::string& name,
               hid_t memory_type,
               const std::vector<hsize_t>& first,
               const std::vector<hsize_t>& count,
               void* out) {
  const Handle from(H5Dget_space(dataset.get()), H5Sclose);
  const Handle to(H5Screate_simple(static_cast<int>(count.size()), count.data(), nullptr),
                  H5Sclose);
  if (H5Sselect_hyperslab(
          from.get(), H5S_SELECT_SET, first.data(), nullptr, count.data(), nullptr) < 0 ||
      H5Dread(dataset.get(), memory_type, to.get(), from.get(), H5P_DEFAULT, out) < 0)
    throw IoError("dataset " + name + " cannot be read at row " + std::to_string(first[0]) + ": " +
                  hdf5_reason());
}

/// Runs `body` and puts the file's name before its errors.
template <typename Body>
auto with_name(const std::string& path, const Body& body) {
  try {
    return body();
  } catch (const IoError& error) {
    throw IoError(path + ": " + error.what());
  }
}

}  // namespace

struct ActivationReader::Impl {
  struct Shard {
    std::int64_t first_token = 0, num_tokens = 0;
    int batch_sequences = 0;
  };
  struct OpenShard {
    Handle file;
    std::map<std::string, Handle> datasets;  // closed before the file: declared after it
    std::uint64_t last_use = 0;
  };

  ActivationInfo info;
  std::vector<std::string> files;
  void read_stored(int layer, Kind kind, std::int64_t first, std::int64_t count, float* out);
  void read_stored_half(
      int layer, Kind kind, std::int64_t first, std::int64_t count, std::uint16_t* out);
  std::vector<Shard> shards;
  std::map<std::size_t, OpenShard> open;
  std::uint64_t clock = 0;
  Handle half;
  std::vector<std::uint16_t> scratch;

  ~Impl() {
    const Hdf5Session session;
    open.clear();
    half.close();
  }

  OpenShard& shard(std::size_t index) {
    auto at = open.find(index);
    if (at == open.end()) {
      if (open.size() >= kOpenFiles)
        open.erase(std::min_element(open.begin(), open.end(), [](const auto& a, const auto& b) {
          return a.second.last_use < b.second.last_use;
        }));
      at = open.try_emplace(index).first;
      at->second.file = open_file(files[index]);
    }
    at->second.last_use = ++clock;
    return at->second;
  }

  const Handle* find_dataset(std::size_t index, const std::string& name) {
    OpenShard& from = shard(index);
    if (const auto at = from.datasets.find(name); at != from.datasets.end()) return &at->second;
    auto dataset = open_dataset(from.file.get(), name);
    if (!dataset) return nullptr;
    return &from.datasets.emplace(name, std::move(*dataset)).first->second;
  }

  const Handle& dataset(std::size_t index, const std::string& name) {
    if (const Handle* found = find_dataset(index, name)) return *found;
    throw IoError("dataset " + name + " is missing");
  }

  ActivationInfo check_shard(std::size_t index) {
    OpenShard& own_file = shard(index);
    store::check_text_heaps(files[index]);
    ActivationInfo own = store::read_info(own_file.file.get());
    if (!own.complete)
      throw IoError("is not complete: its writing was interrupted (resume or repeat it)");
    const auto rows = static_cast<hsize_t>(own.num_tokens) * static_cast<hsize_t>(own.kv_heads);
    for (int layer = 0; layer < own.num_layers; ++layer)
      for (Kind kind : kBothKinds) {
        const std::string name = store::vectors_name(layer, kind);
        check_dataset(dataset(index, name),
                      name,
                      {rows, static_cast<hsize_t>(own.head_dim)},
                      own.half ? Element::kHalf : Element::kFloat);
      }
    return own;
  }

  void check_fits(const ActivationInfo& other, const std::string& other_file) const {
    const auto same = [&](const char* name, const auto& a, const auto& b) {
      if (a == b) return;
      std::ostringstream text;
      text << other_file << ": attribute '" << name << "' is " << b << ", but " << a << " in "
           << files.front();
      throw IoError(text.str());
    };
    same("model_sha256", info.model_sha256, other.model_sha256);
    same("num_layers", info.num_layers, other.num_layers);
    same("kv_heads", info.kv_heads, other.kv_heads);
    same("head_dim", info.head_dim, other.head_dim);
    same("key_stage",
         std::string(lexico::name_of(info.key_stage)),
         std::string(lexico::name_of(other.key_stage)));
    same("dtype",
         std::string(info.half ? "float16" : "float32"),
         std::string(other.half ? "float16" : "float32"));
  }

  /// A folder is one run: all shards of one plan, none twice.
  void check_whole(const std::string& folder, const std::vector<ActivationInfo>& infos) const {
    std::vector<int> seen(static_cast<std::size_t>(infos.size()), -1);
    for (std::size_t i = 0; i < infos.size(); ++i) {
      if (infos[i].plan_hash != infos[0].plan_hash)
        throw IoError(files[i] + ": attribute 'plan_hash' differs from that in " + files[0] +
                      ": they are of different runs (name them by a glob to read both)");
      const int index = infos[i].shard_index;
      if (index >= infos[i].shard_count || infos[i].shard_count != infos[0].shard_count)
        throw IoError(files[i] + ": is shard " + std::to_string(index) + " of " +
                      std::to_string(infos[i].shard_count) + ", in " + files[0] + " there are " +
                      std::to_string(infos[0].shard_count));
      if (static_cast<std::size_t>(index) >= seen.size()) continue;
      if (seen[static_cast<std::size_t>(index)] >= 0)
        throw IoError(files[i] + ": is shard " + std::to_string(index) + ", and so is " +
                      files[static_cast<std::size_t>(seen[static_cast<std::size_t>(index)])]);
      seen[static_cast<std::size_t>(index)] = static_cast<int>(i);
    }
    if (static_cast<int>(infos.size()) < infos[0].shard_count)
      throw IoError(folder + ": holds " + std::to_string(infos.size()) + " of " +
                    std::to_string(infos[0].shard_count) +
                    " shards (resume the extraction, or name the files by a glob)");
  }

  std::size_t shard_of(std::int64_t token) const {
    const auto after =
        std::upper_bound(shards.begin(), shards.end(), token, [](std::int64_t t, const Shard& s) {
          return t < s.first_token;
        });
    return static_cast<std::size_t>(after - shards.begin()) - 1;
  }

  void check_layer(int layer) const {
    if (layer < 0 || layer >= info.num_layers)
      detail::throw_invalid("layer is ", layer, ", must be in [0, ", info.num_layers, ")");
  }

  /// Splits [first, first + count) of `scale` rows per token over the shards; calls part(shard, row
  /// in it, rows, done).
  template <typename Part>
  void for_parts(std::int64_t first, std::int64_t count, std::int64_t scale, const Part& part) {
    const std::int64_t all = info.num_tokens * scale;
    if (first < 0 || count < 0 || first > all - count)
      detail::throw_invalid("rows [", first, ", ", first, " + ", count, ") of ", all);
    for (std::int64_t done = 0; done < count;) {
      const std::size_t index = shard_of((first + done) / scale);
      const std::int64_t row = first + done - shards[index].first_token * scale;
      const std::int64_t rows = std::min(count - done, shards[index].num_tokens * scale - row);
      with_name(files[index], [&] { part(index, row, rows, done); });
      done += rows;
    }
  }

  void read_vectors(int layer,
                    Kind kind,
                    std::int64_t first,
                    std::int64_t count,
                    hid_t memory_type,
                    std::size_t element_bytes,
                    void* out) {
    const std::string name = store::vectors_name(layer, kind);
    const auto dim = static_cast<hsize_t>(info.head_dim);
    for_parts(first,
              count,
              info.kv_heads,
              [&](std::size_t index, std::int64_t row, std::int64_t rows, std::int64_t done) {
                read_rows(dataset(index, name),
                          name,
                          memory_type,
                          {static_cast<hsize_t>(row), 0},
                          {static_cast<hsize_t>(rows), dim},
                          static_cast<std::byte*>(out) +
                              static_cast<std::size_t>(done) * dim * element_bytes);
              });
  }
};

ActivationReader::ActivationReader(const std::string& file_folder_or_glob)
    : impl_(std::make_unique<Impl>()) {
  Impl& self = *impl_;
  self.files = files_in(file_folder_or_glob);
  const Hdf5Session session;
  self.half = store::half_type();
  std::vector<ActivationInfo> infos;
  std::int64_t tokens = 0;
  for (std::size_t i = 0; i < self.files.size(); ++i) {
    infos.push_back(with_name(self.files[i], [&] { return self.check_shard(i); }));
    const ActivationInfo& own = infos.back();
    if (i == 0)
      self.info = own;
    else
      self.check_fits(own, self.files[i]);
    for (const auto& name : own.corpora)
      if (std::find(self.info.corpora.begin(), self.info.corpora.end(), name) ==
          self.info.corpora.end())
        self.info.corpora.push_back(name);
    self.shards.push_back({tokens, own.num_tokens, own.batch_sequences});
    tokens += own.num_tokens;
  }
  self.info.num_tokens = tokens;
  describe(self.info, self.files);
  if (std::filesystem::is_directory(file_folder_or_glob))
    self.check_whole(file_folder_or_glob, infos);
}

ActivationReader::~ActivationReader() = default;
ActivationReader::ActivationReader(ActivationReader&&) noexcept = default;
ActivationReader& ActivationReader::operator=(ActivationReader&&) noexcept = default;

void ActivationReader::read_stored(
    int layer, Kind kind, std::int64_t first, std::int64_t count, float* out) {
  impl_->read_stored(layer, kind, first, count, out);
}

void ActivationReader::read_stored_half(
    int layer, Kind kind, std::int64_t first, std::int64_t count, std::uint16_t* out) {
  impl_->check_layer(layer);
  impl_->read_stored_half(layer, kind, first, count, out);
}

void ActivationReader::read_positions(std::int64_t first_token,
                                      std::int64_t count,
                                      std::int32_t* out) {
  read_tokens(first_token, count, nullptr, out, nullptr);
}

std::vector<std::int64_t> ActivationReader::batch_starts() {
  constexpr std::int64_t kPiece = 1 << 18;
  std::vector<std::int64_t> starts;
  std::vector<std::int32_t> positions;
  for (const Impl::Shard& shard : impl_->shards) {
    if (shard.batch_sequences == 0) return {};
    BatchRule rule(shard.batch_sequences);
    std::int64_t sequence = shard.first_token;  // where the one in work starts
    const auto end_sequence = [&](std::int64_t end) {
      if (rule.starts_batch(end - sequence)) starts.push_back(sequence);
      sequence = end;
    };
    const std::int64_t end = shard.first_token + shard.num_tokens;
    for (std::int64_t first = shard.first_token; first < end; first += kPiece) {
      positions.resize(static_cast<std::size_t>(std::min(kPiece, end - first)));
      read_tokens(
          first, static_cast<std::int64_t>(positions.size()), nullptr, positions.data(), nullptr);
      for (std::size_t i = 0; i < positions.size(); ++i)
        if (const auto at = first + static_cast<std::int64_t>(i);
            positions[i] == 0 && at > sequence)
          end_sequence(at);
    }
    if (end > sequence) end_sequence(end);
  }
  return starts;
}

void ActivationReader::Impl::read_stored(
    int layer, Kind kind, std::int64_t first, std::int64_t count, float* out) {
  check_layer(layer);
  if (!info.half) {
    const Hdf5Session session;
    read_vectors(layer, kind, first, count, H5T_IEEE_F32LE, sizeof(float), out);
    return;
  }
  // HDF5 converts half 50 times slower than we do: read in pieces that stay in the cache, then
  // convert.
  constexpr std::int64_t kPiece = 8 * store::kChunkRows;
  const auto dim = static_cast<std::size_t>(info.head_dim);
  if (count <= 0) {
    read_stored_half(layer, kind, first, count, nullptr);  // only checks the range
    return;
  }
  scratch.resize(static_cast<std::size_t>(std::min(count, kPiece)) * dim);
  for (std::int64_t done = 0; done < count; done += kPiece) {
    const std::int64_t rows = std::min(kPiece, count - done);
    read_stored_half(layer, kind, first + done, rows, scratch.data());
    store::to_float(scratch.data(),
                    static_cast<std::size_t>(rows) * dim,
                    out + static_cast<std::size_t>(done) * dim);
  }
}

void ActivationReader::Impl::read_stored_half(
    int layer, Kind kind, std::int64_t first, std::int64_t count, std::uint16_t* out) {
  const Hdf5Session session;
  read_vectors(layer, kind, first, count, half.get(), sizeof(std::uint16_t), out);
}

void ActivationReader::read_tokens(std::int64_t first,
                                   std::int64_t count,
                                   std::int32_t* id,
                                   std::int32_t* position,
                                   std::int32_t* document) {
  Impl& self = *impl_;
  const std::array<std::int32_t*, 3> outs = {id, position, document};
  const Hdf5Session session;
  for (std::size_t field = 0; field < outs.size(); ++field) {
    if (outs[field] == nullptr) continue;
    const std::string name = store::tokens_name(store::kTokenFields[field]);
    self.for_parts(first,
                   count,
                   1,
                   [&](std::size_t index, std::int64_t row, std::int64_t rows, std::int64_t done) {
                     const Handle& dataset = self.dataset(index, name);
                     check_dataset(dataset,
                                   name,
                                   {static_cast<hsize_t>(self.shards[index].num_tokens)},
                                   Element::kInt32);
                     read_rows(dataset,
                               name,
                               H5T_NATIVE_INT32,
                               {static_cast<hsize_t>(row)},
                               {static_cast<hsize_t>(rows)},
                               outs[field] + done);
                   });
  }
}

std::vector<float> ActivationReader::query_second_moment(int layer) {
  Impl& self = *impl_;
  self.check_layer(layer);
  const auto heads = static_cast<hsize_t>(self.info.kv_heads);
  const auto dim = static_cast<hsize_t>(self.info.head_dim);
  const std::string name = store::moment_name(layer);
  std::vector<double> sum;
  std::vector<float> own;
  const Hdf5Session session;
  for (std::size_t i = 0; i < self.files.size(); ++i) {
    const bool found = with_name(self.files[i], [&] {
      const Handle* dataset = self.find_dataset(i, name);
      if (dataset == nullptr) return false;
      check_dataset(*dataset, name, {heads, dim, dim}, Element::kFloat);
      own.resize(heads * dim * dim);
      sum.resize(own.size());
      read_rows(*dataset, name, H5T_NATIVE_FLOAT, {0, 0, 0}, {heads, dim, dim}, own.data());
      return true;
    });
    if (!found) return {};
    const double weight = static_cast<double>(self.shards[i].num_tokens) /
                          static_cast<double>(std::max<std::int64_t>(self.info.num_tokens, 1));
    for (std::size_t j = 0; j < sum.size(); ++j) sum[j] += weight * static_cast<double>(own[j]);
  }
  return {sum.begin(), sum.end()};
}

}  // namespace lexico
