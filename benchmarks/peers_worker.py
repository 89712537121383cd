"""One model of sentence-transformers in an environment of its own: reads jobs on stdin, answers on stdout.

    python peers_worker.py ENCODER BACKEND POOLING MAX_TOKENS

A job is a line of JSON: {"texts": [...], "batch_size": n, "out": file.npy}; the answer is the seconds of `encode`.
Imports nothing of this repository, whose dependencies differ.
"""

from __future__ import annotations

import json
import sys
import time

import numpy as np
from sentence_transformers import SentenceTransformer, models


def main() -> None:
    """Serve until stdin ends."""
    encoder, backend, pooling, max_tokens = sys.argv[1:]
    answers, sys.stdout = sys.stdout, sys.stderr  # the libraries print
    transformer = models.Transformer(encoder, max_seq_length=int(max_tokens), backend=backend)
    pool = models.Pooling(transformer.get_word_embedding_dimension(), pooling_mode=pooling)
    model = SentenceTransformer(modules=[transformer, pool, models.Normalize()], device="cpu")
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        start = time.perf_counter()
        embeddings = model.encode(job["texts"], batch_size=job["batch_size"], show_progress_bar=False)
        seconds = time.perf_counter() - start
        np.save(job["out"], np.asarray(embeddings, np.float32))
        print(seconds, file=answers, flush=True)


if __name__ == "__main__":
    main()
