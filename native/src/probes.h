// Is a graph, on this machine, the fp32 reference? probes.safetensors, as sessions/certify.py uses it.
#pragma once

#include <string>

#include "manifest.h"
#include "scoring.h"

namespace jql {

// Computes the short probe documents, together and alone. Throws Error: JQL_PARITY out of tolerance.
void certify(const std::string& folder, const Manifest& manifest, const std::string& variant, Session& session,
             Slots& slots);

}  // namespace jql
