#!/usr/bin/env bash
# Memory errors, undefined behavior, data races and hangs of libjql, after `make native`: `make native-check`.
#
#   native/check.sh BUNDLE LIBONNXRUNTIME [SECONDS] [valgrind address thread fuzz ...]
#
# SECONDS: of each fuzzer (10). Fuzzing needs clang. Each check that is named runs, by default all.
set -euo pipefail
cd "$(dirname "$0")/.."
bundle=$(realpath "$1") onnxruntime=$(realpath "$2") seconds=${3:-10}
shift $(($# < 3 ? $# : 3))
if [ ! -e build/native/CMakeCache.txt ]; then
  echo "make native-check is skipped, as make native was"
  exit 0
fi
include=$(sed -n 's/^ONNXRUNTIME_INCLUDE:PATH=//p' build/native/CMakeCache.txt)
jobs=2

configure() { # folder, options
  cmake -S native -B "$1" -DONNXRUNTIME_INCLUDE="$include" -DJQL_EXAMPLES=OFF "${@:2}" > /dev/null
}

missing() {
  ! command -v "$1" > /dev/null && echo "skipped: $1 is not installed"
}

valgrind_check() {
  if missing valgrind; then return; fi
  cmake --build build/native --parallel $jobs --target lifecycle
  valgrind --quiet --error-exitcode=9 --leak-check=full --show-leak-kinds=definite --errors-for-leak-kinds=definite \
    --suppressions=native/tests/valgrind.supp build/native/lifecycle "$bundle" "$onnxruntime" 2
}

# On all tests: Python's own leaks are not looked for, libjql's are in the program. libstdc++ has to be there before
# the sanitizer looks for what it replaces.
address_check() {
  configure build/native-address -DJQL_SANITIZE=address,undefined
  cmake --build build/native-address --parallel $jobs --target jql lifecycle
  build/native-address/lifecycle "$bundle" "$onnxruntime" 4
  ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD="$(cc -print-file-name=libasan.so) $(cc -print-file-name=libstdc++.so.6)" \
    JQL_WITHOUT_OPENVINO=1 JQL_LIBRARY=build/native-address/libjql.so "${PYTHON:-python3}" -m pytest -q tests/native \
    --ignore tests/native/test_packaging.py --ignore tests/native/test_docs.py
}

thread_check() {
  configure build/native-thread -DJQL_SANITIZE=thread
  cmake --build build/native-thread --parallel $jobs --target lifecycle
  TSAN_OPTIONS=halt_on_error=1 build/native-thread/lifecycle "$bundle" "$onnxruntime" 4
}

fuzz_check() {
  local fuzzers=(texts tokenizer manifest)
  local clang
  clang=$(compgen -c clang++ | sort -V | tail -1 || true)
  if missing "${clang:-clang++}"; then return; fi
  if ! echo 'extern "C" int LLVMFuzzerTestOneInput(const char*, long) { return 0; }' |
    $clang -x c++ -fsanitize=fuzzer,address - -o /dev/null 2> /dev/null; then
    echo "skipped: $clang has no libFuzzer (Debian: libclang-rt-dev of its version)"
    return
  fi
  CC=${clang/++/} CXX=$clang configure build/native-fuzz -DJQL_FUZZERS=ON
  cmake --build build/native-fuzz --parallel $jobs --target "${fuzzers[@]/#/fuzz_}"
  for name in "${fuzzers[@]}"; do
    mkdir -p "build/fuzz/$name"
    JQL_FUZZ_TOKENIZER=$bundle/tokenizer.json UBSAN_OPTIONS=print_stacktrace=1 \
      build/native-fuzz/fuzz_$name "build/fuzz/$name" "native/tests/seeds/$name" -max_total_time="$seconds" -timeout=25 -rss_limit_mb=3000 \
      -max_len=8192 -print_final_stats=1 -dict=native/tests/fuzz_$name.dict -artifact_prefix="build/fuzz/$name-" 2>&1 |
      grep -E "ERROR|SUMMARY|stat::|runtime error|^Done"
    [ "${PIPESTATUS[0]}" = 0 ]
  done
}

for check in "${@:-valgrind address thread fuzz}"; do
  for name in $check; do
    echo "== $name"
    "${name}_check"
  done
done
