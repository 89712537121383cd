// A bundle that is open: texts or ids in, scores or embeddings out. All that api.cpp and arrow.cpp offer.
#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#include "documents.h"
#include "manifest.h"
#include "scoring.h"
#include "session.h"
#include "tokenizer.h"

namespace jql {

// Text of a caller; null where data() is.
using Texts = std::vector<std::string_view>;

// What is wanted of texts, row by row; every pointer but one of the first two may be null.
struct TextResults {
  float* scores;
  float* embeddings;
  int32_t* n_tokens;
  uint8_t* truncated;
  int32_t* status;  // null: a text that is not UTF-8 is an error
};

class Engine {
 public:
  Engine(const std::string& folder, const jql_options& options);

  const std::vector<std::string>& heads() const { return manifest_.outputs; }
  size_t max_tokens() const { return static_cast<size_t>(manifest_.max_tokens); }
  size_t hidden_size() const { return static_cast<size_t>(manifest_.hidden_size); }

  // Ids of valid or invalid UTF-8: special tokens included, and whether they were truncated. Throws Error.
  std::vector<int32_t> tokenize(std::string_view text, bool& truncated);

  // Throws Error (JQL_UNSUPPORTED) where texts cannot be embedded, or not scored.
  void check_texts(bool scored) const;

  // Throws Error.
  void score_tokens(const Documents& documents, float* scores);
  void compute_texts(const Texts& texts, const TextResults& results, size_t first = 0);

 private:
  class Lease;  // of a Scratch, for one call
  struct Chunk;

  void read_tokenizer(const std::string& folder);
  void check_readouts() const;
  void check_tokens(const Documents& documents) const;
  const Tokenizer& tokenizer() const;
  bool append(std::string_view text, Tokenizer::Scratch& scratch, std::vector<int32_t>& ids) const;

  Manifest manifest_;
  std::unique_ptr<Tokenizer> tokenizer_;
  std::string no_tokenizer_;  // why there is none
  int64_t n_ids_ = 0;         // ids are below this
  std::unique_ptr<Session> session_;
  std::unique_ptr<Slots> slots_;
  std::mutex scratch_mutex_;
  std::vector<std::unique_ptr<Tokenizer::Scratch>> scratches_;  // that no thread uses
};

}  // namespace jql
