// cuBLAS and cuBLASLt as libraries that compute nothing and keep a record of the products; see runtime.cpp.
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>

extern "C" {
void recorder_add(const char* format, ...);
void recorder_product(long long m, long long n, long long k, int a, int b, int c, int compute, long long batch,
                      const char* function);

int cublasCreate_v2(void** handle) {
  *handle = malloc(1);
  return 0;
}
int cublasDestroy_v2(void* handle) {
  free(handle);
  return 0;
}
int cublasSetStream_v2(void*, void*) { return 0; }
int cublasSetMathMode(void*, int mode) {
  recorder_add("math mode %d", mode);
  return 0;
}
int cublasGetMathMode(void*, int* mode) {
  *mode = 0;
  return 0;
}
const char* cublasGetStatusName(int status) { return status ? "CUBLAS_STATUS" : "CUBLAS_STATUS_SUCCESS"; }
const char* cublasGetStatusString(int status) { return cublasGetStatusName(status); }

int cublasSgemm_v2(void*, int, int, int m, int n, int k, ...) {
  recorder_product(m, n, k, 0, 0, 0, 68, 1, "Sgemm");
  return 0;
}
int cublasSgemmStridedBatched(void*, int, int, int m, int n, int k, const void*, const void*, int, long long,
                              const void*, int, long long, const void*, void*, int, long long, int batch) {
  recorder_product(m, n, k, 0, 0, 0, 68, batch, "SgemmStridedBatched");
  return 0;
}
int cublasGemmEx(void*, int, int, int m, int n, int k, const void*, const void*, int a, int, const void*, int b, int,
                 const void*, void*, int c, int, int compute, int) {
  recorder_product(m, n, k, a, b, c, compute, 1, "GemmEx");
  return 0;
}
int cublasGemmStridedBatchedEx(void*, int, int, int m, int n, int k, const void*, const void*, int a, int, long long,
                               const void*, int b, int, long long, const void*, void*, int c, int, long long, int batch,
                               int compute, int) {
  recorder_product(m, n, k, a, b, c, compute, batch, "GemmStridedBatchedEx");
  return 0;
}

struct Layout {
  int type;
  uint64_t rows, cols;
  int64_t ld;
};
struct Description {
  int compute, scale;
  std::map<int, int>* attributes;
};

int cublasLtCreate(void** handle) { return cublasCreate_v2(handle); }
int cublasLtDestroy(void* handle) { return cublasDestroy_v2(handle); }
int cublasLtMatrixLayoutCreate(Layout** layout, int type, uint64_t rows, uint64_t cols, int64_t ld) {
  *layout = new Layout{type, rows, cols, ld};
  return 0;
}
int cublasLtMatrixLayoutDestroy(Layout* layout) {
  delete layout;
  return 0;
}
int cublasLtMatrixLayoutSetAttribute(Layout*, int, const void*, size_t) { return 0; }
int cublasLtMatmulDescCreate(Description** description, int compute, int scale) {
  *description = new Description{compute, scale, new std::map<int, int>};
  return 0;
}
int cublasLtMatmulDescDestroy(Description* description) {
  delete description->attributes;
  delete description;
  return 0;
}
int cublasLtMatmulDescSetAttribute(Description* description, int attribute, const void* value, size_t size) {
  int number = 0;
  memcpy(&number, value, size < sizeof number ? size : sizeof number);
  (*description->attributes)[attribute] = number;
  return 0;
}
int cublasLtMatmulPreferenceCreate(void** preference) { return cublasCreate_v2(preference); }
int cublasLtMatmulPreferenceDestroy(void* preference) { return cublasDestroy_v2(preference); }
int cublasLtMatmulPreferenceSetAttribute(void*, int, const void*, size_t) { return 0; }
int cublasLtMatmulAlgoGetHeuristic(void*, Description*, Layout*, Layout*, Layout*, Layout*, void*, int, void* results,
                                   int* found) {
  memset(results, 0, 96);  // cublasLtMatmulHeuristicResult_t: algorithm, workspace of 0 bytes, status of success
  *found = 1;
  return 0;
}
int cublasLtMatmul(void*, Description* d, const void*, const void*, Layout* a, const void*, Layout* b, const void*,
                   const void*, Layout*, void*, Layout* c, const void*, void*, size_t, void*) {
  auto k = (*d->attributes)[3] ? a->rows : a->cols;  // CUBLASLT_MATMUL_DESC_TRANSA
  recorder_product(c->rows, c->cols, k, a->type, b->type, c->type, d->compute, 1, "LtMatmul");
  return 0;
}
}
