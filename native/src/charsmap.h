// SentencePiece's precompiled character map, applied to grapheme clusters as the normalizer Precompiled of
// `tokenizers`.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "grapheme.h"

namespace jql {

class Charsmap {
 public:
  // `base64` is precompiled_charsmap of tokenizer.json. Throws Error (JQL_INVALID_BUNDLE).
  explicit Charsmap(std::string_view base64);

  // Appends `text`, mapped, to `out`.
  void apply(std::string_view text, std::string& out) const;

  // Whether the code point in [at, next), and the one at `next`, are clusters by themselves, and the first stays as it
  // is.
  bool keeps(std::string_view text, size_t at, size_t next) const;

 private:
  std::optional<std::string_view> find(std::string_view chunk) const;
  void map_cluster(std::string_view cluster, std::string& out) const;

  std::vector<uint32_t> units_;
  std::string values_;  // each ends in NUL
  Graphemes graphemes_;
  std::vector<bool> plain_;  // by code point: it joins nothing that follows unless that joins it, and is not mapped
};

}  // namespace jql
