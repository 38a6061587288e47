"""The same comparison over processes: a rank a device, over Gloo (``--ranks``).

    parent   builds and captures a model
      forks  tensor x stages ranks for the cases of so many devices; each has the model undivided and a divided copy

Under torchrun each rank captures for itself; here a graph without ties to the very model object (opaque parts, guards,
attributes that it sets) is captured once for all of them.

A rank that fails ends its model's cases and no other's.
"""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
import socket
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import nn

import partita.runtime.bind
from benchmarks.same_numbers.run import CLUSTER, Case, Subject, planned, to_rounding, widened
from partita.capture import Captured, capture
from partita.cluster import Cluster
from partita.manual import plan_live
from partita.plan import Plan
from partita.runtime.compare import Comparison, compare, observe
from partita.runtime.distributed import World, join_world
from partita.runtime.distributed.module import RankModule
from partita.runtime.live import children_bytes
from partita.torch_compat import pytree

SECONDS = 1800.0  # that the cases of one model may take


def comparisons(subject: Subject, cases: Sequence[Case]) -> Iterator[tuple[Case, Captured, Comparison, str]]:
    """Each case compared on every rank: the first rank's finding that differs, else rank 0's. Raises RuntimeError with
    what a rank said that ended."""
    wanted = [c for c in cases if not c.uneven or subject.joins]
    partita.runtime.bind.capture = partial(_remembered, _known(subject, wanted))  # type: ignore[attr-defined]
    for size, group in groupby(wanted, key=lambda c: c.parts * c.tensor):
        some = list(group)
        with tempfile.TemporaryDirectory() as folder:
            _together(size, subject, some, Path(folder))
            for case, path in zip(some, sorted(Path(folder).glob("case*")), strict=True):
                found, remark = pickle.loads(path.read_bytes())
                yield case, subject.captured, found, remark


Known = list[tuple[list[torch.Size], Captured]]


def _known(subject: Subject, cases: Sequence[Case]) -> Known:
    """Graphs that any copy of the model may run, with the shapes of the inputs that they are for."""
    found = []
    for args, kwargs in (subject.call, *(subject.inputs(c) for c in cases if c.uneven)):
        shapes = [t.shape for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        if not any(shapes == known for known, _ in found):
            made = capture(subject.model, args, kwargs) if found else subject.captured
            if not (made.live or made.opaques or made.guards or made.effects or made.left or made.in_contents):
                found.append((shapes, made))
    return found


def _remembered(known: Known, model: nn.Module, args: Any = (), kwargs: Any = None, **options: Any) -> Captured:
    """``capture``, but for a call like one that is known."""
    shapes = [t.shape for t in pytree.tree_leaves((args, kwargs or {})) if isinstance(t, torch.Tensor)]
    for those, made in known if torch.is_grad_enabled() and options.get("forward") in (None, model) else ():
        if shapes == those and made.flatten(args, kwargs) is not None:
            return made
    return capture(model, args, kwargs, **options)


def _together(size: int, subject: Subject, cases: list[Case], folder: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=_rank, args=(r, size, port, subject, cases, folder)) for r in range(size)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(SECONDS)
    for process in ranks:
        if process.is_alive():
            process.kill()
        process.join()
    said = [f"rank {r}: {p.read_text()}" for r in range(size) if (p := folder / f"error{r}").exists()]
    if said or any(p.exitcode for p in ranks):
        raise RuntimeError(said[0] if said else f"the ranks ended with {[p.exitcode for p in ranks]}")


def _rank(rank: int, size: int, port: str, subject: Subject, cases: list[Case], folder: Path) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=port, PARTITA_STALL=os.environ.get("PARTITA_STALL", "120"),
    )  # fmt: skip
    torch.set_num_threads(1)
    try:
        world = join_world()
        for number, case in enumerate(cases):
            found, remark = _compared(world, subject, case)
            if world.rank == 0:
                (folder / f"case{number:02}").write_bytes(pickle.dumps((found, remark)))
        world.watch.leave()
    except BaseException as error:
        (folder / f"error{rank}").write_text(f"{type(error).__name__}: {error}")
        traceback.print_exc()
        sys.exit(1)


def _compared(world: World, subject: Subject, case: Case) -> tuple[Comparison, str]:
    cluster = replace(CLUSTER, devices=CLUSTER.devices[: world.size])
    captured, fresh = subject.captured, subject.inputs(case)
    if captured.live:
        names = [d.name for d in cluster.devices[: case.parts]]
        plan, remark = plan_live(children_bytes(subject.model), subject.name, names, reason=captured.live), "run live"
    else:
        plan, remark = world.first("the plan", lambda: planned(captured.graph, case))
    found = _worst(world, to_rounding(_once(world, cluster, subject.model, captured, plan, fresh)))
    if not found.ok and not captured.live:
        wide, args, kwargs, again = widened(subject, fresh)
        exact = capture(wide, args, kwargs)
        plan = world.first("the plan", lambda: planned(exact.graph, case)[0])
        if _worst(world, _once(world, cluster, wide, exact, plan, again, rtol=1e-7, atol=1e-9)).ok:
            found, remark = replace(found, differences=()), "equal in float64 only"
    return found, remark


def _once(
    world: World, cluster: Cluster, model: nn.Module, captured: Captured, plan: Plan, fresh: Any,
    **tolerances: float,
) -> Comparison:  # fmt: skip
    expected = observe(model, model, *fresh)
    divided = RankModule(copy.deepcopy(model), plan, cluster, world=world, captured=captured)
    try:
        actual = observe(divided, divided.module, *fresh, whole_gradients=divided.gradients)
        return compare(expected, actual, **tolerances)
    finally:
        divided.close()


def _worst(world: World, found: Comparison) -> Comparison:
    return next((f for f in world.gather(found, "what the ranks found") if not f.ok), found)
