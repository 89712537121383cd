// CUDA's runtime library as one that computes nothing: it allocates, copies and keeps a record.
//
// It stands in for libcudart.so where there is no GPU, so that the CUDA libraries above it run for what they decide on
// the host: which kernels exist, which are chosen, which nodes go where, what is copied and when, what happens when
// memory runs out. "Device" memory is the host's. Copies are made as late as a stream allows: when something waits
// for it. A host buffer that is written or read too early therefore shows.
//
// Settings: RECORDER_GPUS (1), RECORDER_MIB of memory on each (81,559), RECORDER_CAPABILITY (90, for 9.0),
// RECORDER_FILL, the byte that new device memory is filled with (0); RECORDER_KEEP, whether to keep what is copied to a
// device on a stream (no); RECORDER_TFLOPS, how fast matrix products are, in 10^12 FLOP/s (0: they take no time). The
// device computes one after another, and who waits for a stream or an event waits as long.
#define __CUDA_API_VERSION_INTERNAL
#include <cuda_runtime_api.h>
#include <cxxabi.h>

#include <chrono>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

namespace {

using Clock = std::chrono::steady_clock;
using Time = Clock::time_point;

struct Event {
  cudaStream_t stream;
  Time reached;
};

struct Copy {
  void* to;
  const void* from;
  size_t n_bytes;
  bool keep;
};

std::recursive_mutex lock;  // over all below
std::vector<std::string> lines, kept;
std::unordered_map<const void*, std::string> kernels;
std::unordered_map<void*, std::pair<size_t, int>> device_memory, host_memory;  // size, GPU
std::map<cudaStream_t, std::deque<Copy>> queued;
std::map<int, size_t> used;
std::map<int, Time> busy_until;
thread_local int current = 0;
thread_local cudaError_t last = cudaSuccess;
thread_local std::vector<std::tuple<dim3, dim3, size_t, cudaStream_t>> configurations;

using Guard = std::lock_guard<std::recursive_mutex>;

long setting(const char* name, long otherwise) {
  const char* value = getenv(name);
  return value ? atol(value) : otherwise;
}

int n_gpus() { return setting("RECORDER_GPUS", 1); }
int capability() { return setting("RECORDER_CAPABILITY", 90); }
size_t total_bytes() { return size_t(setting("RECORDER_MIB", 81559)) << 20; }

cudaError_t failed(cudaError_t error) { return last = error; }

void flush(cudaStream_t stream) {
  for (auto& copy : queued[stream]) {
    memcpy(copy.to, copy.from, copy.n_bytes);
    if (copy.keep) kept.emplace_back((const char*)copy.to, copy.n_bytes);
  }
  queued[stream].clear();
}

Time done(int device) { return std::max(Clock::now(), busy_until[device]); }

void flush_all() {
  for (auto& [stream, _] : queued) flush(stream);
}

Time done_now() {
  Guard guard(lock);
  return done(current);
}

void wait_until(Time time) { std::this_thread::sleep_until(time); }  // the lock is not held

cudaError_t allocate(void** pointer, size_t n_bytes, const char* how);

}  // namespace

extern "C" {

// One line of the record; also for the other libraries.
void recorder_add(const char* format, ...) {
  char text[4096];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  Guard guard(lock);
  lines.emplace_back(text);
}

// A matrix product, for the record and on the device's clock.
void recorder_product(long long m, long long n, long long k, int a, int b, int c, int compute, long long batch,
                      const char* function) {
  static const double tflops = setting("RECORDER_TFLOPS", 0);
  recorder_add("product m=%lld n=%lld k=%lld a=%d b=%d c=%d compute=%d batch=%lld via=%s", m, n, k, a, b, c, compute,
               batch, function);
  if (!tflops) return;
  Guard guard(lock);
  auto nanoseconds = (long long)(2e-3 * m * n * k * batch / tflops);
  busy_until[current] = done(current) + std::chrono::nanoseconds(nanoseconds);
}

// The record since the last call, a line each; valid until the next.
const char* recorder_take() {
  static std::string all;
  Guard guard(lock);
  all.clear();
  for (auto& line : lines) all += line + "\n";
  lines.clear();
  return all.c_str();
}

// Bytes that are allocated on a device.
size_t recorder_used(int device) {
  Guard guard(lock);
  return used[device];
}

// The copies to a device that were kept: how many, and one of them with its size.
size_t recorder_n_kept() { return kept.size(); }
const char* recorder_kept(size_t i, size_t* n_bytes) {
  *n_bytes = kept[i].size();
  return kept[i].data();
}

// ---- devices

cudaError_t cudaGetDeviceCount(int* count) {
  *count = n_gpus();
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = current;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= n_gpus()) return failed(cudaErrorInvalidDevice);
  current = device;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int device) {
  if (device < 0 || device >= n_gpus()) return failed(cudaErrorInvalidDevice);
  memset(p, 0, sizeof *p);
  strcpy(p->name, "recorder");
  p->totalGlobalMem = total_bytes();
  p->sharedMemPerBlock = 48 << 10;
  p->sharedMemPerBlockOptin = 227 << 10;
  p->sharedMemPerMultiprocessor = 228 << 10;
  p->regsPerBlock = p->regsPerMultiprocessor = 65536;
  p->warpSize = 32;
  p->maxThreadsPerBlock = 1024;
  p->maxThreadsPerMultiProcessor = 2048;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
  p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 2147483647;
  p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->major = capability() / 10;
  p->minor = capability() % 10;
  p->multiProcessorCount = 132;
  p->maxBlocksPerMultiProcessor = 32;
  p->l2CacheSize = 50 << 20;
  p->unifiedAddressing = p->canMapHostMemory = p->concurrentKernels = p->memoryPoolsSupported = 1;
  p->cooperativeLaunch = p->clusterLaunch = p->hostRegisterSupported = 1;
  p->asyncEngineCount = 3;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  cudaDeviceProp p;
  if (auto error = cudaGetDeviceProperties(&p, device)) return error;
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = p.major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = p.minor; break;
    case cudaDevAttrMultiProcessorCount: *value = p.multiProcessorCount; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = p.sharedMemPerBlock; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = p.sharedMemPerBlockOptin; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = p.sharedMemPerMultiprocessor; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = p.maxThreadsPerBlock; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = p.maxThreadsPerMultiProcessor; break;
    case cudaDevAttrWarpSize: *value = p.warpSize; break;
    case cudaDevAttrMaxRegistersPerBlock: *value = p.regsPerBlock; break;
    default: recorder_add("unknown attribute %d", attribute); *value = 0;
  }
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) { return cudaDriverGetVersion(version); }
cudaError_t cudaDeviceSynchronize() {
  wait_until(done_now());
  Guard guard(lock);
  recorder_add("synchronize device");
  flush_all();
  return cudaSuccess;
}

