"""Every model of the zoo divided and compared with itself undivided, on fresh inputs: one line a model.

``python -m benchmarks.same_numbers [--tensor T [--stages S] [--ranks]] [NAME ...]`` needs the zoo (``../shared/zoo`` or
PARTITA_ZOO) and its packages.
Cases: two and three parts, one and four microbatches, at the example batch and at five samples (which do not divide),
dropout on and off; with ``--tensor`` the planner's plan under ``constraints={"tensor": T, "stages": S}`` for each S
given, in one process or (``--ranks``) over as many as there are devices. Prints how each model was captured and the
largest relative difference; exits 1 when one differs.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import os
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from partita.capture import Captured, capture
from partita.cluster import Cluster, Device
from partita.cost.blocks import legal_cuts
from partita.errors import InfeasibleError, PlanError
from partita.graph import Graph
from partita.lockstep import can_synchronise
from partita.manual import plan_live, stage_names
from partita.plan import Batch, Plan, Stage
from partita.planners.auto import auto
from partita.runtime.compare import Comparison, compare, observe
from partita.runtime.live import children_bytes
from partita.runtime.module import ParallelModule
from partita.sharding.batch import layouts
from partita.torch_compat import pytree

ZOO = Path(os.environ.get("PARTITA_ZOO") or Path(__file__).resolve().parents[3] / "shared" / "zoo")
CLUSTER = Cluster(tuple(Device(f"cpu:{i}", "cpu", 1 << 34, 1e10, 1e10) for i in range(8)))
# Samples of these do not lie along the first dim of every input: joining inputs does not make a larger batch.
FIXED_BATCH = frozenset({"hm_dlrm", "hm_variable_len_list", "hm_packed_gru", "llava"})


@dataclass(frozen=True, slots=True)
class Case:
    parts: int
    microbatches: int
    schedule: str
    uneven: bool
    dropout: bool
    tensor: int = 1


CASES = (
    Case(2, 1, "1f1b", uneven=False, dropout=True),
    Case(3, 4, "1f1b", uneven=False, dropout=True),
    Case(2, 4, "zero_bubble", uneven=True, dropout=True),
    Case(2, 4, "gpipe", uneven=True, dropout=False),
)


def entries() -> dict[str, Any]:
    """Name -> entry with ``build() -> (model, args, kwargs)``."""
    if str(ZOO) not in sys.path:
        sys.path.insert(0, str(ZOO))
    found: dict[str, Any] = importlib.import_module("zoo").ZOO
    return found


def without_dropout(model: nn.Module) -> None:
    importlib.import_module("reference").zero_dropout(model)


def even_plan(graph: Graph, case: Case) -> Plan:
    """Cut near every ``parts``-th of the ops, where a cut is allowed."""
    legal = [i for i, ok in enumerate(legal_cuts(graph)) if ok]
    cuts: list[int] = []
    for k in range(1, case.parts):
        later = [i for i in legal if not cuts or i > cuts[-1]]
        if later:
            cuts.append(min(later, key=lambda i, k=k: abs(i - len(graph.ops) * k // case.parts)))  # type: ignore[misc]
    stage_of = {op.name: sum(i >= cut for cut in cuts) for i, op in enumerate(graph.ops)}
    names = stage_names(graph, stage_of, len(cuts) + 1)
    return Plan(
        stages=tuple(
            Stage(tuple(f"cpu:{i * case.tensor + k}" for k in range(case.tensor)), modules=m, ops=o, tensor=case.tensor)
            for i, (m, o) in enumerate(names)
        ),
        batch=Batch(graph.batch, case.microbatches),
        schedule=case.schedule,
    )


def planned(graph: Graph, case: Case) -> tuple[Plan, str]:
    """The planner's: every op divided by ``case.tensor`` devices, over ``case.parts`` stages. Where it refuses (it has
    no place for a cut, say) one by hand of as many stages as can be, and what the planner said."""
    cluster = replace(CLUSTER, devices=CLUSTER.devices[: case.tensor * case.parts])
    synchronised = can_synchronise(graph)
    try:
        found = auto(graph, layouts(graph), cluster, sync_batch_norm=synchronised,
                     constraints={"tensor": case.tensor, "stages": case.parts})  # fmt: skip
    except (PlanError, InfeasibleError) as error:
        return even_plan(graph, case), f"planned by hand: {' '.join(str(error).split())[:240]}"
    return replace(found, batch=replace(found.batch, microbatches=case.microbatches), schedule=case.schedule), ""


def joined(calls: list[Any], batch: int) -> Any:
    """The calls' inputs one after the other along the batch: five samples of twos."""
    flat = [pytree.tree_flatten(call) for call in calls]
    leaves = []
    for values in zip(*(f[0] for f in flat), strict=True):
        first = values[0]
        if isinstance(first, torch.Tensor) and first.dim() and first.shape[0] == batch:
            leaves.append(torch.cat([*values[:-1], values[-1][:1]]))
        else:
            leaves.append(first)
    return pytree.tree_unflatten(leaves, flat[0][1])


