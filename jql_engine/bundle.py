"""Read and verify a bundle: what export hands to the runtime; docs/bundle-format.md describes its format."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from jql_engine.data import Layout
from jql_engine.errors import BundleError, InputError, UnsafeNameError
from jql_engine.fields import decode
from jql_engine.names import RelativeName
from jql_engine.template import Template
from jql_engine.unlisted import unlisted_weights

FORMAT = 2
MANIFEST = "bundle.json"
READOUTS = "readouts.safetensors"
PROBES = "probes.safetensors"
TOKENIZER = "tokenizer.json"
# Of `requires`: what a bundle may ask of its reader.
FEATURES = frozenset({"template", "windows"})
Pooling = Literal["cls", "mean"]
Activation = Literal["relu", "tanh", "gelu", "silu", "sigmoid", "softmax"]
Take = Literal["first", "first+last", "all"]
Aggregate = Literal["max", "mean"]
MOST = 2**31 - 1  # of sizes and ids, which graphs and runtimes hold in 32 bits


@dataclass(frozen=True, slots=True)
class EncoderInfo:
    """Where the encoder came from, and its shape."""

    id: str
    revision: str | None
    architecture: str
    layers: int
    hidden_size: int
    files: dict[str, str]  # name -> sha256
    unused_tensors: list[str]

    def __post_init__(self) -> None:
        _check_range("encoder.layers", self.layers, 1)
        _check_range("encoder.hidden_size", self.hidden_size, 1)


@dataclass(frozen=True, slots=True)
class LayerInfo:
    """One layer of a readout: activation(x weight^T + bias), then layer normalization if `norm_epsilon` is given."""

    bias: bool = True
    activation: Activation | None = None
    norm_epsilon: float | None = None


@dataclass(frozen=True, slots=True)
class ReadoutInfo:
    """What turns the encoder's output into scores: pooling, and layers one after another."""

    name: str
    kind: str  # where its layout comes from: "jql-head", ...; no reader needs it
    pooling: Pooling
    normalize: bool  # the pooled vector is divided by its L2 norm first
    layers: list[LayerInfo]
    outputs: list[str]  # of the last layer: the score columns are score_<output>
    sha256: str  # of the checkpoint
    source: str | None = None  # repository and file on the hub
    revision: str | None = None  # commit there

    def __post_init__(self) -> None:
        for name in (self.name, *self.outputs):
            if not name or any(c in name for c in "/\0"):
                raise ValueError(f"{name!r} cannot be the name of a readout or of a column")
        if not self.layers or not self.outputs:
            raise ValueError(f"readout {self.name!r} has {len(self.layers)} layers and {len(self.outputs)} outputs")


@dataclass(frozen=True, slots=True)
class TokenizerInfo:
    """How a text becomes ids; docs/bundle-format.md describes each field."""

    prefix: list[int]
    suffix: list[int]
    pad: int
    fast: str | None
    lone_space: int | None
    added_tokens: list[str]

    def __post_init__(self) -> None:
        for token in (*self.prefix, *self.suffix, self.pad, self.lone_space or 0):
            _check_range("an id in tokenizer", token, 0)
        if "" in self.added_tokens:
            raise ValueError("tokenizer.added_tokens holds an empty text, which is in every document")


@dataclass(frozen=True, slots=True)
class WindowsInfo:
    """Which windows of `max_tokens` tokens of a longer document are scored, and how their scores become one."""

    take: Take = "first"
    aggregate: Aggregate = "max"  # of each score over the windows

    def __post_init__(self) -> None:
        """Raises ValueError for a rule that is none: from Python anything may be given."""
        for found, known in ((self.take, get_args(Take)), (self.aggregate, get_args(Aggregate))):
            if found not in known:
                raise ValueError(f"{found!r} is no rule for windows; known are {', '.join(known)}")


FIRST_WINDOW = WindowsInfo()


@dataclass(frozen=True, slots=True)
class Variant:
    """One graph of a bundle."""

    graph: str
    layout: Layout
    precision: str
    provider: str
    tolerance: dict[str, float]
    parity: dict[str, float]

    def __post_init__(self) -> None:
        if self.parity and not any(name.startswith(("max_abs_score", "max_abs_embedding")) for name in self.parity):
            raise ValueError(f"parity of {self.graph} has no max_abs_score or max_abs_embedding")


@dataclass(frozen=True, slots=True)
class EngineKey:
    """What a TensorRT engine was built from and for: all that decides whether it may be used."""

    variant: str
    graph: str  # SHA-256 over the hashes of the graph and its weights
    library: str
    version: str
    gpu: str | None  # its name; None where any of the compute capability will do
    compute_capability: str  # "8.0"
    precision: str
    profiles: list[list[int]]  # [row length, most documents]


