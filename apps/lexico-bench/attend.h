#pragma once

namespace lexico::apps {

/// `lexico-bench attend`; argv[0] is the word attend. Returns the exit code.
int attend_main(int argc, char** argv);

}  // namespace lexico::apps
