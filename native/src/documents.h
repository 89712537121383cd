// Ragged documents of ids, as every stage passes them on.
#pragma once

#include <cstddef>
#include <cstdint>

namespace jql {

struct Documents {
  const int32_t* ids;
  const int64_t* offsets;  // [n + 1]: where each document begins, and where the last ends
  size_t n;

  int64_t length(size_t i) const { return offsets[i + 1] - offsets[i]; }
};

}  // namespace jql
