"""TensorRT: an engine with one profile for each bucket of row lengths, all of them made before the first batch.

Nothing is built once a session is open: a batch is padded to its bucket and cut where the bucket's profile ends, and
what no bucket holds raises.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jql_engine.bundle import Bundle
from jql_engine.cache import read_private, write_private
from jql_engine.data import Batch, BatchOutput, Budget
from jql_engine.errors import CacheError, DeviceError
from jql_engine.sessions.base import EngineOptions, Fallback
from jql_engine.sessions.fallback import Overflow
from jql_engine.sessions.gpu import Buffer, Gpu
from jql_engine.sessions.tensorrt.build import RTX, Library, deserialize
from jql_engine.sessions.tensorrt.cache import EngineFile, engine_for
from jql_engine.sessions.tensorrt.profiles import INPUTS, OUTPUTS, Interface, Profile


class TensorRTSession:
    """Runs the engine of one variant on one GPU."""

    def __init__(
        self,
        bundle: Bundle,
        variant: str,
        device: int = 0,
        options: EngineOptions | None = None,
        report: Callable[[str], None] = lambda _: None,
        fallback: Fallback | None = None,
    ) -> None:
        """Open the engine that fits GPU number `device`, or build it once; `report` is told how that goes.

        Raises DeviceError: no GPU, no library, an engine that this library cannot run. BundleError: an engine may not
        be built, or is not of this bundle. CacheError: others can write in the engine cache, or it cannot be written.
        """
        gpu = Gpu(device)
        unused = weakref.finalize(self, gpu.close)
        options = options or EngineOptions()
        library, self.budget, engine = engine_for(bundle, variant, gpu.compute_capability, gpu.name, options, report)
        kernels = options.cache / f"{engine.sha256[:32]}.kernels" if library.name == RTX else None
        self.variant, self.n_parallel = variant, 1
        self._overflow = Overflow(variant, fallback)
        self._pad_id = bundle.manifest.tokenizer.pad
        self._lock = threading.Lock()  # buffers, workspace and stream are those of one batch
        self._execution = _Execution(gpu, library, engine, self.budget, kernels)
        unused.detach()
        weakref.finalize(self, self._execution.close).atexit = False  # at exit the driver does it
        for profile in self._execution.interface.profiles:  # what is still to compile compiles now, and it fits or not
            self._execution.run(*full_batch(profile, self._pad_id))
        self._execution.keep_kernels(report)

    @property
    def n_overflowed(self) -> int:
        return self._overflow.n_documents

    @property
    def fallback(self) -> Fallback | None:
        return self._overflow.fallback

    def run(self, batch: Batch) -> BatchOutput:
        """Compute one batch; see Session. One that is larger than its profile is computed in parts."""
        return self._overflow.mend(batch, run_in_parts(batch, self.budget, self._run))

    def _run(self, batch: Batch) -> BatchOutput:
        ids, mask = batch.rectangle(self._pad_id)
        with self._lock:
            scores, embeddings = self._execution.run(ids, mask)
        return BatchOutput(scores, embeddings)


def run_in_parts(batch: Batch, budget: Budget, run: Callable[[Batch], BatchOutput]) -> BatchOutput:
    """Compute `batch` with rows as long as a bucket and no more of them at once than the bucket's profile takes.

    Batches that were planned under `budget` are one part. Raises InputError where no bucket is long enough.
    """
    assert batch.row_length is not None, "a packed batch for a padded graph"
    row_length = budget.row_length(batch.row_length)
    n_docs, step = len(batch.rows), budget.max_docs(row_length)
    parts = [run(batch.part(start, min(start + step, n_docs), row_length)) for start in range(0, n_docs, step)]
    if len(parts) == 1:
        return parts[0]
    scores, embeddings = [part.scores for part in parts], [part.embeddings for part in parts]
    return BatchOutput(np.concatenate(scores), np.concatenate(embeddings))


class _Execution:
    """The engine in GPU memory, with one execution context a profile; they run one at a time and share a workspace."""

    def __init__(self, gpu: Gpu, library: Library, engine: EngineFile, budget: Budget, kernels: Path | None) -> None:
        trt = library.module
        self.gpu = gpu
        self.runtime, self.engine = deserialize(library, engine.content, engine.path)
        self.interface = Interface.of_engine(trt, self.engine)
        self.interface.check(budget, str(engine.path))
        self.kernels = None if kernels is None else _Kernels(kernels, self.engine, trt)
        size = int(self.engine.device_memory_size_v2)
        workspace = gpu.allocate(size)
        self.contexts = [self._context(trt, number, workspace, size) for number in range(len(self.interface.profiles))]
        n_docs = max(profile.max_docs for profile in self.interface.profiles)
        n_ids = max(profile.max_docs * profile.row_length for profile in self.interface.profiles)
        self.buffers = {name: gpu.buffer(8 * n_ids) for name in INPUTS}
        self.buffers |= {name: gpu.buffer(4 * n_docs * self.interface.widths[name]) for name in OUTPUTS}

    def _context(self, trt: Any, number: int, workspace: int, size: int) -> Any:
        how = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        made = self.engine.create_execution_context(how if self.kernels is None else self.kernels.config(how))
        if made is None or not made.set_optimization_profile_async(number, self.gpu.stream):
            raise DeviceError(f"device cuda:{self.gpu.number}: TensorRT gives no context for profile {number}")
        made.set_device_memory(workspace, size)
        self.gpu.synchronize()
        return made

    def close(self) -> None:
        """Give all memory back, the engine's before the stream that it uses."""
        with self.gpu.kept():
            self.contexts, self.kernels = [], None
            self.engine = self.runtime = None
            self.gpu.close()

    def run(self, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> list[NDArray[np.float32]]:
        """Scores and embeddings of a rectangle."""
        self.gpu.activate()
        context = self.contexts[self.interface.profile_of(*ids.shape)]
        for name, values in zip(INPUTS, (ids, mask), strict=True):
            _view(self.buffers[name], np.int64, values.shape)[:] = values
            self.gpu.upload(self.buffers[name], values.nbytes)
            context.set_input_shape(name, values.shape)
        for name, buffer in self.buffers.items():
            context.set_tensor_address(name, buffer.device)
        if not context.execute_async_v3(self.gpu.stream):
            why = "; ".join(self.runtime.logger.errors) or "no reason given"
            raise DeviceError(f"device cuda:{self.gpu.number}: TensorRT cannot run a batch {list(ids.shape)}: {why}")
        outputs = [_view(self.buffers[name], np.float32, (len(ids), self.interface.widths[name])) for name in OUTPUTS]
        for name, output in zip(OUTPUTS, outputs, strict=True):
            self.gpu.download(self.buffers[name], output.nbytes)
        self.gpu.synchronize()
        return [output.copy() for output in outputs]

    def keep_kernels(self, report: Callable[[str], None]) -> None:
        """Keep what was compiled for the next start."""
        if self.kernels is not None:
            self.kernels.save(report)


class _Kernels:
    """What TensorRT for RTX compiles on the GPU, kept in the user's cache; a new shape compiles in the background."""

    def __init__(self, file: Path, engine: Any, trt: Any) -> None:
        self._file, self._trt, self._engine = file, trt, engine
        self._cache = engine.create_runtime_config().create_runtime_cache()
        if (kept := read_private(file)) is not None:
            self._cache.deserialize(kept)  # of another GPU: refused, and compiled again

    def config(self, allocation: Any) -> Any:
        """The configuration of a context."""
        made = self._engine.create_runtime_config()
        made.set_execution_context_allocation_strategy(allocation)
        made.set_runtime_cache(self._cache)
        made.dynamic_shapes_kernel_specialization_strategy = self._trt.DynamicShapesKernelSpecializationStrategy.LAZY
        return made

    def save(self, report: Callable[[str], None]) -> None:
        """Write the file again; where there is no folder for it, each start compiles."""
        try:
            write_private(self._file, memoryview(self._cache.serialize()))
        except CacheError as error:
            report(f"the next start compiles the kernels of this engine again: {error}")


def full_batch(profile: Profile, pad_id: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Ids and mask of the largest batch of a profile; documents of one token, since the mean of none is not finite."""
    mask = np.zeros((profile.max_docs, profile.row_length), np.int64)
    mask[:, 0] = 1
    return np.full(mask.shape, pad_id, np.int64), mask


def _view(buffer: Buffer, dtype: type[np.generic], shape: tuple[int, ...]) -> NDArray[Any]:
    n_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    return buffer.host[:n_bytes].view(dtype).reshape(shape)