@dataclass(frozen=True, slots=True)
class Manifest:
    """The content of bundle.json."""

    format: int
    encoder: EncoderInfo
    readouts: list[ReadoutInfo]
    pooling: Pooling  # of the embedding, which is L2-normalized
    max_tokens: int
    tokenizer: TokenizerInfo
    variants: dict[str, Variant]
    files: dict[str, dict[str, Any]]
    created_with: dict[str, str]
    engines: dict[str, EngineKey] = field(default_factory=dict)
    requires: list[str] = field(default_factory=list)  # features without which a reader would compute wrong scores
    template: str | None = None  # of documents that are put together from several columns
    windows: WindowsInfo = FIRST_WINDOW  # by default; a job may ask for others

    def __post_init__(self) -> None:
        _check_range("max_tokens", self.max_tokens, 1 + len(self.tokenizer.prefix) + len(self.tokenizer.suffix))
        if self.template is not None:
            Template(self.template)
        if not self.tokenizer.prefix + self.tokenizer.suffix:
            raise ValueError("tokenizer has no prefix and no suffix: an empty text would have no token to pool")
        for names in ([readout.name for readout in self.readouts], self.outputs):
            if len(set(names)) < len(names):
                raise ValueError(f"readouts and their outputs are named {names}, expected a name for each")
        for name, file in self.files.items():
            if type(file.get("bytes")) is not int or type(file.get("sha256")) is not str:
                raise ValueError(f"files.{name} is {file}, expected bytes, an integer, and sha256, a string")

    @property
    def outputs(self) -> list[str]:
        """Of all readouts, in the order of the score columns."""
        return [output for readout in self.readouts for output in readout.outputs]

    @classmethod
    def parse(cls, fields: Mapping[str, Any]) -> Manifest:
        """Build from decoded JSON; ValueError names what is missing, or of another type or range."""
        manifest: Manifest = decode(cls, fields, "manifest")
        return manifest

    def to_json(self) -> str:
        """The text of bundle.json."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle whose every file was found unchanged."""

    path: Path
    manifest: Manifest
    hash: str  # SHA-256 of bundle.json

    @classmethod
    def open(cls, path: str | Path) -> Bundle:
        """Read the manifest of the directory `path` and verify size and SHA-256 of every file it lists.

        Raises BundleError: no bundle there, a newer format, a malformed manifest, a missing or changed file.
        """
        path = Path(path)
        raw = _read_manifest(path)
        manifest = _parse(path, raw)
        _check_weights(path, manifest)
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda item: _verify(path, *item), manifest.files.items()))
        return cls(path, manifest, hashlib.sha256(raw).hexdigest())

    def check_still_there(self) -> None:
        """Raise BundleError where the folder no longer holds what was opened, without reading all of it again.

        Compares the manifest, which names what every file holds, and the files' sizes: several processes of a job open
        gigabytes of one bundle from shared storage, and one of them has verified it.
        """
        if (found := hashlib.sha256(_read_manifest(self.path)).hexdigest()) != self.hash:
            raise BundleError(
                f"{self.path} is bundle {found[:12]} now, the job began with {self.hash[:12]}: export to another --out "
                "while a job runs, and start it again"
            )
        for name, expected in self.manifest.files.items():
            _check_size(self.path, name, expected)

    def with_windows(self, take: Take | None, aggregate: Aggregate | None) -> Bundle:
        """The same bundle with other windows than its default; None leaves the one or the other as it is.

        Raises InputError for a rule that is none, and an `aggregate` where there is nothing to put together.
        """
        if take is None and aggregate is None:
            return self
        windows = self.manifest.windows
        try:
            windows = WindowsInfo(take or windows.take, aggregate or windows.aggregate)
        except ValueError as error:
            raise InputError(str(error)) from error
        if aggregate is not None and windows.take == "first":
            raise InputError(f"{aggregate} of one window is its score: give windows first+last or all, or no aggregate")
        return replace(self, manifest=replace(self.manifest, windows=windows))

    @property
    def template(self) -> Template | None:
        """How documents are put together from several columns; None where they are the text alone."""
        source = self.manifest.template
        return None if source is None else Template(source)

    @property
    def heads(self) -> tuple[str, ...]:
        """Names of the scores, in the order of their columns score_<name>: the outputs of all readouts."""
        return tuple(self.manifest.outputs)

    @property
    def encoder_hash(self) -> str:
        """Of all that decides about an embedding: bundles that share it give the same vectors, whatever their heads."""
        m = self.manifest
        parts: list[Any] = [m.encoder.files, m.pooling, m.max_tokens, m.files[TOKENIZER]["sha256"]]
        parts += [] if m.template is None else [m.template]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def read(self, name: str) -> bytes:
        """The content of a file that the manifest lists; raises BundleError where it is another than that."""
        expected = self.manifest.files[name]
        _check_size(self.path, name, expected)
        with _readable(self.path, name):
            content = (self.path / name).read_bytes()
        _check_digest(self.path, name, hashlib.sha256(content).hexdigest(), expected)
        return content

    def graph(self, variant: str) -> Path:
        """The graph file of a variant of this bundle."""
        return self.path / self.manifest.variants[variant].graph


