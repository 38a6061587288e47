"""Checkpoints: saved under one plan and loaded under another, interrupted, damaged, misfitting; never half."""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from dividing import cluster
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

from partita import CheckpointError, Plan, Stage, UsageError, checkpoint
from partita.checkpoint import folder, manifest
from partita.plan import Batch
from partita.runtime.module import ParallelModule
from partita.runtime.pieces import Piece

VOCABULARY, WIDTH, BATCH = 40, 12, 8


class Model(nn.Module):
    """Tied weights, batch norm, dropout, a frozen layer, a scalar, a buffer outside the state dict."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.first = nn.Linear(width, 2 * width)
        self.norm = nn.BatchNorm1d(2 * width)
        self.drop = nn.Dropout(0.2)
        self.second = nn.Linear(2 * width, width)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight
        self.first.bias.requires_grad_(False)
        self.register_buffer("table", torch.arange(3.0), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.drop(self.norm(self.first(self.embedding(x)))).relu()
        return self.head(self.second(hidden) * self.scale + self.table.sum())


def parts(*groups: tuple[str, ...]) -> Plan:
    """A stage per group of modules, one device each."""
    stages = tuple(Stage((f"cpu:{i}",), modules=names) for i, names in enumerate(groups))
    return Plan(stages, devices=tuple(f"cpu:{i}" for i in range(len(groups))), batch=Batch(BATCH))


ALL = ("embedding", "first", "norm", "drop", "second", "head")
REPLICAS = Plan((Stage(("cpu:0", "cpu:1"), modules=("",)),), devices=("cpu:0", "cpu:1"), batch=Batch(BATCH, 2))
PLANS = {
    "one stage": parts(ALL),
    "two stages": parts(ALL[:3], ALL[3:]),
    "three stages": parts(ALL[:1], ALL[1:4], ALL[4:]),
    "unequal stages": parts(ALL[:5], ALL[5:]),
    "replicas": REPLICAS,
    "unequal replicas": replace(REPLICAS, batch=Batch(BATCH, 2, (5, 3))),
}
PAIRS = [p for p in permutations(PLANS, 2) if "replicas" not in p[0] or "replicas" in p[1]][:8] + [
    ("replicas", "one stage"), ("replicas", "three stages"), ("unequal replicas", "two stages"),
    ("unequal replicas", "replicas"),
]  # fmt: skip


class Run:
    """A model under a plan in training; everything drawn comes from the global generators."""

    def __init__(
        self,
        plan: Plan = PLANS["two stages"],
        make: Callable[[Any], torch.optim.Optimizer] = lambda p: torch.optim.AdamW(p, lr=1e-2),
        *,
        seed: int = 0,
        model: nn.Module | None = None,
    ) -> None:
        torch.manual_seed(seed)
        self.model = model if model is not None else Model()
        loss = nn.functional.cross_entropy
        self.parallel = ParallelModule(self.model, plan, cluster(len(plan.devices)), loss_fn=loss)
        self.optimizer = make([p for p in self.parallel.parameters() if p.requires_grad])

    def train(self, steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            x = torch.from_numpy(numpy.random.randint(0, VOCABULARY, (BATCH,)))
            t = torch.tensor([random.randrange(VOCABULARY) for _ in range(BATCH)])

            def closure(x: torch.Tensor = x, t: torch.Tensor = t) -> float:
                self.optimizer.zero_grad()
                return self.parallel.train_step(x, t).item()

            if isinstance(self.optimizer, torch.optim.LBFGS):
                losses.append(float(self.optimizer.step(closure)))
            else:
                losses.append(closure())
                self.optimizer.step()
        return losses

    def state(self) -> dict[str, torch.Tensor]:
        """Every tensor of the model and of the optimizer's state, by name."""
        named = {id(p): name for name, p in self.model.named_parameters()}
        found = {f"model {name}": tensor.clone() for name, tensor in self.model.state_dict().items()}
        for parameter, state in self.optimizer.state.items():
            for key, value in state.items():
                if isinstance(value, torch.Tensor):
                    found[f"{named[id(parameter)]} {key}"] = value.clone()
        return found