// ---- errors

cudaError_t cudaGetLastError() {
  auto error = last;
  last = cudaSuccess;
  return error;
}
cudaError_t cudaPeekAtLastError() { return last; }
const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaErrorMemoryAllocation ? "cudaErrorMemoryAllocation" : error ? "cudaError" : "cudaSuccess";
}
const char* cudaGetErrorString(cudaError_t error) {
  if (error == cudaErrorInvalidConfiguration) return "invalid configuration argument";
  return error == cudaErrorMemoryAllocation ? "out of memory" : error ? "an error" : "no error";
}

// ---- memory

cudaError_t cudaMalloc(void** pointer, size_t n_bytes) { return allocate(pointer, n_bytes, "malloc"); }
cudaError_t cudaMallocFromPoolAsync(void** pointer, size_t n_bytes, cudaMemPool_t, cudaStream_t) {
  return allocate(pointer, n_bytes, "malloc from pool");
}
cudaError_t cudaFree(void* pointer) {
  if (!pointer) return cudaSuccess;
  wait_until(done_now());  // as CUDA waits for the device
  Guard guard(lock);
  flush_all();
  auto place = device_memory.find(pointer);
  if (place == device_memory.end()) return failed(cudaErrorInvalidValue);
  used[place->second.second] -= place->second.first;
  device_memory.erase(place);
  free(pointer);
  return cudaSuccess;
}
cudaError_t cudaFreeAsync(void* pointer, cudaStream_t) { return cudaFree(pointer); }
cudaError_t cudaHostAlloc(void** pointer, size_t n_bytes, unsigned) {
  *pointer = aligned_alloc(4096, (n_bytes + 4095) / 4096 * 4096);
  Guard guard(lock);
  host_memory[*pointer] = {n_bytes, current};
  recorder_add("host malloc %zu", n_bytes);
  return cudaSuccess;
}
cudaError_t cudaMallocHost(void** pointer, size_t n_bytes) { return cudaHostAlloc(pointer, n_bytes, 0); }
cudaError_t cudaFreeHost(void* pointer) {
  if (!pointer) return cudaSuccess;
  Guard guard(lock);
  flush_all();
  if (!host_memory.erase(pointer)) return failed(cudaErrorInvalidValue);
  free(pointer);
  return cudaSuccess;
}
cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* total) {
  Guard guard(lock);
  *total = total_bytes();
  *free_bytes = *total - used[current];
  return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer) {
  Guard guard(lock);
  *attributes = {};
  for (auto& [start, place] : device_memory)
    if (pointer >= start && pointer < (char*)start + place.first) {
      attributes->type = cudaMemoryTypeDevice;
      attributes->device = place.second;
    }
  return cudaSuccess;
}

