#pragma once

#include <string>

namespace lexico {

/// The two streams of vectors an attention layer caches, each with a dictionary of its own.
enum class Kind { kKeys = 0, kValues = 1 };
inline constexpr Kind kBothKinds[] = {Kind::kKeys, Kind::kValues};
inline const char* name_of(Kind kind) { return kind == Kind::kKeys ? "keys" : "values"; }

/// Keys as the cache holds them, or with the rotation of RoPE undone.
enum class KeyStage { kPostRope, kPreRope };
inline const char* name_of(KeyStage stage) {
  return stage == KeyStage::kPostRope ? "post_rope" : "pre_rope";
}
/// @throws InvalidArgument unless `name` is "post_rope" or "pre_rope".
KeyStage key_stage_from(const std::string& name);

}  // namespace lexico
