// Arrays and schemas of Arrow's C interface that own their memory.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "arrow_c.h"

namespace jql {

struct Column {
  std::string name, format;  // "f", "i", "b"
  std::vector<unsigned char> data;
};

// A record batch of `length` rows; a row is null in all columns where `valid` (a bitmap, empty: all are valid) says so.
void export_batch(std::vector<Column> columns, const std::vector<unsigned char>& valid, int64_t length, int64_t n_null,
                  ArrowArray* out);

// Its schema: a struct of nullable fields.
void export_schema(const std::vector<Column>& columns, ArrowSchema* out);

}  // namespace jql
