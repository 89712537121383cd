// The border to C: no exception passes it.
#pragma once

#include <pthread.h>

#include <algorithm>
#include <cstring>
#include <new>
#include <string>

#include "error.h"

namespace jql {

inline void require(bool given, const char* name) {
  if (!given) throw invalid_argument(std::string(name) + " is NULL");
}

// Writes as much of `sentence` as fits, not ending within a code point.
inline void put_sentence(const char* sentence, char* err, size_t err_size) {
  if (!err || err_size == 0) return;
  size_t length = std::min(std::strlen(sentence), err_size - 1);
  if (sentence[length]) {
    while (length > 0 && (static_cast<unsigned char>(sentence[length]) & 0xC0) == 0x80) --length;
  }
  std::memcpy(err, sentence, length);
  err[length] = '\0';
}

// A thread that is cancelled would unwind through catch (...) and end the process.
class NoCancel {
 public:
  NoCancel() { pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, &before_); }
  ~NoCancel() { pthread_setcancelstate(before_, nullptr); }

 private:
  int before_;
};

template <typename Action>
jql_status guarded(char* err, size_t err_size, Action action) noexcept {
  auto failed = [&](jql_status status, const char* sentence) {
    put_sentence(sentence, err, err_size);
    return status;
  };
  NoCancel no_cancel;
  try {
    action();
    return failed(JQL_OK, "");
  } catch (const Error& error) {
    return failed(error.status, error.what());
  } catch (const std::bad_alloc&) {
    return failed(JQL_OUT_OF_MEMORY, "there is not enough memory");
  } catch (const std::length_error&) {
    return failed(JQL_OUT_OF_MEMORY, "there is not enough memory");
  } catch (const std::exception& error) {
    return failed(JQL_INTERNAL, error.what());
  } catch (...) {
    return failed(JQL_INTERNAL, "an unknown exception");
  }
}

}  // namespace jql