@pytest.fixture(autouse=True)
def _end_threads() -> Iterator[None]:
    random.seed(0)
    numpy.random.seed(0)
    yield


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(x.dtype == b[k].dtype and torch.equal(x, b[k]) for k, x in a.items())


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    """A folder with the checkpoint of two steps of training, and the losses of the three steps after it."""
    root = tmp_path_factory.mktemp("saved")
    run = Run()
    run.train(2)
    checkpoint.save(root, run.parallel, run.optimizer, step=2, extra={"note": "two"})
    return root, run.train(3)


# -- any plan to any plan ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("before", "after"), PAIRS, ids=lambda name: name.replace(" ", "_"))
def test_weights_and_optimizer_state_cross_plans_bit_by_bit(before: str, after: str, tmp_path: Path) -> None:
    run = Run(PLANS[before])
    run.train(2)
    checkpoint.save(tmp_path, run.parallel, run.optimizer, step=2)
    expected, losses = run.state(), run.train(2)
    other = Run(PLANS[after], seed=1)
    other.train(1)
    assert not same(other.state(), expected)
    assert checkpoint.load(tmp_path, other.parallel, other.optimizer).step == 2
    assert same(other.state(), expected)
    resumed = other.train(2)
    if "replicas" in before + after:
        assert resumed == pytest.approx(losses, rel=1e-4)
    else:
        assert resumed == losses


def test_there_are_twelve_pairs_and_every_plan_is_on_both_sides() -> None:
    assert len(set(PAIRS)) == 12
    assert {a for a, _ in PAIRS} | {b for _, b in PAIRS} == set(PLANS)


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
    "tensor rate": lambda p: torch.optim.Adam(p, lr=torch.tensor(1e-2)),
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "momentum": lambda p: torch.optim.SGD(p, lr=1e-1, momentum=0.9),
    "plain": lambda p: torch.optim.SGD(p, lr=1e-1),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, centered=True, momentum=0.5),
    "nadam": lambda p: torch.optim.NAdam(p, lr=1e-2),
    "asgd": lambda p: torch.optim.ASGD(p, lr=1e-2),
    "rprop": lambda p: torch.optim.Rprop(p, lr=1e-2),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=1e-1, max_iter=3, history_size=4),
    "groups": lambda p: torch.optim.AdamW([{"params": p[:2], "lr": 1e-2}, {"params": p[2:], "weight_decay": 0.0}]),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_resumes_bit_by_bit_with_any_optimizer(name: str, tmp_path: Path) -> None:
    run = Run(make=OPTIMIZERS[name])
    run.train(2)
    checkpoint.save(tmp_path, run.parallel, run.optimizer)
    options = [{k: v for k, v in g.items() if k != "params"} for g in copy.deepcopy(run.optimizer.param_groups)]
    losses, expected = run.train(2), run.state()
    other = Run(make=OPTIMIZERS[name], seed=1)
    for group in other.optimizer.param_groups:
        group["lr"] = group["lr"] * 7
    checkpoint.load(tmp_path, other.parallel, other.optimizer)
    assert [{k: v for k, v in g.items() if k != "params"} for g in other.optimizer.param_groups] == options
    assert other.train(2) == losses
    assert same(other.state(), expected)


def test_a_schedule_in_extra_resumes(tmp_path: Path) -> None:
    def made(run: Run) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.CosineAnnealingLR(run.optimizer, T_max=5)

    def train(run: Run, scheduler: torch.optim.lr_scheduler.LRScheduler, steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            losses += run.train(1)
            scheduler.step()
        return losses

    run = Run()
    scheduler = made(run)
    train(run, scheduler, 2)
    checkpoint.save(tmp_path, run.parallel, run.optimizer, step=2, extra=scheduler.state_dict())
    losses = train(run, scheduler, 3)
    other = Run(seed=1)
    again = made(other)
    restored = checkpoint.load(tmp_path, other.parallel, other.optimizer)
    again.load_state_dict(restored.extra)
    assert train(other, again, 3) == losses


def test_the_unsplit_model_loads_it_and_is_loaded_from(saved: tuple[Path, list[float]], tmp_path: Path) -> None:
    root, _ = saved
    plain = Model()
    optimizer = torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad])
    checkpoint.load(root, plain, optimizer)
    checkpoint.save(tmp_path, plain, optimizer)
    a, b = Run(seed=1), Run(seed=2)
    checkpoint.load(root, a.parallel, a.optimizer)
    checkpoint.load(tmp_path, b.parallel, b.optimizer)
    assert same(a.state(), b.state())


