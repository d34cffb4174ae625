// Which caches lexico-eval measures, and what they take.
#include "lexico-eval/cache_settings.h"

#include <algorithm>
#include <cmath>
#include <set>

#include "common/options.h"
#include "common/report/text.h"
#include "lexico/error.h"

namespace lexico::apps {
namespace {

using report::print;

constexpr int kFp8Bits = 8, kFloatBits = 32;
constexpr int kPageSlack = 32;  // bytes a page has beside its codes (docs/cache.md)
constexpr int kHalfBytes = 2;
constexpr std::size_t kMostWindows = 8;
constexpr const char* kRotation = "rotation + Lloyd-Max";

/// Parts of the codes' bytes that keys get in a budget sweep.
struct Split {
  const char* name;
  double keys;
};
constexpr Split kSplits[] = {{"keys 1/4", 0.25},
                             {"keys 3/8", 0.375},
                             {"keys 1/2", 0.5},
                             {"keys 5/8", 0.625},
                             {"keys 3/4", 0.75}};

int heads_of(const Place& place, const ModelInfo& model) {
  return std::get<2>(place) == Dictionary::kAllHeads ? model.kv_heads : 1;
}

bool is_whole(const std::map<Place, PlaceCode>& places, const ModelInfo& model) {
  int heads = 0;
  for (const auto& [place, code] : places) heads += heads_of(place, model);
  return heads == 2 * model.layers * model.kv_heads;
}

/// Codes of one rate for every place of one kind, or both.
struct Rung {
  std::map<Place, PlaceCode> places;
  int atoms = 0;
};

int atoms_of(const std::map<Place, PlaceCode>& places, Kind kind) {
  std::set<int> found;
  for (const auto& [place, code] : places)
    if (std::get<1>(place) == kind) found.insert(code.format ? code.format->max_atoms : 0);
  return found.size() == 1 ? *found.begin() : 0;
}

PlaceCode code_of(const RateCoder& coder) {
  PlaceCode code;
  code.dictionary = coder.dictionary;
  if (coder.dictionary != nullptr)
    code.format = coder.format;
  else
    code.coder = coder.coder;
  return code;
}

bool is_wanted(const EvalConfig& config, const RateCoder& coder) {
  return coder.coding.empty() ||
         std::find(config.coding.begin(), config.coding.end(), coder.coding) != config.coding.end();
}

/// Coders of one name go together if they have the same bits, or if there is one for each place.
std::vector<CacheSettings> whole_caches(const EvalConfig& config,
                                        const std::vector<RateCoder>& coders,
                                        const ModelInfo& model) {
  std::vector<std::string> names;
  std::map<std::string, std::map<int, std::vector<const RateCoder*>>> by_bits;
  for (const RateCoder& coder : coders) {
    if (!is_wanted(config, coder)) continue;
    if (!by_bits.count(coder.name)) names.push_back(coder.name);
    by_bits[coder.name][coder.coder->bits_per_vector()].push_back(&coder);
  }
  std::vector<CacheSettings> found;
  const auto add_if_whole = [&](const std::string& name, const std::vector<const RateCoder*>& of) {
    CacheSettings cache;
    cache.coder = name;
    cache.key_stage = of.front()->key_stage;
    for (const RateCoder* coder : of)
      if (!cache.places.emplace(Place{coder->layer, coder->kind, coder->head}, code_of(*coder))
               .second)
        return false;  // several rates
    if (!is_whole(cache.places, model)) return false;
    cache.key_atoms = atoms_of(cache.places, Kind::kKeys);
    cache.value_atoms = atoms_of(cache.places, Kind::kValues);
    found.push_back(std::move(cache));
    return true;
  };
  for (const std::string& name : names) {
    std::vector<const RateCoder*> all;
    for (const auto& [bits, of] : by_bits[name]) all.insert(all.end(), of.begin(), of.end());
    if (add_if_whole(name, all)) continue;
    for (const auto& [bits, of] : by_bits[name]) add_if_whole(name, of);
  }
  return found;
}

bool rotation_has(int dim, int bits) { return bits >= 16 + (dim + 3) / 4 && bits <= 16 + 8 * dim; }

/// Random rotations with as many bits in each place as `like` has. Empty if one cannot be had.
CacheSettings rotation_like(const CacheSettings& like, const ModelInfo& model, std::uint64_t seed) {
  CacheSettings twin;
  twin.coder = kRotation;
  twin.key_stage = like.key_stage;
  for (const auto& [place, code] : like.places) {
    const int bits = code.bits(0);
    if (!rotation_has(model.head_dim, bits)) return {};
    twin.places[place].coder = rotation_coder(model.head_dim, bits, seed);
  }
  return twin;
}

std::vector<int> all_bits(const CacheSettings& settings) {
  std::vector<int> bits;
  for (const auto& [place, code] : settings.places) bits.push_back(code.bits(0));
  return bits;
}

bool can_adapt(const std::map<Place, PlaceCode>& places) {
  return std::all_of(places.begin(), places.end(), [](const auto& place) {
    return place.second.format && place.second.format->max_atoms > 0;
  });
}

constexpr const char* kCannotAdapt =
    ": not adaptive, for in some layer it has no atoms for own ones to join";

void require_something_to_compress(const CacheSettings& settings,
                                   const std::vector<TextLengths>& texts) {
  for (const TextLengths& text : texts) {
    const std::int64_t longest = *std::max_element(text.lengths.begin(), text.lengths.end());
    const std::int64_t exact = std::int64_t{settings.recent_window} + settings.sink_tokens;
    if (exact >= longest)
      throw InvalidArgument("recent_window is " + std::to_string(settings.recent_window) +
                            (settings.sink_tokens > 0
                                 ? " and sink_tokens " + std::to_string(settings.sink_tokens)
                                 : "") +
                            ", but the longest sequence of " + text.name + " has " +
                            std::to_string(longest) + " tokens: nothing would be compressed");
  }
}

// ---- a sweep at a fixed budget -----------------------------------------------------------------

/// What can be had at several rates, ascending.
struct Ladder {
  std::string coder;
  KeyStage key_stage = KeyStage::kPostRope;
  std::vector<Rung> keys, values;
  bool splits = true;  ///< keys and values apart
};

class Budget {
 public:
  Budget(const EvalConfig& config,
         const ModelInfo& model,
         const std::vector<TextLengths>& texts,
         std::vector<std::string>& notes)
      : config_(config), model_(model), texts_(texts), notes_(notes) {}

