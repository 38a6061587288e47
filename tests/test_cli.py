"""The command line: its verbs, exit codes and output. A refusal is one message, never a traceback."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from partita import cluster_file
from partita.cli import main
from partita.cluster import Cluster
from partita.errors import UsageError
from partita.factory import load, resize
from partita.plan import Plan

MODEL = """\
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    return model, (torch.randn(6, 8),)

def with_kwargs(batch=3):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 4)
        def forward(self, x, *, scale):
            return self.fc(x) * scale
    return Scaled(), (torch.randn(batch, 8),), {"scale": 2.0}

def branching():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 4)
        def forward(self, x):
            return self.fc(x) if x.sum() > 0 else -self.fc(x)
    return Branching(), (torch.randn(6, 8),)

NUMBER = 3
def fails(): raise RuntimeError("no weights here")
def one_value(): return nn.Linear(2, 2)
def four_values(): return 1, 2, 3, 4
def no_model(): return "model", (torch.ones(1),)
def no_tuple(): return nn.Linear(2, 2), torch.ones(1, 2)
def no_dict(): return nn.Linear(2, 2), (torch.ones(1, 2),), 3
"""

BY_HAND = """\
partita: 1
batch: {size: 6, microbatches: 2}
schedule: 1f1b
stages:
  - {devices: [cpu:0], modules: ['0', '1', '2']}
  - {devices: [cpu:1], modules: ['3', '4']}
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a model file and a plan, as the current one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(MODEL)
    (tmp_path / "plan.yaml").write_text(BY_HAND)
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(words)
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    return code, out, err


# Verbs


def test_plan_finds_prints_and_writes_a_plan(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "plan", "net.py:make", "--devices", "2", "-o", "found.yaml")
    assert (code, err) == (0, "")
    assert "why:" in out and "written to found.yaml" in out
    found = Plan.load("found.yaml")
    assert found.fingerprint and found.reasons and found.predicted is not None
    assert found.explain().splitlines()[0] in out


def test_plan_for_hardware_that_is_not_here(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "plan", "net.py:make", "--devices", "2x2xH100", "--json")
    assert code == 0
    named = {name for stage in json.loads(out)["stages"] for name in stage["devices"]}
    assert named <= {f"node{n}/cuda:{i}" for n in range(2) for i in range(2)}


def test_plan_reads_a_cluster_file(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cluster_file.describe("2xCPU").save("c.yaml")
    code, out, _ = run(capsys, "plan", "net.py:make", "--devices", "c.yaml", "--batch", "12", "--json")
    assert code == 0
    assert json.loads(out)["batch"]["size"] == 12


def test_explain_says_what_the_file_does(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "explain", "plan.yaml")
    assert code == 0
    assert out == Plan.load("plan.yaml").explain() + "\n"
    code, out, _ = run(capsys, "explain", "plan.yaml", "--json")
    assert json.loads(out)["batch"] == {"size": 6, "microbatches": 2, "sizes": []}


def test_verify_compares_outputs_and_gradients(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "verify", "net.py:make", "--plan", "plan.yaml")
    assert (code, err) == (0, "")
    assert out.startswith("equal: 1 outputs, 6 gradients")
    code, out, _ = run(capsys, "verify", "net.py:with_kwargs", "--devices", "2", "--batch", "5", "--json")
    assert code == 0
    assert json.loads(out)["equal"] is True


def test_simulate_predicts_and_writes_a_chrome_trace(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "simulate", "net.py:make", "--plan", "plan.yaml", "--trace", "t.json")
    assert code == 0
    assert "cpu:0 peak memory" in out and "cpu:1 " in out
    events = json.loads((here / "t.json").read_text())["traceEvents"]
    assert {e["cat"] for e in events if e["ph"] == "X"} >= {"F", "B"}
    code, out, _ = run(capsys, "simulate", "net.py:make", "--plan", "plan.yaml", "--json")
    assert json.loads(out)["step_seconds"] > 0


def test_report_sets_predicted_beside_measured(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("jinja2")
    words = ("report", "net.py:make", "--plan", "plan.yaml", "-o", "r.html", "--trace", "t.json")
    code, out, err = run(capsys, *words)
    assert (code, err) == (0, "")
    assert "predicted" in out and "measured" in out and "written to r.html" in out
    assert (here / "r.html").read_text().count("<svg") == 2
    names = {e["args"]["name"] for e in json.loads((here / "t.json").read_text())["traceEvents"] if e["ph"] == "M"}
    assert {"simulated", "measured", "cpu:0", "cpu:1"} <= names


def test_measure_writes_a_cluster_that_reads_back(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "measure", "-o", "c.yaml", "--devices", "cpu,cpu")
    assert code == 0
    assert [d.name for d in Cluster.load("c.yaml").devices] == ["cpu:0", "cpu:1"]
    assert "cpu:0: " in out and "Gflop/s" in out


def test_doctor_names_versions_devices_and_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "doctor")
    assert code == 0
    assert torch.__version__ in out and "cpu:0" in out
    code, out, _ = run(capsys, "doctor", "--json")
    assert {"python", "torch", "memory", "cache"} <= {row["what"] for row in json.loads(out)}


@pytest.mark.parametrize("verb", ["plan", "explain", "verify", "simulate", "report", "measure", "demo", "doctor"])
def test_every_verb_of_the_contract_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, verb, "--help")
    assert code == 0
    assert out.strip()


