// UTF-8: validation, and code points of text that is known to be valid.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace jql {

// Where the first byte lies that is not part of valid UTF-8 (no overlong forms, no surrogates); npos: nowhere.
size_t find_invalid_utf8(std::string_view text);

// Bytes of the code point that begins with `lead`, in valid UTF-8.
inline size_t length_of(unsigned char lead) { return lead < 0x80 ? 1 : lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4; }

// The code point at `at`, in valid UTF-8.
inline uint32_t decode(std::string_view text, size_t at) {
  auto byte = [&](size_t i) { return static_cast<uint32_t>(static_cast<unsigned char>(text[at + i])); };
  switch (length_of(static_cast<unsigned char>(text[at]))) {
    case 1: return byte(0);
    case 2: return (byte(0) & 0x1F) << 6 | (byte(1) & 0x3F);
    case 3: return (byte(0) & 0x0F) << 12 | (byte(1) & 0x3F) << 6 | (byte(2) & 0x3F);
    default: return (byte(0) & 0x07) << 18 | (byte(1) & 0x3F) << 12 | (byte(2) & 0x3F) << 6 | (byte(3) & 0x3F);
  }
}

// Where the code point before `at` begins; at > 0.
inline size_t before(std::string_view text, size_t at) {
  do --at;
  while ((static_cast<unsigned char>(text[at]) & 0xC0) == 0x80);
  return at;
}

void append_utf8(std::string& text, uint32_t code_point);

// Unicode's White_Space, as Rust's char::is_whitespace has it: without U+001C to U+001F, without U+200B.
bool is_white_space(uint32_t code_point);

// Bytes of the white space that begins at `at`; 0 where there is none.
inline size_t white_space_at(std::string_view text, size_t at) {
  auto lead = static_cast<unsigned char>(text[at]);
  if (lead < 0x80) return lead == ' ' || (lead >= 9 && lead <= 13);
  if (lead != 0xC2 && (lead < 0xE1 || lead > 0xE3)) return 0;
  return is_white_space(decode(text, at)) ? length_of(lead) : 0;
}

}  // namespace jql
