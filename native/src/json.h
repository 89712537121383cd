// A strict JSON reader for manifests and tokenizers: parsed into one flat list of nodes, strings decoded when asked
// for.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace jql {

class Json;

// A value within a Json, which must outlive it. Accessors throw Error (JQL_INVALID_BUNDLE) that names the value.
class JsonValue {
 public:
  enum class Kind : uint8_t { null, boolean, number, string, array, object };

  Kind kind() const;
  bool is_null() const { return kind() == Kind::null; }
  bool is_string() const { return kind() == Kind::string; }

  std::string string() const;
  bool boolean() const;
  // A whole number from `least` to `most`.
  int64_t integer(int64_t least, int64_t most) const;
  // As serde_json reads it: all digits as one integer, then one division by a power of ten. It rounds twice, and so
  // differs from strtod by one unit in the last place for a quarter of XLM-R's scores.
  double number() const;

  // The member `name` of an object (of several the last); missing: an error, or nothing.
  JsonValue at(std::string_view name) const;
  std::optional<JsonValue> find(std::string_view name) const;
  // The same, where null counts as missing.
  std::optional<JsonValue> find_value(std::string_view name) const;

  // Elements of an array.
  std::vector<JsonValue> items() const;
  // Values of an object, whose names name() gives.
  std::vector<JsonValue> members() const;
  std::string name() const;

 private:
  friend class Json;
  JsonValue(const Json* json, uint32_t node) : json_(json), node_(node) {}
  void expect(Kind kind) const;
  std::vector<JsonValue> children() const;
  std::string described() const;  // where it is, for messages

  const Json* json_;
  uint32_t node_;
};

class Json {
 public:
  // Parses `text`, which must outlive this. `file` names it in errors. Throws Error (JQL_INVALID_BUNDLE).
  Json(std::string_view text, std::string file);
  Json(const Json&) = delete;
  Json& operator=(const Json&) = delete;

  JsonValue root() const { return JsonValue(this, 0); }

 private:
  friend class JsonValue;

  struct Node {
    JsonValue::Kind kind;
    bool flag;       // of a boolean: its value; of a string: it has escapes
    uint32_t begin;  // in the text; of a string without its quotes
    uint32_t end;
    uint32_t next;  // the node after this one and all that is inside it
    uint32_t name;  // the node of its name, in an object; 0 elsewhere
  };
  static constexpr int max_depth = 128;  // as serde_json

  [[noreturn]] void fail(const std::string& what) const;
  void skip_space();
  bool take(char c);
  void parse_value(int depth, uint32_t name);
  void parse_members(uint32_t node, int depth);
  void parse_elements(uint32_t node, int depth);
  uint32_t parse_string(uint32_t name);
  void check_escape();
  void parse_number(uint32_t name);
  void parse_word(std::string_view word, JsonValue::Kind kind, uint32_t name);
  uint32_t add(JsonValue::Kind kind, uint32_t begin, uint32_t name);
  std::string_view text_of(const Node& node) const { return text_.substr(node.begin, node.end - node.begin); }
  std::string decoded(const Node& node) const;

  std::string_view text_;
  std::string file_;
  size_t at_ = 0;
  std::vector<Node> nodes_;
};

}  // namespace jql
