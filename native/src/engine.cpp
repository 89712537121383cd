#include "engine.h"

#include <sched.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "error.h"
#include "file.h"
#include "json.h"
#include "probes.h"
#include "utf8.h"

namespace jql {

namespace {

constexpr const char* default_variant = "cpu-fp32";
constexpr size_t chunk_tokens = 1 << 20;  // tokens that are in memory at a time; enough to find documents of one length
constexpr size_t kept_bytes = 1 << 20;    // of a buffer, once a text is done

int threads_of(const jql_options& options) {
  if (options.threads < 0)
    throw invalid_argument("options.threads is " + std::to_string(options.threads) + ", expected 0 or more");
  cpu_set_t cores;
  if (options.threads > 0) return options.threads;
  return sched_getaffinity(0, sizeof cores, &cores) == 0 ? std::max(1, CPU_COUNT(&cores)) : 1;
}

// One more than the largest id of a tokenizer of any kind: its vocabulary is a list, or gives each piece its id.
int64_t n_ids_of(JsonValue root) {
  int64_t n = 0;
  auto model = root.find_value("model");
  auto vocabulary = model ? model->find_value("vocab") : std::nullopt;
  if (vocabulary && vocabulary->kind() == JsonValue::Kind::object) {
    for (JsonValue id : vocabulary->members()) n = std::max(n, id.integer(0, INT32_MAX) + 1);
  } else if (vocabulary) {
    n = static_cast<int64_t>(vocabulary->items().size());
  }
  auto added = root.find_value("added_tokens");
  for (JsonValue token : added ? added->items() : std::vector<JsonValue>()) {
    n = std::max(n, token.at("id").integer(0, INT32_MAX) + 1);
  }
  return n;
}

// All of them, before the first is computed: it may be hours until the last one's turn.
void check_utf8(const Texts& texts, size_t first) {
  for (size_t row = 0; row < texts.size(); ++row) {
    if (size_t at = find_invalid_utf8(texts[row]); at != std::string_view::npos) {
      throw Error(JQL_INVALID_TEXT,
                  "text " + std::to_string(first + row) + " is not UTF-8 at byte " + std::to_string(at));
    }
  }
}

}  // namespace

// Buffers of one thread, taken from those that the engine keeps, so that words stay remembered between calls.
class Engine::Lease {
 public:
  explicit Lease(Engine& engine) : engine_(engine) {
    {
      std::lock_guard<std::mutex> lock(engine.scratch_mutex_);
      if (!engine.scratches_.empty()) {
        scratch_ = std::move(engine.scratches_.back());
        engine.scratches_.pop_back();
      }
    }
    if (!scratch_) scratch_ = std::make_unique<Tokenizer::Scratch>();
  }

  ~Lease() {
    std::lock_guard<std::mutex> lock(engine_.scratch_mutex_);
    try {
      engine_.scratches_.push_back(std::move(scratch_));
    } catch (const std::bad_alloc&) {  // then it is not kept
    }
  }

  Lease(const Lease&) = delete;
  Lease& operator=(const Lease&) = delete;
  Tokenizer::Scratch& operator*() { return *scratch_; }

