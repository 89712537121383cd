VENV ?= .venv
PYTHON ?= python3
# A range would let pip take the newest CUDA build, several gigabytes; this release has a CPU build that is enough.
TORCH ?= torch==2.13.0
bin = $(VENV)/bin

.PHONY: demo test check soak wheel bench native native-check

demo: $(VENV)/.installed
	$(bin)/python examples/demo.py

test: $(VENV)/.installed-dev build/recorder/.installed
	$(bin)/python -m pytest --numprocesses 2 --dist loadfile

check: $(VENV)/.installed-dev
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	mkdir -p build/typing && ln -sfn ../../export build/typing/jql_export
	$(bin)/mypy

# Random kills, damaged files, rival jobs, full disks, failing requests: see tests/soak.py. A failure names its seed.
MINUTES ?= 0.5
SEED ?= 1
soak: $(VENV)/.installed-dev
	$(bin)/python -m tests.soak --minutes $(MINUTES) --seed $(SEED)

# The demo by what users install: an editable install finds packages that a wheel may lack. The dependencies are those
# of the environment; a path file does not bring its editable install along.
wheel: $(VENV)/.installed
	rm -rf build/wheel
	$(bin)/python -m pip wheel --quiet --no-deps --wheel-dir build/wheel .
	$(PYTHON) -m venv build/wheel/venv
	$(bin)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> "$$(build/wheel/venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/dependencies.pth"
	build/wheel/venv/bin/python -m pip install --quiet --no-deps build/wheel/*.whl
	build/wheel/venv/bin/python examples/demo.py --work build/wheel/demo
	build/wheel/venv/bin/jql-rescore --help > /dev/null
	build/wheel/venv/bin/jql-cut --help > /dev/null
	build/wheel/venv/bin/jql-report --help > /dev/null
	build/wheel/venv/bin/jql-compare --help > /dev/null

# libjql, its examples and their tests: see native/build.sh, which says what it needs.
native: $(VENV)/.installed-dev
	PYTHON=$(abspath $(bin))/python native/build.sh

# libjql with the oldest ONNX Runtime that it takes, below valgrind and the sanitizers, and SECONDS of each fuzzer: see
# native/check.sh.
SECONDS ?= 10
native-check: native
	$(bin)/python -m pip install --quiet --upgrade --no-deps --target build/oldest 'onnxruntime==1.24.1'
	JQL_ONNXRUNTIME=build/oldest/onnxruntime $(bin)/python -m pytest tests/native/test_engine.py tests/native/test_errors.py
	$(bin)/python examples/demo.py > /dev/null
	PYTHON=$(abspath $(bin))/python native/check.sh .demo/bundle \
		$$($(bin)/python -c 'from tests.native.binding import package_file as f; print(f("onnxruntime", "capi/libonnxruntime.so.*"))') \
		$(SECONDS)

# ENCODER, BUNDLE, CORPUS and NAME: see benchmarks/throughput.py
bench: $(VENV)/.installed-dev
	$(bin)/python -m benchmarks.throughput --encoder $(ENCODER) --bundle $(BUNDLE) --corpus $(CORPUS) --name $(NAME)

# ONNX Runtime for CUDA, beside the one for the CPU and apart from it, and the headers of the CUDA that it is built
# for: tests/recorder runs it without a GPU.
# What is launched and printed differs between releases: a newer one is taken on purpose.
build/recorder/.installed: $(VENV)/.installed-dev Makefile
	$(bin)/python -m pip install --quiet --upgrade --no-deps --target build/recorder/site \
		'onnxruntime-gpu~=1.31.1' 'nvidia-cuda-runtime~=13.0' 'nvidia-cuda-crt~=13.0'
	touch $@

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(bin)/python -m pip install --quiet --upgrade pip
	$(bin)/python -m pip install --quiet $(TORCH)
	$(bin)/python -m pip install --quiet --editable '.[cpu,export]'
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(bin)/python -m pip install --quiet --editable '.[cpu,export,dev]'
	touch $@
