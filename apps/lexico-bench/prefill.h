#pragma once

namespace lexico::apps {

/// `lexico-bench prefill`; argv[0] is the word prefill. Returns the exit code.
int prefill_main(int argc, char** argv);

}  // namespace lexico::apps