def describe_files(path: Path) -> dict[str, dict[str, Any]]:
    """The manifest's `files` of the directory `path`, sorted by name."""
    found = sorted(file for file in path.rglob("*") if file.is_file() and file.name != MANIFEST)
    return {file.relative_to(path).as_posix(): describe_file(file) for file in found}


def describe_file(file: Path) -> dict[str, Any]:
    """An entry of the manifest's `files`."""
    return {"bytes": file.stat().st_size, "sha256": sha256_of(file)}


def sha256_of(file: Path) -> str:
    """Hex SHA-256 of a file's content."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _parse(path: Path, raw: bytes) -> Manifest:
    try:
        fields = json.loads(raw)
        version = fields.get("format", FORMAT) if isinstance(fields, dict) else FORMAT
        if version != FORMAT:
            advice = "export the bundle again" if version == 1 else "update jql-engine, or export the bundle again"
            raise BundleError(f"{path} has bundle format {version}; this jql-engine reads {FORMAT}: {advice}")
        # First: what a feature stands for may be something that cannot be parsed here.
        requires = fields.get("requires") if isinstance(fields, dict) else None
        if isinstance(requires, list) and (unknown := sorted(set(map(str, requires)) - FEATURES)):
            raise BundleError(
                f"{path} needs {', '.join(unknown)}, which this jql-engine does not know: update jql-engine"
            )
        manifest = Manifest.parse(fields)
        _check_names(path, manifest)
    except BundleError:
        raise
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path / MANIFEST} is damaged: {error}; export the bundle again") from error
    return manifest


def _check_range(name: str, value: int, least: int) -> None:
    if not least <= value <= MOST:
        raise ValueError(f"{name} is {value}, expected {least} to {MOST}")


def _check_names(path: Path, manifest: Manifest) -> None:
    """Raise BundleError for a file outside of the bundle, and for one that is needed and not among the files."""
    needed = [
        TOKENIZER,
        READOUTS,
        PROBES,
        *(variant.graph for variant in manifest.variants.values()),
        *manifest.engines,
    ]
    for name in [*manifest.files, *needed]:
        try:
            RelativeName(name)
        except UnsafeNameError as error:
            raise BundleError(f"{path / MANIFEST}: {error}, and export the bundle again") from error
    for name in needed:
        if name not in manifest.files:
            raise BundleError(f"{path / MANIFEST}: {name!r} is not among its files; export the bundle again")


def _check_weights(path: Path, manifest: Manifest) -> None:
    """Raise BundleError for a file beside a graph that is not listed: the runtime may load weights from it."""
    graphs = {variant.graph for variant in manifest.variants.values()}
    try:
        name = next(unlisted_weights(path, graphs, manifest.files), None)
    except OSError as error:
        raise BundleError(f"{error.filename} cannot be read: {error.strerror}; check its permissions") from error
    if name is not None:
        raise BundleError(
            f"{path / MANIFEST}: {name!r} lies beside a graph and is not among its files; remove it, or export the "
            "bundle again"
        )


def _read_manifest(path: Path) -> bytes:
    try:
        return (path / MANIFEST).read_bytes()
    except OSError as error:
        is_there = not isinstance(error, FileNotFoundError) or path.is_dir()
        what = f"is no bundle: {MANIFEST} cannot be read ({error.strerror})" if is_there else "does not exist"
        raise BundleError(f"{path} {what}; make a bundle with jql-export") from error


def _check_size(path: Path, name: str, expected: Mapping[str, Any]) -> None:
    file = path / name
    with _readable(path, name):
        if not file.is_file():
            raise BundleError(f"{path}: {name} is missing; copy the bundle again, or export it again")
        size = file.stat().st_size
    if size != expected["bytes"]:
        raise BundleError(f"{path}: {name} has {size} bytes, the manifest says {expected['bytes']}; copy it again")


def _verify(path: Path, name: str, expected: Mapping[str, Any]) -> None:
    _check_size(path, name, expected)
    with _readable(path, name):
        digest = sha256_of(path / name)
    _check_digest(path, name, digest, expected)


@contextmanager
def _readable(path: Path, name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BundleError(f"{path}: {name} cannot be read: {error.strerror}; check its permissions") from error


def _check_digest(path: Path, name: str, digest: str, expected: Mapping[str, Any]) -> None:
    if digest != expected["sha256"]:
        raise BundleError(
            f"{path}: {name} was changed: SHA-256 {digest[:12]}..., the manifest says {expected['sha256'][:12]}...; "
            "copy or export the bundle again"
        )
