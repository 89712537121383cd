// A double-array trie over bytes (Aoe 1989): which of many strings does a text begin with?
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace jql {

class Trie {
 public:
  using Entry = std::pair<std::string, int32_t>;
  static constexpr size_t longest_key = 1024;

  // Of keys that are not empty, each with a value from 0; of equal keys the last counts. Throws Error
  // (JQL_UNSUPPORTED) for a key of over `longest_key` bytes: it is built by recursion, to the depth of its keys.
  explicit Trie(std::vector<Entry> entries);

  // Calls found(length, value) for every key that `text` begins with, shortest first.
  template <typename Found>
  void prefixes(std::string_view text, Found found) const {
    uint32_t state = 0;
    for (size_t i = 0; i < text.size(); ++i) {
      state = child(state, static_cast<unsigned char>(text[i]));
      if (state == 0) return;
      if (units_[state].value >= 0) found(i + 1, units_[state].value);
    }
  }

  // The value of `key`; -1 where it is none of the keys.
  int32_t value_of(std::string_view key) const;

 private:
  struct Unit {
    uint32_t base = 0;    // of its children: child c lies at base + c
    uint32_t parent = 0;  // plus one; 0: free
    int32_t value = -1;
  };

  uint32_t child(uint32_t state, unsigned char c) const {
    uint32_t place = units_[state].base + c;
    return units_[place].parent == state + 1 ? place : 0;
  }

  class Builder;
  std::vector<Unit> units_;
};

}  // namespace jql
