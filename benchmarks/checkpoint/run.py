"""Saves and loads one trained model by each library, interleaved; prints seconds, memory and ratios."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.models import WORKLOADS

ROOT = Path(__file__).resolve().parents[2]
State = tuple[nn.Module, torch.optim.Optimizer]


def with_partita(where: Path) -> tuple[Callable[[State], Any], Callable[[State], Any]]:
    from partita import checkpoint

    return lambda s: checkpoint.save(where / "run", *s), lambda s: checkpoint.load(where / "run", *s)


def with_torch(where: Path) -> tuple[Callable[[State], Any], Callable[[State], Any]]:
    def save(state: State) -> None:
        with open(where / "run.pt", "wb") as file:
            torch.save([part.state_dict() for part in state], file)
            file.flush()
            os.fsync(file.fileno())

    def load(state: State) -> None:
        for part, saved in zip(state, torch.load(where / "run.pt", weights_only=True), strict=True):
            part.load_state_dict(saved)

    return save, load


def with_dcp(where: Path) -> tuple[Callable[[State], Any], Callable[[State], Any]]:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    def save(state: State) -> None:
        model, optimizer = get_state_dict(*state)
        dcp.save({"model": model, "optimizer": optimizer}, storage_writer=dcp.FileSystemWriter(where / "run"))

    def load(state: State) -> None:
        model, optimizer = get_state_dict(*state)
        dcp.load({"model": model, "optimizer": optimizer}, storage_reader=dcp.FileSystemReader(where / "run"))
        set_state_dict(*state, model_state_dict=model, optim_state_dict=optimizer)

    return save, load


def with_safetensors(where: Path) -> tuple[Callable[[State], Any], Callable[[State], Any]]:
    from safetensors.torch import load_file, save_file

    def tensors(state: State) -> dict[str, torch.Tensor]:
        model, optimizer = state
        found = {f"model.{n}": p.detach() for n, p in model.named_parameters()}
        for name, parameter in model.named_parameters():
            found |= {f"{key}.{name}": t for key, t in optimizer.state[parameter].items()}
        return found

    def save(state: State) -> None:
        save_file(tensors(state), where / "run.safetensors")
        handle = os.open(where / "run.safetensors", os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)

    def load(state: State) -> None:
        model, optimizer = state
        saved = load_file(where / "run.safetensors")
        for name, parameter in model.named_parameters():
            parameter.detach().copy_(saved[f"model.{name}"])
            optimizer.state[parameter] = {k: saved[f"{k}.{name}"] for k in ("step", "exp_avg", "exp_avg_sq")}

    return save, load


CONTESTANTS = {
    "partita.checkpoint": with_partita,
    "torch.save": with_torch,
    "torch.distributed.checkpoint": with_dcp,
    "safetensors": with_safetensors,
}


def made(model_name: str, seed: int, *, stepped: bool) -> State:
    torch.manual_seed(seed)
    model = WORKLOADS[model_name].make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    if stepped:
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return model, optimizer


def anonymous() -> int:
    """Bytes of memory of this process that are no file's."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise OSError("this system does not tell a process's anonymous memory")


@contextlib.contextmanager
def measured(into: dict[str, float], what: str) -> Iterator[None]:
    peak, ended = anonymous(), threading.Event()
    before = peak

    def sample() -> None:
        nonlocal peak
        while not ended.wait(0.002):
            peak = max(peak, anonymous())

    sampler = threading.Thread(target=sample)
    sampler.start()
    start = time.perf_counter()
    yield
    into[f"{what}_seconds"] = time.perf_counter() - start
    ended.set()
    sampler.join()
    into[f"{what}_bytes"] = max(peak, anonymous()) - before


def one(contestant: str, model_name: str) -> dict[str, float]:
    """One save and one load, in this process."""
    warnings.filterwarnings("ignore", category=UserWarning)
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCHMARK_FOLDER")) as folder:
        save, load = CONTESTANTS[contestant](Path(folder))
        state = made(model_name, 0, stepped=True)
        with measured(found, "save"):
            save(state)
        found["file_bytes"] = sum(p.stat().st_size for p in Path(folder).rglob("*") if p.is_file())
        fresh = made(model_name, 1, stepped=False)
        with measured(found, "load"):
            load(fresh)
    for (name, p), q in zip(state[0].named_parameters(), fresh[0].parameters(), strict=True):
        same = torch.equal(p, q) and all(torch.equal(t, fresh[1].state[q][k]) for k, t in state[1].state[p].items())
        assert same, f"{contestant}: {name} came back with other values"
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="gpt30m", choices=[*WORKLOADS])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--one", choices=[*CONTESTANTS], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(options.one, options.model)))
        return 0
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in CONTESTANTS}
    for _ in range(options.rounds):
        for name, found in rows.items():
            command = [sys.executable, "-m", "benchmarks.checkpoint", "--model", options.model, "--one", name]
            ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            if ended.returncode:
                print(ended.stderr, file=sys.stderr)
                return 1
            found.append(json.loads(ended.stdout.splitlines()[-1]))
    size = rows["torch.save"][0]["file_bytes"] / 2**20
    print(f"{options.model} with AdamW, {size:.0f} MiB, {options.rounds} rounds; median / minimum; ratio to partita")
    print(f"{'':30}{'save, s':>16}{'ratio':>7}{'load, s':>16}{'ratio':>7}{'save, MiB':>11}{'load, MiB':>11}")
    for name, found in rows.items():
        line = f"{name:30}"
        for what in ("save", "load"):
            mine = [r[f"{what}_seconds"] for r in found]
            ours = statistics.median(r[f"{what}_seconds"] for r in rows["partita.checkpoint"])
            line += f"{statistics.median(mine):>9.2f} / {min(mine):.2f}{statistics.median(mine) / ours:>7.2f}"
        for what in ("save", "load"):
            line += f"{statistics.median(r[f'{what}_bytes'] for r in found) / 2**20:>11.0f}"
        print(line)
    return 0
