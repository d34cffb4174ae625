// 10,000 sequences of random operations on a compressed cache, against one that keeps everything.
// The first 300 are in compressed_cache_test.cpp.
#include "core/cache_operations.h"

namespace lexico {
namespace {

TEST(CompressedCacheAtLength, TenThousandSequencesOfRandomOperationsAgreeWithTheModel) {
  run_cache_operations(0, 10000);
}

}  // namespace
}  // namespace lexico
