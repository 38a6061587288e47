"""Wrong input meets one clear message that names the thing and the next step: in Python and on the command line."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import partita
from partita.cli import main
from partita.errors import (
    CaptureError,
    ClusterError,
    ExecutionError,
    InfeasibleError,
    PartitaError,
    PlanError,
    UsageError,
)
from partita.plan import Batch, Plan, Stage

TWO = ["cpu", "cpu"]


class Net(nn.Module):
    """Three layers; ``second`` needs ``first``, ``third`` needs both."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)
        self.third = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.first(x).relu()
        b = self.second(a).relu()
        return self.third(a + b)


class Fails(nn.Module):
    """Its forward does not run at all."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x.reshape(-1, 7))


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def x(rows: int = 6) -> torch.Tensor:
    return torch.randn(rows, 8, generator=torch.Generator().manual_seed(1))


def good_plan() -> Plan:
    return Plan(
        stages=(Stage(("cpu:0",), ("first",)), Stage(("cpu:1",), ("second", "third"))),
        devices=("cpu:0", "cpu:1"),
        batch=Batch(6, 2),
    )


def divided(*, model: Any = None, example: Any = None, devices: Any = TWO, **options: Any) -> Callable[[], object]:
    """``parallelize``, to be called later."""
    example = (x(),) if example is None else example
    return lambda: partita.parallelize(model or net(), example, devices=devices, **options)


def planned(**options: Any) -> Callable[[], object]:
    return lambda: partita.find_plan(net(), (x(),), devices=TWO, **options)


def cut(at: list[str], devices: Any = TWO) -> Callable[[], object]:
    return lambda: partita.split(net(), (x(),), at=at, devices=devices)


def by_hand(first: Stage | None = None, second: Stage | None = None, **changes: Any) -> Callable[[], object]:
    """``parallelize`` with the good plan, in which these stages or fields are other ones."""
    one, two = good_plan().stages
    return divided(plan=replace(good_plan(), **{"stages": (first or one, second or two), **changes}))


def on_first(*modules: str, **more: Any) -> Stage:
    return Stage(("cpu:0",), modules, **more)


def on_second(*modules: str) -> Stage:
    return Stage(("cpu:1",), modules)


def called(given: torch.Tensor) -> Callable[[], object]:
    return lambda: partita.parallelize(net(), (x(),), devices=TWO)(given)


def trained(loss_fn: Any, *args: Any) -> Callable[[], object]:
    return lambda: partita.parallelize(net(), (x(),), devices=TWO, loss_fn=loss_fn).train_step(*args)


@dataclass(frozen=True)
class Case:
    """``call`` raises ``error`` (and no other kind) with a message in which every one of ``texts`` is found."""

    name: str
    call: Callable[[], object]
    error: type[PartitaError]
    texts: tuple[str, ...]


HERE = r"test_bad_input\.py:\d+"
CASES = [
    # The model and its example
    Case("a class instead of a model", divided(model=Net), UsageError, ("must be an nn.Module", "not its class")),
    Case("a tensor instead of arguments", divided(example=x()), UsageError, ("example_args", "(x,)")),
    Case("a forward that fails", divided(model=Fails()), CaptureError, ("shape", HERE)),
    Case("an example of a wrong width", divided(example=(torch.randn(6, 9),)), CaptureError, ("6x9", HERE)),
    Case("a missing example", divided(example=()), CaptureError, ("argument",)),
    # Devices and memory
    Case("a GPU that is not there", divided(devices=["cpu", "cuda:77"]), ClusterError,
         ("no device 'cuda:77'", "this machine has", "in find_plan")),
    Case("no devices", divided(devices=0), ClusterError, ("at least 1",)),
    Case("an empty list of devices", divided(devices=[]), ClusterError, ("name at least one",)),
    Case("a device twice", divided(devices=["cpu:0", "cpu:0"]), ClusterError, ("'cpu:0' is named twice",)),
    Case("an unknown kind of device", divided(devices=["gpx:0"]), ClusterError, ("no device 'gpx:0'",)),
    Case("memory that is no amount", divided(memory="lots"), UsageError, ("'lots' is not an amount of memory", "2GiB")),
    Case("memory of a device not used", divided(memory={"cpu:5": "1GiB"}), UsageError,
         ("'cpu:5' that is not used", "cpu:0, cpu:1")),
    Case("memory too small", planned(memory="100"), InfeasibleError,
         ("cpu:0 100B", r"smallest memory that works: [\d.]+[KM]?i?B on cpu")),
    # Split points
    Case("an unknown split point", cut(["secnod"]), PlanError, ("'secnod'", "did you mean second")),
    Case("more stages than devices", cut(["second", "third"]), PlanError,
         ("3 stages", "2 devices", "give 3 devices or fewer split points")),
    Case("split points out of order", cut(["third", "second"], 3), PlanError, ("'second'", "in the order they run")),
    Case("a split point at the beginning", cut(["first"]), PlanError, ("'first'", "the first stage would be empty")),
    Case("a split point twice", cut(["second", "second"], 3), PlanError, ("'second'", "in the order they run")),
    # Plans
    Case("a plan that names no module", by_hand(on_first("frist")), PlanError, ("frist", "did you mean", "first")),
    Case("a plan whose stages need each other", by_hand(on_first("first", "third"), on_second("second")), PlanError,
         ("stage 0 runs third:linear", "in the later stage 1", HERE)),
    Case("a plan for another model", by_hand(model="GPT", fingerprint="0123abcd"), PlanError,
         ("another model: GPT", "plan this model anew")),
    Case("a plan on a device that takes no part", by_hand(None, Stage(("cpu:7",), ("second", "third"))), PlanError,
         ("cpu:7", "cpu:0, cpu:1")),
    Case("a module in two stages", by_hand(on_first("first", "second"), on_second("second")), PlanError,
         ("'second' is listed by stages 0 and 1; keep it in one of them",)),
    Case("a plan without stages", by_hand(stages=()), PlanError, ("it has no stages",)),
    Case("an unknown schedule", by_hand(schedule="2f2b"), PlanError, ("'2f2b' is not known; did you mean '1f1b'?",)),
    Case("no microbatches", by_hand(batch=Batch(6, 0)), PlanError, ("microbatches is 0; it must be at least 1",)),
    Case("recomputing what a stage does not run", by_hand(on_first("first", recompute=("third",))), PlanError,
         ("recompute", "third")),
    Case("a plan file that is not there", divided(plan="/no/such/plan.yaml"), UsageError,
         ("no plan file at '/no/such/plan.yaml'",)),
    Case("several mistakes at once", by_hand(on_first("frist"), Stage(("cpu:7",), ("third",)), schedule="2f2b"),
         PlanError, ("2f2b", "frist", "cpu:7")),
    # Options
    Case("an unknown constraint", planned(constraints={"split_befor": ["third"]}), UsageError,
         ("'split_befor' is no constraint", "did you mean 'split_before'")),
    Case("a constraint on an unknown module", planned(constraints={"split_before": ["thrid"]}), PlanError,
         ("thrid", "third")),
    Case("an unknown optimizer", planned(optimizer="adan"), UsageError, ("'adan'", "adamw")),
    Case("an unknown objective", planned(objective="fastest"), UsageError, ("fastest", "train")),
    # Running
    Case("a call of a wrong width", called(torch.randn(6, 9)), CaptureError, ("6x9", HERE)),
    Case("a call of a wrong dtype", called(x().double()), ExecutionError, ("stage 0", "'first'", "dtype", HERE)),
    Case("a loss that is no scalar", trained(lambda y, t: (y - t) ** 2, x(), torch.zeros(6, 4)), UsageError,
         ("scalar",)),
    Case("a step without a loss", trained(None, x()), UsageError, ("loss_fn",)),
    Case("targets that do not fit", trained(F.mse_loss, x(), torch.zeros(5, 4)), CaptureError, ("must match",)),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_in_python(case: Case) -> None:
    with pytest.raises(case.error) as caught:
        case.call()
    message = str(caught.value)
    for text in case.texts:
        assert re.search(text if "\\" in text or "|" in text else re.escape(text), message), (text, message)
    assert caught.type in (case.error, *case.error.__subclasses__()) or case.error is PartitaError


@pytest.mark.parametrize("rows", [0, 1, 5, 7, 13])
def test_any_batch_size_gives_what_the_model_gives(rows: int) -> None:
    model = net()
    parallel = partita.parallelize(model, (x(),), devices=TWO, plan=good_plan())
    given, wanted = parallel(x(rows)), model(x(rows))
    assert given.shape == wanted.shape
    torch.testing.assert_close(given, wanted)


def test_a_failing_call_leaves_the_module_usable() -> None:
    model = net()
    parallel = partita.parallelize(model, (x(),), devices=TWO)
    with pytest.raises(PartitaError):
        parallel(torch.randn(6, 9))
    torch.testing.assert_close(parallel(x()), model(x()))


def test_an_error_inside_a_stage_names_the_stage_and_keeps_the_cause() -> None:
    class Picky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(4, 8)
            self.out = nn.Linear(8, 2)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.out(self.table(ids))

    good = torch.zeros(6, 3, dtype=torch.long)
    parallel = partita.split(Picky(), (good,), at=["out"], devices=TWO)
    with pytest.raises(
        ExecutionError, match=r"(?s)table.*test_bad_input\.py:\d+|test_bad_input\.py:\d+.*table"
    ) as caught:
        parallel(good + 9)
    assert isinstance(caught.value.__cause__, IndexError)
    assert parallel(good).shape == (6, 3, 2)


def test_control_flow_on_values_is_never_baked_in() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(8, 8)
            self.b = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.a(x)
            return self.b(y) if y.sum() > 0 else y - self.b(-y)

    model = Branch()
    parallel = partita.parallelize(model, (x(),), devices=TWO)
    for scale in (1.0, -1.0, 10.0, -10.0):
        torch.testing.assert_close(parallel(x() * scale), model(x() * scale))


# On the command line

MODEL = """\
import torch
from torch import nn
def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), (torch.randn(6, 8),)
def other():
    return nn.Sequential(nn.Linear(8, 9), nn.ReLU(), nn.Linear(9, 4)), (torch.randn(6, 8),)
