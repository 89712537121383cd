#include "library.h"

#include <dlfcn.h>
#include <glob.h>

#include <cstdlib>

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

std::vector<std::string> files_like(const std::string& pattern) {
  glob_t found;
  std::vector<std::string> files;
  if (glob(pattern.c_str(), 0, nullptr, &found) == 0) files.assign(found.gl_pathv, found.gl_pathv + found.gl_pathc);
  globfree(&found);
  return files;
}

}  // namespace

Library::Library(const Search& search, const char* path) : title_(search.title) {
  std::string tried;
  if (path) {
    if (open(path, tried)) return;
    throw Error(JQL_NO_RUNTIME, title_ + " cannot be loaded: " + tried);
  }
  for (const std::string& name : search.names) {
    if (open(name, tried)) return;
  }
  std::string folders;
  for (const std::string& folder : package_folders()) {
    std::string pattern = folder + "/lib/python3*/*-packages/" + search.in_packages;
    for (const std::string& file : files_like(pattern)) {
      if (open(file, tried)) return;
    }
    folders += (folders.empty() ? "" : ", ") + folder;
  }
  throw Error(JQL_NO_RUNTIME, title_ + " was not found: the loader gives \"" + tried + "\", and no " +
                                  search.in_packages + " lies among the Python packages of " + folders +
                                  "; install it, or name it in options." + search.option);
}

// The library stays loaded: its own threads and thread-local data may outlive the last engine.
bool Library::open(const std::string& path, std::string& tried) {
  handle_ = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
  if (handle_)
    path_ = path;
  else
    tried += (tried.empty() ? "" : "; ") + std::string(dlerror());
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
