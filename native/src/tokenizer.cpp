#include "tokenizer.h"

#include <algorithm>
#include <set>

#include "error.h"
#include "utf8.h"

namespace jql {

namespace {

constexpr std::string_view marker = "\xE2\x96\x81";  // U+2581, which stands for a space
constexpr size_t most_growth = 64;  // of a text by all replacements together; those of real models double or treble it
constexpr size_t part_size = 1 << 14;  // bytes that are normalized at a time, where there is a place to cut

bool is_true(JsonValue value, std::string_view name, bool otherwise) {
  auto found = value.find_value(name);
  return found ? found->boolean() : otherwise;
}

bool starts_with(std::string_view text, size_t at, std::string_view what) {
  return text.compare(at, what.size(), what) == 0;
}

// Bytes of the word boundary at `at`: U+2581, or a space, which becomes one.
size_t marker_at(std::string_view text, size_t at) {
  if (text[at] == ' ') return 1;
  return text[at] == marker[0] && starts_with(text, at, marker) ? marker.size() : 0;
}

size_t skip_white_space(std::string_view text, size_t at) {
  for (size_t length; at < text.size() && (length = white_space_at(text, at)) > 0;) at += length;
  return at;
}

size_t skip_white_space_back(std::string_view text, size_t at, size_t stop) {
  while (at > stop) {
    size_t start = before(text, at);
    if (start < stop || !white_space_at(text, start)) break;
    at = start;
  }
  return at;
}

// Beyond the limit, ids before this one may have been left out.
void put_token(int32_t id, size_t limit, Tokenizer::Scratch& scratch) {
  if (scratch.ids.size() <= limit) scratch.ids.push_back(id);
}

void replace_all(std::string_view text, std::string_view pattern, std::string_view content, std::string& out) {
  size_t at = 0;
  for (size_t found; (found = text.find(pattern, at)) != std::string_view::npos; at = found + pattern.size()) {
    out.append(text.substr(at, found - at)).append(content);
  }
  out.append(text.substr(at));
}

// Two spaces and more become `content`.
void replace_spaces(std::string_view text, std::string_view content, std::string& out) {
  for (size_t at = 0; at < text.size();) {
    size_t spaces = std::min(text.find("  ", at), text.size());
    out.append(text.substr(at, spaces - at));
    at = std::min(text.find_first_not_of(' ', spaces), text.size());
    if (at > spaces) out.append(content);
  }
}

}  // namespace

void Tokenizer::Scratch::shrink(size_t kept) {
  auto free = [kept](auto& buffer) {
    if (buffer.capacity() * sizeof buffer[0] > kept) std::decay_t<decltype(buffer)>().swap(buffer);
  };
  free(normalized), free(other), free(word), free(ids), free(unigram.nodes), free(unigram.path);
}

Tokenizer::Tokenizer(JsonValue root)
    : unigram_([&] {
        auto named = root.at("model").find_value("type");
        std::string type = named ? named->string() : "of no type";
        if (type != "Unigram") throw unsupported("tokenizer.json has the model " + type + ", libjql knows Unigram");
        return Unigram(root.at("model"));
      }()) {
  if (auto normalizer = root.find_value("normalizer")) read_normalizer(*normalizer);
  if (auto splitter = root.find_value("pre_tokenizer")) read_pre_tokenizer(*splitter);
  if (!has_metaspace_) throw unsupported("tokenizer.json has no pre_tokenizer Metaspace");
  works_on_parts_ = steps_work_on_parts();
  size_ = unigram_.size();
  if (auto tokens = root.find_value("added_tokens")) read_added_tokens(*tokens);
}

void Tokenizer::read_normalizer(JsonValue step) {
  std::string type = step.at("type").string();
  if (type == "Sequence") {
    for (JsonValue inner : step.at("normalizers").items()) read_normalizer(inner);
  } else if (type == "Precompiled" && !charsmap_) {
    charsmap_ = std::make_unique<Charsmap>(step.at("precompiled_charsmap").string());
    steps_.push_back({Step::Kind::map});
  } else if (type == "Strip") {
    steps_.push_back({Step::Kind::strip, step.at("strip_left").boolean(), step.at("strip_right").boolean()});
  } else if (type == "Replace") {
    read_replacement(step);
  } else {
    throw unsupported("tokenizer.json has the normalizer " + type + ", which libjql does not know");
  }
}

void Tokenizer::read_replacement(JsonValue step) {
  auto regex = step.at("pattern").find("Regex");
  std::string pattern = (regex ? *regex : step.at("pattern").at("String")).string(),
              content = step.at("content").string();
  if ((regex && pattern != " {2,}") || pattern.empty()) {
    throw unsupported("tokenizer.json replaces the pattern " + pattern + ", which libjql does not know");
  }
  growth_ *= std::max<double>(1, static_cast<double>(content.size()) / static_cast<double>(regex ? 2 : pattern.size()));
  if (growth_ > most_growth) throw unsupported("tokenizer.json replaces a text by one over 64 times as long");
  steps_.push_back({regex ? Step::Kind::spaces : Step::Kind::replace, false, false, pattern, content});
}

void Tokenizer::read_pre_tokenizer(JsonValue step) {
  std::string type = step.at("type").string();
  if (type == "Sequence") {
    for (JsonValue inner : step.at("pretokenizers").items()) read_pre_tokenizer(inner);
  } else if (type == "WhitespaceSplit" && !has_metaspace_) {
    splits_white_space_ = true;
  } else if (type == "Metaspace" && !has_metaspace_) {
    read_metaspace(step);
  } else {
    throw unsupported("tokenizer.json has the pre_tokenizer " + type + ", which libjql does not know in this place");
  }
}

void Tokenizer::read_metaspace(JsonValue step) {
  auto scheme = step.find_value("prepend_scheme");
  bool known = step.at("replacement").string() == marker && (!scheme || scheme->string() == "always") &&
               is_true(step, "split", true) && is_true(step, "add_prefix_space", true);
  if (!known) throw unsupported("tokenizer.json has a Metaspace that does not split, or not always prepends, U+2581");
  has_metaspace_ = true;
}

// Whether a text may be normalized in parts: those that end before a space, and after a character that is none.
bool Tokenizer::steps_work_on_parts() const {
  for (size_t i = 0; i < steps_.size(); ++i) {
    if (steps_[i].kind == Step::Kind::replace || (steps_[i].kind == Step::Kind::map && i > 0)) return false;
    const std::string& content = steps_[i].content;  // must begin a word, as the spaces did
    if (steps_[i].kind == Step::Kind::spaces && (content.empty() || marker_at(content, 0) == 0)) return false;
  }
  std::string space;
  if (charsmap_) charsmap_->apply(" ", space);
  return !charsmap_ || space == " ";
}

void Tokenizer::read_added_tokens(JsonValue tokens) {
  std::vector<Trie::Entry> raw, normalized;
  std::set<std::string> contents, normal_texts;
  for (JsonValue token : tokens.items()) {
    std::string content = token.at("content").string(), other;
    if (content.empty()) continue;
    if (is_true(token, "single_word", false)) throw unsupported("tokenizer.json has an added token of single words");
    if (!contents.insert(content).second) {
      throw unsupported("tokenizer.json has the added token " + content + " twice");
    }
    int32_t id = unigram_.id_of(content);
    if (id < 0) id = static_cast<int32_t>(size_);
    size_ = std::max(size_, static_cast<size_t>(id) + 1);
    auto place = static_cast<int32_t>(added_.size());
    added_.push_back({id, is_true(token, "lstrip", false), is_true(token, "rstrip", false)});
    if (!is_true(token, "normalized", false)) {
      raw.emplace_back(content, place);
    } else {
      std::string text;
      normalize(content, true, text, other);
      if (text.empty() || !normal_texts.insert(text).second) {
        throw unsupported("tokenizer.json has the added token " + content + ", which is normalized to " +
                          (text.empty() ? "nothing" : "the text of another one"));
      }
      normalized.emplace_back(text, place);
    }
  }
  has_normalized_tokens_ = !normalized.empty();
  works_on_parts_ = works_on_parts_ && !has_normalized_tokens_;
  raw_tokens_ = Trie(std::move(raw));
  normalized_tokens_ = Trie(std::move(normalized));
}

template <typename Gap, typename Token>
void Tokenizer::cut_at(const Trie& tokens, std::string_view text, Gap gap, Token token) const {
  size_t done = 0;
  for (size_t at = 0; at < text.size();) {
    size_t length = 0;
    int32_t place = -1;
    tokens.prefixes(text.substr(at), [&](size_t n, int32_t value) { length = n, place = value; });  // the longest
    if (place < 0) {
      ++at;
      continue;
    }
    const Added& added = added_[place];
    size_t start = added.takes_left ? skip_white_space_back(text, at, std::min(done, at)) : at;
    if (start > done) gap(text.substr(done, start - done));
    at += length;
    const size_t stop = added.takes_right ? skip_white_space(text, at) : at;
    if (!added.takes_left || stop > done) token(added.id);  // else the one before has taken all of it
    done = stop;  // as tokenizers: back into white space that the token before has taken
  }
  if (done < text.size()) gap(text.substr(done));
}

void Tokenizer::encode(std::string_view text, size_t limit, Scratch& scratch) const {
  scratch.ids.clear();
  cut_at(
      raw_tokens_, text, [&](std::string_view gap) { encode_raw(gap, limit, scratch); },
      [&](int32_t id) { put_token(id, limit, scratch); });
}

// Where the first part of `text` ends that can be normalized by itself: before a space, and after a character that is
// none and stays as it is.
size_t Tokenizer::end_of_part(std::string_view text) const {
  if (!works_on_parts_) return text.size();
  for (size_t at = part_size; (at = text.find(' ', at)) < text.size(); ++at) {
    size_t last = before(text, at);
    if (!white_space_at(text, last) && (!charsmap_ || charsmap_->keeps(text, last, at))) return at;
  }
  return text.size();
}

void Tokenizer::encode_raw(std::string_view text, size_t limit, Scratch& scratch) const {
  for (bool is_first = true; !text.empty() && scratch.ids.size() <= limit; is_first = false) {
    std::string_view part = text.substr(0, end_of_part(text));
    text.remove_prefix(part.size());
    normalize(part, is_first, scratch.normalized, scratch.other);
    encode_normalized(scratch.normalized, limit, scratch);
  }
}

void Tokenizer::normalize(std::string_view text, bool is_first, std::string& out, std::string& other) const {
  out.clear();
  bool maps_first = !steps_.empty() && steps_[0].kind == Step::Kind::map;
  if (maps_first)
    charsmap_->apply(text, out);
  else
    out.assign(text);
  for (size_t i = maps_first; i < steps_.size(); ++i) apply(steps_[i], is_first, out, other);
}

void Tokenizer::apply(const Step& step, bool is_first, std::string& text, std::string& other) const {
  other.clear();
  switch (step.kind) {
    case Step::Kind::map: charsmap_->apply(text, other); break;
    case Step::Kind::replace: replace_all(text, step.pattern, step.content, other); break;
    case Step::Kind::spaces: replace_spaces(text, step.content, other); break;
    case Step::Kind::strip: {
      // A later part begins with the spaces between two words, which are not at the beginning of the text.
      size_t start = step.left && is_first ? skip_white_space(text, 0) : 0;
      size_t end = step.right ? skip_white_space_back(text, text.size(), start) : text.size();
      other.assign(text, start, end - start);
    }
  }
  text.swap(other);
}

void Tokenizer::encode_normalized(std::string_view text, size_t limit, Scratch& scratch) const {
  auto encode_gap = [&](std::string_view gap) {
    if (!splits_white_space_) return encode_chunk(gap, limit, scratch);
    for (size_t at = skip_white_space(gap, 0); at < gap.size() && scratch.ids.size() <= limit;) {
      size_t end = at;
      while (end < gap.size() && !white_space_at(gap, end)) end += length_of(static_cast<unsigned char>(gap[end]));
      encode_chunk(gap.substr(at, end - at), limit, scratch);
      at = skip_white_space(gap, end);
    }
  };
  if (has_normalized_tokens_) {
    cut_at(normalized_tokens_, text, encode_gap, [&](int32_t id) { put_token(id, limit, scratch); });
  } else {
    encode_gap(text);
  }
}

// Metaspace: every word begins with U+2581, be it written, a space, or put before the first.
void Tokenizer::encode_chunk(std::string_view chunk, size_t limit, Scratch& scratch) const {
  if (chunk.empty()) return;
  for (size_t at = marker_at(chunk, 0); scratch.ids.size() <= limit;) {
    size_t end = at;
    while (end < chunk.size() && !marker_at(chunk, end)) ++end;
    encode_word(chunk.substr(at, end - at), limit, scratch);
    if (end == chunk.size()) break;
    at = end + marker_at(chunk, end);
  }
}

// `word` without the U+2581 that it begins with.
void Tokenizer::encode_word(std::string_view word, size_t limit, Scratch& scratch) const {
  if (scratch.memo.recall(word, scratch.ids)) return;
  scratch.word.assign(marker).append(word);
  size_t first = scratch.ids.size();
  unigram_.encode(scratch.word, limit, scratch.unigram, scratch.ids);
  if (scratch.ids.size() <= limit) scratch.memo.remember(word, scratch.ids.data() + first, scratch.ids.size() - first);
}

}  // namespace jql
