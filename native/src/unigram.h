// The Unigram model of `tokenizers` (encode_optimized): the likeliest pieces of a word, ties included.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "json.h"
#include "trie.h"

namespace jql {

class Unigram {
 public:
  // Buffers of one thread.
  struct Scratch {
    struct Node {
      double score;
      uint32_t length;  // of the piece that ends here on the best path, in bytes; 0: nothing ends here
      int32_t id;
    };
    std::vector<Node> nodes;
    std::vector<Node> path;
  };

  // `model` of tokenizer.json. Throws Error.
  explicit Unigram(JsonValue model);

  // Appends the ids of `word` to `ids`. May stop early, once there are more than `limit` ids in `ids`.
  void encode(std::string_view word, size_t limit, Scratch& scratch, std::vector<int32_t>& ids) const;

  // The id of a piece; -1 where it is none.
  int32_t id_of(std::string_view piece) const { return trie_.value_of(piece); }
  size_t size() const { return scores_.size(); }

 private:
  struct Output;
  static std::vector<Trie::Entry> read_pieces(JsonValue vocabulary);
  void extend(std::string_view rest, size_t at, Scratch& scratch, size_t& reach) const;

  Trie trie_;
  std::vector<double> scores_;
  double unknown_score_;
  int32_t unknown_;
  bool byte_fallback_;
  std::array<int32_t, 256> byte_ids_;  // -1: the vocabulary lacks it
};

}  // namespace jql
