#include "hdf5_handles.h"

#include <cstring>

#include "lexico/error.h"

namespace lexico::store {
namespace {

std::mutex& hdf5_mutex() {
  static std::mutex mutex;
  // HDF5 would try at exit to flush a file whose disk is full, again and again. We close what we
  // open ourselves.
  static const herr_t no_atexit = H5dont_atexit();
  (void)no_atexit;
  return mutex;
}

void must(bool ok, const char* name) {
  if (!ok)
    throw ResourceError("cannot write attribute '" + std::string(name) + "': " + hdf5_reason());
}

Handle text_type() {
  Handle type(H5Tcopy(H5T_C_S1), H5Tclose);
  H5Tset_size(type.get(), H5T_VARIABLE);
  H5Tset_cset(type.get(), H5T_CSET_UTF8);
  return type;
}

void write(hid_t object, const char* name, hid_t type, const Handle& space, const void* data) {
  Handle attribute(H5Acreate2(object, name, type, space.get(), H5P_DEFAULT, H5P_DEFAULT), H5Aclose);
  must(attribute && H5Awrite(attribute.get(), type, data) >= 0, name);
}

Handle vector_space(std::size_t size) {
  const hsize_t dim = size;
  return {H5Screate_simple(1, &dim, nullptr), H5Sclose};
}
Handle scalar_space() { return {H5Screate(H5S_SCALAR), H5Sclose}; }

/// An attribute open for reading, and how many elements it holds.
struct Attribute {
  Handle id, type;
  std::size_t size = 0;
  H5T_class_t type_class = H5T_NO_CLASS;
};

[[noreturn]] void wrong(const char* name, const std::string& what) {
  throw IoError("attribute '" + std::string(name) + "' " + what);
}

std::optional<Attribute> open(hid_t object, const char* name) {
  const htri_t exists = H5Aexists(object, name);
  if (exists < 0) wrong(name, "cannot be read: " + hdf5_reason());
  if (exists == 0) return std::nullopt;
  Attribute a;
  a.id = Handle(H5Aopen(object, name, H5P_DEFAULT), H5Aclose);
  if (!a.id) wrong(name, "cannot be read: " + hdf5_reason());
  a.type = Handle(H5Aget_type(a.id.get()), H5Tclose);
  Handle space(H5Aget_space(a.id.get()), H5Sclose);
  const hssize_t points = space ? H5Sget_simple_extent_npoints(space.get()) : -1;
  if (!a.type || points < 0) wrong(name, "cannot be read: " + hdf5_reason());
  a.type_class = H5Tget_class(a.type.get());
  // Ours are small; a damaged size must not become a huge allocation.
  if (points > (1 << 20) || H5Tget_size(a.type.get()) > (1u << 24) ||
      static_cast<std::size_t>(points) * H5Tget_size(a.type.get()) > (1u << 26))
    wrong(name, "is too large");
  a.size = static_cast<std::size_t>(points);
  return a;
}

}  // namespace

Hdf5Session::Hdf5Session() : lock_(hdf5_mutex()) {
  H5Eget_auto2(H5E_DEFAULT, &print_, &print_data_);
  H5Eset_auto2(H5E_DEFAULT, nullptr, nullptr);
}
Hdf5Session::~Hdf5Session() { H5Eset_auto2(H5E_DEFAULT, print_, print_data_); }

std::string hdf5_reason() {
  std::string reason;
  const auto take_first = [](unsigned, const H5E_error2_t* error, void* to) -> herr_t {
    auto& text = *static_cast<std::string*>(to);
    if (text.empty() && error->desc != nullptr) text = error->desc;
    return 0;
  };
  H5Ewalk2(H5E_DEFAULT, H5E_WALK_UPWARD, take_first, &reason);
  H5Eclear2(H5E_DEFAULT);
  // A failed system call reads "file write failed: time = ..., error message = 'No space left on
  // device', ...".
  constexpr const char* kMark = "error message = '";
  if (const auto at = reason.find(kMark); at != std::string::npos) {
    const auto from = at + std::strlen(kMark);
    return reason.substr(from, reason.find('\'', from) - from);
  }
  return reason.empty() ? "HDF5 gives no reason" : reason;
}

Handle half_type() {
  Handle type(H5Tcopy(H5T_IEEE_F32LE), H5Tclose);
  H5Tset_fields(type.get(), 15, 10, 5, 0, 10);
  H5Tset_size(type.get(), 2);
  H5Tset_ebias(type.get(), 15);
  return type;
}

void write_attribute(hid_t object, const char* name, const std::string& value) {
  const char* text = value.c_str();
  write(object, name, text_type().get(), scalar_space(), &text);
}
void write_attribute(hid_t object, const char* name, const std::vector<std::string>& values) {
  std::vector<const char*> texts;
  texts.reserve(values.size());
  for (const auto& value : values) texts.push_back(value.c_str());
  write(object, name, text_type().get(), vector_space(texts.size()), texts.data());
}
void write_attribute(hid_t object, const char* name, std::int64_t value) {
  write(object, name, H5T_NATIVE_INT64, scalar_space(), &value);
}
void write_attribute(hid_t object, const char* name, std::uint64_t value) {
  write(object, name, H5T_NATIVE_UINT64, scalar_space(), &value);
}
void write_attribute(hid_t object, const char* name, const std::vector<std::int64_t>& values) {
  write(object, name, H5T_NATIVE_INT64, vector_space(values.size()), values.data());
}

std::optional<std::vector<std::string>> read_texts(hid_t object, const char* name) {
  auto attribute = open(object, name);
  if (!attribute) return std::nullopt;
  if (attribute->type_class != H5T_STRING) wrong(name, "is no text");
  std::vector<std::string> texts;
  const hid_t type = attribute->type.get();
  if (H5Tis_variable_str(type) > 0) {
    std::vector<char*> pointers(attribute->size, nullptr);
    const Handle memory_type = text_type();
    H5Tset_cset(memory_type.get(), H5Tget_cset(type));
    const bool ok = H5Aread(attribute->id.get(), memory_type.get(), pointers.data()) >= 0;
    for (char* pointer : pointers) {
      texts.emplace_back(pointer != nullptr ? pointer : "");
      H5free_memory(pointer);
    }
    if (!ok) wrong(name, "cannot be read: " + hdf5_reason());
  } else {
    const std::size_t width = H5Tget_size(type);
    std::vector<char> bytes(width * attribute->size + 1);
    if (H5Aread(attribute->id.get(), type, bytes.data()) < 0)
      wrong(name, "cannot be read: " + hdf5_reason());
    for (std::size_t i = 0; i < attribute->size; ++i) {
      const char* text = bytes.data() + i * width;
      texts.emplace_back(text, strnlen(text, width));
    }
  }
  return texts;
}

std::optional<std::string> read_text(hid_t object, const char* name) {
  auto texts = read_texts(object, name);
  if (!texts) return std::nullopt;
  if (texts->size() != 1) wrong(name, "is no single text");
  return std::move(texts->front());
}

std::optional<std::vector<std::int64_t>> read_integers(hid_t object, const char* name) {
  auto attribute = open(object, name);
  if (!attribute) return std::nullopt;
  std::vector<std::int64_t> values(attribute->size);
  if (attribute->type_class == H5T_ENUM && H5Tget_size(attribute->type.get()) == 1) {
    std::vector<std::int8_t> flags(attribute->size);  // what h5py makes of a bool
    if (H5Aread(attribute->id.get(), attribute->type.get(), flags.data()) < 0)
      wrong(name, "cannot be read: " + hdf5_reason());
    values.assign(flags.begin(), flags.end());
  } else {
    if (attribute->type_class != H5T_INTEGER) wrong(name, "is no integer");
    // H5T_NATIVE_INT64 would saturate a large unsigned value; the bits are kept instead.
    const bool is_unsigned = H5Tget_sign(attribute->type.get()) == H5T_SGN_NONE;
    if (H5Aread(attribute->id.get(),
                is_unsigned ? H5T_NATIVE_UINT64 : H5T_NATIVE_INT64,
                values.data()) < 0)
      wrong(name, "cannot be read: " + hdf5_reason());
  }
  return values;
}

std::optional<std::int64_t> read_integer(hid_t object, const char* name) {
  auto values = read_integers(object, name);
  if (!values) return std::nullopt;
  if (values->size() != 1) wrong(name, "is no single integer");
  return values->front();
}

}  // namespace lexico::store
