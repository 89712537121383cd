#include "charsmap.h"

#include <cstring>

#include "error.h"
#include "utf8.h"

namespace jql {

namespace {

constexpr size_t largest_value = 1024;   // bytes of what a character becomes; the largest that Unicode has are 33
constexpr size_t largest_cluster = 5;  // bytes of a cluster that is looked up as a whole

std::string decode_base64(std::string_view text) {
  static constexpr std::string_view digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  int8_t value_of[256];
  std::memset(value_of, -1, sizeof value_of);
  for (size_t i = 0; i < digits.size(); ++i) value_of[static_cast<unsigned char>(digits[i])] = static_cast<int8_t>(i);
  std::string bytes;
  uint32_t bits = 0;
  int n_bits = 0;
  for (char c : text) {
    if (c == '=') break;
    int digit = value_of[static_cast<unsigned char>(c)];
    if (digit < 0) throw invalid_bundle("tokenizer.json: precompiled_charsmap is not base64");
    bits = bits << 6 | static_cast<uint32_t>(digit);
    if ((n_bits += 6) >= 8) bytes.push_back(static_cast<char>(bits >> (n_bits -= 8) & 0xFF));
  }
  return bytes;
}

}  // namespace

Charsmap::Charsmap(std::string_view base64) : plain_(0x110000) {
  std::string bytes = decode_base64(base64);
  uint32_t n_bytes = 0;  // of the trie
  if (bytes.size() >= 4) std::memcpy(&n_bytes, bytes.data(), 4);
  if (bytes.size() < 8 || n_bytes < 4 || n_bytes % 4 != 0 || n_bytes > bytes.size() - 4) {
    throw invalid_bundle("tokenizer.json: precompiled_charsmap has another size than it says");
  }
  units_.resize(n_bytes / 4);
  std::memcpy(units_.data(), bytes.data() + 4, n_bytes);
  values_ = bytes.substr(4 + n_bytes) + '\0';
  if (find_invalid_utf8(values_) != std::string::npos) {
    throw invalid_bundle("tokenizer.json: precompiled_charsmap holds text that is not UTF-8");
  }
  for (size_t at = 0, end; at < values_.size(); at = end + 1) {
    end = values_.find('\0', at);
    if (end - at > largest_value) throw unsupported("tokenizer.json: precompiled_charsmap has a value of over 1,024 bytes");
  }
  std::string text;
  for (uint32_t c = 0; c < 0x110000; ++c) {
    if (c >= 0xD800 && c < 0xE000) continue;
    text.clear();
    append_utf8(text, c);
    plain_[c] = !graphemes_.joins_after(c) && !find(text);
  }
}

// The value of the shortest key that `chunk` begins with; a NUL ends the look-up.
std::optional<std::string_view> Charsmap::find(std::string_view chunk) const {
  auto offset = [](uint32_t unit) { return (unit >> 10) << ((unit & (1U << 9)) >> 6); };
  size_t place = offset(units_[0]);
  for (char c : chunk) {
    auto byte = static_cast<unsigned char>(c);
    place ^= byte;
    if (byte == 0 || place >= units_.size()) return std::nullopt;
    uint32_t unit = units_[place];
    if ((unit & (1U << 31 | 0xFF)) != byte) return std::nullopt;
    place ^= offset(unit);
    if (unit >> 8 & 1) {
      if (place >= units_.size()) return std::nullopt;
      size_t value = units_[place] & ((1U << 31) - 1);
      if (value >= values_.size() || (static_cast<unsigned char>(values_[value]) & 0xC0) == 0x80) return std::nullopt;
      return std::string_view(values_.c_str() + value);
    }
  }
  return std::nullopt;
}

void Charsmap::map_cluster(std::string_view cluster, std::string& out) const {
  if (cluster.size() <= largest_cluster) {
    if (auto value = find(cluster)) {  // bytes after the key are dropped with it
      out.append(*value);
      return;
    }
  }
  for (size_t at = 0; at < cluster.size();) {
    std::string_view part = cluster.substr(at, length_of(static_cast<unsigned char>(cluster[at])));
    out.append(find(part).value_or(part));
    at += part.size();
  }
}

void Charsmap::apply(std::string_view text, std::string& out) const {
  size_t kept = 0;  // text from here up to `at` stays as it is
  for (size_t at = 0; at < text.size();) {
    size_t next = at + length_of(static_cast<unsigned char>(text[at]));
    bool alone = plain_[decode(text, at)] && (next == text.size() || !graphemes_.joins_before(decode(text, next)));
    if (!alone) {
      out.append(text.substr(kept, at - kept));
      next = graphemes_.end(text, at);
      map_cluster(text.substr(at, next - at), out);
      kept = next;
    }
    at = next;
  }
  out.append(text.substr(kept));
}

bool Charsmap::keeps(std::string_view text, size_t at, size_t next) const {
  auto may_cut = [&](size_t place) {
    return place == 0 || place >= text.size() ||
           (!graphemes_.joins_after(decode(text, before(text, place))) &&
            !graphemes_.joins_before(decode(text, place)));
  };
  size_t after = next + length_of(static_cast<unsigned char>(text[next]));
  return plain_[decode(text, at)] && may_cut(at) && may_cut(next) && may_cut(after);
}

}  // namespace jql
