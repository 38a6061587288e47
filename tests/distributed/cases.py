"""Many plans of many models on one set of ranks, each against the unsplit model: ``python -m tests.distributed.cases``.

A case is ``model/pp/dp/schedule/microbatches/zero/tp``; the ranks it does not use wait. Rank 0 prints a JSON line a
case. ``tests.distributed.matrix`` runs the whole product of them.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product

import torch
from torch import nn
from torch.distributed.tensor import DTensor

import partita
from partita.cluster import Cluster
from partita.errors import PartitaError
from partita.plan import Batch, Plan, Stage
from tests.distributed.models import FAMILIES, Family, loss_of

SCHEDULES = ("gpipe", "1f1b", "interleaved", "zero_bubble")
STEPS = 20
RTOL, ATOL = 1e-4, 1e-6
ROWS = {"cnn": 26}  # samples of a batch; batch norm over few values magnifies rounding
FEW = 13


@dataclass(frozen=True)
class Case:
    """``pp`` stages (twice as many under the interleaved schedule) of ``dp`` replicas of ``tp`` ranks each.
    ``backwards``: the plan lists ranks from the last to the first; a ``-`` before the words. ``divided``: the one stage
    ('first', 'last') of which there are members; the others have a rank each."""

    model: str
    pp: int
    dp: int
    schedule: str = "1f1b"
    microbatches: int = 4
    zero: int = 0
    tp: int = 1
    backwards: bool = False
    divided: str = ""

    @property
    def ranks(self) -> int:
        return self.pp - 1 + self.tp if self.divided else self.pp * self.dp * self.tp

    @property
    def stages(self) -> int:
        return 2 * self.pp if self.schedule == "interleaved" else self.pp

    @property
    def rows(self) -> int:
        """Samples of a batch: they do not divide evenly."""
        return ROWS.get(self.model, FEW)

    def __str__(self) -> str:
        words = (self.model, self.pp, self.dp, self.schedule, self.microbatches, self.zero, self.tp, self.divided)
        return "-" * self.backwards + "/".join(map(str, words)).rstrip("/")

    @classmethod
    def read(cls, text: str) -> Case:
        model, pp, dp, schedule, microbatches, zero, tp, *divided = text.removeprefix("-").split("/")
        numbers = int(microbatches), int(zero), int(tp)
        return cls(model, int(pp), int(dp), schedule, *numbers, text.startswith("-"), *divided)


def product_of(ranks: int) -> Iterator[Case]:
    """Every case of exactly this many ranks: each way to write it as stages x replicas x members, under each schedule
    and ZeRO level, with one and with two microbatches a replica where there is one stage."""
    for model, schedule, zero in product(FAMILIES, SCHEDULES, range(4)):
        for pp in (p for p in range(1, ranks + 1) if ranks % p == 0):
            for tp in (t for t in range(1, ranks // pp + 1) if ranks // pp % t == 0):
                dp = ranks // pp // tp
                for each in (1, 2) if pp == 1 else (2,):
                    case = Case(model, pp, dp, schedule, each * dp, zero, tp)
                    if case.stages <= len(FAMILIES[model].parts) and case.microbatches <= case.rows:
                        yield case


def plan_of(case: Case) -> Plan:
    """Near-equal runs of parts; stage s on its own ranks, or by turns where interleaved."""
    family = FAMILIES[case.model]
    count, made = len(family.parts), []
    of_one = {"first": 0, "last": case.pp - 1}.get(case.divided)
    degrees = [case.tp if of_one in (None, place) else 1 for place in range(case.pp)]
    sizes = [case.dp * degree for degree in degrees]
    for s in range(case.stages):
        names = [n for part in family.parts[s * count // case.stages : (s + 1) * count // case.stages] for n in part]
        place = s % case.pp
        ranks = range(sum(sizes[:place]), sum(sizes[: place + 1]))
        devices = tuple(f"cpu:{case.ranks - 1 - r if case.backwards else r}" for r in ranks)
        made.append(Stage(devices, tuple(names) if case.stages > 1 else ("",), tensor=degrees[place]))
    devices = tuple(f"cpu:{r}" for r in range(case.ranks))
    return Plan(tuple(made), devices=devices, batch=Batch(case.rows, case.microbatches), schedule=case.schedule,
                zero=case.zero)  # fmt: skip


def close(name: str, actual: torch.Tensor, expected: torch.Tensor, rtol: float = RTOL, atol: float = ATOL) -> list[str]:
    scale = float(expected.detach().abs().max()) if expected.numel() else 0.0
    if actual.shape == expected.shape and torch.allclose(actual, expected, rtol=rtol, atol=atol + 0.1 * rtol * scale):
        return []
    off = float((actual - expected).abs().max()) if actual.shape == expected.shape else float("inf")
    return [f"{name}: off by {off:.2g} of {scale:.2g}"]


# -- the unsplit model -------------------------------------------------------------------------------------------------


@dataclass
class Reference:
    """What the unsplit model computes: one forward and backward, then STEPS steps of AdamW, the norm of every fourth
    step's gradients clipped, and at the end one forward more. ``gradients``: of the first backward and of step 1."""

    output: torch.Tensor
    buffers: dict[str, torch.Tensor]
    gradients: list[dict[str, torch.Tensor]] = field(default_factory=list)
    losses: list[torch.Tensor] = field(default_factory=list)
    norms: dict[int, torch.Tensor] = field(default_factory=dict)
    trained: dict[str, torch.Tensor] = field(default_factory=dict)
    last: torch.Tensor = field(default_factory=lambda: torch.empty(0))


