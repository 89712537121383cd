// Any bytes as a bundle.json: an error, or a manifest whose files lie inside the bundle.
#include <cstdlib>

#include "error.h"
#include "manifest.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  try {
    auto manifest = jql::Manifest::parse({reinterpret_cast<const char*>(data), size}, "folder");
    for (const auto& [name, _] : manifest.files) {
      if (name.empty() || name[0] == '/' || ("/" + name + "/").find("/../") != std::string::npos) std::abort();
    }
    if (manifest.max_tokens <= static_cast<int64_t>(manifest.prefix.size() + manifest.suffix.size())) std::abort();
  } catch (const jql::Error&) {
  }
  return 0;
}
