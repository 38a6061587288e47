"""Every example runs by itself, in seconds, and its own check against the unsplit model holds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted(p for p in (ROOT / "examples").glob("*.py") if p.stem != "cnn")


def run(*command: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=240, env=environment
    )


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda p: p.stem)
def test_the_example_runs_and_gives_the_unsplit_models_numbers(example: Path) -> None:
    ended = run(str(example))
    assert ended.returncode == 0, ended.stderr
    assert "equal" in ended.stdout


def test_there_is_an_example_for_each_way_of_use() -> None:
    assert {p.stem for p in EXAMPLES} >= {
        "quickstart", "manual_split", "plan_file", "context_manager", "model_parallel", "fused_op",
    }  # fmt: skip
