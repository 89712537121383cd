"""One corpus, one set of heads, every way to score it: the scores are the same, and they are the original's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch
import transformers
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import ParquetReader
from datatrove.pipeline.writers import ParquetWriter
from numpy.typing import NDArray

from jql_engine import probe_texts
from jql_engine.engine import Engine
from jql_engine.integrations.datatrove import JQLAnnotator
from jql_engine.integrations.jql import RegressionHead, get_embedder_instance
from jql_engine.integrations.ray import score_dataset
from jql_export.tolerances import TOLERANCES
from tests.conftest import MAX_TOKENS
from tests.job.test_run import score

# Not the empty text: datatrove's readers leave it out. The last one is truncated.
TEXTS = [*probe_texts.SENTENCES, *probe_texts.ODDITIES[5:], " ".join(probe_texts.SENTENCES)]
IDS = [f"doc-{i}" for i in range(len(TEXTS))]
HEADS = ("edu", "prose")
PATHS = ("datatrove", "ray", "jql-run", "engine", "direct")
pytestmark = pytest.mark.filterwarnings("ignore")

Scores = NDArray[np.float32]  # [documents, HEADS], in the order of TEXTS


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """TEXTS in two files, which a sorted listing gives in their order."""
    folder, table = tmp_path_factory.mktemp("corpus"), pa.table({"text": TEXTS, "id": IDS})
    pq.write_table(table.slice(0, 30), folder / "a.parquet")
    pq.write_table(table.slice(30), folder / "b.parquet")
    return folder


@pytest.fixture(scope="module")
def scored(corpus, bundle, engine, head_files, tmp_path_factory) -> dict[str, Scores]:
    """The scores of every path."""
    out = tmp_path_factory.mktemp("out")
    return {
        "datatrove": through_datatrove(corpus, bundle.path, out / "datatrove"),
        "ray": through_ray(corpus, bundle.path, out / "ray"),
        "jql-run": through_jql_run(corpus, engine, out / "jql-run"),
        "engine": engine.score(TEXTS).values,
        "direct": directly(bundle.path, head_files),
    }


def by_id(folder: Path) -> Scores:
    """Scores of the parquet files in `folder`."""
    table = pa.concat_tables(pq.read_table(file) for file in sorted(folder.rglob("*.parquet")))
    rows = {row["id"]: [row[f"score_{head}"] for head in HEADS] for row in table.to_pylist()}
    assert len(rows) == table.num_rows == len(TEXTS)
    return np.array([rows[i] for i in IDS], np.float32)


def through_datatrove(corpus: Path, bundle: Path, out: Path) -> Scores:
    steps = [
        ParquetReader(str(corpus), glob_pattern="*.parquet"),
        JQLAnnotator(bundle=bundle, device_overwrite="cpu", threads=1),
        ParquetWriter(str(out / "data"), expand_metadata=True),
    ]
    LocalPipelineExecutor(steps, tasks=1, workers=1, logging_dir=str(out / "logs")).run()
    return by_id(out / "data")


def through_ray(corpus: Path, bundle: Path, out: Path) -> Scores:
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="error")
    try:
        ray.data.DataContext.get_current().enable_progress_bars = False
        dataset = score_dataset(ray.data.read_parquet(str(corpus)), bundle=bundle, num_cpus=1, batch_size=20)
        dataset.write_parquet(str(out))
    finally:
        ray.shutdown()
    return by_id(out)


def through_jql_run(corpus: Path, engine: Engine, out: Path) -> Scores:
    score(engine, out, corpus)
    return by_id(out)


def directly(bundle: Path, head_files: dict[str, Path]) -> Scores:
    embeddings = get_embedder_instance("any", "cpu", torch.float32, bundle).embed(TEXTS)
    heads = [RegressionHead.load_from_checkpoint(head_files[head], map_location="cpu") for head in HEADS]
    return torch.cat([head(embeddings) for head in heads], dim=1).numpy()


@pytest.fixture(scope="module")
def original(encoders, head_files) -> Scores:
    """What the JQL annotation pipeline computes, in fp32: nothing here is this project's but the checkpoints."""
    folder = encoders["gte"]
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=f"{folder}/tokenizer.json", pad_token="<pad>")
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = tokenizer(TEXTS, max_length=MAX_TOKENS, padding="longest", truncation=True, return_tensors="pt")
    assert tokens["input_ids"].shape == (len(TEXTS), MAX_TOKENS)
    with torch.no_grad():
        states = model(tokens["input_ids"], attention_mask=tokens["attention_mask"]).last_hidden_state
        embeddings = torch.nn.functional.normalize(states[:, 0], p=2, dim=1)
        return torch.cat([plain_head(head_files[head])(embeddings) for head in HEADS], dim=1).numpy()


def plain_head(file: Path) -> torch.nn.Module:
    """A head's layers, filled from its Lightning checkpoint by torch itself."""
    state = torch.load(file, map_location="cpu", weights_only=True)["state_dict"]
    hidden_size, input_size = state["layer1.weight"].shape
    layers = {"layer1": torch.nn.Linear(input_size, hidden_size), "layer2": torch.nn.Linear(hidden_size, 1)}
    head = torch.nn.ModuleDict(layers)
    head.load_state_dict(state)
    return torch.nn.Sequential(head["layer1"], torch.nn.ReLU(), head["layer2"])


def test_every_path_gives_the_same_scores(scored):
    assert tuple(scored) == PATHS
    values = np.stack(list(scored.values()))
    assert values.shape == (len(PATHS), len(TEXTS), len(HEADS))
    assert np.ptp(values, axis=0).max() <= TOLERANCES["fp32"].batch == 1e-5


@pytest.mark.parametrize("path", PATHS)
def test_the_scores_are_those_of_the_original(scored, original, path):
    assert original.std(axis=0).min() > 0.1  # a score that never varies would agree with anything
    assert np.abs(scored[path] - original).max() <= TOLERANCES["fp32"].score == 1e-4
