#include "unigram.h"

#include <algorithm>
#include <limits>

#include "error.h"
#include "utf8.h"

namespace jql {

namespace {

constexpr double unknown_penalty = 10;

std::vector<double> read_scores(JsonValue vocabulary) {
  std::vector<double> scores;
  for (JsonValue entry : vocabulary.items()) scores.push_back(entry.items().at(1).number());
  return scores;
}

}  // namespace

// Collects ids in the order of the text. Neighboring unknown pieces are one, which is looked up again.
struct Unigram::Output {
  const Unigram& model;
  std::string_view word;
  std::vector<int32_t>& ids;
  size_t at = 0;            // how much of the word is done
  size_t unknown_from = 0;  // where the unknown pieces at its end begin; at: there are none

  void put(uint32_t length, int32_t id) {
    if (id != model.unknown_) {
      close();
      ids.push_back(id);
      unknown_from = at + length;
    }
    at += length;
  }

  void close() {
    if (unknown_from == at) return;
    std::string_view text = word.substr(unknown_from, at - unknown_from);
    auto byte_id = [&](char c) { return model.byte_ids_[static_cast<unsigned char>(c)]; };
    int32_t id = model.id_of(text);
    if (id >= 0) {
      ids.push_back(id);
    } else if (model.byte_fallback_ && std::all_of(text.begin(), text.end(), [&](char c) { return byte_id(c) >= 0; })) {
      for (char c : text) ids.push_back(byte_id(c));
    } else {
      ids.push_back(model.unknown_);
    }
    unknown_from = at;
  }
};

std::vector<Trie::Entry> Unigram::read_pieces(JsonValue vocabulary) {
  std::vector<Trie::Entry> pieces;
  int32_t id = 0;
  for (JsonValue entry : vocabulary.items()) {
    std::vector<JsonValue> pair = entry.items();
    if (pair.size() != 2) throw invalid_bundle("tokenizer.json: a piece is no pair of a text and a score");
    pieces.emplace_back(pair[0].string(), id++);
    if (pieces.back().first.empty()) pieces.pop_back();  // is nowhere in a text
  }
  return pieces;
}

Unigram::Unigram(JsonValue model) : trie_(read_pieces(model.at("vocab"))), scores_(read_scores(model.at("vocab"))) {
  if (scores_.empty()) throw invalid_bundle("tokenizer.json has no pieces");
  auto unknown = model.find_value("unk_id");
  if (!unknown) throw unsupported("tokenizer.json has no unk_id: a text with unknown characters would have no ids");
  unknown_ = static_cast<int32_t>(unknown->integer(0, static_cast<int64_t>(scores_.size()) - 1));
  unknown_score_ = *std::min_element(scores_.begin(), scores_.end()) - unknown_penalty;
  auto fallback = model.find_value("byte_fallback");
  byte_fallback_ = fallback && fallback->boolean();
  for (size_t i = 0; i < 256; ++i) {
    static constexpr char digits[] = "0123456789ABCDEF";
    byte_ids_[i] = id_of(std::string("<0x") + digits[i >> 4] + digits[i & 15] + ">");
  }
}

// Offers every piece that begins at node `at`, where `rest` of the word begins. `reach` is the last node with an offer.
void Unigram::extend(std::string_view rest, size_t at, Scratch& scratch, size_t& reach) const {
  auto& nodes = scratch.nodes;
  double until_here = nodes[at].score;
  size_t first = length_of(static_cast<unsigned char>(rest[0]));
  auto offer = [&](size_t length, int32_t id, double score) {
    size_t end = at + length;
    if (end >= nodes.size()) nodes.resize(std::min(at + rest.size() + 1, std::max(end + 1, 2 * nodes.size())), {0, 0, 0});
    Scratch::Node& node = nodes[end];
    double total = score + until_here;
    if (node.length == 0 || total > node.score) node = {total, static_cast<uint32_t>(length), id};
    reach = std::max(reach, end);
  };
  bool has_first = false;
  trie_.prefixes(rest, [&](size_t length, int32_t id) {
    offer(length, id, scores_[id]);
    has_first = has_first || length == first;
  });
  if (!has_first) offer(first, unknown_, unknown_score_);
}

void Unigram::encode(std::string_view word, size_t limit, Scratch& scratch, std::vector<int32_t>& ids) const {
  // Nodes from `start` on are in memory, node 0 being that place. Where no piece lies across a place, the path up to it
  // is final: it is put out, and memory is only needed for what follows.
  auto& nodes = scratch.nodes;
  Output output{*this, word, ids};
  nodes.assign(1, {0, 0, 0});
  size_t start = 0, at = 0, reach = 0;
  while (start + at < word.size()) {
    extend(word.substr(start + at), at, scratch, reach);
    at += length_of(static_cast<unsigned char>(word[start + at]));
    if (at < reach) continue;
    scratch.path.clear();
    for (size_t end = at; end > 0; end -= nodes[end].length) scratch.path.push_back(nodes[end]);
    for (auto node = scratch.path.rbegin(); node != scratch.path.rend(); ++node) output.put(node->length, node->id);
    if (ids.size() > limit) return;
    double score = nodes[at].score;
    nodes.assign(1, {score, 0, 0});
    start += at;
    at = reach = 0;
  }
  output.close();
}

}  // namespace jql
