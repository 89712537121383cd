// OpenVINO's C API, on the CPU.
#include <openvino/c/openvino.h>

#include <cstring>
#include <mutex>

#include "error.h"
#include "library.h"
#include "session.h"

namespace jql {

namespace {

// The functions that are used, each under its own name.
#define JQL_OPENVINO_FUNCTIONS(_)                                                                       \
  _(core_create)                                                                                        \
  _(core_free) _(core_get_property) _(core_compile_model_from_file) _(compiled_model_free)              \
      _(compiled_model_create_infer_request) _(infer_request_set_tensor) _(infer_request_start_async)   \
          _(infer_request_wait) _(infer_request_get_tensor) _(infer_request_free) _(shape_create)       \
              _(shape_free) _(tensor_create_from_host_ptr) _(tensor_get_size) _(tensor_get_element_type) \
                  _(tensor_data) _(tensor_free) _(free) _(get_error_info) _(get_last_err_msg)

struct Functions {
#define JQL_DECLARE(name) decltype(&ov_##name) name = nullptr;
  JQL_OPENVINO_FUNCTIONS(JQL_DECLARE)
#undef JQL_DECLARE

  explicit Functions(const Library& library) {
#define JQL_LOAD(name) library.load(name, "ov_" #name);
    JQL_OPENVINO_FUNCTIONS(JQL_LOAD)
#undef JQL_LOAD
  }
};

template <typename T>
using Owned = std::unique_ptr<T, void (*)(T*)>;

class OpenVinoSession : public Session {
 public:
  explicit OpenVinoSession(const SessionRequest& request);
  Output run(const Batch& batch) override;

 private:
  void check(ov_status_e status) const;
  bool has_bf16() const;
  void compile(const SessionRequest& request);
  void set(const char* name, const std::vector<int64_t>& values, const Batch& batch);
  std::vector<float> take(const char* name, int64_t rows, size_t width) const;

  Library library_;
  Functions ov_;
  Owned<ov_core_t> core_;
  Owned<ov_compiled_model_t> model_;
  Owned<ov_infer_request_t> request_;
  std::mutex running_;   // a request holds its tensors
  bool failed_ = false;  // then its graph is in no known state: it may give wrong scores without an error
  bool takes_mask_;
  size_t n_heads_, hidden_size_;
};

OpenVinoSession::OpenVinoSession(const SessionRequest& request)
    : library_({"OpenVINO",
                "openvino",
                {"libopenvino_c.so"},
                "openvino/libs/libopenvino_c.so*",
                [](const Library& library) { Functions{library}; }},
               request.options.openvino),
      ov_(library_),
      core_(nullptr, ov_.core_free),
      model_(nullptr, ov_.compiled_model_free),
      request_(nullptr, ov_.infer_request_free),
      takes_mask_(request.variant.layout == "padded"),
      n_heads_(request.n_heads),
      hidden_size_(request.hidden_size) {
  ov_core_t* core = nullptr;
  check(ov_.core_create(&core));
  core_.reset(core);
  if (request.variant.precision == "bf16" && !has_bf16()) {
    throw unsupported("this CPU has no bf16 instructions, which " + request.variant.graph +
                      " needs; open another variant");
  }
  compile(request);
  ov_infer_request_t* infer = nullptr;
  check(ov_.compiled_model_create_infer_request(model_.get(), &infer));
  request_.reset(infer);
}

void OpenVinoSession::compile(const SessionRequest& request) {
  // An int8 graph computes what is not quantized in bf16, where there is.
  const char* precision = request.variant.precision != "fp32" && has_bf16() ? "bf16" : "f32";
  const std::string threads = std::to_string(request.threads);
  ov_compiled_model_t* model = nullptr;
  // Pinned threads of several engines would share the first cores.
  check(ov_.core_compile_model_from_file(core_.get(), request.graph.c_str(), "CPU", 8, &model,  //
                                         "INFERENCE_PRECISION_HINT", precision, "NUM_STREAMS", "1",
                                         "INFERENCE_NUM_THREADS", threads.c_str(), "ENABLE_CPU_PINNING", "NO"));
  model_.reset(model);
}

bool OpenVinoSession::has_bf16() const {
  char* found = nullptr;
  check(ov_.core_get_property(core_.get(), "CPU", "OPTIMIZATION_CAPABILITIES", &found));
  bool has = std::strstr(found, "BF16") != nullptr;
  ov_.free(found);
  return has;
}

void OpenVinoSession::check(ov_status_e status) const {
  if (status == OK) return;
  Owned<const char> sentence(ov_.get_last_err_msg(), ov_.free);  // a copy
  std::string what = sentence && *sentence ? sentence.get() : ov_.get_error_info(status);
  throw Error(JQL_RUNTIME_FAILED, "OpenVINO: " + what);
}

void OpenVinoSession::set(const char* name, const std::vector<int64_t>& values, const Batch& batch) {
  const int64_t sizes[] = {batch.n_docs, batch.length};
  ov_shape_t shape;
  check(ov_.shape_create(2, sizes, &shape));
  ov_tensor_t* tensor = nullptr;
  ov_status_e status = ov_.tensor_create_from_host_ptr(I64, shape, const_cast<int64_t*>(values.data()), &tensor);
  ov_.shape_free(&shape);
  check(status);
  Owned<ov_tensor_t> owner(tensor, ov_.tensor_free);
  check(ov_.infer_request_set_tensor(request_.get(), name, tensor));
}

std::vector<float> OpenVinoSession::take(const char* name, int64_t rows, size_t width) const {
  ov_tensor_t* tensor = nullptr;
  check(ov_.infer_request_get_tensor(request_.get(), name, &tensor));
  Owned<ov_tensor_t> owner(tensor, ov_.tensor_free);
  ov_element_type_e type;
  size_t n_values = 0;
  check(ov_.tensor_get_element_type(tensor, &type));
  check(ov_.tensor_get_size(tensor, &n_values));
  check_output(name, type == F32, n_values, static_cast<size_t>(rows) * width);
  std::vector<float> values(n_values);
  void* data = nullptr;
  check(ov_.tensor_data(tensor, &data));
  if (n_values) std::memcpy(values.data(), data, n_values * sizeof(float));
  return values;
}

Output OpenVinoSession::run(const Batch& batch) {
  std::lock_guard<std::mutex> lock(running_);
  const std::vector<int64_t> ones(takes_mask_ ? batch.ids.size() : 0, 1);
  set("input_ids", batch.ids, batch);
  if (takes_mask_) set("attention_mask", ones, batch);
  if (failed_) {
    throw Error(JQL_RUNTIME_FAILED, "OpenVINO has failed in an earlier call, and its graph is in no known state; "
                                    "open the engine again");
  }
  failed_ = true;
  // Not ov_infer_request_infer: with one thread it swallows every exception, and the outputs are those of the call
  // before (2026.4).
  check(ov_.infer_request_start_async(request_.get()));
  check(ov_.infer_request_wait(request_.get()));
  failed_ = false;
  return {take("scores", batch.n_docs, n_heads_), take("embedding", batch.n_docs, hidden_size_)};
}

}  // namespace

std::unique_ptr<Session> open_openvino(const SessionRequest& request) {
  return std::make_unique<OpenVinoSession>(request);
}

}  // namespace jql
