// Documents -> batches of one length -> a session, by several threads; results in the order of the documents.
#pragma once

#include <condition_variable>
#include <mutex>

#include "documents.h"
#include "session.h"

namespace jql {

// Small batches keep the activations of a layer in the cache.
constexpr int64_t batch_tokens = 1024;

// At most so many batches of an engine run at a time, whoever called.
class Slots {
 public:
  explicit Slots(int n) : n_(n) {}
  void acquire();
  void release();

 private:
  std::mutex mutex_;
  std::condition_variable freed_;
  int n_;
};

// Where results go; either may be null. Document i has row i, or rows[i].
struct Results {
  float* scores;      // [n][n_heads]
  float* embeddings;  // [n][hidden_size]
  size_t n_heads, hidden_size;
  const size_t* rows;
};

// Computes all documents, in batches of at most `max_tokens` tokens or one document. Throws Error.
void compute(Session& session, Slots& slots, const Documents& documents, int64_t max_tokens, const Results& results);

}  // namespace jql
