// ONNX Runtime's C API, on the CPU.
#include <onnxruntime_c_api.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "error.h"
#include "library.h"
#include "session.h"

namespace jql {

namespace {

constexpr int least_minor = 24;  // of version 1: what the bundles are tested with
// On two cores two documents at a time are 6 % faster than one on both; but as many of the longest are in memory at
// once.
constexpr int max_streams = 4;

// Something of ONNX Runtime's that its own function releases.
template <typename T>
using Owned = std::unique_ptr<T, void(ORT_API_CALL*)(T*)>;

template <typename T>
Owned<T> own(T* pointer, void(ORT_API_CALL* release)(T*)) {
  return Owned<T>(pointer, release);
}

void ORT_API_CALL ignore_log(void*, OrtLoggingLevel, const char*, const char*, const char*, const char*) {}

// GetApi prints where it is asked for a version that the library does not have: so its version is read first.
const OrtApi& api_of(const Library& library) {
  OrtApiBase const*(ORT_API_CALL * get_base)() = nullptr;
  library.load(get_base, "OrtGetApiBase");
  const OrtApiBase* base = get_base();
  const char* version = base->GetVersionString();
  int major = 0, minor = 0;
  bool fits = std::sscanf(version, "%d.%d", &major, &minor) == 2 && major == 1 &&
              minor >= std::max<int>(least_minor, ORT_API_VERSION);
  const OrtApi* api = fits ? base->GetApi(ORT_API_VERSION) : nullptr;
  if (!api) {
    throw Error(JQL_NO_RUNTIME, library.path() + " is ONNX Runtime " + version + ", libjql needs 1." +
                                    std::to_string(std::max<int>(least_minor, ORT_API_VERSION)) +
                                    " or later, of version 1");
  }
  return *api;
}

void prepare(const Library& library) {
  api_of(library);
  // From 1.29 on its telemetry starts a thread that stays, and sends a first event, before it can be disabled by a
  // call; the variable is read before. A host that has set it keeps its value.
  setenv("ORT_DISABLE_TELEMETRY", "1", 0);
}

class OnnxRuntimeSession : public Session {
 public:
  explicit OnnxRuntimeSession(const SessionRequest& request);
  Output run(const Batch& batch) override;

 private:
  void check(OrtStatus* status) const;
  Owned<OrtSession> create(const SessionRequest& request) const;
  Owned<OrtValue> input(const std::vector<int64_t>& values, const Batch& batch) const;
  std::vector<float> take(OrtValue* value, int64_t rows, size_t width, const char* name) const;

  Library library_;
  const OrtApi& api_;
  Owned<OrtEnv> env_;
  Owned<OrtMemoryInfo> memory_;
  Owned<OrtSession> session_;
  bool takes_mask_;
  size_t n_heads_, hidden_size_;
};

OnnxRuntimeSession::OnnxRuntimeSession(const SessionRequest& request)
    : library_({"ONNX Runtime",
                "onnxruntime",
                {"libonnxruntime.so.1", "libonnxruntime.so"},
                "onnxruntime/capi/libonnxruntime.so*",
                prepare},
               request.options.onnxruntime),
      api_(api_of(library_)),
      env_(own<OrtEnv>(nullptr, api_.ReleaseEnv)),
      memory_(own<OrtMemoryInfo>(nullptr, api_.ReleaseMemoryInfo)),
      session_(own<OrtSession>(nullptr, api_.ReleaseSession)),
      takes_mask_(request.variant.layout == "padded"),
      n_heads_(request.n_heads),
      hidden_size_(request.hidden_size) {
  OrtEnv* env = nullptr;
  check(api_.CreateEnvWithCustomLogger(ignore_log, nullptr, ORT_LOGGING_LEVEL_FATAL, "jql", &env));
  env_.reset(env);
  check(api_.DisableTelemetryEvents(env));  // other people's text passes through here: nothing is reported to anyone
  OrtMemoryInfo* memory = nullptr;
  check(api_.CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &memory));
  memory_.reset(memory);
  n_parallel = request.threads <= max_streams ? request.threads : 1;
  session_ = create(request);
}

Owned<OrtSession> OnnxRuntimeSession::create(const SessionRequest& request) const {
  OrtSessionOptions* options = nullptr;
  check(api_.CreateSessionOptions(&options));
  auto owner = own(options, api_.ReleaseSessionOptions);
  check(api_.SetIntraOpNumThreads(options, request.threads / n_parallel));
  check(api_.DisableMemPattern(options));  // every length is another shape, and no pattern is met again
  check(api_.SetSessionLogSeverityLevel(options, ORT_LOGGING_LEVEL_FATAL));  // the environment may be the host's
  OrtSession* session = nullptr;
  check(api_.CreateSession(env_.get(), request.graph.c_str(), options, &session));
  return own(session, api_.ReleaseSession);
}

void OnnxRuntimeSession::check(OrtStatus* status) const {
  if (!status) return;
  auto owner = own(status, api_.ReleaseStatus);
  throw Error(JQL_RUNTIME_FAILED, std::string("ONNX Runtime: ") + api_.GetErrorMessage(status));
}

Owned<OrtValue> OnnxRuntimeSession::input(const std::vector<int64_t>& values, const Batch& batch) const {
  const int64_t shape[] = {batch.n_docs, batch.length};
  OrtValue* value = nullptr;
  auto data = const_cast<int64_t*>(values.data());  // the type of inputs and outputs is the same; inputs are only read
  check(api_.CreateTensorWithDataAsOrtValue(memory_.get(), data, values.size() * sizeof(int64_t), shape, 2,
                                            ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64, &value));
  return own(value, api_.ReleaseValue);
}

std::vector<float> OnnxRuntimeSession::take(OrtValue* value, int64_t rows, size_t width, const char* name) const {
  OrtTensorTypeAndShapeInfo* info = nullptr;
  check(api_.GetTensorTypeAndShape(value, &info));
  auto owner = own(info, api_.ReleaseTensorTypeAndShapeInfo);
  ONNXTensorElementDataType type;
  size_t n_values = 0;
  check(api_.GetTensorElementType(info, &type));
  check(api_.GetTensorShapeElementCount(info, &n_values));
  check_output(name, type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, n_values, static_cast<size_t>(rows) * width);
  std::vector<float> values(n_values);
  void* data = nullptr;
  check(api_.GetTensorMutableData(value, &data));
  if (n_values) std::memcpy(values.data(), data, n_values * sizeof(float));
  return values;
}

Output OnnxRuntimeSession::run(const Batch& batch) {
  static constexpr const char* inputs[] = {"input_ids", "attention_mask"};
  static constexpr const char* outputs[] = {"scores", "embedding"};
  const std::vector<int64_t> ones(takes_mask_ ? batch.ids.size() : 0, 1);
  auto ids = input(batch.ids, batch);
  auto mask = takes_mask_ ? input(ones, batch) : own<OrtValue>(nullptr, api_.ReleaseValue);
  const OrtValue* values[] = {ids.get(), mask.get()};
  OrtValue* found[] = {nullptr, nullptr};
  check(api_.Run(session_.get(), nullptr, inputs, values, takes_mask_ ? 2 : 1, outputs, 2, found));
  auto scores = own(found[0], api_.ReleaseValue), embeddings = own(found[1], api_.ReleaseValue);
  return {take(scores.get(), batch.n_docs, n_heads_, "scores"),
          take(embeddings.get(), batch.n_docs, hidden_size_, "embedding")};
}

}  // namespace

std::unique_ptr<Session> open_onnxruntime(const SessionRequest& request) {
  return std::make_unique<OnnxRuntimeSession>(request);
}

}  // namespace jql