  std::vector<CacheSettings> sweep(const std::vector<Ladder>& ladders) {
    std::vector<CacheSettings> found;
    double least = 1e30;
    bool dictionaries_fit = false;
    for (Ladder ladder : ladders) {
      const bool adapts = ladder.keys.front().places.begin()->second.dictionary != nullptr &&
                          config_.adaptive_threshold.front() > 0;
      if (adapts) {
        std::erase_if(ladder.keys, [](const Rung& rung) { return !can_adapt(rung.places); });
        std::erase_if(ladder.values, [](const Rung& rung) { return !can_adapt(rung.places); });
        if (ladder.keys.empty() || ladder.values.empty()) {
          notes_.push_back(ladder.coder + kCannotAdapt);
          continue;
        }
      }
      const CacheSettings smallest = settings(ladder, 0, 0, 0, adapts);
      const double share = largest_share(smallest);
      if (smallest.by_dictionaries()) least = std::min(least, share);
      if (share > budget()) {
        notes_.push_back(ladder.coder + ": the least it can take is " + share_text(share) +
                         " of the full cache, more than the budget");
        continue;
      }
      if (smallest.by_dictionaries()) dictionaries_fit = true;
      for (const int window : windows(ladder, adapts)) add_points(ladder, window, adapts, found);
    }
    if (least > 1e29)
      throw InvalidArgument("adaptive_threshold: no dictionary has an atom in every layer");
    if (!dictionaries_fit)
      throw InvalidArgument("budget is " + value_text(budget()) +
                            ", too small: the least possible is " + share_text(least) +
                            ", with no recent window and the fewest atoms");
    return found;
  }

 private:
  double budget() const { return config_.budget.front(); }

  /// Rounded up, so that asking for it works.
  static std::string share_text(double share) {
    return print("%.4f", std::ceil(share * 1e4) / 1e4);
  }

