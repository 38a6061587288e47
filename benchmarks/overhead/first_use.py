"""A process of its own: from ``parallelize`` to the end of the first step of a model; prints one JSON object.

What ``partita.parallelize`` imports when it is first named (``partita.api``) is part of it, timed by itself.
"""

from __future__ import annotations

import json
import sys
import time

import torch

from benchmarks.models import WORKLOADS, cross_entropy


def main() -> None:
    model, x, target = WORKLOADS[sys.argv[1]].build()
    torch.ones(1).add_(1)
    began, spent = time.perf_counter(), time.process_time()
    import partita.api

    imported = time.perf_counter() - began
    began = time.perf_counter()
    parallel = partita.parallelize(model, (x,), devices=["cpu", "cpu"], loss_fn=cross_entropy)
    divided = time.perf_counter()
    parallel.train_step(x, target)
    ended = time.perf_counter()
    found = {"import": imported, "parallelize": divided - began, "step": ended - divided}
    print(json.dumps({**found, "cpu": time.process_time() - spent}))


if __name__ == "__main__":
    main()
