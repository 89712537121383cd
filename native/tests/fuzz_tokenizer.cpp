// Any bytes as a tokenizer.json: an error, or a tokenizer that gives ids it says it has.
#include <cstdlib>
#include <memory>

#include "error.h"
#include "json.h"
#include "tokenizer.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static constexpr const char* texts[] = {"a ab  abc<s>", "x\u0301 \u00a0\u2581y", "\U0001f389\u0915\u094d\u0937",
                                          "e\r\n\u0600a"};
  try {
    jql::Json json({reinterpret_cast<const char*>(data), size}, "tokenizer.json");
    jql::Tokenizer tokenizer(json.root());
    auto scratch = std::make_unique<jql::Tokenizer::Scratch>();
    for (const char* text : texts) {
      tokenizer.encode(text, SIZE_MAX, *scratch);
      for (int32_t id : scratch->ids) {
        if (id < 0 || static_cast<size_t>(id) >= tokenizer.size()) std::abort();
      }
    }
  } catch (const jql::Error&) {
  }
  return 0;
}
