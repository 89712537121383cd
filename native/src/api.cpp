// jql.h: checks arguments, turns exceptions into a status and a sentence.
#include <algorithm>
#include <cstddef>
#include <cstring>
#include <new>

#include "engine.h"
#include "error.h"
#include "guard.h"

#define JQL_STRING(x) #x
#define JQL_DOTTED(major, minor, patch) JQL_STRING(major) "." JQL_STRING(minor) "." JQL_STRING(patch)

using jql::Engine;
using jql::guarded;
using jql::require;

namespace {

constexpr size_t first_size = offsetof(jql_options, reserved) + sizeof(int32_t);  // of the options of version 0.1
static_assert(sizeof(jql_options) == first_size, "no padding at the end, and a new size for each version");

// What the caller knows of the options, the rest as it is by default.
jql_options complete(const jql_options* given) {
  jql_options options = JQL_OPTIONS_INIT;
  if (!given) return options;
  if (given->size < first_size || given->size > 4096) {
    throw jql::invalid_argument("options.size is " + std::to_string(given->size) + ": begin with JQL_OPTIONS_INIT");
  }
  auto bytes = reinterpret_cast<const char*>(given);
  if (std::any_of(bytes + std::min(given->size, sizeof options), bytes + given->size, [](char c) { return c != 0; })) {
    throw jql::invalid_argument("options has fields that this libjql " + std::string(jql_version()) + " does not know");
  }
  std::memcpy(&options, given, std::min(given->size, sizeof options));
  if (options.reserved != 0) throw jql::invalid_argument("options.reserved is not 0: begin with JQL_OPTIONS_INIT");
  return options;
}

jql::Texts views(const char* const* texts, const size_t* lengths, size_t n_docs) {
  jql::Texts found(n_docs);
  for (size_t i = 0; i < n_docs; ++i) {
    if (texts[i]) found[i] = {texts[i], lengths ? lengths[i] : std::strlen(texts[i])};
  }
  return found;
}

}  // namespace

extern "C" {

const char* jql_version(void) { return JQL_DOTTED(JQL_VERSION_MAJOR, JQL_VERSION_MINOR, JQL_VERSION_PATCH); }

const char* jql_status_name(jql_status status) {
  static constexpr const char* names[] = {
      "JQL_OK",           "JQL_INVALID_ARGUMENT", "JQL_INVALID_BUNDLE", "JQL_INVALID_TEXT",  "JQL_UNSUPPORTED",
      "JQL_NO_RUNTIME",   "JQL_RUNTIME_FAILED",   "JQL_PARITY",         "JQL_OUT_OF_MEMORY", "JQL_BUFFER_TOO_SMALL",
      "JQL_INPUT_FAILED", "JQL_INTERNAL"};
  auto number = static_cast<size_t>(status);
  return number < sizeof names / sizeof *names ? names[number] : "unknown";
}

jql_status jql_open(const char* bundle_dir, const jql_options* options, jql_engine** engine, char* err,
                    size_t err_size) {
  if (engine) *engine = nullptr;
  return guarded(err, err_size, [&] {
    require(bundle_dir && *bundle_dir, "bundle_dir");
    require(engine, "engine");
    *engine = reinterpret_cast<jql_engine*>(new Engine(bundle_dir, complete(options)));
  });
}

void jql_close(jql_engine* engine) {
  jql::NoCancel no_cancel;  // threads of the runtime are joined
  delete reinterpret_cast<Engine*>(engine);
}

size_t jql_head_count(const jql_engine* engine) {
  return engine ? reinterpret_cast<const Engine*>(engine)->heads().size() : 0;
}

const char* jql_head_name(const jql_engine* engine, size_t index) {
  return index < jql_head_count(engine) ? reinterpret_cast<const Engine*>(engine)->heads()[index].c_str() : nullptr;
}

size_t jql_max_tokens(const jql_engine* engine) {
  return engine ? reinterpret_cast<const Engine*>(engine)->max_tokens() : 0;
}

size_t jql_embedding_size(const jql_engine* engine) {
  return engine ? reinterpret_cast<const Engine*>(engine)->hidden_size() : 0;
}

jql_status jql_tokenize(jql_engine* engine, const char* text, size_t length, int32_t* ids, size_t capacity,
                        size_t* n_ids, int32_t* truncated, char* err, size_t err_size) {
  return guarded(err, err_size, [&] {
    require(engine, "engine");
    require(text || length == 0, "text");
    require(ids || capacity == 0, "ids");
    require(n_ids, "n_ids");
    bool was_truncated = false;
    auto found = reinterpret_cast<Engine*>(engine)->tokenize({text ? text : "", length}, was_truncated);
    *n_ids = found.size();
    if (truncated) *truncated = was_truncated;
    if (found.size() > capacity) {
      throw jql::Error(JQL_BUFFER_TOO_SMALL, "the text has " + std::to_string(found.size()) +
                                                 " ids, there is room for " + std::to_string(capacity));
    }
    std::copy(found.begin(), found.end(), ids);
  });
}

jql_status jql_score_tokens(jql_engine* engine, const int32_t* ids, const int64_t* offsets, size_t n_docs,
                            float* scores, char* err, size_t err_size) {
  return guarded(err, err_size, [&] {
    require(engine, "engine");
    if (n_docs == 0) return;
    require(ids, "ids");
    require(offsets, "offsets");
    require(scores || jql_head_count(engine) == 0, "scores");
    reinterpret_cast<Engine*>(engine)->score_tokens({ids, offsets, n_docs}, scores);
  });
}

jql_status jql_score_texts(jql_engine* engine, const char* const* texts, const size_t* lengths, size_t n_docs,
                           float* scores, int32_t* n_tokens, uint8_t* truncated, int32_t* status, char* err,
                           size_t err_size) {
  return guarded(err, err_size, [&] {
    require(engine, "engine");
    if (n_docs == 0) return;
    require(texts, "texts");
    require(scores || jql_head_count(engine) == 0, "scores");
    reinterpret_cast<Engine*>(engine)->compute_texts(views(texts, lengths, n_docs),
                                                     {scores, nullptr, n_tokens, truncated, status});
  });
}

jql_status jql_embed_texts(jql_engine* engine, const char* const* texts, const size_t* lengths, size_t n_docs,
                           float* embeddings, int32_t* n_tokens, uint8_t* truncated, int32_t* status, char* err,
                           size_t err_size) {
  return guarded(err, err_size, [&] {
    require(engine, "engine");
    if (n_docs == 0) return;
    require(texts, "texts");
    require(embeddings, "embeddings");
    reinterpret_cast<Engine*>(engine)->compute_texts(views(texts, lengths, n_docs),
                                                     {nullptr, embeddings, n_tokens, truncated, status});
  });
}

}  // extern "C"
