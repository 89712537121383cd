#!/usr/bin/env bash
# Builds libjql and its examples into build/native, and tests them: `make native`. Needs no root.
#
#   PYTHON               Python with this repository and its `dev` extra installed
#   ONNXRUNTIME_INCLUDE  folder of onnxruntime_c_api.h; by default Debian 13's package is downloaded and unpacked
#
# Where a compiler or the header cannot be had it says so, and is done; with NATIVE_REQUIRED=1 it fails.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
unpacked=build/onnxruntime-dev

skip() {
  echo "make native is skipped: $1"
  exit "${NATIVE_REQUIRED:-0}"
}

# Debian's own package of another release than this machine's, with state of its own: apt's is not touched.
unpack_headers() {
  local state="$PWD/$unpacked/apt" key=/usr/share/keyrings/debian-archive-keyring.gpg
  mkdir -p "$state/lists/partial" "$state/cache/archives/partial"
  echo "deb [signed-by=$key] http://deb.debian.org/debian trixie main" > "$state/sources.list"
  local apt=(apt-get -qq -o "Dir::Etc::SourceList=$state/sources.list" -o Dir::Etc::SourceParts=/dev/null
    -o "Dir::State::Lists=$state/lists" -o "Dir::Cache=$state/cache" -o APT::Sandbox::User=)
  "${apt[@]}" update || true
  (cd "$unpacked" && "${apt[@]}" download libonnxruntime-dev && dpkg-deb -x libonnxruntime-dev_*.deb .) || true
  rm -rf "$state"
}

for tool in cmake cc c++; do
  command -v $tool > /dev/null || skip "$tool is not installed"
done
if [ -z "${ONNXRUNTIME_INCLUDE:-}" ]; then
  ONNXRUNTIME_INCLUDE=$PWD/$unpacked/usr/include/onnxruntime
  if [ ! -e "$ONNXRUNTIME_INCLUDE/onnxruntime_c_api.h" ]; then
    command -v apt-get > /dev/null || skip "there is no apt-get; set ONNXRUNTIME_INCLUDE to where onnxruntime_c_api.h lies"
    unpack_headers
    [ -e "$ONNXRUNTIME_INCLUDE/onnxruntime_c_api.h" ] ||
      skip "Debian's libonnxruntime-dev cannot be downloaded; set ONNXRUNTIME_INCLUDE to where onnxruntime_c_api.h lies"
  fi
fi
package() { "$PYTHON" -c "import importlib.util as u; s = u.find_spec('$1'); print(s.submodule_search_locations[0] if s else '')"; }
openvino=$(package openvino)
cmake -S native -B build/native -DONNXRUNTIME_INCLUDE="$ONNXRUNTIME_INCLUDE" \
  -DOPENVINO_INCLUDE="${openvino:+$openvino/include}" -DARROW_ROOT="$(package pyarrow)" \
  -DCMAKE_COMPILE_WARNING_AS_ERROR=ON > build/native-configure.log ||
  { cat build/native-configure.log; exit 1; }
cmake --build build/native --parallel 2
"$PYTHON" -m pytest -q tests/native
