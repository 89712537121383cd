"""Which shapes an engine is built for, and whether one that was built accepts what a budget plans."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jql_engine.bundle import Bundle
from jql_engine.data import Budget
from jql_engine.errors import BundleError

BUCKETS = (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
INPUTS = ("input_ids", "attention_mask")
OUTPUTS = ("scores", "embedding")


@dataclass(frozen=True, slots=True)
class Profile:
    """One bucket: [1..max_docs, row_length]."""

    row_length: int
    max_docs: int


def budget_for(bundle: Bundle, batch_tokens: int) -> Budget:
    """Buckets up to the bundle's max_tokens, which is the last one, in batches of at most `batch_tokens`."""
    longest = bundle.manifest.max_tokens
    buckets = (*(bucket for bucket in BUCKETS if bucket < longest), longest)
    return Budget(max(batch_tokens, longest), "padded", buckets)


def profiles_of(budget: Budget) -> tuple[Profile, ...]:
    """One profile a bucket, in their order."""
    return tuple(Profile(length, budget.max_docs(length)) for length in budget.buckets)


@dataclass(frozen=True, slots=True)
class Interface:
    """Inputs and outputs, and the shapes that each profile accepts."""

    inputs: dict[str, str]  # name -> type
    outputs: dict[str, str]
    widths: dict[str, int]  # of the outputs
    profiles: tuple[Profile, ...]

    @classmethod
    def of_network(cls, network: Any, profiles: Sequence[Profile]) -> Interface:
        """Of a parsed network that is to be built with `profiles`."""
        inputs = [network.get_input(i) for i in range(network.num_inputs)]
        outputs = [network.get_output(i) for i in range(network.num_outputs)]
        widths = {tensor.name: int(tensor.shape[-1]) for tensor in outputs}
        return cls(_types(inputs), _types(outputs), widths, tuple(profiles))

    @classmethod
    def of_engine(cls, trt: Any, engine: Any) -> Interface:
        """Of an engine as it was built."""
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        types = {name: engine.get_tensor_dtype(name).name for name in names}
        inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        widths = {name: int(engine.get_tensor_shape(name)[-1]) for name in names if name not in inputs}
        profiles = []
        for number in range(engine.num_optimization_profiles):
            shapes = {tuple(map(tuple, engine.get_tensor_profile_shape(name, number))) for name in inputs}
            (smallest, _, largest), *others = shapes
            if others or smallest[0] != 1 or smallest[1] != largest[1]:
                raise BundleError(f"profile {number} of the engine accepts {shapes}, expected [1..n, one length]")
            profiles.append(Profile(int(largest[1]), int(largest[0])))
        kept = {name: types[name] for name in inputs}
        return cls(kept, {name: types[name] for name in widths}, widths, tuple(profiles))

    def check(self, budget: Budget, what: str) -> None:
        """Raise BundleError naming `what` unless this takes every batch that `budget` plans and returns scores."""
        expected: list[tuple[str, object, object]] = [
            ("inputs", self.inputs, dict.fromkeys(INPUTS, "INT64")),
            ("outputs", self.outputs, dict.fromkeys(OUTPUTS, "FLOAT")),
            ("profiles", self.profiles, profiles_of(budget)),
        ]
        for name, found, wanted in expected:
            if found != wanted:
                raise BundleError(f"{what} has {name} {found}, expected {wanted}; export the bundle again")

    def profile_of(self, n_docs: int, row_length: int) -> int:
        """The profile of a batch [n_docs, row_length]; BundleError where there is none: it is never built for it."""
        for number, profile in enumerate(self.profiles):
            if profile.row_length == row_length and 1 <= n_docs <= profile.max_docs:
                return number
        raise BundleError(
            f"a batch [{n_docs}, {row_length}] fits no profile of the engine, which takes "
            + ", ".join(f"[1..{profile.max_docs}, {profile.row_length}]" for profile in self.profiles)
        )


def _types(tensors: Sequence[Any]) -> dict[str, str]:
    return {tensor.name: tensor.dtype.name for tensor in tensors}