 private:
  Engine& engine_;
  std::unique_ptr<Tokenizer::Scratch> scratch_;
};

// Texts that are computed together.
struct Engine::Chunk {
  std::vector<int32_t> ids;
  std::vector<int64_t> offsets{0};
  std::vector<size_t> rows;  // of the documents, among all texts
};

Engine::Engine(const std::string& folder, const jql_options& options) : manifest_(Manifest::read(folder)) {
  const std::string name = options.variant ? options.variant : default_variant;
  const Variant& variant = manifest_.variant(name);
  const int threads = threads_of(options);
  manifest_.verify(folder, options.verify != 0);
  read_tokenizer(folder);
  session_ = open_session({folder + "/" + variant.graph, variant, heads().size(), hidden_size(), threads, options});
  slots_ = std::make_unique<Slots>(session_->n_parallel);
  if (options.certify) certify(folder, manifest_, name, *session_, *slots_);
}

void Engine::read_tokenizer(const std::string& folder) {
  MappedFile file(folder + "/tokenizer.json");
  Json json(file.text(), folder + "/tokenizer.json");
  n_ids_ = n_ids_of(json.root());
  try {
    tokenizer_ = std::make_unique<Tokenizer>(json.root());
    n_ids_ = std::max(n_ids_, static_cast<int64_t>(tokenizer_->size()));
  } catch (const Error& error) {
    if (error.status != JQL_UNSUPPORTED) throw;
    no_tokenizer_ = error.what();
  }
  if (!manifest_.unknown_texts.empty()) {
    tokenizer_.reset();
    no_tokenizer_ = manifest_.unknown_texts;
  }
  for (const auto* around : {&manifest_.prefix, &manifest_.suffix}) {
    for (int32_t id : *around) n_ids_ = std::max<int64_t>(n_ids_, id + int64_t{1});
  }
}

const Tokenizer& Engine::tokenizer() const {
  if (!tokenizer_) throw unsupported(no_tokenizer_ + "; texts cannot be scored, token ids can");
  return *tokenizer_;
}

void Engine::check_texts(bool scored) const {
  tokenizer();
  if (scored) check_readouts();
}

void Engine::check_readouts() const {
  if (!manifest_.unknown_readout.empty()) throw unsupported(manifest_.unknown_readout);
}

// Appends all ids of a text, truncated; returns whether it was.
bool Engine::append(std::string_view text, Tokenizer::Scratch& scratch, std::vector<int32_t>& ids) const {
  const size_t room = max_tokens() - manifest_.prefix.size() - manifest_.suffix.size();
  tokenizer().encode(text, room, scratch);
  const auto& content = scratch.ids;
  const bool truncated = content.size() > room;
  ids.insert(ids.end(), manifest_.prefix.begin(), manifest_.prefix.end());
  ids.insert(ids.end(), content.begin(), content.begin() + static_cast<std::ptrdiff_t>(std::min(room, content.size())));
  ids.insert(ids.end(), manifest_.suffix.begin(), manifest_.suffix.end());
  scratch.shrink(kept_bytes);
  return truncated;
}

std::vector<int32_t> Engine::tokenize(std::string_view text, bool& truncated) {
  tokenizer();
  if (size_t at = find_invalid_utf8(text); at != std::string_view::npos) {
    throw Error(JQL_INVALID_TEXT, "the text is not UTF-8 at byte " + std::to_string(at));
  }
  std::vector<int32_t> ids;
  Lease scratch(*this);
  truncated = append(text, *scratch, ids);
  return ids;
}

void Engine::check_tokens(const Documents& documents) const {
  auto fail = [](size_t i, const std::string& what) {
    throw invalid_argument("document " + std::to_string(i) + " " + what);
  };
  if (documents.offsets[0] != 0)
    throw invalid_argument("offsets begin at " + std::to_string(documents.offsets[0]) + ", expected 0");
  for (size_t i = 0; i < documents.n; ++i) {
    int64_t begin = documents.offsets[i], end = documents.offsets[i + 1];
    if (end < begin) fail(i, "ends before it begins: offsets must not go back");
    if (end == begin) fail(i, "has no token");
    if (end - begin > manifest_.max_tokens) {
      fail(i, "has " + std::to_string(end - begin) + " tokens, the most are " + std::to_string(manifest_.max_tokens));
    }
    for (int64_t at = begin; at < end; ++at) {
      int32_t id = documents.ids[at];
      if (id < 0 || id >= n_ids_)
        fail(i, "has the id " + std::to_string(id) + ", expected 0 to " + std::to_string(n_ids_ - 1));
    }
  }
}

void Engine::score_tokens(const Documents& documents, float* scores) {
  check_readouts();
  check_tokens(documents);
  compute(*session_, *slots_, documents, batch_tokens, {scores, nullptr, heads().size(), hidden_size(), nullptr});
}

void Engine::compute_texts(const Texts& texts, const TextResults& results, size_t first) {
  check_texts(results.scores != nullptr);
  if (!results.status) check_utf8(texts, first);
  Chunk chunk;
  std::optional<Lease> scratch;  // while tokenizing alone: a call may wait long for its turn to compute
  for (size_t row = 0; row < texts.size(); ++row) {
    std::string_view text = texts[row];
    const bool is_utf8 = !results.status || find_invalid_utf8(text) == std::string_view::npos;
    const bool is_valid = text.data() && is_utf8;
    if (is_valid && !scratch) scratch.emplace(*this);
    const bool truncated = is_valid && append(text, **scratch, chunk.ids);
    if (results.status) results.status[row] = is_utf8 ? JQL_OK : JQL_INVALID_TEXT;
    if (results.truncated) results.truncated[row] = truncated;
    if (results.n_tokens)
      results.n_tokens[row] = static_cast<int32_t>(static_cast<int64_t>(chunk.ids.size()) - chunk.offsets.back());
    if (is_valid) {
      chunk.offsets.push_back(static_cast<int64_t>(chunk.ids.size()));
      chunk.rows.push_back(row);
    } else {
      if (results.scores) std::fill_n(results.scores + row * heads().size(), heads().size(), NAN);
      if (results.embeddings) std::fill_n(results.embeddings + row * hidden_size(), hidden_size(), NAN);
    }
    if (chunk.ids.size() >= chunk_tokens || row + 1 == texts.size()) {
      scratch.reset();
      compute(*session_, *slots_, {chunk.ids.data(), chunk.offsets.data(), chunk.rows.size()}, batch_tokens,
              {results.scores, results.embeddings, heads().size(), hidden_size(), chunk.rows.data()});
      chunk = Chunk();
    }
  }
}

}  // namespace jql
