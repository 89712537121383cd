// SHA-256 (FIPS 180-4), with the processor's own instructions where it has them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace jql {

class Sha256 {
 public:
  Sha256();
  void update(const void* data, size_t size);
  // The digest in hexadecimal; nothing can be added afterwards.
  std::string hex();

 private:
  using Compress = void (*)(uint32_t* state, const unsigned char* blocks, size_t n_blocks);
  Compress compress_;
  uint32_t state_[8];
  unsigned char block_[64];
  size_t n_block_ = 0;
  uint64_t n_bytes_ = 0;
};

}  // namespace jql
