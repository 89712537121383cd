#include "arrow_export.h"

#include <memory>

namespace jql {

namespace {

constexpr int64_t nullable = 2;  // ARROW_FLAG_NULLABLE

// What an exported array or schema keeps alive. A child may be moved out: then its release is null here.
template <typename T>
struct Kept {
  std::vector<unsigned char> valid, data;
  const void* buffers[2] = {nullptr, nullptr};
  std::string name, format;
  std::vector<T> children;
  std::vector<T*> pointers;

  static void release(T* exported) {
    std::unique_ptr<Kept> kept(static_cast<Kept*>(exported->private_data));
    for (T& child : kept->children) {
      if (child.release) child.release(&child);
    }
    exported->release = nullptr;
  }

  void point() {
    for (T& child : children) pointers.push_back(&child);
  }
};

// Fills `out` with a column; nothing is allocated once it owns something, so that an exception leaks nothing.
void export_column(Column column, const std::vector<unsigned char>& valid, int64_t length, int64_t n_null,
                   ArrowArray* out) {
  auto kept = std::make_unique<Kept<ArrowArray>>();
  kept->data = std::move(column.data);
  kept->valid = valid;
  kept->buffers[0] = valid.empty() ? nullptr : kept->valid.data();
  kept->buffers[1] = kept->data.data();
  *out = {length, n_null, 0, 2, 0, kept->buffers, nullptr, nullptr, Kept<ArrowArray>::release, nullptr};
  out->private_data = kept.release();
}

void export_field(const Column& column, ArrowSchema* out) {
  auto kept = std::make_unique<Kept<ArrowSchema>>();
  kept->name = column.name;
  kept->format = column.format;
  *out = {kept->format.c_str(),
          kept->name.c_str(),
          nullptr,
          nullable,
          0,
          nullptr,
          nullptr,
          Kept<ArrowSchema>::release,
          nullptr};
  out->private_data = kept.release();
}

// Exports children one by one; those that are done are released if one fails.
template <typename T, typename Export>
std::unique_ptr<Kept<T>> keep_children(size_t n, Export export_child) {
  auto kept = std::make_unique<Kept<T>>();
  kept->children.resize(n, T{});
  try {
    for (size_t i = 0; i < n; ++i) export_child(i, &kept->children[i]);
    kept->point();
  } catch (...) {
    T parent{};
    parent.private_data = kept.release();
    Kept<T>::release(&parent);
    throw;
  }
  return kept;
}

}  // namespace

void export_batch(std::vector<Column> columns, const std::vector<unsigned char>& valid, int64_t length, int64_t n_null,
                  ArrowArray* out) {
  auto kept = keep_children<ArrowArray>(columns.size(), [&](size_t i, ArrowArray* child) {
    export_column(std::move(columns[i]), valid, length, n_null, child);
  });
  auto n = static_cast<int64_t>(kept->children.size());
  *out = {length, 0, 0, 1, n, kept->buffers, kept->pointers.data(), nullptr, Kept<ArrowArray>::release, nullptr};
  out->private_data = kept.release();
}

void export_schema(const std::vector<Column>& columns, ArrowSchema* out) {
  auto kept = keep_children<ArrowSchema>(columns.size(),
                                         [&](size_t i, ArrowSchema* child) { export_field(columns[i], child); });
  auto n = static_cast<int64_t>(kept->children.size());
  *out = {"+s", "", nullptr, 0, n, kept->pointers.data(), nullptr, Kept<ArrowSchema>::release, nullptr};
  out->private_data = kept.release();
}

}  // namespace jql