def test_the_command_line_starts_without_torch() -> None:
    code = "import sys, partita.cli; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "False"


# Usage


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("plan",), "Missing argument 'FACTORY'"),
        (("plan", "net.py:make", "--devises", "2"), "No such option: --devises"),
        (("paln", "net.py:make"), "No such command 'paln'"),
        (("plan", "net.py:make", "--batch", "many"), "Invalid value for '--batch'"),
        (("report", "net.py:make", "--steps", "0"), "Invalid value for '--steps'"),
    ],
)
def test_wrong_usage_is_exit_code_2(
    words: tuple[str, ...], text: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(capsys, *words)
    assert code == 2
    assert text in " ".join(err.split())


def test_with_json_a_refusal_is_json_too(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "bad.yaml").write_text("partita: 1\nstage: []\n")
    code, out, err = run(capsys, "explain", "bad.yaml", "--json")
    assert code == 2
    error = json.loads(out)["error"]
    assert error["kind"] == "PlanError"
    assert "line 2: stage: unknown key; did you mean 'stages'?" in error["problems"]
    assert error["message"] in err


# Factories


def test_a_factory_is_a_function_of_a_file_or_a_module(here: Path) -> None:
    model, args, kwargs = load("net.py:make")
    assert (len(model), tuple(args[0].shape), kwargs) == (5, (6, 8), {})  # type: ignore[arg-type]
    assert tuple(load("net:make")[1][0].shape) == (6, 8)


def test_batch_goes_to_the_factory_or_to_the_rows(here: Path) -> None:
    assert tuple(load("net.py:with_kwargs", 5)[1][0].shape) == (5, 8)
    _, (small,), _ = load("net.py:make")
    _, (large,), _ = load("net.py:make", 9)
    assert torch.equal(large[6:], large[:3])
    assert large.shape == (9, 8) and small.shape == (6, 8)


def test_rows_are_changed_wherever_the_batch_is_the_first_dim() -> None:
    x, mask, table = torch.arange(4.0).reshape(2, 2), torch.ones(2, dtype=torch.bool), torch.ones(5, 3)
    args, kwargs = resize((x, [mask]), {"more": {"t": table, "n": None}}, 3)
    assert torch.equal(args[0], x[[0, 1, 0]])
    assert args[1][0].shape == (3,)
    assert kwargs["more"]["t"] is table


def test_a_call_without_tensors_cannot_be_resized() -> None:
    with pytest.raises(UsageError, match="--batch needs an example call with a tensor"):
        resize((1, "x"), {}, 3)


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("net.py", "names no function; write module:function or file.py:function"),
        ("nte.py:make", "there is no file 'nte.py'; did you mean 'net.py'?"),
        ("net.py:mkae", "net.py has no 'mkae'; did you mean 'make'?"),
        ("nowhere.at.all:make", "there is no module 'nowhere.at.all' here or installed; a file is written"),
        ("net.py:NUMBER", "'NUMBER' is a int, not a function"),
        ("net.py:fails", "failed: RuntimeError: no weights here ("),
        ("net.py:one_value", "returned a Linear; it must return (model, example_args)"),
        ("net.py:four_values", "returned 4 values; it must return (model, example_args)"),
        ("net.py:no_model", "returned a str as its model"),
        ("net.py:no_tuple", "returned a Tensor as example_args; it must return"),
        ("net.py:no_dict", "returned a int as example_kwargs"),
        ("broken.py:make", "'broken.py' cannot be imported: SyntaxError"),
        ("needy.py:make", "'needy.py' cannot be imported: ModuleNotFoundError: No module named 'unheard_of'"),
    ],
)
def test_a_factory_that_makes_nothing_usable_is_exit_code_2(
    spec: str, text: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "broken.py").write_text("def make(:\n")
    (here / "needy.py").write_text("import unheard_of\n")
    code, out, err = run(capsys, "plan", spec, "--devices", "2")
    assert (code, out) == (2, "")
    assert err.startswith("error: FACTORY")
    assert text in err


def test_the_users_own_line_is_named(here: Path) -> None:
    with pytest.raises(UsageError, match=r"net\.py:\d+: def fails\(\): raise RuntimeError"):
        load("net.py:fails")
