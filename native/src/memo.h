// Remembers the ids of short words, in a fixed amount of memory: a word takes the place of another with the same hash.
#pragma once

#include <cstdint>
#include <cstring>
#include <string_view>
#include <vector>

namespace jql {

class Memo {
 public:
  // Appends the ids of `word` to `ids` if they are here.
  bool recall(std::string_view word, std::vector<int32_t>& ids) {
    if (word.size() > sizeof(Slot::bytes)) return false;
    const Slot& slot = slot_of(word);
    const size_t n_bytes = slot.n_ids * sizeof(int32_t);
    if (slot.length != word.size() + 1 || std::memcmp(slot.bytes + n_bytes, word.data(), word.size()) != 0)
      return false;
    const size_t size = ids.size();
    ids.resize(size + slot.n_ids);
    std::memcpy(ids.data() + size, slot.bytes, n_bytes);
    return true;
  }

  void remember(std::string_view word, const int32_t* ids, size_t n_ids) {
    const size_t n_bytes = n_ids * sizeof(int32_t);
    if (n_bytes + word.size() > sizeof(Slot::bytes)) return;
    Slot& slot = slot_of(word);
    slot.n_ids = static_cast<uint8_t>(n_ids);
    slot.length = static_cast<uint8_t>(word.size() + 1);
    std::memcpy(slot.bytes, ids, n_bytes);
    std::memcpy(slot.bytes + n_bytes, word.data(), word.size());
  }

 private:
  struct Slot {  // one cache line
    uint8_t n_ids = 0;
    uint8_t length = 0;   // of the word, plus one; 0: empty
    char bytes[62] = {};  // the ids, then the word
  };
  static constexpr size_t n_slots = 1 << 16;  // 4 MiB: what a core's own cache holds of them counts, not the number

  Slot& slot_of(std::string_view word) {
    uint64_t hash = word.size();
    size_t i = 0;
    for (; i + 8 <= word.size(); i += 8) hash = mix(hash, load(word.data() + i, 8));
    hash = mix(hash, load(word.data() + i, word.size() - i));
    return slots_[hash >> 48];
  }

  static uint64_t load(const char* bytes, size_t n) {
    uint64_t value = 0;
    std::memcpy(&value, bytes, n);
    return value;
  }

  static uint64_t mix(uint64_t hash, uint64_t value) {
    hash = (hash ^ value) * 0x9E3779B97F4A7C15;
    return hash ^ hash >> 32;
  }

  std::vector<Slot> slots_{n_slots};
};

}  // namespace jql