def tensor_cases(tensor: int, stages: int) -> tuple[Case, ...]:
    """Every op divided by ``tensor`` devices, over ``stages`` stages."""
    return (
        Case(stages, 1, "1f1b", uneven=False, dropout=True, tensor=tensor),
        Case(stages, 2, "1f1b", uneven=True, dropout=True, tensor=tensor),
    )


def to_rounding(found: Comparison) -> Comparison:
    """Sums over divided dims are added in another order, and batch norms over few values magnify the rounding: what is
    within 1e-4 of the tensor's largest value, or 1e-5 of a gradient that is 0 but for rounding, counts as equal."""
    near = (replace(d, equal=d.equal or d.relative <= 1e-4 or d.absolute <= 1e-5) for d in found.differences)
    return replace(found, differences=tuple(near))


@dataclass(frozen=True)
class Subject:
    """A model, captured at its example call, and fresh inputs. ``joins``: whether inputs can be joined to a batch that
    does not divide."""

    name: str
    model: nn.Module
    call: tuple[Any, Any]
    calls: list[Any]
    captured: Captured

    @property
    def joins(self) -> bool:
        return self.name not in FIXED_BATCH and bool(self.captured.graph.batch)

    def inputs(self, case: Case) -> Any:
        """(args, kwargs) of a case."""
        return joined(self.calls, self.captured.graph.batch) if case.uneven else self.calls[0]


def subject_of(name: str, build: Any) -> Subject:
    torch.manual_seed(0)
    model, args, kwargs = build()
    calls = []
    for seed in (1, 2, 3):
        torch.manual_seed(seed)
        calls.append(build()[1:])
    model.train()
    return Subject(name, model, (args, kwargs), calls, capture(model, args, kwargs))


def widened(subject: Subject, fresh: Any) -> tuple[nn.Module, Any, Any, Any]:
    """The model in float64, its example call, and those inputs. Batch norms over a handful of values magnify
    float32's rounding until activations change sign, and gradients with them; what is wrong is wrong here too."""
    args, kwargs, fresh = pytree.tree_map(
        lambda t: t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t, (*subject.call, fresh)
    )
    return copy.deepcopy(subject.model).double(), args, kwargs, fresh


def in_double(subject: Subject, fresh: Any, case: Case) -> Comparison:
    """The same comparison in float64, a thousand times as strict."""
    wide, args, kwargs, fresh = widened(subject, fresh)
    plan, _ = planned(capture(wide, args, kwargs).graph, case)
    divided = ParallelModule(wide, plan, CLUSTER)
    try:
        return compare(observe(wide, wide, *fresh), observe(divided, wide, *fresh), rtol=1e-7, atol=1e-9)
    finally:
        divided.close()