def test_an_optimizer_that_has_not_stepped_is_restored_as_such(tmp_path: Path) -> None:
    run = Run()
    checkpoint.save(tmp_path, run.parallel, run.optimizer)
    losses = run.train(2)
    other = Run(seed=1)
    other.train(1)
    checkpoint.load(tmp_path, other.parallel, other.optimizer)
    assert not other.optimizer.state
    assert other.train(2) == losses


def test_weights_load_without_the_optimizer_and_without_the_generators(saved: tuple[Path, list[float]]) -> None:
    run = Run(seed=3)
    before = torch.get_rng_state()
    checkpoint.load(saved[0], run.parallel, random_state=False)
    assert torch.equal(torch.get_rng_state(), before)
    assert not run.optimizer.state


# -- boxes of tensors, as processes hold them --------------------------------------------------------------------------


class InBoxes(ParallelModule):
    """Holds every tensor of two dims as four boxes, cut at a third; the others whole."""

    def pieces(self) -> tuple[Piece, ...]:
        found = []
        for piece in super().pieces():
            if len(piece.shape) != 2:
                found.append(piece)
                continue
            rows, columns = piece.shape
            for top, height in ((0, rows // 3), (rows // 3, rows - rows // 3)):
                for left, width in ((0, columns // 3), (columns // 3, columns - columns // 3)):
                    box = piece.tensor[top : top + height, left : left + width]
                    found.append(replace(piece, offsets=(top, left), sizes=(height, width), tensor=box))
        return tuple(found)


def in_boxes(run: Run) -> Run:
    run.parallel = InBoxes(run.model, run.parallel.plan, run.parallel.cluster, loss_fn=run.parallel.loss_fn)
    return run


@pytest.mark.parametrize(("before", "after"), [(True, False), (False, True), (True, True)])
def test_boxes_of_tensors_are_put_together_and_apart(before: bool, after: bool, tmp_path: Path) -> None:
    run = in_boxes(Run()) if before else Run()
    run.train(2)
    where = checkpoint.save(tmp_path, run.parallel, run.optimizer)
    saved = checkpoint.check(where).tensors
    assert len(saved["model.first.weight"].chunks) == len(saved["optimizer.state.first.weight.exp_avg"].chunks)
    assert len(saved["model.first.weight"].chunks) == (4 if before else 1)
    other = in_boxes(Run(seed=1)) if after else Run(seed=1)
    checkpoint.load(where, other.parallel, other.optimizer)
    assert same(other.state(), run.state())


def test_a_state_that_cannot_be_divided_is_refused_by_name(tmp_path: Path) -> None:
    run = in_boxes(Run(make=OPTIMIZERS["adafactor"]))
    run.train(1)
    with pytest.raises(CheckpointError, match=r"'row_var' of 'first.weight' .*leaves this parameter whole"):
        checkpoint.save(tmp_path, run.parallel, run.optimizer)
    assert list(tmp_path.iterdir()) == []
    whole = Run(make=OPTIMIZERS["adafactor"])
    whole.train(1)
    checkpoint.save(tmp_path, whole.parallel, whole.optimizer)
    with pytest.raises(CheckpointError, match=r"'row_var' of 'first.weight' .*needs it whole"):
        checkpoint.load(tmp_path, run.parallel, run.optimizer)


def test_boxes_that_leave_a_gap_or_overlap_are_refused(tmp_path: Path) -> None:
    class Overlapping(InBoxes):
        def pieces(self) -> tuple[Piece, ...]:
            found = list(super().pieces())
            wide = next(p for p in found if p.fqn == "second.weight" and p.offsets != (0, 0))
            return (*found, replace(wide, offsets=(0, 1), sizes=(1, 1), tensor=wide.tensor[:1, :1]))

    run = Run()
    run.parallel = Overlapping(run.model, run.parallel.plan, run.parallel.cluster)
    with pytest.raises(CheckpointError, match=r"second\.weight.*overlapping"):
        checkpoint.save(tmp_path, run.parallel)
    assert list(tmp_path.iterdir()) == []


# -- what is kept ------------------------------------------------------------------------------------------------------


class Odd(nn.Module):
    """Every dtype a file has, an empty tensor, a scalar, a transposed tensor, state of a module's own making."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.half = nn.Linear(3, 2, dtype=torch.bfloat16)
        self.complex = nn.Parameter(torch.randn(2, 2, dtype=torch.complex64))
        self.turned = nn.Parameter(torch.randn(4, 3).t())
        for dtype in (torch.int64, torch.uint8, torch.bool, torch.float16, torch.float8_e4m3fn, torch.uint32):
            name = str(dtype).removeprefix("torch.")
            self.register_buffer(name, torch.randint(0, 2, (5,)).to(dtype))
        self.register_buffer("empty", torch.zeros(0, 4))
        self.register_buffer("conjugate", torch.randn(3, dtype=torch.complex64).conj())
        self.calls = seed

    def get_extra_state(self) -> dict[str, int]:
        return {"calls": self.calls}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.calls = state["calls"]


def bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.detach().resolve_conj().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def test_every_dtype_and_layout_comes_back_bit_by_bit(tmp_path: Path) -> None:
    model, other = Odd(3), Odd(4)
    checkpoint.save(tmp_path, model)
    checkpoint.load(tmp_path, other)
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, torch.Tensor):
            loaded = other.state_dict(keep_vars=True)[name]
            assert (loaded.dtype, loaded.stride()) == (tensor.dtype, tensor.stride())
            assert bits(loaded) == bits(tensor), name
    assert other.calls == 3


def test_tied_weights_are_saved_once_and_buffers_outside_the_state_dict_not_at_all(saved: tuple[Path, Any]) -> None:
    table = checkpoint.check(saved[0])
    names = {key.removeprefix("model.") for key in table.tensors if key.startswith("model.")}
    assert "head.weight" not in names and "table" not in names
    assert table.ties == {"head.weight": "embedding.weight"}
    run = Run(seed=1)
    run.model.table.fill_(7.0)
    checkpoint.load(saved[0], run.parallel)
    assert run.model.head.weight is run.model.embedding.weight
    assert run.model.table.tolist() == [7.0] * 3


def test_modes_and_frozen_parameters_stay_as_the_model_has_them(saved: tuple[Path, Any], tmp_path: Path) -> None:
    run = Run(seed=1)
    run.model.eval()
    checkpoint.load(saved[0], run.parallel)
    assert not run.model.norm.training and not run.model.first.bias.requires_grad
    checkpoint.save(tmp_path, run.parallel)
    assert not run.model.norm.training
    x = torch.arange(BATCH)
    other = Run(PLANS["three stages"], seed=2)
    other.model.eval()
    checkpoint.load(tmp_path, other.parallel)
    assert torch.equal(other.parallel(x), run.parallel(x))


# -- open to other tools -----------------------------------------------------------------------------------------------


def test_the_files_are_safetensors_under_the_models_own_names(saved: tuple[Path, Any]) -> None:
    where = checkpoint.latest(saved[0])
    assert where is not None
    plain = Model()
    loose = plain.load_state_dict(load_file(where / "model-00000.safetensors"), strict=False)
    assert (loose.missing_keys, loose.unexpected_keys) == (["head.weight"], [])
    run = Run(seed=1)
    checkpoint.load(where, run.parallel)
    assert all(
        torch.equal(a, b) for a, b in zip(plain.state_dict().values(), run.model.state_dict().values(), strict=True)
    )


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_plain_distributed_checkpoint_reads_it(saved: tuple[Path, Any]) -> None:
    plain, run = Model(), Run(seed=1)
    weights = {k: v for k, v in plain.state_dict().items() if k != "head.weight"}
    moment = torch.zeros(2 * WIDTH, WIDTH)
    wanted = {"model": weights, "optimizer": {"state": {"first.weight": {"exp_avg": moment}}}}
    dcp_load(wanted, storage_reader=checkpoint.Reader(saved[0]), no_dist=True)
    checkpoint.load(saved[0], run.parallel, run.optimizer)
    assert all(torch.equal(tensor, run.model.state_dict()[name]) for name, tensor in weights.items())
    assert torch.equal(moment, run.optimizer.state[run.model.first.weight]["exp_avg"])


def test_an_export_is_the_whole_model_in_one_file(tmp_path: Path) -> None:
    run = in_boxes(Run())
    run.train(1)
    path = tmp_path / "model.safetensors"
    checkpoint.export_safetensors(path, run.parallel)
    found = load_file(path)
    expected = {n: t for n, t in run.model.state_dict().items() if n != "head.weight"}
    assert same(found, expected)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    other = in_boxes(Run(PLANS["three stages"], seed=1))
    assert checkpoint.load_safetensors(path, other.parallel) == ()
    assert same(other.model.state_dict(), run.model.state_dict())


def test_safetensors_of_others_load_from_several_files_by_either_name_of_a_tie(tmp_path: Path) -> None:
    source = {name: tensor.clone() for name, tensor in Model().state_dict().items()}
    del source["embedding.weight"]
    first = {name: source.pop(name) for name in list(source)[:3]}
    save_file(first, tmp_path / "model-00001-of-00002.safetensors")
    save_file(source, tmp_path / "model-00002-of-00002.safetensors")
    run = Run(seed=5)
    assert checkpoint.load_safetensors(tmp_path, run.parallel) == ()
    merged = {**first, **source}
    assert all(torch.equal(run.model.state_dict()[name], tensor) for name, tensor in merged.items())


def test_a_misfitting_safetensors_file_changes_nothing(tmp_path: Path) -> None:
    run = Run()
    before = run.state()
    weights = {n: t.clone() for n, t in run.model.state_dict().items() if n != "head.weight"}
    weights["stray"] = weights.pop("norm.bias")
    weights["first.weight"] = weights["first.weight"][:3].clone()
    weights["second.bias"] = weights["second.bias"].half()
    save_file(weights, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError) as refusal:
        checkpoint.load_safetensors(tmp_path / "w.safetensors", run.parallel)
    for expected in ("has 'norm.bias'", "has 'stray'", "'first.weight' is (24, 12)", "'second.bias' is F32"):
        assert expected in str(refusal.value)
    assert same(run.state(), before)
    weights["first.weight"] = before["model first.weight"] + 1
    save_file(weights, tmp_path / "w.safetensors")
    loose = checkpoint.load_safetensors(tmp_path / "w.safetensors", run.parallel, strict=False, cast=True)
    assert len(loose) == 2
    assert torch.equal(run.model.first.weight, before["model first.weight"] + 1)


# -- refusals: all at once, by name, and nothing is changed ------------------------------------------------------------


def refused(root: Path, run: Run, *, weights_only: bool = False) -> CheckpointError:
    before, generators = run.state(), torch.get_rng_state()
    groups = repr(run.optimizer.param_groups)
    with pytest.raises(CheckpointError) as refusal:
        checkpoint.load(root, run.parallel, None if weights_only else run.optimizer)
    assert same(run.state(), before)
    assert torch.equal(torch.get_rng_state(), generators)
    assert repr(run.optimizer.param_groups) == groups
    return refusal.value


def test_another_models_checkpoint_is_refused_with_every_difference(saved: tuple[Path, Any]) -> None:
    model = Model()
    model.third = model.second
    del model.second
    model.first = nn.Linear(WIDTH, 3 * WIDTH)
    model.norm = model.norm.to(torch.float64)
    model.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
    found = refused(saved[0], Run(model=model), weights_only=True).problems
    starts = [
        "missing: the model has 'third.weight'", "unexpected: the checkpoint has 'second.bias'",
        "shape: 'first.weight' is (36, 12) in the model, (24, 12) in the checkpoint",
        "dtype: 'norm.weight' is float64 in the model, float32",
    ]  # fmt: skip
    assert all(any(line.startswith(start) for line in found) for start in starts)
    assert not any("head.weight" in line for line in found)  # tied there: its values are the embedding's


def test_a_tie_that_the_checkpoint_has_not_is_refused(tmp_path: Path) -> None:
    model = Model()
    model.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
    checkpoint.save(tmp_path, model)
    found = refused(tmp_path, Run(), weights_only=True)
    assert "'head.weight' on its own, the model ties it to 'embedding.weight'" in str(found)


def test_another_optimizer_and_other_groups_are_refused(saved: tuple[Path, Any]) -> None:
    assert "the state is AdamW's, this optimizer is SGD" in str(refused(saved[0], Run(make=OPTIMIZERS["plain"])))
    assert "has 1 param groups, this one has 2" in str(refused(saved[0], Run(make=OPTIMIZERS["groups"])))
    fewer = Run(make=lambda p: torch.optim.AdamW(p[1:]))
    assert "the checkpoint's optimizer has 'scale'" in str(refused(saved[0], fewer))


def test_moved_between_groups_is_refused(tmp_path: Path) -> None:
    run = Run(make=OPTIMIZERS["groups"])
    checkpoint.save(tmp_path, run.parallel, run.optimizer)
    other = Run(make=lambda p: torch.optim.AdamW([{"params": p[:3]}, {"params": p[3:]}]))
    assert "is in param group 0, but was saved in group 1" in str(refused(tmp_path, other))


def test_a_checkpoint_without_an_optimizer_is_refused_for_one(tmp_path: Path) -> None:
    run = Run()
    checkpoint.save(tmp_path, run.parallel)
    assert "has no optimizer state" in str(refused(tmp_path, run))


@pytest.mark.parametrize(
    "name", ["model-00000.safetensors", "optimizer-00000.safetensors", "values.pt", "random-00000.pt", "manifest.json"]
)
@pytest.mark.parametrize("how", ["flipped", "cut", "gone"])
def test_a_damaged_file_is_refused_by_name(name: str, how: str, saved: tuple[Path, Any], tmp_path: Path) -> None:
    shutil.copytree(saved[0], tmp_path, dirs_exist_ok=True)
    path = tmp_path / "step-00000002" / name
    data = bytearray(path.read_bytes())
    if how == "flipped":
        data[random.randrange(len(data) // 2, len(data) - 4)] ^= 1
        path.write_bytes(data)
    elif how == "cut":
        path.write_bytes(data[: len(data) // 2])
    else:
        path.unlink()
    message = str(refused(tmp_path if name != "manifest.json" or how != "gone" else path.parent, Run()))
    assert name in message
    if name != "manifest.json":
        wanted = {"flipped": "expected SHA-256", "cut": f"expected {len(data)} bytes", "gone": "cannot be read"}
        assert wanted[how] in message
        with pytest.raises(CheckpointError, match=name):
            checkpoint.check(tmp_path)


def test_every_single_byte_of_the_manifest_counts(saved: tuple[Path, Any]) -> None:
    text = (saved[0] / "step-00000002" / "manifest.json").read_bytes()
    manifest.loads(text, "it")
    silent = []
    for place in random.sample(range(len(text) - 2), 300):
        changed = bytearray(text)
        changed[place] ^= 1
        try:
            silent += [changed[place]] if manifest.loads(bytes(changed), "it") != manifest.loads(text, "it") else []
        except CheckpointError:
            continue
    assert silent == []


def test_a_manifest_of_a_later_version_says_so(saved: tuple[Path, Any]) -> None:
    text = (saved[0] / "step-00000002" / "manifest.json").read_bytes()
    with pytest.raises(CheckpointError, match="version 2; this partita reads version 1"):
        manifest.loads(text.replace(b'"partita_checkpoint": 1', b'"partita_checkpoint": 2'), "it")


def test_nothing_there_a_wrong_pointer_and_no_pointer_are_told_apart(saved: tuple[Path, Any], tmp_path: Path) -> None:
    run = Run()
    assert checkpoint.latest(tmp_path) is None
    assert "has no checkpoint" in str(refused(tmp_path, run))
    assert "does not exist" in str(refused(tmp_path / "nowhere", run))
    shutil.copytree(saved[0], tmp_path, dirs_exist_ok=True)
    (tmp_path / "latest").write_text("../elsewhere\n")
    assert "whole ones there" in str(refused(tmp_path, run))
    (tmp_path / "latest").unlink()
    assert "step-00000002" in str(refused(tmp_path, run))
    checkpoint.load(tmp_path / "step-00000002", run.parallel, run.optimizer)


def test_what_cannot_be_saved_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    run = Run()
    with pytest.raises(UsageError, match="extra.*must be plain values"):
        checkpoint.save(tmp_path, run.parallel, extra=run.model)
    with pytest.raises(UsageError, match="whole number"):
        checkpoint.save(tmp_path, run.parallel, step=-1)
    with pytest.raises(UsageError, match=r"torch\.optim\.Optimizer"):
        checkpoint.save(tmp_path, run.parallel, run.model)  # type: ignore[arg-type]
    stranger = torch.optim.SGD(nn.Linear(2, 3).parameters(), lr=1.0)
    with pytest.raises(CheckpointError, match=r"parameter 0 of the optimizer's group 0, of shape \(3, 2\)"):
        checkpoint.save(tmp_path, run.parallel, stranger)
    sparse = nn.Linear(2, 2)
    sparse.register_buffer("mask", torch.eye(2).to_sparse())
    with pytest.raises(CheckpointError, match=r"'mask' has the layout torch\.sparse_coo"):
        checkpoint.save(tmp_path, sparse)
    with torch.device("meta"):
        empty = nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match="'weight' is on the meta device"):
        checkpoint.save(tmp_path, empty)
    assert list(tmp_path.iterdir()) == []


def test_an_expanded_buffer_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    def made() -> nn.Module:
        model = nn.Linear(2, 2)
        model.register_buffer("rows", torch.ones(1, 3).expand(4, 3))
        return model

    checkpoint.save(tmp_path, made())
    with pytest.raises(CheckpointError, match="'rows' is an expanded tensor"):
        checkpoint.load(tmp_path, made())


# -- the folder --------------------------------------------------------------------------------------------------------


def test_a_step_saved_again_replaces_nothing_and_is_the_latest(tmp_path: Path) -> None:
    run = Run()
    first = checkpoint.save(tmp_path, run.parallel, step=7)
    run.train(1)
    second = checkpoint.save(tmp_path, run.parallel, step=7)
    assert [p.name for p in folder.complete(tmp_path)] == ["step-00000007", "step-00000007-2"]
    assert checkpoint.latest(tmp_path) == second != first
    checkpoint.check(first)


def test_keep_leaves_the_newest(tmp_path: Path) -> None:
    run = Run()
    for step in range(9, 13):
        checkpoint.save(tmp_path, run.parallel, step=step, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000011", "step-00000012"]


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run()
    first = checkpoint.save(tmp_path, run.parallel, run.optimizer, step=1)

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match="No space left on device"):
        patch.setattr(os, "fsync", full)
        checkpoint.save(tmp_path, run.parallel, run.optimizer, step=2)
    assert checkpoint.latest(tmp_path) == first
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000001"]


# -- killed ------------------------------------------------------------------------------------------------------------


def _values(step: int) -> float:
    return float(step * 1000 + 1)


def _filled(step: int, size: int = 1 << 16) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model and an optimizer whose every number says which step it is of."""
    model = nn.Sequential(nn.Linear(size, 1, bias=False), nn.Linear(1, 8))
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.data.fill_(_values(step))
        filled = torch.full_like(parameter, _values(step))
        optimizer.state[parameter] = {"step": torch.tensor(_values(step)), "exp_avg": filled, "exp_avg_sq": filled + 1}
    return model, optimizer


def _save_for_ever(root: Path, begin: int, told: Any) -> None:
    """Saves step after step; tells each when its save has returned."""
    torch.set_num_threads(1)
    step = begin
    while True:
        model, optimizer = _filled(step)
        checkpoint.save(root, model, optimizer, step=step, extra=step, keep=2)
        told.send(step)
        step += 1


def _save_until_the_nth(root: Path, step: int, number: int) -> None:
    """Dies by kill -9 just before the nth thing it asks of the disk; ends by itself where there are fewer."""
    torch.set_num_threads(1)
    model, optimizer = _filled(step)
    left = number

    def mortal(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for name in ("fsync", "rename", "replace", "mkdir", "open", "unlink"):
        setattr(os, name, mortal(getattr(os, name)))
    checkpoint.save(root, model, optimizer, step=step, extra=step, keep=2)


def _loaded(root: Path) -> int:
    """Load the latest; every number of it must be of one step, which is returned."""
    model, optimizer = _filled(0)
    restored = checkpoint.load(root, model, optimizer)
    step = restored.step
    assert restored.extra == step
    for parameter in model.parameters():
        state = optimizer.state[parameter]
        for tensor, offset in ((parameter, 0), (state["exp_avg"], 0), (state["exp_avg_sq"], 1), (state["step"], 0)):
            assert (tensor == _values(step) + offset).all()
    return step


@pytest.fixture(scope="module")
def processes() -> Any:
    """Processes that begin with everything imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "partita.checkpoint", "torch._dynamo"])
    return context


def test_killed_at_20_random_moments_no_checkpoint_is_lost_or_wrong(tmp_path: Path, processes: Any) -> None:
    draw = random.Random(1)
    step = 0
    during = 0
    for _ in range(20):
        heard, told = processes.Pipe(duplex=False)
        process = processes.Process(target=_save_for_ever, args=(tmp_path, step + 1, told))
        process.start()
        told.close()
        promised = heard.recv()
        time.sleep(draw.uniform(0.0, 0.1))
        process.kill()
        process.join()
        while True:
            try:
                promised = heard.recv()
            except EOFError:
                break
        during += any(p.name.startswith(".partial") for p in tmp_path.iterdir())
        step = _loaded(tmp_path)
        assert step in (promised, promised + 1)
        for whole in folder.complete(tmp_path):
            checkpoint.check(whole)
    assert during >= 5  # the kills fell into saves


def test_killed_before_any_request_to_the_disk_no_checkpoint_is_lost_or_wrong(tmp_path: Path, processes: Any) -> None:
    model, optimizer = _filled(1)
    checkpoint.save(tmp_path, model, optimizer, step=1, extra=1)
    seen = set()
    for number in range(200):
        step = _loaded(tmp_path) + 1
        process = processes.Process(target=_save_until_the_nth, args=(tmp_path, step, number))
        process.start()
        process.join()
        found = _loaded(tmp_path)
        seen.add(found - step)
        assert found in (step - 1, step)
        for whole in folder.complete(tmp_path):
            checkpoint.check(whole)
        if process.exitcode == 0:
            assert found == step
            break
    else:
        raise AssertionError("it never ended by itself")
    assert seen == {-1, 0} and number > 10
    assert not any(p.name.startswith(".partial") for p in tmp_path.iterdir())


def test_the_manifest_says_what_is_inside(saved: tuple[Path, Any]) -> None:
    sealed = json.loads((saved[0] / "step-00000002" / "manifest.json").read_text())
    content = sealed["content"]
    assert (content["step"], content["model"], content["ranks"]) == (2, "Model", 1)
    assert content["optimizer"]["state"]["scale"] == {"step": "like", "exp_avg": "like", "exp_avg_sq": "like"}
    assert content["optimizer"]["state"]["second.bias"]["step"] == "scalar"
