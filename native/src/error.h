// The one exception of the library: a status and a sentence. guard.h makes a status of it.
#pragma once

#include <stdexcept>
#include <string>

#include "jql.h"

namespace jql {

struct Error : std::runtime_error {
  Error(jql_status status, const std::string& sentence) : std::runtime_error(sentence), status(status) {}
  jql_status status;
};

inline Error invalid_bundle(const std::string& sentence) { return Error(JQL_INVALID_BUNDLE, sentence); }
inline Error unsupported(const std::string& sentence) { return Error(JQL_UNSUPPORTED, sentence); }
inline Error invalid_argument(const std::string& sentence) { return Error(JQL_INVALID_ARGUMENT, sentence); }

}  // namespace jql
