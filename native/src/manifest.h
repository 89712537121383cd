// bundle.json, format 2: docs/bundle-format.md. Only what scoring needs; other fields are ignored, as the format says.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace jql {

struct Variant {
  std::string graph, layout, precision, provider;
  std::map<std::string, double> tolerance;
};

struct BundleFile {
  int64_t bytes;
  std::string sha256;
};

struct Manifest {
  // Reads bundle.json in `folder`. Throws Error (JQL_INVALID_BUNDLE).
  static Manifest read(const std::string& folder);
  static Manifest parse(const std::string& text, const std::string& folder);

  // Compares sizes, and SHA-256 if `hashes`, of all files with what is in `folder`. Throws Error (JQL_INVALID_BUNDLE).
  void verify(const std::string& folder, bool hashes) const;

  // Throws Error (JQL_UNSUPPORTED) that names those there are.
  const Variant& variant(const std::string& name) const;

  int64_t hidden_size = 0, max_tokens = 0;
  std::vector<std::string> outputs;  // of all readouts: the names of the scores
  std::string unknown_texts;         // why texts cannot be turned into ids; empty: they can
  std::string unknown_readout;       // why the scores cannot be trusted; empty: they can
  std::vector<int32_t> prefix, suffix;
  std::map<std::string, Variant> variants;
  std::map<std::string, BundleFile> files;
};

}  // namespace jql
