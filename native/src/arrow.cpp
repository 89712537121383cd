// jql_score_arrow: a stream of text in, a stream of scores out.
#include <cerrno>
#include <cstring>
#include <memory>

#include "arrow_c.h"
#include "arrow_export.h"
#include "engine.h"
#include "error.h"
#include "guard.h"

namespace jql {

namespace {

enum class Kind { utf8, large_utf8, string_view };

template <typename T>
class Released {  // releases what a producer gave
 public:
  Released() = default;
  ~Released() {
    if (value.release) value.release(&value);
  }
  Released(const Released&) = delete;
  Released& operator=(const Released&) = delete;
  T value{};
};

bool bit(const void* bitmap, int64_t i) { return static_cast<const unsigned char*>(bitmap)[i >> 3] >> (i & 7) & 1; }

bool is_valid(const ArrowArray& array, int64_t i) {
  return array.n_buffers == 0 || !array.buffers[0] || bit(array.buffers[0], i);
}

template <typename T>
T load(const void* buffer, int64_t i) {
  T value;
  std::memcpy(&value, static_cast<const char*>(buffer) + i * static_cast<int64_t>(sizeof(T)), sizeof(T));
  return value;
}

std::string_view view_at(const char* data, int64_t begin, int64_t end) {
  if (begin < 0 || end < begin) throw invalid_argument("an Arrow array has offsets that go back");
  return begin == end ? std::string_view("") : std::string_view(data + begin, static_cast<size_t>(end - begin));
}

struct View {  // of string_view: 16 bytes
  int32_t length, prefix, buffer, offset;
};

std::string_view text_at(const ArrowArray& array, Kind kind, int64_t i) {
  auto data = [&](int64_t n) { return static_cast<const char*>(array.buffers[n]); };
  if (kind == Kind::utf8) return view_at(data(2), load<int32_t>(data(1), i), load<int32_t>(data(1), i + 1));
  if (kind == Kind::large_utf8) return view_at(data(2), load<int64_t>(data(1), i), load<int64_t>(data(1), i + 1));
  auto view = load<View>(data(1), i);
  if (view.length <= 12) return view_at(data(1) + i * static_cast<int64_t>(sizeof(View)) + 4, 0, view.length);
  if (view.buffer < 0 || view.buffer >= array.n_buffers - 3) throw invalid_argument("an Arrow view names no buffer");
  return view_at(data(2 + view.buffer), view.offset, int64_t{view.offset} + view.length);
}

// The stream that is given back, and what it needs.
struct Stream {
  Engine& engine;
  Released<ArrowArrayStream> input;
  int64_t column = -1;  // of a record batch; -1: the array itself
  Kind kind = Kind::utf8;
  size_t n_done = 0;  // rows of earlier arrays
  std::string error;

  explicit Stream(Engine& engine) : engine(engine) {}

  void read_schema(const char* name);
  std::vector<Column> columns() const;
  Texts texts_of(const ArrowArray& array) const;
  void next(ArrowArray* out);

