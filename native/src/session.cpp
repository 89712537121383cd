#include "session.h"

#include "error.h"

namespace jql {

std::unique_ptr<Session> open_session(const SessionRequest& request) {
  const Variant& variant = request.variant;
  if (variant.layout != "exact" && variant.layout != "padded") {
    throw unsupported("libjql does not know the layout " + variant.layout + " of " + variant.graph);
  }
  if (variant.provider == "cpu" || variant.provider == "any") return open_onnxruntime(request);
#ifdef JQL_WITH_OPENVINO
  if (variant.provider == "openvino") return open_openvino(request);
#else
  if (variant.provider == "openvino") throw unsupported("this libjql was built without OpenVINO's headers");
#endif
  throw unsupported("libjql does not run " + variant.graph + ", which is written for " + variant.provider +
                    ": it knows cpu, any and openvino");
}

void check_output(const char* name, bool is_float32, size_t n_values, size_t expected) {
  if (is_float32 && n_values == expected) return;
  throw Error(JQL_RUNTIME_FAILED, std::string("the graph gives ") + std::to_string(n_values) + " values of " +
                                      (is_float32 ? "float32" : "another type") + " as " + name + ", expected " +
                                      std::to_string(expected) + " of float32; export the bundle again");
}

}  // namespace jql
