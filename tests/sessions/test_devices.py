"""A GPU that is there and cannot be used is an error, whatever it is that is missing."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import replace

import onnxruntime as ort
import pytest

from jql_engine.bundle import MANIFEST, Bundle, Variant
from jql_engine.engine import Engine
from jql_engine.errors import DeviceError
from jql_engine.integrations.datatrove import JQLAnnotator
from jql_engine.sessions import devices
from jql_engine.sessions.cuda.provider import PROVIDER
from jql_engine.sessions.devices import every_gpu, gpu_without_driver
from jql_engine.sessions.select import Choice, choose
from tests.conftest import without_gpu

CPU = Choice(("cpu",), "cpu-fp32")
PCI = "sys/bus/pci/devices/0000:17:00.0"
TAKE_CPU = "or take the CPU: --device cpu"


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Writes what the kernel of a machine lists; it has no driver."""
    monkeypatch.setattr(devices, "ROOT", tmp_path / "root")
    monkeypatch.setattr(devices, "DRIVER", str(tmp_path / "libcuda.so.1"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def write(files):
        for name, text in files.items():
            file = devices.ROOT / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)

    return write


@pytest.fixture
def driver(machine, tmp_path):
    """Compiles a driver that shows so many GPUs, or fails."""
    compiler = shutil.which("cc") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C compiler")

    def build(status, count):
        source = f"int cuInit(unsigned _) {{ return {status}; }}"
        source += f"int cuDeviceGetCount(int* count) {{ *count = {count}; return 0; }}"
        (tmp_path / "driver.c").write_text(source)
        subprocess.run(
            [compiler, "-x", "c", "-shared", "-fPIC", tmp_path / "driver.c", "-o", devices.DRIVER], check=True
        )

    return build


def with_graphs(bundle, *names):
    """A bundle that has further graphs, cuda-fp16 and the like, by its manifest."""
    kinds = {name: name.split("-") for name in names}
    layouts = {"cuda": "packed", "tensorrt": "padded"}
    file = bundle.manifest.variants["cpu-fp32"].graph  # any that is listed: none of these is opened
    graphs = {n: Variant(file, layouts[p], precision, p, {}, {}) for n, (p, precision) in kinds.items()}
    return replace(bundle, manifest=replace(bundle.manifest, variants=bundle.manifest.variants | graphs))


GPU = {
    "driver": {"proc/driver/nvidia/gpus/0000:17:00.0/information": "Model: NVIDIA H100"},
    "device": {"dev/nvidia0": "", "dev/nvidiactl": ""},
    "vga": {f"{PCI}/vendor": "0x10de\n", f"{PCI}/class": "0x030000\n"},
    "3d": {f"{PCI}/vendor": "0x10de\n", f"{PCI}/class": "0x030200\n"},
}
NO_GPU = {
    "nothing": {},
    "control": {"dev/nvidiactl": "", "dev/nvidia-uvm": "", "proc/driver/nvidia/version": "580"},
    "audio": {f"{PCI}/vendor": "0x10de\n", f"{PCI}/class": "0x040300\n"},
    "another maker's": {f"{PCI}/vendor": "0x1002\n", f"{PCI}/class": "0x030000\n"},
    "no class": {f"{PCI}/vendor": "0x10de\n"},
}


@pytest.mark.parametrize("listed", GPU.values(), ids=GPU)
def test_a_gpu_is_found_without_its_driver_and_then_the_cpu_is_not_taken_in_silence(machine, bundle, listed):
    machine(listed)
    seen = str(gpu_without_driver())
    assert seen.startswith(str(devices.ROOT))
    with pytest.raises(DeviceError) as raised:
        choose(with_graphs(bundle, "cuda-fp16"), "auto")
    assert "driver cannot be loaded" in str(raised.value) and f"the kernel sees an NVIDIA GPU ({seen})" in str(
        raised.value
    )
    assert TAKE_CPU in str(raised.value)


@pytest.mark.parametrize("listed", NO_GPU.values(), ids=NO_GPU)
def test_a_machine_without_a_gpu_takes_the_cpu(machine, bundle, listed):
    machine(listed)
    assert gpu_without_driver() is None
    assert choose(with_graphs(bundle, "cuda-fp16"), "auto") == CPU


@pytest.mark.parametrize("visible", ["", "-1", " ", "NoDevFiles", "none", "-1,0"])
def test_who_hides_the_gpus_gets_the_cpu(machine, bundle, monkeypatch, visible):
    machine(GPU["device"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert choose(with_graphs(bundle, "cuda-fp16"), "auto") == CPU


@pytest.mark.parametrize("visible", ["0", "1,0", "GPU-8932f937", "MIG-b2f8"])
def test_who_names_gpus_wants_them(machine, bundle, monkeypatch, visible):
    machine(GPU["device"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(DeviceError, match="driver cannot be loaded"):
        choose(with_graphs(bundle, "cuda-fp16"), "auto")


@pytest.mark.parametrize("graphs", [(), ("cuda-bf16",)])
def test_without_a_graph_that_would_be_taken_there_the_gpu_does_not_matter(machine, bundle, graphs):
    machine(GPU["device"])
    assert choose(with_graphs(bundle, *graphs), "auto") == CPU


def test_why_a_gpu_that_is_there_is_not_taken_is_known(machine, driver, bundle):
    driver(0, 1)
    choice = choose(with_graphs(bundle, "cuda-bf16"), "auto")
    assert choice == CPU and "bf16 is taken on a GPU only where" in choice.passed_over["cuda-bf16"]


def test_a_graph_that_is_asked_for_counts(machine, bundle):
    machine(GPU["device"])
    with pytest.raises(DeviceError, match=TAKE_CPU):
        choose(with_graphs(bundle, "cuda-bf16"), "auto", tolerance=0.1)


def test_the_cpu_that_is_asked_for_is_taken(machine, bundle):
    machine(GPU["device"])
    both = with_graphs(bundle, "cuda-fp16")
    assert choose(both, "cpu") == choose(both, "auto", "cpu-fp32") == CPU


@pytest.mark.parametrize(("status", "count"), [(100, 0), (803, 0), (0, 0)])
def test_a_driver_that_fails_is_no_machine_without_a_gpu(machine, driver, bundle, status, count):
    driver(status, count)
    both = with_graphs(bundle, "cuda-fp16")
    assert choose(both, "auto") == CPU
    machine(GPU["3d"])
    with pytest.raises(DeviceError, match=rf"driver shows no GPU \(error {status}, .* the kernel sees .*{TAKE_CPU}"):
        choose(both, "auto")


@pytest.mark.skipif(PROVIDER in ort.get_available_providers(), reason="ONNX Runtime has a CUDA provider here")
def test_the_wheel_for_the_cpu_in_the_place_of_that_for_gpus_is_an_error(driver, bundle):
    driver(0, 2)
    assert every_gpu("cuda") == ("cuda:0", "cuda:1")
    with pytest.raises(
        DeviceError, match=rf"shows cuda:0, cuda:1, .*cuda-fp16: .*install jql-engine\[gpu\].*{TAKE_CPU}"
    ):
        choose(with_graphs(bundle, "cuda-fp16"), "auto")


def test_too_old_an_onnx_runtime_is_an_error(driver, bundle, monkeypatch):
    driver(0, 1)
    monkeypatch.setattr(ort, "get_available_providers", lambda: [PROVIDER])
    monkeypatch.setattr(ort, "__version__", "1.30.2")
    with pytest.raises(DeviceError, match=rf"ONNX Runtime 1\.30\.2 is too old.* expected 1\.31 .*{TAKE_CPU}"):
        choose(with_graphs(bundle, "cuda-fp16", "cuda-fp32"), "auto")


@without_gpu
@pytest.mark.parametrize("graph", ["cuda-fp16", "tensorrt-fp16"])
def test_a_driver_that_does_not_know_this_cuda_is_an_error(driver, bundle, monkeypatch, graph):
    driver(0, 1)  # and cuda-python finds none
    monkeypatch.setattr(ort, "get_available_providers", lambda: [PROVIDER])
    monkeypatch.setattr(ort, "__version__", "1.31.1")
    expected = rf"{graph}: cuda-python is for CUDA 13\.\d+, the NVIDIA driver for CUDA 0\.0: .*insufficient.*{TAKE_CPU}"
    with pytest.raises(DeviceError, match=expected):
        choose(with_graphs(bundle, graph), "auto")


def test_it_holds_for_an_engine_and_for_datatrove(machine, bundle, tmp_path):
    machine(GPU["device"])
    folder = shutil.copytree(bundle.path, tmp_path / "bundle")
    (folder / MANIFEST).write_text(with_graphs(bundle, "cuda-fp16").manifest.to_json())
    assert "cuda-fp16" in json.loads((folder / MANIFEST).read_text())["variants"] and Bundle.open(folder)
    with pytest.raises(DeviceError, match=TAKE_CPU):
        Engine(folder)
    with pytest.raises(DeviceError, match=TAKE_CPU):
        list(JQLAnnotator(bundle=folder).run(iter(())))