// ---- copies

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t n_bytes, cudaMemcpyKind kind, cudaStream_t stream) {
  Guard guard(lock);
  recorder_add("copy async kind=%d bytes=%zu stream=%p", kind, n_bytes, (void*)stream);
  queued[stream].push_back({to, from, n_bytes, kind == cudaMemcpyHostToDevice && setting("RECORDER_KEEP", 0)});
  return cudaSuccess;
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t n_bytes, cudaMemcpyKind kind) {
  wait_until(done_now());
  Guard guard(lock);
  recorder_add("copy kind=%d bytes=%zu", kind, n_bytes);
  flush_all();
  memcpy(to, from, n_bytes);
  return cudaSuccess;
}
cudaError_t cudaMemset(void* to, int value, size_t n_bytes) {
  Guard guard(lock);
  flush_all();
  memset(to, value, n_bytes);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t n_bytes, cudaStream_t stream) {
  Guard guard(lock);
  recorder_add("memset bytes=%zu stream=%p", n_bytes, (void*)stream);
  flush(stream);
  memset(to, value, n_bytes);
  return cudaSuccess;
}

// ---- streams and events

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  static intptr_t next = 0x1000;
  Guard guard(lock);
  *stream = (cudaStream_t)(next += 0x10);
  recorder_add("stream %p", (void*)*stream);
  return cudaSuccess;
}
cudaError_t cudaStreamCreate(cudaStream_t* stream) { return cudaStreamCreateWithFlags(stream, 0); }
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  Guard guard(lock);
  flush(stream);
  queued.erase(stream);
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  wait_until(done_now());
  Guard guard(lock);
  recorder_add("synchronize stream=%p", (void*)stream);
  flush(stream);
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = (cudaEvent_t) new Event{};
  return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete (Event*)event;
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  Guard guard(lock);
  *(Event*)event = {stream, done(current)};
  return cudaSuccess;
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
  return cudaEventRecord(event, stream);
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  auto [stream, reached] = *(Event*)event;
  recorder_add("synchronize event of stream=%p", (void*)stream);
  wait_until(reached);
  Guard guard(lock);
  recorder_add("reached event of stream=%p", (void*)stream);
  flush(stream);
  return cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t event, unsigned) {
  Guard guard(lock);
  flush(((Event*)event)->stream);
  return cudaSuccess;
}
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t, cudaEvent_t) {
  *milliseconds = 1;
  return cudaSuccess;
}

// ---- kernels

void** __cudaRegisterFatBinary(void*) { return (void**)&lines; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*, int*) {
  Guard guard(lock);
  kernels[host] = name;
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  configurations.emplace_back(grid, block, shared, stream);
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  std::tie(*grid, *block, *shared, *(cudaStream_t*)stream) = configurations.back();
  configurations.pop_back();
  return cudaSuccess;
}
cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void**, size_t shared, cudaStream_t stream) {
  Guard guard(lock);
  std::string& name = kernels[function];
  int status = 0;
  char* readable = name.rfind("_Z", 0) ? nullptr : abi::__cxa_demangle(name.c_str(), nullptr, nullptr, &status);
  if (readable) name = readable;  // once
  free(readable);
  recorder_add("kernel stream=%p grid=%u,%u,%u block=%u,%u,%u shared=%zu %s", (void*)stream, grid.x, grid.y, grid.z, block.x,
               block.y, block.z, shared, name.c_str());
  bool allowed = grid.x <= 2147483647 && grid.y <= 65535 && grid.z <= 65535 && grid.x * grid.y * grid.z > 0 &&
                 block.x * block.y * block.z - 1 < 1024 && shared <= 227 << 10;
  return allowed ? cudaSuccess : failed(cudaErrorInvalidConfiguration);
}
cudaError_t cudaLaunchCooperativeKernel(const void* f, dim3 grid, dim3 block, void** a, size_t shared, cudaStream_t s) {
  return cudaLaunchKernel(f, grid, block, a, shared, s);
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = (cudaKernel_t)function;
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** a, size_t shared, cudaStream_t s) {
  return cudaLaunchKernel((const void*)kernel, grid, block, a, shared, s);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* c, const void* function, void** arguments) {
  return cudaLaunchKernel(function, c->gridDim, c->blockDim, arguments, c->dynamicSmemBytes, c->stream);
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  *attributes = {};
  attributes->maxThreadsPerBlock = 1024;
  attributes->numRegs = 128;
  attributes->binaryVersion = attributes->ptxVersion = capability();
  attributes->maxDynamicSharedSizeBytes = 227 << 10;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* n, const void*, int, size_t, unsigned) {
  *n = 2;
  return cudaSuccess;
}

// ---- what nothing depends on

cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaKernelSetAttributeForDevice(cudaKernel_t, cudaFuncAttribute, int, int) { return cudaSuccess; }

}  // extern "C"

namespace {
cudaError_t allocate(void** pointer, size_t n_bytes, const char* how) {
  Guard guard(lock);
  if (used[current] + n_bytes > total_bytes()) {
    recorder_add("refused %zu", n_bytes);
    return failed(cudaErrorMemoryAllocation);
  }
  *pointer = aligned_alloc(256, (n_bytes + 255) / 256 * 256);
  memset(*pointer, setting("RECORDER_FILL", 0), n_bytes);
  device_memory[*pointer] = {n_bytes, current};
  used[current] += n_bytes;
  recorder_add("%s %zu", how, n_bytes);
  return cudaSuccess;
}
}  // namespace
