// Extended grapheme clusters of Unicode 17.0 (UAX #29), the version that `tokenizers` 0.23 splits by.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

namespace jql {

class Graphemes {
 public:
  Graphemes();

  // Where the cluster ends that begins at `at`, in valid UTF-8.
  size_t end(std::string_view text, size_t at) const;

  // Whether a cluster may hold this code point and one before it, or after it: if neither, it is one by itself.
  bool joins_before(uint32_t code_point) const;
  bool joins_after(uint32_t code_point) const;

 private:
  std::vector<uint8_t> properties_;  // by code point, as in grapheme_table.inc
};

}  // namespace jql
