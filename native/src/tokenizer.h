// tokenizer.json of the XLM-R kind: text -> ids, exactly as `tokenizers` gives them.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "charsmap.h"
#include "json.h"
#include "memo.h"
#include "trie.h"
#include "unigram.h"

namespace jql {

class Tokenizer {
 public:
  // What one thread needs besides: buffers, and the words that it has met.
  struct Scratch {
    Memo memo;
    Unigram::Scratch unigram;
    std::string normalized, other, word;
    std::vector<int32_t> ids;

    // Frees buffers of more than `kept` bytes, which a huge text leaves behind.
    void shrink(size_t kept);
  };

  // Throws Error: JQL_UNSUPPORTED for a tokenizer of another kind, JQL_INVALID_BUNDLE for a damaged one.
  explicit Tokenizer(JsonValue root);

  // Fills scratch.ids with the ids of `text`, valid UTF-8, without special tokens: all of them if there are at most
  // `limit`, else more than `limit` of the first.
  void encode(std::string_view text, size_t limit, Scratch& scratch) const;

  // All ids are below this.
  size_t size() const { return size_; }

 private:
  struct Added {
    int32_t id;
    bool takes_left, takes_right;  // white space (lstrip, rstrip)
  };
  struct Step {  // of the normalizer
    enum class Kind { map, strip, spaces, replace } kind;
    bool left = false, right = false;        // strip
    std::string pattern = {}, content = {};  // replace; spaces: two and more become `content`
  };

  void read_normalizer(JsonValue step);
  void read_replacement(JsonValue step);
  void read_pre_tokenizer(JsonValue step);
  void read_metaspace(JsonValue step);
  void read_added_tokens(JsonValue tokens);
  bool steps_work_on_parts() const;

  // Calls gap(text) for what lies between added tokens, token(id) for each of those, in order.
  template <typename Gap, typename Token>
  void cut_at(const Trie& tokens, std::string_view text, Gap gap, Token token) const;

  size_t end_of_part(std::string_view text) const;
  void encode_raw(std::string_view text, size_t limit, Scratch& scratch) const;
  void normalize(std::string_view text, bool is_first, std::string& out, std::string& other) const;
  void apply(const Step& step, bool is_first, std::string& text, std::string& other) const;
  void encode_normalized(std::string_view text, size_t limit, Scratch& scratch) const;
  void encode_chunk(std::string_view chunk, size_t limit, Scratch& scratch) const;
  void encode_word(std::string_view word, size_t limit, Scratch& scratch) const;

  Unigram unigram_;
  std::vector<Step> steps_;
  double growth_ = 1;  // how many times as long the replacements may make a text
  std::unique_ptr<Charsmap> charsmap_;
  bool splits_white_space_ = false, has_metaspace_ = false, works_on_parts_ = false;
  std::vector<Added> added_;
  Trie raw_tokens_{{}}, normalized_tokens_{{}};  // searched in the text as it is, and normalized; places in added_
  bool has_normalized_tokens_ = false;
  size_t size_ = 0;
};

}  // namespace jql
