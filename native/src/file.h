// Files: read whole, mapped, and their SHA-256.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace jql {

// A file mapped into memory for reading. Throws Error (JQL_INVALID_BUNDLE) that names it.
class MappedFile {
 public:
  explicit MappedFile(const std::string& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;
  std::string_view text() const { return {data_, size_}; }

 private:
  const char* data_ = nullptr;
  size_t size_ = 0;
};

// The whole content. Throws Error (JQL_INVALID_BUNDLE).
std::string read_file(const std::string& path);

// The size of a regular file; -1 where there is none.
int64_t size_of_file(const std::string& path);

// Hexadecimal SHA-256 of a file's content. Throws Error (JQL_INVALID_BUNDLE).
std::string sha256_of_file(const std::string& path);

}  // namespace jql