def wrong():
    return nn.Linear(8, 4), (torch.randn(6, 9),)
"""

COMMANDS = [
    ("plan net.py:make --devices cuda:77", 2, "there is no device 'cuda:77'"),
    ("plan net.py:make --devices 8xH10", 2, "did you mean 'H100'?"),
    ("plan net.py:make --devices 0", 2, "it must be at least 1"),
    ("plan net.py:make --devices none.yaml", 2, "no cluster file at 'none.yaml'"),
    ("plan net.py:make --devices bad.yaml", 2, "cannot be used as a cluster"),
    ("plan net.py:make --devices 2 --memory lots", 2, "'lots' is not an amount of memory"),
    ("plan net.py:make --devices 2 --memory 100", 3, "smallest memory that works: "),
    ("plan net.py:make --devices 2 --batch 0", 2, "--batch 0 holds no samples; it must be at least 1"),
    ("plan net.py:make --devices 2 --optimizer adan", 2, "'adan'"),
    ("plan net.py:make --devices 2 --objective fastest", 2, "fastest"),
    ("plan net.py:make --devices 2 -o none/plan.yaml", 2, "there is no directory 'none'; make it first"),
    ("plan net.py:make --devices 2 -o folder", 2, "it is a directory; name a file in it"),
    ("plan net.py:wrong --devices 2", 2, "6x9"),
    ("plan net.py:nothing --devices 2", 2, "net.py has no 'nothing'"),
    ("explain none.yaml", 2, "no plan file at 'none.yaml'"),
    ("explain corrupt.yaml", 2, "'corrupt.yaml' is not YAML: line 4"),
    ("explain bad.yaml", 2, "unknown key"),
    ("explain folder", 2, "cannot read the plan file 'folder'"),
    ("explain binary.yaml", 2, "not UTF-8 text"),
    ("verify net.py:make --plan none.yaml", 2, "no plan file at 'none.yaml'"),
    ("verify net.py:make --plan unknown.yaml", 2, "fc9"),
    ("verify net.py:other --plan made.yaml", 2, "another model"),
    ("verify net.py:make --devices 2 --batch -3", 2, "--batch -3 holds no samples"),
    ("simulate net.py:make --plan unknown.yaml", 2, "fc9"),
    ("simulate net.py:make --devices 2 --trace none/t.json", 2, "there is no directory 'none'; make it first"),
    ("report net.py:make --devices 2 -o none/r.html", 2, "there is no directory 'none'; make it first"),
    ("measure -o none/c.yaml", 2, "there is no directory 'none'; make it first"),
    ("measure --devices cuda:77", 2, "there is no device 'cuda:77'"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("cli")
    (place / "net.py").write_text(MODEL)
    (place / "corrupt.yaml").write_text("partita: 1\nstages:\n  - {devices: [cpu:0\nbatch: 3\n")
    (place / "bad.yaml").write_text("partita: 1\nstage: []\n")
    (place / "binary.yaml").write_bytes(b"\xff\xfe\x00\x01")
    (place / "unknown.yaml").write_text(
        "partita: 1\nstages:\n  - {devices: [cpu:0], modules: [fc9]}\n  - {devices: [cpu:1], modules: ['2']}\n"
    )
    (place / "folder").mkdir()
    before = Path.cwd()
    os.chdir(place)
    try:
        assert main(["plan", "net.py:make", "--devices", "2", "-o", "made.yaml"]) == 0
    finally:
        os.chdir(before)
    return place


@pytest.mark.parametrize(("command", "code", "text"), COMMANDS, ids=[c for c, _, _ in COMMANDS])
def test_on_the_command_line(
    command: str,
    code: int,
    text: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folder)
    assert main(command.split()) == code
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and text in err
    assert "Traceback" not in err + out
    assert out == ""


def test_a_terminal_shows_one_message_and_nothing_else(folder: Path) -> None:
    command = [sys.executable, "-m", "partita.cli", "plan", "net.py:wrong", "--devices", "2"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="the superuser may write everywhere")
def test_a_directory_that_may_not_be_written_is_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    assert main(["plan", "net.py:make", "--devices", "2", "-o", str(tmp_path / "plan.yaml")]) == 2
    assert "cannot write the plan file" in capsys.readouterr().err
