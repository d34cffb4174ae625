// Sorts the codes of a tile by atom: rows counted, placed by length, filled.
#include "kernels/attention/value_tiles.h"

#include <algorithm>
#include <bit>
#include <cstring>

namespace lexico::kernels {
namespace {

static_assert(std::endian::native == std::endian::little);
constexpr int kBanks = 8;  // of 16 bytes

std::size_t size(std::int64_t count) { return static_cast<std::size_t>(count); }
std::size_t whole_16(std::size_t bytes) { return (bytes + 15) / 16 * 16; }

std::uint32_t zero_code(const CodeLayout& layout) {
  return layout.weights == CodedWeights::kE4m3
             ? 0
             : static_cast<std::uint32_t>(layout.slots) << layout.weight_bits;
}

// A field of up to 24 bits; up to 7 bytes behind its plane are read (kPageSlack).
std::uint32_t field(const std::uint8_t* plane, int bits, int token) {
  const int at = token * bits;
  std::uint64_t word;
  std::memcpy(&word, plane + at / 8, sizeof word);
  return static_cast<std::uint32_t>(word >> at % 8) & ((1u << bits) - 1);
}

// The code of a slot's weight, or zero_code.
std::uint32_t code_of(const CodeLayout& layout, int slot, std::uint32_t weight) {
  if (layout.weights == CodedWeights::kE4m3) return (weight & 0x7f) == 0 ? 0 : weight;
  const std::uint32_t code = static_cast<std::uint32_t>(slot) << layout.weight_bits | weight;
  return layout.levels[code] == 0 ? zero_code(layout) : code;
}

const CodeLayout& layout_of(const ValueTileSource& source, int head) {
  return source.layout[head * source.layout_stride];
}

// Calls visit(block, first token in the tile) for the blocks of a head.
template <typename Visit>
void for_each_block(const ValueTileSource& source, int head, Visit&& visit) {
  const std::int64_t blocks = source.page_tokens / kBlockTokens;
  const std::size_t bytes = block_bytes(layout_of(source, head));
  for (int t = 0; t < source.tile_tokens; t += kBlockTokens) {
    const std::int64_t token = source.first_token + t;
    const std::int64_t block = token % source.page_tokens / kBlockTokens;
    visit(source.pages[token / source.page_tokens] + size(head * blocks + block) * bytes, t);
  }
}

// Calls visit(atom, token, code) for the entries of a head, tokens ascending.
template <typename Visit>
void for_each_entry(const ValueTileSource& source, int head, Visit&& visit) {
  const CodeLayout& layout = layout_of(source, head);
  const int bits = weight_field_bits(layout);
  const std::uint32_t zero = zero_code(layout);
  for_each_block(source, head, [&](const std::uint8_t* block, int first) {
    const std::uint8_t* weights = block + layout.slots * layout.index_bits * (kBlockTokens / 8);
    for (int t = 0; t < kBlockTokens; ++t) {
      for (int slot = 0; slot < layout.slots; ++slot) {
        const std::uint32_t code =
            code_of(layout, slot, field(weights + slot * bits * (kBlockTokens / 8), bits, t));
        if (code == zero) continue;
        const std::uint8_t* indices = block + slot * layout.index_bits * (kBlockTokens / 8);
        visit(field(indices, layout.index_bits, t), first + t, code);
      }
    }
  });
}

int steps_of_long(std::uint32_t entries) {
  return static_cast<int>((entries + kTileLanes - 1) / kTileLanes);
}

// What a head's tile is made of: how many rows there are of each length.
struct Plan {
  std::int64_t long_rows = 0, steps = 0;
  std::int64_t rows[kLongRow + 1] = {};
  std::int64_t num_atoms = 0;