  CacheSettings settings(
      const Ladder& ladder, std::size_t keys, std::size_t values, int window, bool adapts) const {
    CacheSettings made;
    made.coder = ladder.coder;
    made.key_stage = ladder.key_stage;
    made.places = ladder.keys[keys].places;
    made.places.insert(ladder.values[values].places.begin(), ladder.values[values].places.end());
    made.key_atoms = ladder.keys[keys].atoms;
    made.value_atoms = ladder.values[values].atoms;
    made.recent_window = window;
    made.sink_tokens = config_.sink_tokens.front();
    made.compress_chunk = config_.compress_chunk;
    made.adaptive_threshold = adapts ? config_.adaptive_threshold.front() : 0;
    made.adaptive_atoms = adapts ? config_.adaptive_atoms : 0;
    return made;
  }

  double largest_share(const CacheSettings& settings) const {
    double largest = 0;
    for (const TextLengths& text : texts_)
      largest = std::max(
          largest,
          static_cast<double>(cache_bytes(settings, model_, text)) / full_bytes(model_, text));
    return largest;
  }
  bool fits(const CacheSettings& settings) const { return largest_share(settings) <= budget(); }

  /// Given ones, or 0 and powers of two, up to the largest with which the fewest atoms fit.
  std::vector<int> windows(const Ladder& ladder, bool adapts) const {
    std::vector<int> tried = config_.recent_window;
    if (tried.empty()) {
      tried = {0};
      for (int window = 8; window < 1 << 20; window *= 2) tried.push_back(window);
    }
    std::vector<int> fitting;
    for (const int window : tried) {
      const CacheSettings smallest = settings(ladder, 0, 0, window, adapts);
      if (fits(smallest)) fitting.push_back(window);
    }
    if (config_.recent_window.empty() && fitting.size() > kMostWindows) {  // 0 and the largest
      std::vector<int> fewer;
      for (std::size_t i = 0; i < kMostWindows; ++i)
        fewer.push_back(fitting[i * (fitting.size() - 1) / (kMostWindows - 1)]);
      fitting = fewer;
    }
    return fitting;
  }

  void add_points(const Ladder& ladder,
                  int window,
                  bool adapts,
                  std::vector<CacheSettings>& found) const {
    const auto with = [&](std::size_t keys, std::size_t values) {
      return settings(ladder, keys, values, window, adapts);
    };
    if (!ladder.splits) {
      std::size_t both = 0;
      while (both + 1 < ladder.keys.size() && fits(with(both + 1, both + 1))) ++both;
      found.push_back(with(both, both));
      found.back().split = ladder.coder;
      return;
    }
    const auto bits_of = [&](const Rung& rung) {
      double bits = 0;
      for (const auto& [place, code] : rung.places)
        bits += code.bits(adapts ? config_.adaptive_atoms : 0) * heads_of(place, model_);
      return bits;
    };
    // The most that codes may take, were there only keys: bits of a token in all layers.
    const double spare =
        (budget() - largest_share(with(0, 0))) * full_bytes(model_, 1) * 8 * coded_part(window) +
        bits_of(ladder.keys[0]) + bits_of(ladder.values[0]);
    std::set<std::pair<std::size_t, std::size_t>> taken;
    for (const Split& split : kSplits) {
      std::size_t keys = 0, values = 0;
      while (keys + 1 < ladder.keys.size() &&
             bits_of(ladder.keys[keys + 1]) <= split.keys * spare && fits(with(keys + 1, 0)))
        ++keys;
      while (values + 1 < ladder.values.size() && fits(with(keys, values + 1))) ++values;
      while (keys + 1 < ladder.keys.size() && fits(with(keys + 1, values))) ++keys;
      if (!taken.emplace(keys, values).second) continue;  // another split came to the same
      found.push_back(with(keys, values));
      found.back().split = split.name;
    }
  }

  /// Tokens read for each token that is coded.
  double coded_part(int window) const {
    double all = 0, coded = 0;
    for (const TextLengths& text : texts_)
      for (const std::int64_t length : text.lengths) {
        all += static_cast<double>(length);
        coded += static_cast<double>(
            std::max<std::int64_t>(1, length - window - config_.sink_tokens.front()));
      }
    return all / coded;
  }