def seed(number: int) -> None:
    """``torch.manual_seed`` without the devices that are not here: for each of them it takes a picture of the stack."""
    torch.default_generator.manual_seed(number)


def beginning(family: Family, rows: int) -> tuple[nn.Module, tuple[torch.Tensor, ...], torch.Tensor]:
    """The model, and its first batch and target: the same at every call."""
    seed(11)
    model = family.make()
    return model, family.inputs(rows), family.target(rows)


def batch_of(family: Family, rows: int, step: int) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    seed(100 + step)
    return family.inputs(rows), family.target(rows)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW, many tensors in one operator; torch's takes either DTensors or others, so each kind is a group."""
    kinds: dict[type, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        kinds.setdefault(type(parameter.data), []).append(parameter)
    return torch.optim.AdamW([{"params": group} for group in kinds.values()], 3e-3, fused=True)


def gradients_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def reference(family: Family, rows: int) -> Reference:
    model, inputs, target = beginning(family, rows)
    seed(5)
    output = model(*inputs)
    loss_of(output, target).backward()
    found = Reference(output.detach(), {n: b.clone() for n, b in model.named_buffers()}, [gradients_of(model)])
    optimizer = optimizer_of(model)
    for step in range(STEPS):
        inputs, target = batch_of(family, rows, step)
        optimizer.zero_grad()
        seed(step)
        loss = loss_of(model(*inputs), target)
        loss.backward()
        found.losses.append(loss.detach())
        if step == 1:
            found.gradients.append(gradients_of(model))
        if step % 4 == 3:
            found.norms[step] = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    found.trained = {n: t.clone() for n, t in model.state_dict().items()}
    seed(6)
    with torch.no_grad():
        found.last = model(*inputs)
    return found


# -- the divided one ---------------------------------------------------------------------------------------------------


def run(case: Case, devices: int | Cluster, expected: Reference | None = None) -> list[str]:
    """What differs from the unsplit model, in words; empty where nothing does. Every rank calls it alike."""
    family, rows = FAMILIES[case.model], case.rows
    expected = expected or reference(family, rows)
    model, inputs, target = beginning(family, rows)
    pm = partita.parallelize(model, inputs, plan=plan_of(case), devices=devices, loss_fn=loss_of, profile=False)
    problems: list[str] = []
    # one forward and backward through autograd
    seed(5)
    actual = pm(*inputs)
    loss_of(actual, target).backward()
    problems += close("output", actual.detach(), expected.output)
    problems += compare_gradients(pm, expected.gradients[0])
    for name, buffer in expected.buffers.items():
        problems += close(name, dict(model.named_buffers())[name].double(), buffer.double())
    # training
    optimizer = optimizer_of(pm)
    for step in range(STEPS):
        inputs, target = batch_of(family, rows, step)
        optimizer.zero_grad()
        seed(step)
        loss = pm.train_step(*inputs, target)
        problems += close(f"loss {step}", loss, expected.losses[step])
        if step == 1:
            problems += compare_gradients(pm, expected.gradients[1])
        if step in expected.norms:
            problems += close(f"norm {step}", pm.clip_grad_norm_(0.5), expected.norms[step])
        optimizer.step()
    state = pm.state_dict()
    if {n: t.shape for n, t in state.items()} != {n: t.shape for n, t in expected.trained.items()}:
        problems.append("state_dict has other names or shapes")
    seed(6)
    with torch.no_grad():
        problems += close("trained output", pm(*inputs), expected.last, rtol=10 * RTOL)
    whole = copy.deepcopy(family.make())
    whole.load_state_dict(state)  # strict: the unsplit model's names and shapes
    seed(6)
    with torch.no_grad():
        problems += close("output of the saved state", whole(*inputs), expected.last, rtol=10 * RTOL)
    pm.close()
    return problems


def compare_gradients(pm: partita.ParallelModule, wanted: dict[str, torch.Tensor]) -> list[str]:
    found, problems = pm.gradients(), []
    if set(found) != set(wanted):
        problems.append(f"gradients of {set(found) ^ set(wanted)}")
    for name, parameter in pm.named_parameters():
        if parameter.grad is not None and _steps(parameter.grad) != _steps(parameter.data):
            problems.append(f"gradient {name} does not lie as its parameter does")
    for name in set(found) & set(wanted):
        problems += close(f"gradient {name}", found[name], wanted[name])
    return problems


def _steps(tensor: torch.Tensor) -> list[int]:
    """How what this rank has of it lies in memory."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return [step for step, size in zip(local.stride(), local.shape, strict=True) if size > 1]


def outcome(case: Case, check: Callable[[Case], list[str]]) -> list[str]:
    """What ``check`` finds, or how it was refused."""
    try:
        return check(case)
    except PartitaError as error:
        return [f"{type(error).__name__}: {error}"]


def main(words: Sequence[str]) -> int:
    from partita.runtime.distributed import join_world

    world = join_world()
    failed = 0
    for text in words:
        problems = outcome(Case.read(text), lambda case: run(case, world.size))
        every = world.gather(problems, "the results of a case")
        problems = [f"rank {r}: {p}" for r, found in enumerate(every) for p in found]
        failed += bool(problems)
        if world.rank == 0:
            print(json.dumps({"case": text, "problems": problems[:4], "count": len(problems)}), flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
