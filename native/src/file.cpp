#include "file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <system_error>
#include <vector>

#include "error.h"
#include "sha256.h"

namespace jql {

namespace {

class OpenFile {
 public:
  explicit OpenFile(const std::string& path) : path_(path), fd_(open(path.c_str(), O_RDONLY | O_CLOEXEC)) {
    if (fd_ < 0) fail();
  }
  ~OpenFile() {
    if (fd_ >= 0) close(fd_);
  }
  OpenFile(const OpenFile&) = delete;
  OpenFile& operator=(const OpenFile&) = delete;

  int fd() const { return fd_; }

  size_t size() const {
    struct stat status;
    if (fstat(fd_, &status) != 0) fail();
    if (!S_ISREG(status.st_mode)) throw invalid_bundle(path_ + " is no file");
    return static_cast<size_t>(status.st_size);
  }

  // At most `size` bytes; 0: the end.
  size_t read_some(char* data, size_t size) const {
    for (;;) {
      ssize_t n = read(fd_, data, size);
      if (n >= 0) return static_cast<size_t>(n);
      if (errno != EINTR) fail();
    }
  }

  [[noreturn]] void fail() const {
    const int code = errno;  // before anything else sets it
    std::string sentence = path_ + " cannot be read: " + std::error_code(code, std::generic_category()).message();
    throw Error(code == ENOMEM ? JQL_OUT_OF_MEMORY : JQL_INVALID_BUNDLE, sentence);
  }

 private:
  std::string path_;
  int fd_;
};

}  // namespace

MappedFile::MappedFile(const std::string& path) {
  OpenFile file(path);
  size_ = file.size();
  if (size_ == 0) return;
  void* data = mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file.fd(), 0);
  if (data == MAP_FAILED) file.fail();
  data_ = static_cast<const char*>(data);
}

MappedFile::~MappedFile() {
  if (data_) munmap(const_cast<char*>(data_), size_);
}

std::string read_file(const std::string& path) {
  OpenFile file(path);
  std::string content(file.size(), '\0');
  size_t done = 0;
  while (done < content.size()) {
    size_t n = file.read_some(content.data() + done, content.size() - done);
    if (n == 0) throw invalid_bundle(path + " became shorter while it was read");
    done += n;
  }
  return content;
}

int64_t size_of_file(const std::string& path) {
  struct stat status;
  return stat(path.c_str(), &status) == 0 && S_ISREG(status.st_mode) ? static_cast<int64_t>(status.st_size) : -1;
}

std::string sha256_of_file(const std::string& path) {
  OpenFile file(path);
  Sha256 hash;
  std::vector<char> buffer(1 << 18);
  while (size_t n = file.read_some(buffer.data(), buffer.size())) hash.update(buffer.data(), n);
  return hash.hex();
}

}  // namespace jql