def comparisons(
    name: str, build: Any, cases: tuple[Case, ...] = CASES
) -> Iterator[tuple[Case, Captured, Comparison, str]]:
    """Each case of one model, compared; and in words what was not as asked for."""
    subject = subject_of(name, build)
    model, captured = subject.model, subject.captured
    for case in cases:
        if not case.dropout:
            without_dropout(model)
        if case.uneven and not subject.joins:
            continue
        fresh = subject.inputs(case)
        remark = ""
        if captured.live:
            remark = "run live"
            devices = [d.name for d in CLUSTER.devices[: case.parts]]
            plan = plan_live(children_bytes(model), name, devices, reason=captured.live)
        else:
            plan, remark = planned(captured.graph, case) if case.tensor > 1 else (even_plan(captured.graph, case), "")
        divided = ParallelModule(model, plan, CLUSTER)
        try:
            expected, actual = observe(model, model, *fresh), observe(divided, model, *fresh)
            found = compare(expected, actual)
            if case.tensor > 1:
                found = to_rounding(found)
                if not found.ok and in_double(subject, fresh, case).ok:
                    found, remark = replace(found, differences=()), "equal in float64 only"
            yield case, captured, found, remark
        finally:
            divided.close()


def how(captured: Captured) -> str:
    """How the model was captured, in a few words."""
    if captured.live:
        return f"live: {captured.live}"
    graph = captured.graph
    found = layouts(graph)
    total = sum(op.flops for op in graph.ops) or 1
    split = sum(op.flops for op in graph.ops if found.phase[op.name] == "split")
    extra = [f"{len(captured.opaques)} opaque"] * bool(captured.opaques)
    extra += [f"{len(captured.guards)} guards"] * bool(captured.guards)
    extra += [c.reason[:60] for c in found.couplings[:1]]
    return f"graph of {len(graph.ops)} ops, {split / total:.0%} per microbatch" + "".join(f"; {e}" for e in extra)


def main() -> None:
    parser = argparse.ArgumentParser(description="Zoo models divided and compared with themselves undivided.")
    parser.add_argument("names", nargs="*")
    parser.add_argument("--tensor", type=int, default=1, help="devices that divide every op among them")
    parser.add_argument("--stages", default="1,2", help="numbers of stages, with --tensor")
    parser.add_argument("--ranks", action="store_true", help="with --tensor: a process a device, over Gloo")
    given = parser.parse_args()
    stages = map(int, given.stages.split(","))
    chosen = CASES if given.tensor == 1 else tuple(c for s in stages for c in tensor_cases(given.tensor, s))
    torch.set_num_threads(1)
    wrong, every = 0, Counter[str]()
    zoo = entries()
    names = given.names or list(zoo)
    for name in names:
        worst, bad, words, cases, remarks = 0.0, [], "", 0, dict[str, None]()
        try:
            if given.ranks:
                from benchmarks.same_numbers import ranks

                made = ranks.comparisons(subject_of(name, zoo[name].build), chosen)
            else:
                made = comparisons(name, zoo[name].build, chosen)
            for case, captured, found, remark in made:
                every["cases"] += 1
                every[remark.split(":")[0]] += bool(remark)
                every["equal"] += found.ok
                remarks |= {f"   {remark}": None} if remark and not captured.live else {}
                words, cases = words or how(captured), cases + 1
                worst = max(worst, max((d.relative for d in found.differences if not d.equal), default=0.0))
                if not found.ok:
                    bad.append(f"   {case}: {found}")
        except Exception as error:
            bad.append(f"   {type(error).__name__}: {error}")
        wrong += bool(bad)
        print(f"{'DIFFERENT' if bad else 'equal':9} {name:26} {cases} cases  {words}", *bad, *remarks, sep="\n",
              flush=True)  # fmt: skip
    print(", ".join(f"{count} {what}" for what, count in every.items() if count))
    print(f"{len(names) - wrong} of {len(names)} models equal in every case")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
