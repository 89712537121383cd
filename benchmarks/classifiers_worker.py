"""One sequence classifier in a process of its own: reads jobs on stdin, answers on stdout.

    python classifiers_worker.py HOW MODEL MAX_TOKENS
    python classifiers_worker.py openvino-export MODEL OUT

HOW: `transformers`; `openvino`, sentence-transformers' CrossEncoder with its OpenVINO backend on what `openvino-export`
wrote to MODEL/openvino; or the name of a variant of the bundle MODEL. A job is a line of JSON: {"texts": [...],
"batch_size": n, "out": file.npy}, where 0 leaves the batches to the model; the answer is the seconds, tokenizing
included, and the peak of the resident memory in MiB. Runs in environments without this repository, so it is imported
only for a bundle.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

Score = Callable[[list[str], int], np.ndarray]  # texts, batch size -> logits [N, outputs]


def main() -> None:
    """Serve until stdin ends, or export."""
    how, model, last = sys.argv[1:]
    answers, sys.stdout = sys.stdout, sys.stderr  # the libraries print
    if how == "openvino-export":
        _export(model, last)
        return
    score = {"transformers": _with_torch, "openvino": _with_openvino}.get(how, lambda *a: _with_bundle(how, *a))(
        model, int(last)
    )
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        start = time.perf_counter()
        logits = score(job["texts"], job["batch_size"])
        seconds = time.perf_counter() - start
        np.save(job["out"], logits)
        print(seconds, _peak_mib(), file=answers, flush=True)


def _peak_mib() -> int:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) // 1024


def _with_bundle(variant: str, bundle: str, max_tokens: int) -> Score:
    from jql_engine import Engine

    engine = Engine(bundle, "cpu", variant)
    assert engine.bundle.manifest.max_tokens == max_tokens

    def score(texts: list[str], batch_size: int) -> np.ndarray:
        size = batch_size or len(texts)
        return np.concatenate([engine.score(texts[i : i + size]).values for i in range(0, len(texts), size)])

    return score


def _with_torch(folder: str, max_tokens: int) -> Score:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    model.requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def score(texts: list[str], batch_size: int) -> np.ndarray:
        ids = tokenizer(texts, truncation=True, max_length=max_tokens)["input_ids"]

        def logits(rows: list[int]) -> np.ndarray:
            batch = tokenizer.pad({"input_ids": [ids[i] for i in rows]}, return_tensors="pt")
            return np.asarray(model(**batch).logits)

        return _in_batches(list(map(len, ids)), batch_size, logits)

    return score


def _export(folder: str, out: str) -> None:
    from optimum.intel import OVModelForSequenceClassification

    OVModelForSequenceClassification.from_pretrained(folder, export=True, device="CPU").save_pretrained(out)


def _with_openvino(folder: str, max_tokens: int) -> Score:
    import torch
    from sentence_transformers import CrossEncoder

    model = CrossEncoder(
        folder, backend="openvino", device="cpu", max_length=max_tokens, activation_fn=torch.nn.Identity()
    )

    # What its `predict` does, which takes pairs of texts only.
    def score(texts: list[str], batch_size: int) -> np.ndarray:
        def logits(rows: list[int]) -> np.ndarray:
            return np.asarray(model(model.preprocess([texts[i] for i in rows]))["scores"], np.float32)

        return _in_batches(list(map(len, texts)), batch_size, logits)

    return score


def _in_batches(lengths: list[int], batch_size: int, logits: Callable[[list[int]], np.ndarray]) -> np.ndarray:
    """Longest first, padded to the longest of a batch, as most loops do; a batch of one has no padding."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    found = np.concatenate([logits(order[begin : begin + batch_size]) for begin in range(0, len(order), batch_size)])
    return found[np.argsort(order)]


if __name__ == "__main__":
    main()
