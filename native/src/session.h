// A loaded graph: documents of one length go in, their scores and embeddings come out.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "jql.h"
#include "manifest.h"

namespace jql {

// Documents of exactly one length, which no graph needs padding for.
struct Batch {
  std::vector<int64_t> ids;  // [n_docs][length]
  int64_t n_docs, length;
};

struct Output {
  std::vector<float> scores;      // [n_docs][heads]
  std::vector<float> embeddings;  // [n_docs][hidden_size]
};

class Session {
 public:
  virtual ~Session() = default;
  // May be called by `n_parallel` threads at once. Throws Error (JQL_RUNTIME_FAILED).
  virtual Output run(const Batch& batch) = 0;
  int n_parallel = 1;
};

struct SessionRequest {
  std::string graph;  // path
  const Variant& variant;
  size_t n_heads, hidden_size;
  int threads;
  const jql_options& options;
};

// Checks what a graph gives as `name`, of which the manifest says how many values there are; throws Error.
void check_output(const char* name, bool is_float32, size_t n_values, size_t expected);

// Throws Error: JQL_UNSUPPORTED, JQL_NO_RUNTIME, JQL_RUNTIME_FAILED.
std::unique_ptr<Session> open_session(const SessionRequest& request);
std::unique_ptr<Session> open_onnxruntime(const SessionRequest& request);
std::unique_ptr<Session> open_openvino(const SessionRequest& request);

}  // namespace jql
