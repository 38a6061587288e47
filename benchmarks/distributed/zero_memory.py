"""Bytes of each rank under ZeRO 0 to 3 beside the closed form: ``python -m benchmarks.distributed.zero_memory``.

AdamW, parameters of 4 bytes. P: the parameters' elements; R: those of the rows a rank has of them. After a step, as in
ZeRO (Rajbhandari et al. 2020, section 5), with everything in float32:

    zero     parameters   gradients   optimizer state
    0            4 P          4 P          8 P
    1            4 P          4 R          8 R        (4 P gradients until backward is over)
    2            4 P          4 R          8 R
    3            4 R          4 R          8 R

The peak of a training step adds what the paper leaves out, and is taken over the parameters in the order in which
backward comes to them: what is summed already as rows, and before it is summed the gradient of one parameter whole;
with zero 3 the whole parameters of the unit (a block of the model) that backward is in, and of the next one, fetched
ahead. Activations are small here (a few rows). Small parameters (under 256 KiB) are summed at the end, in one message.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import partita
from partita.models.gpt import GPT, GPTSize
from partita.plan import Batch, Plan, Stage
from partita.runtime.distributed.module import RankModule

ROOT = Path(__file__).resolve().parents[2]
SMALL = 1 << 18


def mlp() -> tuple[nn.Module, torch.Tensor]:
    blocks = (nn.Sequential(nn.Linear(384, 1024), nn.ReLU(), nn.Linear(1024, 384)) for _ in range(10))
    return nn.Sequential(*blocks), torch.randn(8, 384)


def gpt() -> tuple[nn.Module, torch.Tensor]:
    return GPT(GPTSize(layers=10, hidden=256, heads=4, vocabulary=512, positions=8)), torch.randint(512, (8, 2))


MODELS: dict[str, Callable[[], tuple[nn.Module, torch.Tensor]]] = {"mlp": mlp, "gpt": gpt}


def rows(shape: Sequence[int], size: int) -> int:
    """Elements of the most rows that a rank has: the first of torch's chunks of dim 0."""
    return -(-shape[0] // size) * torch.Size(shape[1:]).numel()


def resting(shapes: Sequence[Sequence[int]], size: int, zero: int) -> tuple[int, int, int]:
    """Bytes of parameters, gradients and optimizer state on the fullest rank after a step."""
    whole = 4 * sum(torch.Size(s).numel() for s in shapes)
    part = 4 * sum(rows(s, size) for s in shapes)
    return (whole if zero < 3 else part), (part if zero else whole), 2 * (part if zero else whole)


def peak(shapes: Sequence[Sequence[int]], units: Sequence[int], size: int, zero: int) -> int:
    """``shapes`` in the order of use, ``units``: of each the unit it is gathered with."""
    parameters, gradients, state = resting(shapes, size, zero)
    if zero < 2:
        return parameters + 4 * sum(torch.Size(s).numel() for s in shapes) + state
    bytes_of = [4 * torch.Size(s).numel() for s in shapes]
    unit_bytes = [sum(b for b, u in zip(bytes_of, units, strict=True) if u == unit) for unit in range(max(units) + 1)]
    most, summed, small = 0, 0, 0
    for shape, whole, unit in reversed(list(zip(shapes, bytes_of, units, strict=True))):
        here = unit_bytes[unit] + (unit_bytes[unit - 1] if unit else 0) if zero == 3 else 0
        most = max(most, here + summed + small + whole)
        if whole < SMALL:
            small += whole
        else:
            summed += 4 * rows(shape, size)
    return parameters + state + most


def measure(model: str, levels: Sequence[int]) -> None:
    """On every rank; rank 0 prints a JSON line a level."""
    torch.set_num_threads(1)
    size = int(os.environ["WORLD_SIZE"])
    devices = tuple(f"cpu:{r}" for r in range(size))
    for zero in levels:
        torch.manual_seed(0)
        module, x = MODELS[model]()
        shapes = [tuple(p.shape) for p in module.parameters()]
        plan = Plan((Stage(devices, ("",)),), devices=devices, batch=Batch(8, size), zero=zero)
        pm = partita.parallelize(module, (x,), plan=plan, devices=list(devices), loss_fn=square, profile=False)
        assert isinstance(pm, RankModule), "start it with torchrun"
        optimizer = torch.optim.AdamW(pm.parameters())
        for _ in range(2):
            optimizer.zero_grad()
            pm.train_step(x, torch.zeros(()))
            optimizer.step()
        held = pm.held(optimizer)
        optimizer.zero_grad()
        peaks = pm.measure_memory(x, torch.zeros(()), optimizer=optimizer)
        every = pm.world.gather(held, "what the ranks hold")
        if pm.world.rank == 0:
            each = [[h.parameters, h.gradients, h.state] for h in every]
            print(json.dumps({"zero": zero, "shapes": shapes, "held": each, "peak": list(peaks.values())}), flush=True)


def square(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output - target).square().mean()


def found(model: str, levels: str, size: int) -> list[dict[str, Any]]:
    command = ["-m", "torch.distributed.run", f"--nproc-per-node={size}", "-m", "benchmarks.distributed.zero_memory",
               "--measure", model, "--levels", levels]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=600, env=environment
    )
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode:
        raise SystemExit(f"{model} on {size} ranks failed:\n{done.stderr[-3000:]}")
    return lines


def compared(model: str, size: int, seen: dict[str, Any]) -> tuple[list[float], list[float]]:
    """Bytes measured on the fullest rank (parameters, gradients, state, peak), and by the closed form."""
    names = [n for n, _ in MODELS[model]()[0].named_parameters()]
    most = [float(max(h[i] for h in seen["held"])) for i in range(3)]
    form = [*resting(seen["shapes"], size, seen["zero"]), peak(seen["shapes"], blocks(names), size, seen["zero"])]
    return [*most, float(max(seen["peak"]))], [float(b) for b in form]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.distributed.zero_memory")
    parser.add_argument("--models", default="mlp,gpt")
    parser.add_argument("--ranks", default="2,4")
    parser.add_argument("--levels", default="0,1,2,3")
    parser.add_argument("--measure", default="", help="run as one rank")
    given = parser.parse_args()
    if given.measure:
        measure(given.measure, list(map(int, given.levels.split(","))))
        return 0
    worst = 0.0
    print(
        "MiB, measured/closed form  parameters       gradients        state            peak in a step   ratio of peaks"
    )
    for model in given.models.split(","):
        for size in map(int, given.ranks.split(",")):
            for seen in found(model, given.levels, size):
                have, form = compared(model, size, seen)
                worst = max(worst, *(abs(a / b - 1) for a, b in zip(have, form, strict=True)))
                pairs = "  ".join(f"{a / 2**20:7.2f}/{b / 2**20:7.2f}" for a, b in zip(have, form, strict=True))
                print(f"{model:4} {size} ranks, zero {seen['zero']}       {pairs}  {have[3] / form[3]:.3f}", flush=True)
    print(f"furthest from the closed form: {worst:.1%}")
    return int(worst > 0.05)


def blocks(names: Sequence[str]) -> list[int]:
    """Unit of each parameter: the module down to the first number in its name, else its first part."""
    keys = []
    for name in names:
        parts = name.split(".")
        numbered = next((i for i, part in enumerate(parts) if part.isdigit()), 0)
        keys.append(".".join(parts[: numbered + 1]))
    order = list(dict.fromkeys(keys))
    return [order.index(key) for key in keys]


if __name__ == "__main__":
    sys.exit(main())
