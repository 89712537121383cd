#include "library.h"

#include <dlfcn.h>
#include <glob.h>

#include <cstdlib>
#include <cstring>
#include <mutex>

#include "error.h"

namespace jql {

namespace {

std::vector<std::string> package_folders() {
  std::vector<std::string> folders;
  for (const char* name : {"VIRTUAL_ENV", "CONDA_PREFIX"}) {
    if (const char* root = std::getenv(name)) folders.emplace_back(root);
  }
  if (const char* home = std::getenv("HOME")) folders.push_back(std::string(home) + "/.local");
  folders.insert(folders.end(), {"/usr/local", "/usr"});
  return folders;
}

// What `pattern` matches in `folder`, whose own name is no pattern.
std::vector<std::string> files_like(const std::string& folder, const std::string& in_folder) {
  std::string pattern;
  for (char c : folder) pattern += (std::strchr("*?[\\", c) ? "\\" : "") + std::string(1, c);
  pattern += in_folder;
  glob_t found;
  std::vector<std::string> files;
  if (glob(pattern.c_str(), 0, nullptr, &found) == 0) files.assign(found.gl_pathv, found.gl_pathv + found.gl_pathc);
  globfree(&found);
  return files;
}

}  // namespace

Library::Library(const Search& wanted, const char* path) : title_(wanted.title) {
  static std::mutex one_at_a_time;  // getenv and setenv
  std::lock_guard<std::mutex> lock(one_at_a_time);
  search(wanted, path);
}

void Library::search(const Search& wanted, const char* path) {
  std::string tried;
  if (path) {
    if (!open(path, tried)) throw Error(JQL_NO_RUNTIME, title_ + " cannot be loaded: " + tried);
    return wanted.check(*this);
  }
  for (const std::string& name : wanted.names) {
    if (open_usable(name, wanted, tried)) return;
  }
  std::string folders;
  for (const std::string& folder : package_folders()) {
    for (const std::string& file : files_like(folder, "/lib/python3*/*-packages/" + wanted.in_packages)) {
      if (open_usable(file, wanted, tried)) return;
    }
    folders += (folders.empty() ? "" : ", ") + folder;
  }
  throw Error(JQL_NO_RUNTIME, title_ + " was not found by the loader, nor as " + wanted.in_packages +
                                  " among the Python packages of $VIRTUAL_ENV, $CONDA_PREFIX, " + folders + " (" +
                                  tried + "); install it, or name it in options." + wanted.option);
}

bool Library::open_usable(const std::string& path, const Search& wanted, std::string& tried) {
  if (!open(path, tried)) return false;
  try {
    wanted.check(*this);
  } catch (const Error& error) {
    tried += (tried.empty() ? "" : "; ") + std::string(error.what());
    return false;
  }
  return true;
}

// The library stays loaded: its own threads and thread-local data may outlive the last engine.
bool Library::open(const std::string& path, std::string& tried) {
  if (handle_) dlclose(handle_);
  path_ = path;
  handle_ = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
  if (!handle_) tried += (tried.empty() ? "" : "; ") + std::string(dlerror());
  return handle_ != nullptr;
}

Library::~Library() {
  if (handle_) dlclose(handle_);
}

void* Library::symbol(const char* name) const {
  if (void* found = dlsym(handle_, name)) return found;
  throw Error(JQL_NO_RUNTIME, path_ + " is no " + title_ + " that libjql can use: it lacks " + name);
}

}  // namespace jql
