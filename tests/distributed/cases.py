"""Many plans of many models on one set of ranks, each against the unsplit model: ``python -m tests.distributed.cases``.

A case is ``model/pp/dp/schedule/microbatches/zero``; the ranks it does not use wait. Rank 0 prints a JSON line a case.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import nn

import partita
from partita.errors import PartitaError
from partita.plan import Batch, Plan, Stage
from tests.distributed.models import FAMILIES, Family, loss_of

SCHEDULES = ("gpipe", "1f1b", "interleaved", "zero_bubble")
STEPS = 20
RTOL, ATOL = 1e-4, 1e-6


@dataclass(frozen=True)
class Case:
    """``pp`` stages (twice as many under the interleaved schedule) of ``dp`` replicas of ``tp`` ranks each."""

    model: str
    pp: int
    dp: int
    schedule: str = "1f1b"
    microbatches: int = 4
    zero: int = 0
    tp: int = 1

    @property
    def ranks(self) -> int:
        return self.pp * self.dp * self.tp

    def __str__(self) -> str:
        words = (self.model, self.pp, self.dp, self.schedule, self.microbatches, self.zero, self.tp)
        return "/".join(map(str, words))

    @classmethod
    def read(cls, text: str) -> Case:
        model, pp, dp, schedule, microbatches, zero, tp = text.split("/")
        return cls(model, int(pp), int(dp), schedule, int(microbatches), int(zero), int(tp))


def product_of(ranks: int) -> Iterator[Case]:
    """Every case that this many ranks can run."""
    for model, zero, schedule in product(FAMILIES, range(4), SCHEDULES):
        for pp in (p for p in (1, 2, 3, 4) if ranks % p == 0):
            for tp in (t for t in (1, 2) if ranks // pp % t == 0):
                dp = ranks // pp // tp
                parts = len(FAMILIES[model].parts)
                stages = 2 * pp if schedule == "interleaved" else pp
                if stages > parts or (zero and dp == 1) or (pp == 1 and schedule != "1f1b"):
                    continue
                yield Case(model, pp, dp, schedule, 1 if pp * dp == 1 else 2 * dp if pp > 1 else dp, zero, tp)


def plan_of(case: Case, family: Family, batch: int) -> Plan:
    """Near-equal runs of parts; stage s on its own ranks, or by turns where interleaved."""
    stages = 2 * case.pp if case.schedule == "interleaved" and case.pp > 1 else case.pp
    count, made = len(family.parts), []
    each = case.dp * case.tp
    for s in range(stages):
        names = [n for part in family.parts[s * count // stages : (s + 1) * count // stages] for n in part]
        first = (s % case.pp) * each
        devices = tuple(f"cpu:{r}" for r in range(first, first + each))
        made.append(Stage(devices, tuple(names) if stages > 1 else ("",), tensor=case.tp))
    devices = tuple(f"cpu:{r}" for r in range(case.ranks))
    return Plan(tuple(made), devices=devices, batch=Batch(batch, case.microbatches), schedule=case.schedule,
                zero=case.zero)  # fmt: skip


def close(name: str, actual: torch.Tensor, expected: torch.Tensor, rtol: float = RTOL, atol: float = ATOL) -> list[str]:
    scale = float(expected.detach().abs().max()) if expected.numel() else 0.0
    if actual.shape == expected.shape and torch.allclose(actual, expected, rtol=rtol, atol=atol + 0.1 * rtol * scale):
        return []
    off = float((actual - expected).abs().max()) if actual.shape == expected.shape else float("inf")
    return [f"{name}: off by {off:.2g} of {scale:.2g}"]


def run(case: Case, size: int) -> list[str]:
    """What differs from the unsplit model, in words; empty where nothing does."""
    family = FAMILIES[case.model]
    torch.manual_seed(11)
    model = family.make()
    plain = copy.deepcopy(model)
    batch = 3 * case.microbatches + (1 if case.model != "cnn" else 3 * case.microbatches)  # rows do not divide evenly
    inputs, target = family.inputs(batch), family.target(batch)
    pm = partita.parallelize(
        model, inputs, plan=plan_of(case, family, batch), devices=case.ranks, loss_fn=loss_of, profile=False
    )
    problems: list[str] = []
    # one forward and backward through autograd
    torch.manual_seed(5)
    expected = plain(*inputs)
    loss_of(expected, target).backward()
    torch.manual_seed(5)
    actual = pm(*inputs)
    loss_of(actual, target).backward()
    problems += close("output", actual.detach(), expected.detach())
    problems += compare_gradients(pm, plain)
    for name, buffer in plain.named_buffers():
        problems += close(name, dict(model.named_buffers())[name].double(), buffer.double())
    # training
    ours = torch.optim.AdamW(pm.parameters(), 3e-3)
    theirs = torch.optim.AdamW(plain.parameters(), 3e-3)
    for step in range(STEPS):
        torch.manual_seed(100 + step)
        inputs, target = family.inputs(batch), family.target(batch)
        ours.zero_grad()
        theirs.zero_grad()
        torch.manual_seed(step)
        plain_loss = loss_of(plain(*inputs), target)
        plain_loss.backward()
        torch.manual_seed(step)
        loss = pm.train_step(*inputs, target)
        problems += close(f"loss {step}", loss, plain_loss.detach())
        if step == 1:
            problems += compare_gradients(pm, plain)
        if step % 4 == 3:
            norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
            problems += close(f"norm {step}", pm.clip_grad_norm_(0.5), norm)
        ours.step()
        theirs.step()
    state = pm.state_dict()
    whole = copy.deepcopy(plain)
    whole.load_state_dict(state)  # strict: the unsplit model's names and shapes
    torch.manual_seed(6)
    expected = whole(*inputs)
    torch.manual_seed(6)
    with torch.no_grad():
        problems += close("trained output", pm(*inputs), expected.detach())
    pm.close()
    return problems


def compare_gradients(pm: partita.ParallelModule, plain: nn.Module) -> list[str]:
    found, problems = pm.gradients(), []
    wanted = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
    if set(found) != set(wanted):
        problems.append(f"gradients of {set(found) ^ set(wanted)}")
    for name in set(found) & set(wanted):
        problems += close(f"gradient {name}", found[name], wanted[name])
    return problems


def main(words: Sequence[str]) -> int:
    from partita.runtime.distributed import join_world

    world = join_world()
    failed = 0
    for text in words:
        case = Case.read(text)
        try:
            problems = run(case, world.size)
        except PartitaError as error:
            problems = [f"{type(error).__name__}: {error}"]
        every = world.gather(problems, "the results of a case")
        problems = [f"rank {r}: {p}" for r, found in enumerate(every) for p in found]
        failed += bool(problems)
        if world.rank == 0:
            print(json.dumps({"case": text, "problems": problems[:4], "count": len(problems)}), flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
