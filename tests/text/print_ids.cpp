// print_ids TOKENIZER.json TEXTS IDS: encodes each text of TEXTS and writes its ids to IDS. In both
// files a record is a uint32 count, then so many bytes or int32 ids. Used by
// compare_with_tokenizers.py.
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "lexico/error.h"
#include "lexico/tokenizer.h"

int main(int argc, char** argv) {
  if (argc != 4) return 2;
  try {
    const lexico::Tokenizer tokenizer = lexico::Tokenizer::from_file(argv[1]);
    std::ifstream texts(argv[2], std::ios::binary);
    std::ofstream out(argv[3], std::ios::binary);
    std::uint32_t size = 0;
    std::string text;
    std::vector<std::int32_t> ids;
    double seconds = 0, num_bytes = 0;
    while (texts.read(reinterpret_cast<char*>(&size), sizeof size)) {
      text.resize(size);
      texts.read(text.data(), size);
      ids.clear();
      const auto start = std::chrono::steady_clock::now();
      tokenizer.encode(text, ids);
      seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
      num_bytes += size;
      const auto count = static_cast<std::uint32_t>(ids.size());
      out.write(reinterpret_cast<const char*>(&count), sizeof count);
      out.write(reinterpret_cast<const char*>(ids.data()),
                static_cast<std::streamsize>(ids.size() * sizeof(std::int32_t)));
    }
    std::printf("%.1f MB/s\n", num_bytes / 1e6 / seconds);
    return out.flush() ? 0 : 4;
  } catch (const lexico::Error& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 3;
  }
}
