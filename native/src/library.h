// A shared library that is looked for when it is needed.
#pragma once

#include <string>
#include <vector>

namespace jql {

class Library {
 public:
  struct Search {
    std::string title;               // for errors: "ONNX Runtime"
    std::string option;              // the field of jql_options that holds a path
    std::vector<std::string> names;  // for the loader: "libonnxruntime.so.1"
    std::string in_packages;         // a pattern below a folder of Python packages: "onnxruntime/capi/lib*.so.*"
    void (*check)(const Library&);   // throws Error where the library cannot be used
  };

  // `path` alone if it is given, else the first that can be used of what the loader finds by the names, and of the
  // Python packages of $VIRTUAL_ENV, $CONDA_PREFIX, ~/.local, /usr/local and /usr. Throws Error (JQL_NO_RUNTIME) that
  // says what was looked for where. One search at a time, `check` included, which may set environment variables.
  Library(const Search& search, const char* path);
  ~Library();
  Library(const Library&) = delete;
  Library& operator=(const Library&) = delete;

  // Throws Error (JQL_NO_RUNTIME).
  template <typename Function>
  void load(Function*& function, const char* name) const {
    function = reinterpret_cast<Function*>(symbol(name));
  }

  const std::string& path() const { return path_; }

 private:
  void search(const Search& search, const char* path);
  bool open(const std::string& path, std::string& tried);
  bool open_usable(const std::string& path, const Search& search, std::string& tried);
  void* symbol(const char* name) const;

  std::string title_, path_;
  void* handle_ = nullptr;
};

}  // namespace jql