  // Runs `action`; an exception becomes an errno and the sentence of get_last_error.
  template <typename Action>
  int attempt(Action action) noexcept {
    char sentence[1024];
    jql_status status = guarded(sentence, sizeof sentence, action);
    try {
      error = sentence;
    } catch (const std::bad_alloc&) {
      return ENOMEM;
    }
    return status == JQL_OK ? 0 : status == JQL_OUT_OF_MEMORY ? ENOMEM : status == JQL_INPUT_FAILED ? EIO : EINVAL;
  }
};

void check_input(ArrowArrayStream* input, int code) {
  if (code == 0) return;
  const char* sentence = input->get_last_error ? input->get_last_error(input) : nullptr;
  throw Error(JQL_INPUT_FAILED, "the Arrow stream of texts failed: " +
                                    (sentence ? std::string(sentence) : "error " + std::to_string(code)));
}

void Stream::read_schema(const char* name) {
  Released<ArrowSchema> schema;
  check_input(&input.value, input.value.get_schema(&input.value, &schema.value));
  const ArrowSchema* field = &schema.value;
  if (name) {
    if (std::strcmp(field->format, "+s") != 0)
      throw invalid_argument("the Arrow stream has no columns: column must be NULL");
    const ArrowSchema* parent = field;
    field = nullptr;
    std::string names;
    for (int64_t i = 0; i < parent->n_children; ++i) {
      const std::string other = parent->children[i]->name ? parent->children[i]->name : "";
      names += (names.empty() ? "" : ", ") + other;
      if (other != name) continue;
      if (column >= 0) throw invalid_argument("the Arrow stream has two columns " + other + "; rename one");
      column = i;
    }
    if (column < 0)
      throw invalid_argument("the Arrow stream has no column " + std::string(name) + "; it has: " + names);
    field = parent->children[column];
  }
  const std::string format = field->format;
  if (format == "u")
    kind = Kind::utf8;
  else if (format == "U")
    kind = Kind::large_utf8;
  else if (format == "vu")
    kind = Kind::string_view;
  if (field->dictionary || (format != "u" && format != "U" && format != "vu")) {
    throw unsupported("the Arrow stream gives the format \"" + format + "\"" +
                      (field->dictionary ? ", by dictionary" : "") + "; expected utf8, large_utf8 or string_view" +
                      (format == "+s" ? ": name a column" : ""));
  }
}

std::vector<Column> Stream::columns() const {
  std::vector<Column> columns;
  for (const std::string& head : engine.heads()) columns.push_back({"score_" + head, "f", {}});
  columns.push_back({"n_tokens", "i", {}});
  columns.push_back({"truncated", "b", {}});
  return columns;
}

Texts Stream::texts_of(const ArrowArray& array) const {
  if (column >= array.n_children) throw invalid_argument("an Arrow array has fewer columns than its schema");
  const ArrowArray& texts = column < 0 ? array : *array.children[column];
  const int64_t shift = column < 0 ? 0 : array.offset;  // of a record batch's rows in its columns
  Texts found(static_cast<size_t>(array.length));
  for (int64_t i = 0; i < array.length; ++i) {
    const int64_t at = texts.offset + shift + i;
    const bool valid = is_valid(texts, at) && (column < 0 || is_valid(array, array.offset + i));
    if (valid) found[static_cast<size_t>(i)] = text_at(texts, kind, at);
  }
  return found;
}

void set_bit(std::vector<unsigned char>& bitmap, size_t i) { bitmap[i / 8] |= static_cast<unsigned char>(1 << i % 8); }

void Stream::next(ArrowArray* out) {
  Released<ArrowArray> array;
  *out = {};
  check_input(&input.value, input.value.get_next(&input.value, &array.value));
  if (!array.value.release) return;  // the end
  const Texts texts = texts_of(array.value);
  const size_t n = texts.size(), n_heads = engine.heads().size();
  std::vector<float> scores(n * n_heads);
  std::vector<int32_t> n_tokens(n);
  std::vector<uint8_t> truncated(n);
  float none = 0;  // a bundle without heads has no scores, and yet they are what is asked for
  engine.compute_texts(
      texts, {scores.empty() ? &none : scores.data(), nullptr, n_tokens.data(), truncated.data(), nullptr}, n_done);
  n_done += n;

  std::vector<Column> found = columns();
  auto bytes_of = [](const auto& values) {
    auto first = reinterpret_cast<const unsigned char*>(values.data());
    return std::vector<unsigned char>(first, first + values.size() * sizeof values[0]);
  };
  std::vector<float> column_scores(n);
  for (size_t head = 0; head < n_heads; ++head) {
    for (size_t i = 0; i < n; ++i) column_scores[i] = scores[i * n_heads + head];
    found[head].data = bytes_of(column_scores);
  }
  found[n_heads].data = bytes_of(n_tokens);
  std::vector<unsigned char> flags((n + 7) / 8), valid((n + 7) / 8);
  int64_t n_null = 0;
  for (size_t i = 0; i < n; ++i) {
    if (truncated[i]) set_bit(flags, i);
    if (texts[i].data())
      set_bit(valid, i);
    else
      ++n_null;
  }
  found[n_heads + 1].data = flags;
  if (n_null == 0) valid.clear();
  export_batch(std::move(found), valid, static_cast<int64_t>(n), n_null, out);
}

Stream& stream_of(ArrowArrayStream* exported) { return *static_cast<Stream*>(exported->private_data); }

int get_schema(ArrowArrayStream* exported, ArrowSchema* out) {
  Stream& stream = stream_of(exported);
  return stream.attempt([&] { export_schema(stream.columns(), out); });
}

int get_next(ArrowArrayStream* exported, ArrowArray* out) {
  Stream& stream = stream_of(exported);
  return stream.attempt([&] { stream.next(out); });
}

const char* get_last_error(ArrowArrayStream* exported) {
  const std::string& error = stream_of(exported).error;
  return error.empty() ? nullptr : error.c_str();
}

void release(ArrowArrayStream* exported) {
  NoCancel no_cancel;
  delete static_cast<Stream*>(exported->private_data);
  exported->release = nullptr;
}

}  // namespace

}  // namespace jql

extern "C" jql_status jql_score_arrow(jql_engine* engine, struct ArrowArrayStream* input, const char* column,
                                      struct ArrowArrayStream* scores, char* err, size_t err_size) {
  return jql::guarded(err, err_size, [&] {
    jql::require(engine, "engine");
    jql::require(input && input->release, "input");
    jql::require(scores, "scores");
    reinterpret_cast<jql::Engine*>(engine)->check_texts(true);
    auto stream = std::make_unique<jql::Stream>(*reinterpret_cast<jql::Engine*>(engine));
    stream->input.value = *input;
    try {
      stream->read_schema(column);
    } catch (...) {
      stream->input.value.release = nullptr;  // it stays the caller's
      throw;
    }
    input->release = nullptr;
    *scores = {jql::get_schema, jql::get_next, jql::get_last_error, jql::release, stream.release()};
  });
}
