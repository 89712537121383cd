#include "manifest.h"

#include <algorithm>
#include <cctype>
#include <filesystem>
#include <set>

#include "error.h"
#include "file.h"
#include "json.h"

namespace jql {

namespace {

constexpr int64_t format = 2;
constexpr int64_t most = INT32_MAX;  // of sizes and ids, which graphs and runtimes hold in 32 bits
constexpr const char* needed_files[] = {"tokenizer.json", "readouts.safetensors", "probes.safetensors"};

// As RelativeName in names.py: a path of plain segments, which cannot lead out of the bundle.
void check_name(const std::string& name) {
  bool fine = name.find('\0') == std::string::npos && !name.empty() && name.back() != '/';
  for (size_t begin = 0; fine && begin < name.size();) {
    size_t end = std::min(name.find('/', begin), name.size());
    std::string segment = name.substr(begin, end - begin);
    fine = !segment.empty() && segment != "." && segment != "..";
    begin = end + 1;
  }
  size_t colon = name.find(":/");  // joined to a remote folder it would lead elsewhere
  bool is_url = colon != std::string::npos && colon > 0 && std::isalpha(static_cast<unsigned char>(name[0])) &&
                std::all_of(name.begin(), name.begin() + static_cast<std::ptrdiff_t>(colon),
                            [](unsigned char c) { return std::isalnum(c) || c == '+' || c == '.' || c == '-'; });
  if (!fine || is_url) {
    throw invalid_bundle("bundle.json: \"" + name.substr(0, 200) + "\" cannot be the name of a file inside a bundle");
  }
}

std::vector<int32_t> ids_of(JsonValue list) {
  std::vector<int32_t> ids;
  for (JsonValue id : list.items()) ids.push_back(static_cast<int32_t>(id.integer(0, most)));
  return ids;
}

void check_format(JsonValue root, const std::string& folder) {
  int64_t found = root.find("format") ? root.at("format").integer(INT32_MIN, most) : format;
  if (found != format) {
    throw invalid_bundle(folder + " has bundle format " + std::to_string(found) + "; this libjql reads " +
                         std::to_string(format) + ": " +
                         (found < format ? "export the bundle again" : "update libjql, or export the bundle again"));
  }
}

// Features that decide how texts become token ids, and nothing else: ids can be scored without knowing them.
void read_features(JsonValue root, const std::string& folder, Manifest& manifest) {
  auto needs = root.find_value("requires");
  for (JsonValue feature : needs ? needs->items() : std::vector<JsonValue>()) {
    const std::string name = feature.string();
    if (name != "template" && name != "windows") {
      throw unsupported(folder + " needs \"" + name + "\", which this libjql does not know: update it");
    }
    manifest.unknown_texts = folder + " needs \"" + name + "\", which this libjql does not know";
  }
}

void read_readouts(JsonValue readouts, Manifest& manifest) {
  static const std::set<std::string> known = {"relu", "tanh", "gelu", "silu", "sigmoid", "softmax"};
  for (JsonValue readout : readouts.items()) {
    std::vector<JsonValue> layers = readout.at("layers").items();
    if (layers.empty()) {
      throw invalid_bundle("bundle.json: readout " + readout.at("name").string() + " has no layers; export it again");
    }
    for (JsonValue layer : layers) {
      auto activation = layer.find_value("activation");
      if (activation && !known.count(activation->string())) {
        manifest.unknown_readout = "readout " + readout.at("name").string() + " has the activation " +
                                   activation->string() + ", which this libjql does not know: update it";
      }
    }
    for (JsonValue output : readout.at("outputs").items()) {
      std::string name = output.string();
      if (name.empty() || name.find('/') != std::string::npos || name.find('\0') != std::string::npos) {
        throw invalid_bundle("bundle.json: \"" + name + "\" cannot be the name of a score");
      }
      manifest.outputs.push_back(name);
    }
  }
  std::set<std::string> different(manifest.outputs.begin(), manifest.outputs.end());
  if (different.size() < manifest.outputs.size()) throw invalid_bundle("bundle.json: two scores have the same name");
}

void read_tokenizer(JsonValue tokenizer, Manifest& manifest) {
  manifest.prefix = ids_of(tokenizer.at("prefix"));
  manifest.suffix = ids_of(tokenizer.at("suffix"));
  auto around = static_cast<int64_t>(manifest.prefix.size() + manifest.suffix.size());
  if (around == 0)
    throw invalid_bundle("bundle.json: tokenizer has no prefix and no suffix: an empty text has no token");
  if (manifest.max_tokens <= around) {
    throw invalid_bundle("bundle.json: max_tokens is " + std::to_string(manifest.max_tokens) +
                         ", which leaves no room for text between " + std::to_string(around) + " special tokens");
  }
}

Variant read_variant(JsonValue fields) {
  Variant variant{fields.at("graph").string(),
                  fields.at("layout").string(),
                  fields.at("precision").string(),
                  fields.at("provider").string(),
                  {}};
  for (JsonValue limit : fields.at("tolerance").members()) variant.tolerance[limit.name()] = limit.number();
  return variant;
}

void check_names(const Manifest& manifest) {
  std::vector<std::string> needed(std::begin(needed_files), std::end(needed_files));
  for (const auto& [_, variant] : manifest.variants) needed.push_back(variant.graph);
  for (const auto& [name, _] : manifest.files) check_name(name);
  for (const std::string& name : needed) {
    check_name(name);
    if (!manifest.files.count(name)) {
      throw invalid_bundle("bundle.json: \"" + name + "\" is not among its files; export the bundle again");
    }
  }
}

// Operating systems leave hidden files anywhere: one counts where a graph holds its name, as unlisted.py says.
bool a_graph_names(const Manifest& manifest, const std::string& root, const std::string& file) {
  auto lower = [](std::string text) {
    std::transform(text.begin(), text.end(), text.begin(),
                   [](unsigned char c) { return c >= 'A' && c <= 'Z' ? c + 32 : c; });
    return text;
  };
  for (const auto& [_, variant] : manifest.variants) {
    if (size_of_file(root + "/" + variant.graph) < 0) continue;
    if (lower(read_file(root + "/" + variant.graph)).find(lower(file)) != std::string::npos) return true;
  }
  return false;
}

// A file beside a graph that is not listed: the runtime may load weights from it. In the bundle's own folder, where
// other files lie as well, weights are named after their graph.
void check_beside(const std::string& root, const Manifest& manifest, const std::string& graph) {
  namespace fs = std::filesystem;
  fs::path folder = fs::path(root) / fs::path(graph).parent_path();
  std::string stem = fs::path(graph).stem().string() + ".";
  auto check = [&](const fs::path& path) {
    std::string file = path.filename().string(), name = path.lexically_relative(root).generic_string();
    if (!manifest.files.count(name) && (file[0] != '.' || a_graph_names(manifest, root, file)) &&
        fs::is_regular_file(path)) {
      throw invalid_bundle(root + ": \"" + name + "\" lies beside a graph and is not listed in bundle.json; remove it");
    }
  };
  if (graph.find('/') != std::string::npos) {
    for (const auto& entry : fs::recursive_directory_iterator(folder)) check(entry.path());
    return;
  }
  for (const auto& entry : fs::directory_iterator(folder)) {
    std::string file = entry.path().filename().string();
    if (file[0] == '.' || file.compare(0, stem.size(), stem) == 0) check(entry.path());
  }
}

}  // namespace

Manifest Manifest::read(const std::string& folder) {
  if (size_of_file(folder + "/bundle.json") < 0) {
    throw invalid_bundle(folder + " is no bundle: it holds no bundle.json; make a bundle with jql-export");
  }
  return parse(read_file(folder + "/bundle.json"), folder);
}

Manifest Manifest::parse(const std::string& text, const std::string& folder) {
  Json json(text, folder + "/bundle.json");
  JsonValue root = json.root();
  check_format(root, folder);
  Manifest manifest;
  read_features(root, folder, manifest);
  manifest.hidden_size = root.at("encoder").at("hidden_size").integer(1, most);
  manifest.max_tokens = root.at("max_tokens").integer(1, most);
  read_tokenizer(root.at("tokenizer"), manifest);
  read_readouts(root.at("readouts"), manifest);
  for (JsonValue variant : root.at("variants").members()) manifest.variants[variant.name()] = read_variant(variant);
  for (JsonValue file : root.at("files").members()) {
    manifest.files[file.name()] = {file.at("bytes").integer(0, INT64_MAX), file.at("sha256").string()};
  }
  check_names(manifest);
  return manifest;
}

void Manifest::verify(const std::string& folder, bool hashes) const {
  try {
    for (const auto& [_, variant] : variants) check_beside(folder, *this, variant.graph);
  } catch (const std::filesystem::filesystem_error& error) {
    throw invalid_bundle(folder + ": the folder of a graph cannot be read (" + error.code().message() + ")");
  }
  for (const auto& [name, file] : files) {
    int64_t size = size_of_file(folder + "/" + name);
    if (size < 0) throw invalid_bundle(folder + ": " + name + " is missing; copy the bundle again, or export it again");
    if (size != file.bytes) {
      throw invalid_bundle(folder + ": " + name + " has " + std::to_string(size) + " bytes, the manifest says " +
                           std::to_string(file.bytes) + "; copy it again");
    }
    std::string hash = hashes ? sha256_of_file(folder + "/" + name) : file.sha256;
    if (hash != file.sha256) {
      throw invalid_bundle(folder + ": " + name + " was changed: SHA-256 " + hash.substr(0, 12) +
                           "..., the manifest says " + file.sha256.substr(0, 12) + "...; copy the bundle again");
    }
  }
}

const Variant& Manifest::variant(const std::string& name) const {
  auto found = variants.find(name);
  if (found != variants.end()) return found->second;
  std::string names;
  for (const auto& [other, _] : variants) names += (names.empty() ? "" : ", ") + other;
  throw unsupported("the bundle has no variant " + name + "; it has: " + (names.empty() ? "none" : names));
}

}  // namespace jql
