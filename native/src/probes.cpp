#include "probes.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>

#include "error.h"
#include "file.h"
#include "json.h"

namespace jql {

namespace {

constexpr int64_t short_tokens = 64;
constexpr double large_score = 10;  // as in certify.py

struct Probes {
  std::vector<int32_t> ids;
  std::vector<int64_t> offsets{0};
  std::vector<float> embeddings, scores;
  size_t size() const { return offsets.size() - 1; }
};

// A tensor of a safetensors file: an 8-byte length, a JSON header, and the data that it describes.
template <typename T>
std::vector<T> tensor(JsonValue header, std::string_view data, const char* name, const char* type) {
  JsonValue info = header.at(name);
  std::vector<JsonValue> range = info.at("data_offsets").items();
  auto limit = static_cast<int64_t>(data.size());
  bool fine = range.size() == 2 && info.at("dtype").string() == type;
  int64_t begin = fine ? range[0].integer(0, limit) : 0, end = fine ? range[1].integer(begin, limit) : 1;
  if (!fine || (end - begin) % static_cast<int64_t>(sizeof(T)) != 0) {
    throw invalid_bundle(std::string("probes.safetensors has no ") + type + " as " + name +
                         "; export the bundle again");
  }
  std::vector<T> values(static_cast<size_t>(end - begin) / sizeof(T));
  if (!values.empty()) std::memcpy(values.data(), data.data() + begin, values.size() * sizeof(T));
  return values;
}

Probes read_probes(const std::string& folder) {
  const std::string path = folder + "/probes.safetensors";
  MappedFile file(path);
  std::string_view bytes = file.text();
  uint64_t n_header = 0;
  if (bytes.size() >= 8) std::memcpy(&n_header, bytes.data(), 8);
  if (bytes.size() < 8 || n_header > bytes.size() - 8) throw invalid_bundle(path + " ends early; copy it again");
  Json json(bytes.substr(8, n_header), path);
  std::string_view data = bytes.substr(8 + n_header);
  JsonValue header = json.root();
  return {tensor<int32_t>(header, data, "ids", "I32"), tensor<int64_t>(header, data, "offsets", "I64"),
          tensor<float>(header, data, "embedding", "F32"), tensor<float>(header, data, "scores", "F32")};
}

void check_shape(const Probes& probes, const std::string& folder, size_t n_heads, size_t width) {
  bool fine = !probes.offsets.empty() && probes.offsets.front() == 0 &&
              probes.offsets.back() == static_cast<int64_t>(probes.ids.size());
  for (size_t i = 0; fine && i < probes.size(); ++i) fine = probes.offsets[i] < probes.offsets[i + 1];
  fine = fine && probes.embeddings.size() == probes.size() * width && probes.scores.size() == probes.size() * n_heads;
  if (!fine)
    throw invalid_bundle(folder +
                         ": probes.safetensors is of another shape than bundle.json says; export the bundle again");
}

// The documents of up to `short_tokens` tokens, so that opening a bundle takes no longer than it must.
Probes short_ones(const Probes& all, size_t n_heads, size_t width) {
  Probes some;
  for (size_t i = 0; i < all.size(); ++i) {
    int64_t begin = all.offsets[i], end = all.offsets[i + 1];
    if (end - begin > short_tokens) continue;
    some.ids.insert(some.ids.end(), all.ids.begin() + begin, all.ids.begin() + end);
    some.offsets.push_back(static_cast<int64_t>(some.ids.size()));
    auto row = [i](const std::vector<float>& values, size_t n) {
      return values.begin() + static_cast<std::ptrdiff_t>(i * n);
    };
    some.embeddings.insert(some.embeddings.end(), row(all.embeddings, width), row(all.embeddings, width) + width);
    some.scores.insert(some.scores.end(), row(all.scores, n_heads), row(all.scores, n_heads) + n_heads);
  }
  return some;
}

// The largest absolute difference, of `scores` that are large as a part of them; NaN counts as infinite.
double largest_difference(const std::vector<float>& found, const std::vector<float>& expected,
                          const std::vector<float>* scores = nullptr) {
  double largest = 0;
  for (size_t i = 0; i < found.size(); ++i) {
    double difference = std::fabs(static_cast<double>(found[i]) - static_cast<double>(expected[i]));
    if (scores) difference /= std::max(1.0, std::fabs(static_cast<double>((*scores)[i])) / large_score);
    if (!(difference <= largest)) largest = std::isnan(difference) ? INFINITY : difference;
  }
  return largest;
}

std::string number(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%.2e", value);
  return text;
}

// As _check_manifest in certify.py: the probes are documents of every kind, so the manifest must fit them.
void check_manifest(const Probes& probes, const Manifest& manifest, const std::string& folder) {
  const auto n_prefix = static_cast<int64_t>(manifest.prefix.size()),
             n_suffix = static_cast<int64_t>(manifest.suffix.size());
  int64_t longest = 0;
  for (size_t i = 0; i < probes.size(); ++i) {
    const int64_t begin = probes.offsets[i], end = probes.offsets[i + 1];
    longest = std::max(longest, end - begin);
    if (end - begin < n_prefix + n_suffix ||
        !std::equal(manifest.prefix.begin(), manifest.prefix.end(), probes.ids.begin() + begin) ||
        !std::equal(manifest.suffix.begin(), manifest.suffix.end(), probes.ids.begin() + (end - n_suffix))) {
      throw invalid_bundle(folder +
                           ": documents in probes.safetensors have other ids at their ends than tokenizer.prefix "
                           "and suffix in bundle.json; export the bundle again");
    }
  }
  if (longest < manifest.max_tokens) {
    throw invalid_bundle(folder + ": max_tokens is " + std::to_string(manifest.max_tokens) +
                         " in bundle.json, the longest document in probes.safetensors has " + std::to_string(longest) +
                         " tokens, and the graphs were certified up to there; export the bundle again");
  }
}

}  // namespace

void certify(const std::string& folder, const Manifest& manifest, const std::string& variant, Session& session,
             Slots& slots) {
  size_t n_heads = manifest.outputs.size(), width = static_cast<size_t>(manifest.hidden_size);
  Probes all = read_probes(folder);
  check_shape(all, folder, n_heads, width);
  check_manifest(all, manifest, folder);
  Probes probes = short_ones(all, n_heads, width);
  Documents documents{probes.ids.data(), probes.offsets.data(), probes.size()};
  std::vector<float> scores(probes.scores.size()), alone(scores.size()), embeddings(probes.embeddings.size());
  compute(session, slots, documents, batch_tokens, {scores.data(), embeddings.data(), n_heads, width, nullptr});
  if (n_heads) compute(session, slots, documents, 1, {alone.data(), nullptr, n_heads, width, nullptr});
  const auto& limits = manifest.variant(variant).tolerance;
  auto is_large = [](float score) { return std::fabs(score) > large_score; };
  const bool scaled = std::any_of(probes.scores.begin(), probes.scores.end(), is_large);
  auto check = [&](const char* name, double difference, bool is_of_scores) {
    auto limit = limits.find(name);
    if (limit == limits.end()) throw invalid_bundle("bundle.json: tolerance of " + variant + " lacks " + name);
    if (difference <= limit->second) return;
    throw Error(JQL_PARITY, "variant " + variant + " is out of tolerance on this machine: " + name + " differs by " +
                                number(difference) + " on a probe document, allowed is " + number(limit->second) +
                                (scaled && is_of_scores ? " (of a score s beyond 10: both over |s| / 10)" : "") +
                                ". It must not be used; please report this with the machine");
  };
  check("embedding", largest_difference(embeddings, probes.embeddings), false);
  check("score", largest_difference(scores, probes.scores, &probes.scores), true);
  check("batch", largest_difference(scores, alone, &probes.scores), true);
}

}  // namespace jql