  const EvalConfig& config_;
  const ModelInfo& model_;
  const std::vector<TextLengths>& texts_;
  std::vector<std::string>& notes_;
};

/// Formats of a dictionary at 1, 2, ... atoms.
Ladder atom_ladder(const Contender& contender, bool published) {
  Ladder ladder;
  ladder.coder = contender.coder.name + (published ? report::kPublishedSuffix : "");
  ladder.key_stage = contender.set.key_stage;
  for (const Kind kind : kBothKinds) {
    int most = published ? 1 << 20 : 0;
    for (const Dictionary& d : contender.set.dictionaries) {
      if (d.kind != kind) continue;
      most = published ? std::min({most, d.num_atoms, d.dim}) : std::max(most, d.format.max_atoms);
    }
    std::vector<Rung>& rungs = kind == Kind::kKeys ? ladder.keys : ladder.values;
    for (int atoms = 1; atoms <= most; ++atoms) {
      Rung rung;
      rung.atoms = atoms;
      for (const Dictionary& d : contender.set.dictionaries) {
        if (d.kind != kind) continue;
        CodeFormat format = published ? CodeFormat{} : d.format;
        if (published) format.coding = CodeFormat::Coding::kFp8Int16;
        format.max_atoms = published ? atoms : std::min(atoms, d.format.max_atoms);
        if (!published)
          format.weight_levels.resize(static_cast<std::size_t>(format.max_atoms)
                                      << format.weight_bits);
        PlaceCode& code = rung.places[{d.layer, d.kind, d.head}];
        code.dictionary = &d;
        code.format = std::make_shared<const CodeFormat>(std::move(format));
      }
      rungs.push_back(std::move(rung));
    }
  }
  return ladder;
}

/// Keys and values of whole caches at several rates.
Ladder ladder_of(std::vector<CacheSettings> rates, bool splits) {
  std::stable_sort(rates.begin(), rates.end(), [](const CacheSettings& a, const CacheSettings& b) {
    return a.places.begin()->second.bits(0) < b.places.begin()->second.bits(0);
  });
  Ladder ladder;
  ladder.splits = splits;
  for (const CacheSettings& rate : rates) {
    ladder.coder = rate.coder;
    ladder.key_stage = rate.key_stage;
    for (const Kind kind : kBothKinds) {
      Rung rung;
      rung.atoms = kind == Kind::kKeys ? rate.key_atoms : rate.value_atoms;
      for (const auto& [place, code] : rate.places)
        if (std::get<1>(place) == kind) rung.places.emplace(place, code);
      (kind == Kind::kKeys ? ladder.keys : ladder.values).push_back(std::move(rung));
    }
  }
  return ladder;
}

}  // namespace

int PlaceCode::bits(int own_atoms) const {
  if (dictionary == nullptr) return coder->bits_per_vector();
  const int atoms = dictionary->num_atoms + own_atoms;
  switch (format->coding) {
    case CodeFormat::Coding::kPacked:
      return format->bits_per_vector(atoms, dictionary->dim);
    case CodeFormat::Coding::kFp8Int16:
      return format->max_atoms * (index_bits(atoms) + kFp8Bits);
    case CodeFormat::Coding::kExact:
      return format->max_atoms * (index_bits(atoms) + kFloatBits);
  }
  return 0;
}

double CacheSettings::mean_bits(Kind kind, const ModelInfo& model) const {
  double bits = 0;
  for (const auto& [place, code] : places)
    if (std::get<1>(place) == kind) bits += code.bits(adaptive_atoms) * heads_of(place, model);
  return bits / (model.layers * model.kv_heads);
}

CompressedCache make_cache(const CacheSettings& settings,
                           const ModelInfo& model,
                           const EncodeOptions& encode) {
  DictionarySet set;
  set.key_stage = settings.key_stage;
  set.metadata["rope"] = model.rope.to_json();
  for (const auto& [place, code] : settings.places) {
    set.dictionaries.push_back(*code.dictionary);
    set.dictionaries.back().format = *code.format;
  }
  CacheOptions options;
  options.recent_window = settings.recent_window;
  options.compress_chunk = settings.compress_chunk;
  options.sink_tokens = settings.sink_tokens;
  options.keys.relative_tolerance = options.values.relative_tolerance = encode.relative_tolerance;
  options.selection = encode.selection;
  options.adaptive_threshold = static_cast<float>(settings.adaptive_threshold);
  options.adaptive_atoms = settings.adaptive_atoms;
  options.page_tokens = kCachePageTokens;
  options.threads = encode.threads;
  try {
    return CompressedCache(std::move(set), cache_shape(model), options);
  } catch (const InvalidArgument& error) {
    throw InvalidArgument(settings.coder + ": " + error.what());
  }
}

std::size_t cache_bytes(const CacheSettings& settings,
                        const ModelInfo& model,
                        std::int64_t tokens) {
  const std::int64_t ring = std::int64_t{settings.recent_window} + settings.compress_chunk - 1;
  const std::int64_t waiting = std::max<std::int64_t>(0, tokens - settings.sink_tokens);
  const std::int64_t coded = waiting > ring ? waiting - settings.recent_window : 0;
  const std::int64_t pages = (coded + kCachePageTokens - 1) / kCachePageTokens;
  std::int64_t bytes = 2 * kHalfBytes * (settings.sink_tokens + ring) * model.layers *
                       model.kv_heads * model.head_dim;
  std::set<std::pair<int, Kind>> layers;
  for (const auto& [place, code] : settings.places) {
    const auto& [layer, kind, head] = place;
    bytes += pages * heads_of(place, model) * code.bits(settings.adaptive_atoms) *
             (kCachePageTokens / 8);
    if (layers.emplace(layer, kind).second) bytes += pages * kPageSlack;
    bytes += std::int64_t{settings.adaptive_atoms} * model.head_dim * kHalfBytes;
  }
  return static_cast<std::size_t>(bytes);
}

double full_bytes(const ModelInfo& model, std::int64_t tokens) {
  return 2.0 * kHalfBytes * model.layers * model.kv_heads * model.head_dim *
         static_cast<double>(tokens);
}

std::size_t cache_bytes(const CacheSettings& settings,
                        const ModelInfo& model,
                        const TextLengths& text) {
  std::size_t sum = 0;
  for (const std::int64_t length : text.lengths) sum += cache_bytes(settings, model, length);
  return sum;
}

double full_bytes(const ModelInfo& model, const TextLengths& text) {
  double sum = 0;
  for (const std::int64_t length : text.lengths) sum += full_bytes(model, length);
  return sum;
}

std::vector<CacheSettings> listed_settings(const EvalConfig& config,
                                           const std::vector<RateCoder>& coders,
                                           const ModelInfo& model,
                                           const std::vector<TextLengths>& texts,
                                           std::vector<std::string>& notes) {
  std::vector<CacheSettings> caches = whole_caches(config, coders, model);
  if (!config.no_baselines) {
    std::set<std::vector<int>> rotations;
    for (const CacheSettings& cache : caches)
      if (cache.coder == kRotation) rotations.insert(all_bits(cache));
    const std::vector<CacheSettings> all = caches;
    for (const CacheSettings& cache : all) {
      if (!cache.by_dictionaries()) continue;
      CacheSettings twin = rotation_like(cache, model, config.seed);
      if (!twin.places.empty() && rotations.insert(all_bits(twin)).second)
        caches.push_back(std::move(twin));
    }
    // Dictionaries as they are; then the others by name and bits.
    std::stable_sort(caches.begin(), caches.end(), [](const auto& a, const auto& b) {
      if (a.by_dictionaries() || b.by_dictionaries())
        return a.by_dictionaries() && !b.by_dictionaries();
      return std::pair(a.coder, all_bits(a)) < std::pair(b.coder, all_bits(b));
    });
  }
  const std::vector<int> usual_window{32};
  const std::vector<double> no_threshold{0};
  std::vector<CacheSettings> settings;
  bool some_adapt = false;
  for (CacheSettings cache : caches)
    for (const double threshold :
         cache.by_dictionaries() ? config.adaptive_threshold : no_threshold) {
      const bool adapts = threshold > 0;
      if (adapts && !can_adapt(cache.places)) {
        notes.push_back(cache.coder + kCannotAdapt);
        continue;
      }
      some_adapt = some_adapt || adapts;
      for (const int window : config.recent_window.empty() ? usual_window : config.recent_window)
        for (const int sinks : config.sink_tokens) {
          cache.recent_window = window;
          cache.sink_tokens = sinks;
          cache.compress_chunk = config.compress_chunk;
          cache.adaptive_threshold = threshold;
          cache.adaptive_atoms = adapts ? config.adaptive_atoms : 0;
          require_something_to_compress(cache, texts);
          settings.push_back(cache);
        }
    }
  const bool asked = std::any_of(config.adaptive_threshold.begin(),
                                 config.adaptive_threshold.end(),
                                 [](double threshold) { return threshold > 0; });
  if (asked && !some_adapt)
    throw InvalidArgument(
        "adaptive_threshold: no dictionary has keys and values of all layers "
        "with at least one atom, and other coders cannot be adaptive");
  return settings;
}

std::vector<CacheSettings> budget_settings(const EvalConfig& config,
                                           const std::vector<Contender>& contenders,
                                           const std::vector<RateCoder>& coders,
                                           const ModelInfo& model,
                                           const std::vector<TextLengths>& texts,
                                           std::vector<std::string>& notes) {
  const auto wants = [&](const char* coding) {
    return std::find(config.coding.begin(), config.coding.end(), coding) != config.coding.end();
  };
  std::vector<Ladder> ladders;
  for (const Contender& contender : contenders) {
    if (contender.coder.role != report::Coder::Role::kDictionary) continue;
    for (const bool published : {false, true}) {
      if (!wants(published ? "fp8-int16" : "file")) continue;
      if (!published &&
          contender.set.dictionaries.front().format.coding != CodeFormat::Coding::kPacked)
        continue;
      Ladder ladder = atom_ladder(contender, published);
      if (ladder.keys.empty() || ladder.values.empty()) continue;
      std::map<Place, PlaceCode> places = ladder.keys.front().places;
      places.insert(ladder.values.front().places.begin(), ladder.values.front().places.end());
      if (is_whole(places, model)) ladders.push_back(std::move(ladder));
    }
  }
  std::map<std::string, std::vector<CacheSettings>> rates;  // of coders with rates of their own
  std::vector<std::string> names;
  for (CacheSettings& cache : whole_caches(config, coders, model)) {
    const bool fitted = cache.by_dictionaries() && cache.coder.ends_with(kFittedSuffix);
    if ((cache.by_dictionaries() && !fitted) || cache.coder == kRotation) continue;
    if (!rates.count(cache.coder)) names.push_back(cache.coder);
    rates[cache.coder].push_back(std::move(cache));
  }
  for (const std::string& name : names)
    ladders.push_back(ladder_of(rates[name], rates[name].front().by_dictionaries()));
  const bool any_dictionary = std::any_of(ladders.begin(), ladders.end(), [](const Ladder& l) {
    return l.keys.front().places.begin()->second.dictionary != nullptr;
  });
  if (!any_dictionary)
    throw InvalidArgument(
        "budget: no dictionary has keys and values of all layers in one of the "
        "codings asked for");
  if (!config.no_baselines) {
    std::vector<CacheSettings> rotations;
    const int step = std::max(1, model.head_dim / 16);
    for (int bits = 16 + (model.head_dim + 3) / 4; bits <= 16 + 8 * model.head_dim; bits += step) {
      CacheSettings rotation;
      rotation.coder = kRotation;
      rotation.key_stage = contenders.front().set.key_stage;
      const std::shared_ptr<VectorCoder> coder = rotation_coder(model.head_dim, bits, config.seed);
      for (int layer = 0; layer < model.layers; ++layer)
        for (const Kind kind : kBothKinds)
          rotation.places[{layer, kind, Dictionary::kAllHeads}].coder = coder;
      rotations.push_back(std::move(rotation));
    }
    ladders.push_back(ladder_of(std::move(rotations), false));
  }
  return Budget(config, model, texts, notes).sweep(ladders);
}

std::string exact_part(const CacheSettings& settings) {
  std::string text = "window " + std::to_string(settings.recent_window);
  if (settings.sink_tokens > 0) text += ", sinks " + std::to_string(settings.sink_tokens);
  if (settings.adaptive_threshold > 0)
    text += ", adaptive " + value_text(settings.adaptive_threshold);
  return text;
}

}  // namespace lexico::apps
