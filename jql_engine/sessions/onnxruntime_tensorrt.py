"""The TensorRT provider of ONNX Runtime: a second way to run the same graph, one session a bucket.

The provider builds several profiles into an engine but runs the first alone (microsoft/onnxruntime pull request 31624,
still open), and it builds again in mid-run for a shape outside of what it knows. So each bucket has a session whose
only profile is that bucket, built before the first batch; the weights are in GPU memory once a bucket.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import onnxruntime as ort

from jql_engine.bundle import Bundle
from jql_engine.data import Batch, BatchOutput
from jql_engine.engine_files import EngineOptions, writable
from jql_engine.errors import DeviceError
from jql_engine.profiles import INPUTS, OUTPUTS, Profile, budget_for, profiles_of
from jql_engine.sessions import Fallback
from jql_engine.sessions.overflow import Overflow
from jql_engine.sessions.tensorrt import full_batch, run_in_parts

PROVIDER = "TensorrtExecutionProvider"
NVINFER = "libnvinfer.so.10"  # what the provider of onnxruntime-gpu is linked with, 1.31 as well
INSTALL = (
    "pip install onnxruntime-gpu 'tensorrt-cu13<11', without onnxruntime beside them; or leave out --via onnxruntime"
)


class OnnxRuntimeTensorRTSession:
    """Runs one graph of a bundle with ONNX Runtime's TensorRT provider on one GPU."""

    def __init__(
        self,
        bundle: Bundle,
        variant: str,
        device: int = 0,
        options: EngineOptions | None = None,
        report: Callable[[str], None] = lambda _: None,
        fallback: Fallback | None = None,
    ) -> None:
        """Build the engines or find them in the provider's cache; raises DeviceError where the provider is not active.

        `options`: the folder and the tokens of a batch count here, the rest is for engines of our own.
        """
        require_provider()
        options = options or EngineOptions()
        if options != EngineOptions(options.folder, batch_tokens=options.batch_tokens):
            raise DeviceError(
                "--via onnxruntime builds engines its own way; of their options only --engine-cache counts"
            )
        self.variant, self.n_parallel = variant, 1
        self._overflow = Overflow(variant, fallback)
        self.budget = budget_for(bundle, options.batch_tokens)
        self._pad_id = bundle.manifest.tokenizer.pad
        folder = writable((options.folder or bundle.path / "engines") / f"onnxruntime-{ort.__version__}")
        ort.disable_telemetry_events()
        self._sessions = {}
        for profile in profiles_of(self.budget):
            report(f"opening {variant} for rows of {profile.row_length} tokens; building its engine takes minutes")
            settings = provider_options(device, variant, bundle.hash, profile, folder)
            session = self._sessions[profile.row_length] = _open(bundle.graph(variant), settings)
            session.run(list(OUTPUTS), dict(zip(INPUTS, full_batch(profile, self._pad_id), strict=True)))

    @property
    def n_overflowed(self) -> int:
        """See Session."""
        return self._overflow.n_documents

    @property
    def fallback(self) -> Fallback | None:
        """See Session."""
        return self._overflow.fallback

    def run(self, batch: Batch) -> BatchOutput:
        """Compute one batch; see Session."""
        return self._overflow.mend(batch, run_in_parts(batch, self.budget, self._run))

    def _run(self, batch: Batch) -> BatchOutput:
        assert batch.row_length is not None
        feeds = dict(zip(INPUTS, batch.rectangle(self._pad_id), strict=True))
        scores, embeddings = self._sessions[batch.row_length].run(list(OUTPUTS), feeds)
        return BatchOutput(np.asarray(scores), np.asarray(embeddings))


def require_provider() -> None:
    """Raise DeviceError, with what to install, unless TensorRT's library and ONNX Runtime's provider are both there."""
    with suppress(ModuleNotFoundError):
        importlib.import_module("tensorrt_libs")  # a wheel that holds the library, and loads it where it is
    try:
        ctypes.CDLL(NVINFER)
    except OSError as error:
        raise DeviceError(f"--via onnxruntime needs {NVINFER}, which cannot be loaded ({error}): {INSTALL}") from error
    if PROVIDER not in (found := ort.get_available_providers()):
        raise DeviceError(
            f"--via onnxruntime needs {PROVIDER}; onnxruntime {ort.__version__} here has {', '.join(found)}: {INSTALL}"
        )


def provider_options(device: int, variant: str, bundle_hash: str, profile: Profile, folder: Path) -> dict[str, str]:
    """The provider's settings for one bucket: one profile, an engine cache and a timing cache in `folder`.

    fp16 is not asked for: the graph says itself where it computes in which type.
    """

    def shapes(n_docs: int) -> str:
        return ",".join(f"{name}:{n_docs}x{profile.row_length}" for name in INPUTS)

    return {
        "device_id": str(device),
        "trt_profile_min_shapes": shapes(1),
        "trt_profile_opt_shapes": shapes(profile.max_docs),
        "trt_profile_max_shapes": shapes(profile.max_docs),
        "trt_engine_cache_enable": "True",
        "trt_engine_cache_path": str(folder),
        "trt_engine_cache_prefix": f"{variant}-{bundle_hash[:10]}-{profile.max_docs}x{profile.row_length}",
        "trt_timing_cache_enable": "True",
        "trt_timing_cache_path": str(folder),
    }


def _open(graph: Path, settings: dict[str, str]) -> ort.InferenceSession:
    options = ort.SessionOptions()
    # Otherwise nodes that the provider leaves out, or all where it does not load, would run on the CPU unseen.
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    try:
        session = ort.InferenceSession(str(graph), options, providers=[(PROVIDER, settings)])
    except Exception as error:  # ONNX Runtime raises classes of its own for each status
        raise DeviceError(f"{graph}: {PROVIDER} cannot open it ({error}); leave out --via onnxruntime") from error
    if PROVIDER not in session.get_providers():
        raise DeviceError(f"{PROVIDER} was requested, active are {', '.join(session.get_providers())}: {INSTALL}")
    return session
