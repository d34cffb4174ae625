// A compressed cache, against one that keeps everything (cache_model.h), and at its limits.
#include "lexico/compressed_cache.h"

#include <gtest/gtest.h>

#include "core/cache_operations.h"
#include "lexico/error.h"

namespace lexico {
namespace {

TEST(CompressedCache, RandomOperationsAgreeWithTheModel) { run_cache_operations(0, 300); }

}  // namespace
}  // namespace lexico
