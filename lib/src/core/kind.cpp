#include "lexico/kind.h"

#include "check.h"

namespace lexico {

KeyStage key_stage_from(const std::string& name) {
  for (KeyStage stage : {KeyStage::kPostRope, KeyStage::kPreRope})
    if (name == name_of(stage)) return stage;
  detail::throw_invalid("key stage is '", name, "', must be post_rope or pre_rope");
}

}  // namespace lexico
