// Any bytes as a text: what must hold of its ids. $JQL_FUZZ_TOKENIZER is a tokenizer.json with WhitespaceSplit.
#include <cstdlib>
#include <memory>

#include "file.h"
#include "json.h"
#include "tokenizer.h"
#include "utf8.h"

namespace {

struct State {
  jql::MappedFile file{std::getenv("JQL_FUZZ_TOKENIZER")};
  jql::Json json{file.text(), "tokenizer.json"};
  jql::Tokenizer tokenizer{json.root()};
  jql::Tokenizer::Scratch warm;
};

void check(bool holds) {
  if (!holds) std::abort();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static State& state = *new State;
  std::string text(reinterpret_cast<const char*>(data), size);
  text.resize(std::min(text.size(), jql::find_invalid_utf8(text)));
  constexpr size_t all = SIZE_MAX;

  state.tokenizer.encode(text, all, state.warm);
  const std::vector<int32_t> ids = state.warm.ids;
  for (int32_t id : ids) check(id >= 0 && static_cast<size_t>(id) < state.tokenizer.size());

  if (size % 16 == 0) {                                       // not always: it is 4 MiB
    auto cold = std::make_unique<jql::Tokenizer::Scratch>();  // remembers no word
    state.tokenizer.encode(text, all, *cold);
    check(cold->ids == ids);
  }

  const size_t limit = size % 7;
  state.tokenizer.encode(text, limit, state.warm);
  const auto& first = state.warm.ids;
  check(ids.size() <= limit ? first == ids : first.size() > limit && first.size() <= ids.size());
  check(std::equal(first.begin(), first.end(), ids.begin()));

  state.tokenizer.encode(text + " \n", all, state.warm);  // white space at the end is nothing
  check(state.warm.ids == ids);
  return 0;
}
