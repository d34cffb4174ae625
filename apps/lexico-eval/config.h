#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "common/model_text.h"

namespace lexico::apps {

/// The options of lexico-eval.
struct EvalConfig : ModelTextConfig {
  std::vector<std::string> dictionary, data, text, token_ids, ood;
  std::string fit;
  std::vector<double> bits{1, 2, 3, 4, 5};
  std::int64_t fit_vectors = 32768, autoencoder_vectors = 0;
  std::string layers = "all", selection = "omp", output;
  std::vector<int> sparsity{4, 8, 16}, position_offset;
  std::int64_t max_vectors = 65536;
  int threads = 0;
  double tolerance = 0;
  std::uint64_t seed = 0;
  std::vector<int> recent_window, sink_tokens{0};
  std::vector<double> adaptive_threshold{0}, budget;
  std::vector<std::string> coding{"file", "fp8-int16", "fitted"};
  int adaptive_atoms = 64, compress_chunk = 1, chunk = 0;
  std::int64_t perplexity_tokens = 12288;
  bool sparse_autoencoder = false, perplexity = false, no_baselines = false, overwrite = false,
       dry_run = false, json = false;

  template <typename Self, typename Visitor>
  static void for_each_field(Self& self, Visitor&& visit) {
    visit("dictionary",
          self.dictionary,
          "[name=]FILE or run folder of lexico-train (.safetensors or .pt); several are compared");
    visit("data",
          self.data,
          "[name=]PATH of in-domain data: activations (file, folder, 'glob'), text or token ids");
    visit("ood", self.ood, "[name=]PATH of out-of-domain data, of the same kinds");
    visit("text", self.text, "[name=]FILE of in-domain text, whatever its name");
    visit("token_ids", self.token_ids, "[name=]FILE of in-domain token ids, whatever its name");
    ModelTextConfig::for_each_field(self, visit);
    visit("fit",
          self.fit,
          "training data (activations or text) to fit codes on: adds the best code of each "
          "dictionary and PCA "
          "transform coding at each of bits");
    visit("bits", self.bits, "bits per number at which coders are compared");
    visit("sparse_autoencoder",
          self.sparse_autoencoder,
          "also train a top-k sparse autoencoder on the activations of fit: as many latents as the "
          "dictionary has "
          "atoms, the middle one of sparsity; minutes");
    visit("autoencoder_vectors",
          self.autoencoder_vectors,
          "vectors of each layer and kind it learns from; 0: max(2e6, 2000 latents)");
    visit(
        "fit_vectors", self.fit_vectors, "vectors of each layer and kind that codes are fitted on");
    visit("perplexity",
          self.perplexity,
          "also run the model on the texts with its cache compressed by each coder: perplexity and "
          "KL of the next token");
    visit("coding",
          self.coding,
          "perplexity: how dictionaries code: 'file' (the packed format in the file), 'fp8-int16' "
          "(at each of sparsity), 'fitted' (with fit: at each of bits)");
    visit("recent_window",
          self.recent_window,
          "perplexity: latest tokens that stay exact; none given: 32, with budget a range");
    visit("sink_tokens", self.sink_tokens, "perplexity: first tokens that stay exact");
    visit("adaptive_threshold",
          self.adaptive_threshold,
          "perplexity: relative error from which on a vector joins the sequence's own atoms; 0: "
          "off");
    visit("adaptive_atoms",
          self.adaptive_atoms,
          "perplexity: own atoms a sequence may have, per layer and kind");
    visit("compress_chunk", self.compress_chunk, "perplexity: tokens compressed at once, at least");
    visit("budget",
          self.budget,
          "perplexity at this part of the full cache's fp16 bytes, as 0.2: trades the window "
          "against atoms, and atoms of keys against those of values, in place of the lists");
    visit("chunk",
          self.chunk,
          "perplexity: tokens read at once; 0: the smallest recent_window (or 32), with budget 8; "
          "1: token by token");
    visit("perplexity_tokens",
          self.perplexity_tokens,
          "perplexity: tokens of each text, in whole sequences; 0: all");
    visit("layers", self.layers, "layers to measure: all, or numbers like 0,2,5-7");
    visit("sparsity", self.sparsity, "numbers of atoms per vector to measure at");
    visit("position_offset",
          self.position_offset,
          "also measure the keys of in-domain data as if they came so many positions later");
    visit("max_vectors",
          self.max_vectors,
          "vectors per data set, layer and kind, evenly spread; 0: all");
    visit("selection",
          self.selection,
          "omp, ols, or ols-N (OLS among N candidates; among all of up to 64 N atoms)");
    visit("tolerance", self.tolerance, "stop a vector once |r| <= tolerance * |x|; 0: never");
    visit("no_baselines", self.no_baselines, "leave out the random and the sample dictionary");
    visit("output", self.output, "folder for report.json, report.csv and report.html");
    visit("overwrite", self.overwrite, "replace a report in OUTPUT");
    visit("json", self.json, "print the report as JSON on stdout instead of a table");
    visit("dry_run", self.dry_run, "check the inputs, print the plan and stop");
    visit("threads", self.threads, "of the CPU; 0: all the machine has");
    visit("seed", self.seed, "of the random dictionary");
  }

  /// Sorts the sparsities, each once. @throws InvalidArgument naming the option, its value and its
  /// bound.
  void validate();
};

}  // namespace lexico::apps
