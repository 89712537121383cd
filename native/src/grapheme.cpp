#include "grapheme.h"

#include "utf8.h"

namespace jql {

namespace {

enum Cluster : uint8_t {
  other,
  cr,
  lf,
  control,
  extend,
  zwj,
  regional,
  prepend,
  spacing,
  l,
  v,
  t,
  lv,
  lvt,
  pictographic
};
enum Conjunct : uint8_t { none, consonant, conjunct_extend, linker };

struct Row {
  uint32_t first, last;
  uint8_t value;
};

constexpr Row rows[] = {
#include "grapheme_table.inc"
};

Cluster cluster_of(uint8_t property) { return static_cast<Cluster>(property & 15); }
Conjunct conjunct_of(uint8_t property) { return static_cast<Conjunct>(property >> 4); }

// What the rules ask about the code points of a cluster so far.
struct State {
  Cluster last;
  Conjunct conjunct;      // consonant; linker: a consonant and a linker after it; none
  bool after_pictograph;  // Extended_Pictographic Extend* (rule GB11)
  bool after_joined_zwj;  // the same, and ZWJ
  bool odd_regional;      // an odd number of regional indicators

  explicit State(uint8_t property)
      : last(cluster_of(property)),
        conjunct(conjunct_of(property) == consonant ? consonant : none),
        after_pictograph(last == pictographic),
        after_joined_zwj(false),
        odd_regional(last == regional) {}

  bool joins(uint8_t property) const {
    Cluster next = cluster_of(property);
    if (last == cr && next == lf) return true;                                             // GB3
    if (last == control || last == cr || last == lf) return false;                         // GB4
    if (next == control || next == cr || next == lf) return false;                         // GB5
    if (last == l && (next == l || next == v || next == lv || next == lvt)) return true;   // GB6
    if ((last == lv || last == v) && (next == v || next == t)) return true;                // GB7
    if ((last == lvt || last == t) && next == t) return true;                              // GB8
    if (next == extend || next == zwj || next == spacing || last == prepend) return true;  // GB9, 9a, 9b
    if (conjunct == linker && conjunct_of(property) == consonant) return true;             // GB9c
    if (after_joined_zwj && next == pictographic) return true;                             // GB11
    return last == regional && next == regional && odd_regional;                           // GB12, GB13
  }

  void add(uint8_t property) {
    last = cluster_of(property);
    Conjunct kind = conjunct_of(property);
    if (kind == consonant)
      conjunct = consonant;
    else if (kind == none)
      conjunct = none;
    else if (kind == linker && conjunct != none)
      conjunct = linker;
    after_joined_zwj = last == zwj && after_pictograph;
    after_pictograph = last == pictographic || (last == extend && after_pictograph);
    odd_regional = last == regional && !odd_regional;
  }
};

}  // namespace

Graphemes::Graphemes() : properties_(0x110000) {
  for (const Row& row : rows) {
    for (uint32_t c = row.first; c <= row.last; ++c) properties_[c] = row.value;
  }
  for (uint32_t c = 0xAC00; c < 0xD7A4; ++c) properties_[c] = (c - 0xAC00) % 28 == 0 ? lv : lvt;
}

size_t Graphemes::end(std::string_view text, size_t at) const {
  State state(properties_[decode(text, at)]);
  at += length_of(static_cast<unsigned char>(text[at]));
  while (at < text.size()) {
    uint8_t property = properties_[decode(text, at)];
    if (!state.joins(property)) break;
    state.add(property);
    at += length_of(static_cast<unsigned char>(text[at]));
  }
  return at;
}

bool Graphemes::joins_before(uint32_t code_point) const {
  Cluster cluster = cluster_of(properties_[code_point]);
  return !(cluster == other || cluster == control || cluster == cr || cluster == prepend) || cluster == lf ||
         conjunct_of(properties_[code_point]) == consonant;
}

bool Graphemes::joins_after(uint32_t code_point) const {
  Cluster cluster = cluster_of(properties_[code_point]);
  return !(cluster == other || cluster == control || cluster == lf || cluster == pictographic);
}

}  // namespace jql
