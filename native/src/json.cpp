#include "json.h"

#include <cmath>

#include "error.h"
#include "utf8.h"

namespace jql {

namespace {

constexpr const char* kind_names[] = {"null", "true or false", "a number", "a string", "an array", "an object"};

bool is_digit(char c) { return c >= '0' && c <= '9'; }

uint32_t hex4(std::string_view text) {
  uint32_t value = 0;
  for (char c : text.substr(0, 4)) {
    uint32_t digit = is_digit(c) ? c - '0' : (c | 0x20) - 'a' + 10;
    value = value << 4 | digit;
  }
  return value;
}

// value * 10^exponent as serde_json 1.0 computes it.
double scaled(uint64_t digits, int64_t exponent) {
  auto value = static_cast<double>(digits);
  while (exponent < -308) {
    if (value == 0) return value;
    value /= 1e308;
    exponent += 308;
  }
  double power = 1;
  if (exponent >= -308 && exponent <= 308)
    power = std::stod("1e" + std::to_string(std::abs(exponent)));
  else
    power = value == 0 ? 1 : INFINITY;
  return exponent < 0 ? value / power : value * power;
}

}  // namespace

Json::Json(std::string_view text, std::string file) : text_(text), file_(std::move(file)) {
  if (text.size() > UINT32_MAX / 2) fail("it is larger than 2 GiB");
  at_ = find_invalid_utf8(text);
  if (at_ != std::string_view::npos) fail("it is not UTF-8");
  at_ = 0;
  skip_space();
  parse_value(0, 0);
  skip_space();
  if (at_ < text_.size()) fail("something follows its value");
}

void Json::fail(const std::string& what) const {
  throw invalid_bundle(file_ + " is damaged at byte " + std::to_string(at_) + ": " + what + "; copy it again");
}

void Json::skip_space() {
  while (at_ < text_.size() && (text_[at_] == ' ' || text_[at_] == '\n' || text_[at_] == '\r' || text_[at_] == '\t')) {
    ++at_;
  }
}

bool Json::take(char c) {
  skip_space();
  if (at_ >= text_.size() || text_[at_] != c) return false;
  ++at_;
  return true;
}

uint32_t Json::add(JsonValue::Kind kind, uint32_t begin, uint32_t name) {
  auto node = static_cast<uint32_t>(nodes_.size());
  nodes_.push_back({kind, false, begin, static_cast<uint32_t>(at_), node + 1, name});
  return node;
}

void Json::parse_value(int depth, uint32_t name) {
  skip_space();
  if (depth > max_depth) fail("its values are nested too deeply");
  if (at_ >= text_.size()) fail("it ends early");
  auto begin = static_cast<uint32_t>(at_);
  switch (text_[at_]) {
    case '{': return parse_members(add(JsonValue::Kind::object, begin, name), depth);
    case '[': return parse_elements(add(JsonValue::Kind::array, begin, name), depth);
    case '"': parse_string(name); return;
    case 'n': return parse_word("null", JsonValue::Kind::null, name);
    case 't': return parse_word("true", JsonValue::Kind::boolean, name);
    case 'f': return parse_word("false", JsonValue::Kind::boolean, name);
    default: return parse_number(name);
  }
}

void Json::parse_members(uint32_t node, int depth) {
  ++at_;
  if (!take('}')) {
    do {
      skip_space();
      if (at_ >= text_.size() || text_[at_] != '"') fail("expected a name in quotes");
      uint32_t name = parse_string(0);
      if (!take(':')) fail("expected a colon");
      parse_value(depth + 1, name);
    } while (take(','));
    if (!take('}')) fail("expected a comma or the end of an object");
  }
  nodes_[node].next = static_cast<uint32_t>(nodes_.size());
}

void Json::parse_elements(uint32_t node, int depth) {
  ++at_;
  if (!take(']')) {
    do {
      parse_value(depth + 1, 0);
    } while (take(','));
    if (!take(']')) fail("expected a comma or the end of an array");
  }
  nodes_[node].next = static_cast<uint32_t>(nodes_.size());
}

uint32_t Json::parse_string(uint32_t name) {
  auto begin = static_cast<uint32_t>(++at_);
  bool escapes = false;
  for (; at_ < text_.size() && text_[at_] != '"'; ++at_) {
    if (static_cast<unsigned char>(text_[at_]) < 0x20) fail("a control character stands in a string");
    if (text_[at_] != '\\') continue;
    escapes = true;
    check_escape();
  }
  if (at_ >= text_.size()) fail("a string does not end");
  uint32_t node = add(JsonValue::Kind::string, begin, name);
  nodes_[node].flag = escapes;
  ++at_;
  return node;
}

// Checks the escape at `at_` and moves to its last byte: a surrogate must be one half of a pair.
void Json::check_escape() {
  auto unit = [&](size_t at) -> int64_t {
    if (at + 6 > text_.size() || text_[at] != '\\' || text_[at + 1] != 'u') return -1;
    for (size_t i = at + 2; i < at + 6; ++i) {
      if (!is_digit(text_[i]) && !((text_[i] | 0x20) >= 'a' && (text_[i] | 0x20) <= 'f')) return -1;
    }
    return hex4(text_.substr(at + 2));
  };
  char escaped = at_ + 1 < text_.size() ? text_[at_ + 1] : '\0';
  if (escaped != 'u') {
    if (escaped == '\0' || std::string_view("\"\\/bfnrt").find(escaped) == std::string_view::npos) fail("bad escape");
    ++at_;
    return;
  }
  int64_t first = unit(at_);
  bool high = first >= 0xD800 && first < 0xDC00;
  int64_t second = high ? unit(at_ + 6) : 0;
  if (first < 0 || (first >= 0xDC00 && first < 0xE000) || (high && (second < 0xDC00 || second >= 0xE000))) {
    fail("bad escape of a code point");
  }
  at_ += high ? 11 : 5;
}

void Json::parse_number(uint32_t name) {
  auto begin = static_cast<uint32_t>(at_);
  auto digits = [&] {
    size_t start = at_;
    while (at_ < text_.size() && is_digit(text_[at_])) ++at_;
    return at_ - start;
  };
  auto next_is = [&](char c) { return at_ < text_.size() && text_[at_] == c; };
  if (next_is('-')) ++at_;
  size_t first = at_;
  size_t n_digits = digits();
  bool valid = n_digits > 0 && (n_digits == 1 || text_[first] != '0');
  if (valid && next_is('.')) {
    ++at_;
    valid = digits() > 0;
  }
  if (valid && (next_is('e') || next_is('E'))) {
    ++at_;
    if (next_is('+') || next_is('-')) ++at_;
    valid = digits() > 0;
  }
  if (!valid) fail("expected a value");
  add(JsonValue::Kind::number, begin, name);
}

void Json::parse_word(std::string_view word, JsonValue::Kind kind, uint32_t name) {
  if (text_.substr(at_, word.size()) != word) fail("expected a value");
  auto begin = static_cast<uint32_t>(at_);
  at_ += word.size();
  nodes_[add(kind, begin, name)].flag = word == "true";
}

std::string Json::decoded(const Node& node) const {
  std::string_view raw = text_of(node);
  if (!node.flag) return std::string(raw);
  std::string text;
  for (size_t i = 0; i < raw.size(); ++i) {
    if (raw[i] != '\\') {
      text.push_back(raw[i]);
      continue;
    }
    static constexpr std::string_view names = "bfnrt", meanings = "\b\f\n\r\t";
    char escaped = raw[++i];
    if (escaped == 'u') {
      uint32_t c = hex4(raw.substr(i + 1));
      i += 4;
      if (c >= 0xD800 && c < 0xDC00) {
        c = 0x10000 + ((c - 0xD800) << 10) + (hex4(raw.substr(i + 3)) - 0xDC00);
        i += 6;
      }
      append_utf8(text, c);
    } else {
      size_t place = names.find(escaped);
      text.push_back(place == std::string_view::npos ? escaped : meanings[place]);
    }
  }
  return text;
}

JsonValue::Kind JsonValue::kind() const { return json_->nodes_[node_].kind; }

std::string JsonValue::name() const {
  uint32_t name = json_->nodes_[node_].name;
  return name ? json_->decoded(json_->nodes_[name]) : std::string();
}

std::string JsonValue::described() const {
  const Json::Node& node = json_->nodes_[node_];
  std::string what = node.name ? "\"" + name() + "\"" : "the value at byte " + std::to_string(node.begin);
  return json_->file_ + ": " + what;
}

void JsonValue::expect(Kind kind) const {
  if (this->kind() == kind) return;
  throw invalid_bundle(described() + " is " + kind_names[static_cast<int>(this->kind())] + ", expected " +
                       kind_names[static_cast<int>(kind)]);
}

std::string JsonValue::string() const {
  expect(Kind::string);
  return json_->decoded(json_->nodes_[node_]);
}

bool JsonValue::boolean() const {
  expect(Kind::boolean);
  return json_->nodes_[node_].flag;
}

int64_t JsonValue::integer(int64_t least, int64_t most) const {
  expect(Kind::number);
  std::string_view text = json_->text_of(json_->nodes_[node_]);
  bool whole = text.find_first_of(".eE") == std::string_view::npos && text.size() <= 18;
  int64_t value = whole ? std::stoll(std::string(text)) : 0;
  if (!whole || value < least || value > most) {
    throw invalid_bundle(described() + " is " + std::string(text.substr(0, 40)) + ", expected a whole number from " +
                         std::to_string(least) + " to " + std::to_string(most));
  }
  return value;
}

double JsonValue::number() const {
  expect(Kind::number);
  std::string_view text = json_->text_of(json_->nodes_[node_]);
  bool negative = text[0] == '-', full = false, fraction = false;
  uint64_t digits = 0;
  int64_t exponent = 0;
  size_t i = negative;
  for (; i < text.size() && text[i] != 'e' && text[i] != 'E'; ++i) {
    if (text[i] == '.') {
      fraction = true;
      full = false;
      continue;
    }
    auto digit = static_cast<uint64_t>(text[i] - '0');
    full = full || digits > (UINT64_MAX - digit) / 10;  // what follows is dropped, up to the point or the end
    if (!full) digits = digits * 10 + digit;
    exponent += full ? !fraction : -static_cast<int64_t>(fraction);
  }
  if (i < text.size()) {
    bool down = text[i + 1] == '-';
    int64_t written = 0;
    for (++i; i < text.size(); ++i) {
      if (is_digit(text[i]) && written < 1000000) written = written * 10 + (text[i] - '0');
    }
    exponent += down ? -written : written;
  }
  double value = scaled(digits, exponent);
  if (std::isinf(value)) throw invalid_bundle(json_->file_ + ": the number " + std::string(text) + " is out of range");
  return negative ? -value : value;
}

std::optional<JsonValue> JsonValue::find(std::string_view name) const {
  expect(Kind::object);
  std::optional<JsonValue> found;
  const auto& nodes = json_->nodes_;
  uint32_t end = nodes[node_].next;
  for (uint32_t at = node_ + 1; at < end; at = nodes[at + 1].next) {  // a name, then its value
    const Json::Node& key = nodes[at];
    if (key.flag ? json_->decoded(key) == name : json_->text_of(key) == name) found = JsonValue(json_, at + 1);
  }
  return found;
}

std::optional<JsonValue> JsonValue::find_value(std::string_view name) const {
  auto found = find(name);
  return found && !found->is_null() ? found : std::nullopt;
}

JsonValue JsonValue::at(std::string_view name) const {
  if (auto found = find(name)) return *found;
  throw invalid_bundle(json_->file_ + ": " + (this->name().empty() ? "" : "\"" + this->name() + "\": ") + "\"" +
                       std::string(name) + "\" is missing");
}

std::vector<JsonValue> JsonValue::members() const {
  expect(Kind::object);
  return children();
}

std::vector<JsonValue> JsonValue::items() const {
  expect(Kind::array);
  return children();
}

std::vector<JsonValue> JsonValue::children() const {
  const auto& nodes = json_->nodes_;
  const Json::Node& node = nodes[node_];
  std::vector<JsonValue> found;
  for (uint32_t at = node_ + 1; at < node.next; at = nodes[at].next) {
    if (node.kind == Kind::object) ++at;
    found.push_back(JsonValue(json_, at));
  }
  return found;
}

}  // namespace jql
