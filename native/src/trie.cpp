#include "trie.h"

#include <algorithm>

#include "error.h"

namespace jql {

// Places nodes depth first. Free units are found through a list of them that begins at `first_free_`.
class Trie::Builder {
 public:
  Builder(const std::vector<Entry>& entries, std::vector<Unit>& units) : entries_(entries), units_(units) {
    grow(1 << 10);
    units_[0].parent = UINT32_MAX;  // no state has this number: the root is nobody's child
  }

  // Entries [begin, end) share their first `depth` bytes, which lead to `state`.
  void place(uint32_t state, size_t begin, size_t end, size_t depth) {
    if (entries_[begin].first.size() == depth) units_[state].value = entries_[begin++].second;
    if (begin == end) return;
    std::vector<std::pair<unsigned char, size_t>> children;  // a byte, and where its entries begin
    for (size_t i = begin; i < end; ++i) {
      auto c = static_cast<unsigned char>(entries_[i].first[depth]);
      if (children.empty() || children.back().first != c) children.emplace_back(c, i);
    }
    uint32_t base = find_base(children);
    units_[state].base = base;
    for (auto [c, _] : children) {
      take(base + c);
      units_[base + c].parent = state + 1;
    }
    for (size_t i = 0; i < children.size(); ++i) {
      size_t stop = i + 1 < children.size() ? children[i + 1].second : end;
      place(base + children[i].first, children[i].second, stop, depth + 1);
    }
  }

 private:
  static constexpr int max_tries = 2000;  // a crowded stretch of the list costs more time than it saves room

  uint32_t find_base(const std::vector<std::pair<unsigned char, size_t>>& children) {
    unsigned char first = children.front().first;
    int tries = 0;
    for (uint32_t at = first_free_; at != 0 && tries < max_tries; at = next_[at], ++tries) {
      if (at < first || at - first == 0) continue;
      grow(at - first + 256);
      bool fits = std::all_of(children.begin(), children.end(),
                              [&](const auto& c) { return units_[at - first + c.first].parent == 0; });
      if (fits) return at - first;
    }
    auto base = static_cast<uint32_t>(units_.size());
    grow(base + 256);
    return base;
  }

  void grow(size_t size) {
    if (size <= units_.size()) return;
    size = std::max(size, units_.size() + units_.size() / 4);
    size_t old = units_.size();
    units_.resize(size);
    next_.resize(size), previous_.resize(size);
    for (auto i = static_cast<uint32_t>(std::max<size_t>(old, 1)); i < size; ++i) {  // 0 is the root
      previous_[i] = last_free_, next_[i] = 0;
      (last_free_ ? next_[last_free_] : first_free_) = i;
      last_free_ = i;
    }
  }

  void take(uint32_t unit) {
    uint32_t before = previous_[unit], after = next_[unit];
    (before ? next_[before] : first_free_) = after;
    (after ? previous_[after] : last_free_) = before;
    units_[unit].parent = UINT32_MAX;
  }

  const std::vector<Entry>& entries_;
  std::vector<Unit>& units_;
  std::vector<uint32_t> next_, previous_;  // free units before and after one; 0: none
  uint32_t first_free_ = 0, last_free_ = 0;
};

Trie::Trie(std::vector<Entry> entries) {
  std::stable_sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) { return a.first < b.first; });
  std::vector<Entry> unique;
  for (Entry& entry : entries) {
    if (entry.first.size() > longest_key) {
      throw unsupported("tokenizer.json has a piece or an added token of over 1,024 bytes");
    }
    if (!unique.empty() && unique.back().first == entry.first)
      unique.back().second = entry.second;
    else
      unique.push_back(std::move(entry));
  }
  Builder builder(unique, units_);
  if (!unique.empty()) builder.place(0, 0, unique.size(), 0);
  uint32_t highest = 0;
  for (uint32_t i = 0; i < units_.size(); ++i) highest = std::max(highest, units_[i].parent ? units_[i].base : 0);
  units_.resize(std::max<size_t>(units_.size(), highest + 256));
  units_.shrink_to_fit();
}

int32_t Trie::value_of(std::string_view key) const {
  uint32_t state = 0;
  for (char c : key) {
    state = child(state, static_cast<unsigned char>(c));
    if (state == 0) return -1;
  }
  return units_[state].value;
}

}  // namespace jql