  std::int64_t narrow_rows() const {
    std::int64_t sum = 0;
    for (int length = 1; length <= kLongRow; ++length) sum += rows[length];
    return sum;
  }
  std::int64_t bundles() const { return long_rows + (narrow_rows() + kTileLanes - 1) / kTileLanes; }
  std::size_t bytes(const ValueTileSource& source, int head) const {
    const bool scales = layout_of(source, head).scale_bits > 0;
    return (scales ? size(source.tile_tokens) : 0) + whole_16(4 * size(bundles() + 1)) +
           2 * kTileLanes * size(bundles()) + kTileStepBytes * size(steps);
  }
};

// Leaves each atom's entries in counts [num_atoms].
Plan plan_head(const ValueTileSource& source, int head, std::uint32_t* counts) {
  std::fill_n(counts, source.num_atoms, 0u);
  for_each_entry(source, head, [&](std::uint32_t atom, int, std::uint32_t) { ++counts[atom]; });
  Plan plan;
  for (int atom = 0; atom < source.num_atoms; ++atom) {
    const std::uint32_t count = counts[atom];
    if (count == 0) continue;
    plan.num_atoms = atom + 1;
    if (count > kLongRow)
      ++plan.long_rows, plan.steps += steps_of_long(count);
    else
      ++plan.rows[count];
  }
  std::int64_t row = 0;  // every 32nd is the longest of its bundle
  for (int length = kLongRow; length > 0; --length) {
    const std::int64_t end = row + plan.rows[length];
    plan.steps +=
        length * ((end + kTileLanes - 1) / kTileLanes - (row + kTileLanes - 1) / kTileLanes);
    row = end;
  }
  return plan;
}

// The chunk of a bundle of `length` steps that has step `step`.
struct Chunk {
  int first, width;
};
Chunk chunk_of(int length, int step) {
  int first = length / 8 * 8;
  if (step < first) return {step / 8 * 8, 8};
  for (int width = 4; width > 0; width /= 2) {
    if ((length & width) == 0) continue;
    if (step < first + width) return {first, width};
    first += width;
  }
  return {first, 0};  // never
}

// Where a bundle has an entry, in bytes from its first step.
struct Place {
  std::size_t low, high;
};
Place place_of(const Chunk& chunk, int step, int lane) {
  const int begin = kTileStepBytes * chunk.first, at = lane * chunk.width + step - chunk.first;
  return {size(begin + 2 * at), size(begin + 2 * kTileLanes * chunk.width + at)};
}
Place place_of(int length, int step, int lane) {
  return place_of(chunk_of(length, step), step, lane);
}

struct Item {
  int token = 0;
  std::uint32_t code = 0;
};
void write_entry(std::uint8_t* bundle, const Place& place, const Item& item) {
  const auto low = static_cast<std::uint16_t>(static_cast<std::uint32_t>(item.token) |
                                              item.code >> 8 << kTileTokenBits);
  std::memcpy(bundle + place.low, &low, sizeof low);
  bundle[place.high] = static_cast<std::uint8_t>(item.code);
}
Item read_entry(const std::uint8_t* bundle, const Place& place) {
  std::uint16_t low;
  std::memcpy(&low, bundle + place.low, sizeof low);
  return {low & ((1 << kTileTokenBits) - 1),
          static_cast<std::uint32_t>(low >> kTileTokenBits) << 8 | bundle[place.high]};
}

// Eight lanes of a warp read or write 16 bytes of shared memory each at a time, at once where those
// lie in different banks: here, where tokens, or atoms, differ mod 8. So rows are dealt to the
// lanes of a bundle so that those of few atoms of eight lanes are the same mod 8 ...
void spread_rows(std::uint16_t* atoms) {
  std::uint16_t rows[kTileLanes];
  int count = 0, load[kBanks] = {};  // not yet dealt: rows, those in a bank
  for (int lane = 0; lane < kTileLanes && atoms[lane] != kNoRow; ++lane) {
    rows[count++] = atoms[lane];
    ++load[atoms[lane] % kBanks];
  }
  bool taken[kBanks];
  for (int lane = 0; count > 0; ++lane) {
    if (lane % kBanks == 0) std::fill_n(taken, kBanks, false);
    int best = 0, best_load = 0;
    for (int k = 0; k < count; ++k) {
      const int bank = rows[k] % kBanks;
      if (!taken[bank] && load[bank] > best_load) best = k, best_load = load[bank];
    }
    atoms[lane] = rows[best];
    taken[rows[best] % kBanks] = true;
    --load[rows[best] % kBanks];
    std::copy(rows + best + 1, rows + count--, rows + best);
  }
}

// ... and the entries of eight rows, whose order is free, are put in one where few tokens of a step
// are the same mod 8. Padding repeats a token of its step.
void spread_entries(const CodeLayout& layout, std::uint8_t* bundle, int length, int first_lane) {
  Item items[kBanks][kLongRow];
  std::uint8_t banks[kBanks][kLongRow];
  int left[kBanks] = {}, load[kBanks] = {};  // entries not yet placed: of a row, in a bank
  for (int step = 0; step < length; ++step) {
    const Chunk chunk = chunk_of(length, step);
    for (int row = 0; row < kBanks; ++row) {
      const Item item = read_entry(bundle, place_of(chunk, step, first_lane + row));
      if (item.code == zero_code(layout)) continue;
      const int bank = item.token % kBanks;
      banks[row][left[row]] = static_cast<std::uint8_t>(bank);
      items[row][left[row]++] = item;
      ++load[bank];
    }
  }
  for (int step = 0; step < length; ++step) {
    const Chunk chunk = chunk_of(length, step);
    int open[kBanks];  // the load of banks that the step does not have yet
    std::copy(load, load + kBanks, open);
    bool padded[kBanks] = {};
    int token = 0;
    for (int i = 0; i < kBanks; ++i) {
      const int row = (i + step) % kBanks;
      int best = -1;
      const auto look = [&](const int* loads) {
        for (int k = 0, most = 0; k < left[row]; ++k)
          if (loads[banks[row][k]] > most) best = k, most = loads[banks[row][k]];
      };
      look(open);
      if (best < 0 && left[row] == length - step) look(load);  // there is no step to wait for
      padded[row] = best < 0;
      if (best < 0) continue;
      const Item item = items[row][best];
      const int bank = banks[row][best], last = --left[row];
      items[row][best] = items[row][last], banks[row][best] = banks[row][last];
      --load[bank], open[bank] = 0;
      token = item.token;
      write_entry(bundle, place_of(chunk, step, first_lane + row), item);
    }
    for (int row = 0; row < kBanks; ++row) {
      if (padded[row])
        write_entry(bundle, place_of(chunk, step, first_lane + row), {token, zero_code(layout)});
    }
  }
}

void pack_head(const ValueTileSource& source,
               int head,
               const Plan& plan,
               std::uint32_t* counts,
               std::uint32_t* rows,  // of each atom, as bundle * kTileLanes + lane
               std::uint8_t* to) {
  const CodeLayout& layout = layout_of(source, head);
  const std::int64_t bundles = plan.bundles();
  if (layout.scale_bits > 0) {
    const int before = layout.slots * (layout.index_bits + weight_field_bits(layout));
    for_each_block(source, head, [&](const std::uint8_t* block, int first) {
      for (int t = 0; t < kBlockTokens; ++t)
        to[first + t] = static_cast<std::uint8_t>(
            field(block + before * (kBlockTokens / 8), layout.scale_bits, t));
    });
    to += source.tile_tokens;
  }
  const std::size_t start_bytes = whole_16(4 * size(bundles + 1));
  auto* starts = reinterpret_cast<std::uint32_t*>(to);
  auto* atoms = reinterpret_cast<std::uint16_t*>(to + start_bytes);
  std::uint8_t* steps = to + start_bytes + 2 * kTileLanes * size(bundles);
  std::fill_n(starts, start_bytes / 4, 0u);
  std::fill_n(atoms, bundles * kTileLanes, kNoRow);

  // Long rows first, then by length; atoms ascend among rows of a length.
  std::uint32_t next_long = 0, next[kLongRow + 1];
  std::uint32_t row = static_cast<std::uint32_t>(plan.long_rows) * kTileLanes;
  for (int length = kLongRow; length > 0; --length) {
    next[length] = row;
    row += static_cast<std::uint32_t>(plan.rows[length]);
  }
  for (int atom = 0; atom < source.num_atoms; ++atom) {
    const std::uint32_t count = counts[atom];
    if (count == 0) continue;
    if (count > kLongRow) {
      rows[atom] = kTileLanes * next_long;
      std::fill_n(atoms + rows[atom], kTileLanes, static_cast<std::uint16_t>(atom));
      starts[++next_long] = static_cast<std::uint32_t>(steps_of_long(count));
    } else {
      rows[atom] = next[count]++;
      atoms[rows[atom]] = static_cast<std::uint16_t>(atom);
      if (rows[atom] % kTileLanes == 0) starts[rows[atom] / kTileLanes + 1] = count;
    }
  }
  for (std::int64_t b = 0; b < bundles; ++b) starts[b + 1] += starts[b];

  for (std::uint32_t b = next_long; b < bundles; ++b) {
    std::uint16_t* const its = atoms + kTileLanes * b;
    spread_rows(its);
    for (std::uint32_t lane = 0; lane < kTileLanes && its[lane] != kNoRow; ++lane)
      rows[its[lane]] = kTileLanes * b + lane;
  }

  const auto length_of = [&](std::uint32_t b) {
    return static_cast<int>(starts[b + 1] - starts[b]);
  };
  const auto bundle_of = [&](std::uint32_t b) { return steps + kTileStepBytes * size(starts[b]); };
  for (std::uint32_t b = 0; b < bundles; ++b) {
    for (int step = 0; step < length_of(b); ++step) {
      const Chunk chunk = chunk_of(length_of(b), step);
      for (int lane = 0; lane < kTileLanes; ++lane)
        write_entry(bundle_of(b), place_of(chunk, step, lane), {0, zero_code(layout)});
    }
  }
  std::uint32_t* const done = counts;  // entries so far, from here on
  std::fill_n(done, source.num_atoms, 0u);
  for_each_entry(source, head, [&](std::uint32_t atom, int token, std::uint32_t code) {
    const std::uint32_t b = rows[atom] / kTileLanes;
    const int entry = static_cast<int>(done[atom]++);
    const bool is_long = b < plan.long_rows;
    const int lane = is_long ? entry % kTileLanes : static_cast<int>(rows[atom] % kTileLanes);
    const int step = is_long ? entry / kTileLanes : entry;
    write_entry(bundle_of(b), place_of(length_of(b), step, lane), {token, code});
  });
  for (std::uint32_t b = 0; b < bundles; ++b) {
    for (int lane = 0; lane < kTileLanes && length_of(b) <= kLongRow; lane += kBanks)
      spread_entries(layout, bundle_of(b), length_of(b), lane);
  }
}

}  // namespace

bool value_tiles_fit(const CodeLayout& layout, int tile_tokens, int num_atoms) {
  for (int c = 0; c < layout.components; ++c)
    if (layout.component_bits[c] > 0) return false;
  if (layout.slots <= 0 || num_atoms < 0 || num_atoms > kNoRow) return false;
  if (tile_tokens <= 0 || tile_tokens > kMostTileTokens || tile_tokens % kBlockTokens != 0)
    return false;
  return layout.weights == CodedWeights::kE4m3 ||
         (layout.weights == CodedWeights::kLevels &&
          std::int64_t{layout.slots} << layout.weight_bits < 1 << kTileCodeBits);
}

std::size_t value_tile_workspace_bytes(int num_atoms) {
  return 2 * sizeof(std::uint32_t) * size(num_atoms);
}

std::size_t value_tile_bytes(const ValueTileSource& source, void* workspace) {
  std::size_t bytes = sizeof(ValueTileHead) * size(source.kv_heads);
  for (int h = 0; h < source.kv_heads; ++h)
    bytes += plan_head(source, h, static_cast<std::uint32_t*>(workspace)).bytes(source, h);
  return bytes;
}

void pack_value_tile(const ValueTileSource& source, void* workspace, std::uint8_t* tile) {
  auto* const counts = static_cast<std::uint32_t*>(workspace);
  std::size_t offset = sizeof(ValueTileHead) * size(source.kv_heads);
  for (int h = 0; h < source.kv_heads; ++h) {
    const Plan plan = plan_head(source, h, counts);
    const ValueTileHead head{static_cast<std::uint32_t>(offset),
                             static_cast<std::uint32_t>(plan.bundles()),
                             static_cast<std::uint32_t>(plan.long_rows),
                             static_cast<std::uint32_t>(plan.num_atoms)};
    std::memcpy(tile + sizeof head * size(h), &head, sizeof head);
    pack_head(source, h, plan, counts, counts + source.num_atoms, tile + offset);
    offset += plan.bytes(source, h);
  }
}

std::int64_t read_value_tile(const CodeLayout& layout,
                             int tile_tokens,
                             const std::uint8_t* tile,
                             int head,
                             ValueTileEntry* entries) {
  ValueTileHead of;
  std::memcpy(&of, tile + sizeof of * size(head), sizeof of);
  const std::uint8_t* const at = tile + of.offset + (layout.scale_bits > 0 ? tile_tokens : 0);
  const std::uint8_t* const atoms = at + whole_16(4 * (size(of.num_bundles) + 1));
  const std::uint8_t* const steps = atoms + 2 * kTileLanes * size(of.num_bundles);
  std::int64_t count = 0;
  for (std::uint32_t b = 0; b < of.num_bundles; ++b) {
    std::uint32_t starts[2];
    std::memcpy(starts, at + 4 * size(b), sizeof starts);
    const std::uint8_t* const bundle = steps + kTileStepBytes * size(starts[0]);
    const int length = static_cast<int>(starts[1] - starts[0]);
    for (int lane = 0; lane < kTileLanes; ++lane) {
      std::uint16_t atom;
      std::memcpy(&atom, atoms + 2 * (kTileLanes * size(b) + size(lane)), sizeof atom);
      for (int step = 0; step < length; ++step) {
        const Item item = read_entry(bundle, place_of(length, step, lane));
        if (item.code == zero_code(layout)) continue;
        if (entries != nullptr) entries[count] = {atom, item.token, item.code};
        ++count;
      }
    }
  }
  return count;
}

}  // namespace lexico::kernels
