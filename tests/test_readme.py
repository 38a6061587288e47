"""What the documentation shows is what happens: its Python runs, its files are read."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from partita import cluster_file, plan_file
from partita.planners.constraints import Constraints

ROOT = Path(__file__).resolve().parent.parent


def blocks(page: str, language: str) -> list[str]:
    return re.findall(
        rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )


def test_the_readmes_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    shown = blocks("README.md", "python")
    assert len(shown) == 5
    for block in shown:
        exec(compile(block, "README.md", "exec"), names)


def test_the_plans_shown_are_plans() -> None:
    shown = [b for page in ("README.md", "docs/files.md") for b in blocks(page, "yaml") if b.startswith("partita:")]
    assert len(shown) == 3
    for block in shown:
        assert plan_file.loads(block).stages


def test_the_cluster_shown_is_a_cluster() -> None:
    (shown,) = (b for b in blocks("docs/files.md", "yaml") if b.startswith("partita_cluster:"))
    assert len(cluster_file.loads(shown).devices) == 2


def test_the_constraints_shown_are_constraints() -> None:
    shown = [b for b in blocks("docs/files.md", "yaml") if not b.startswith("partita")]
    assert len(shown) == 2
    for block in shown:
        assert Constraints.read(yaml.safe_load(block)) != Constraints()


def test_every_decision_is_listed() -> None:
    folder = ROOT / "docs" / "decisions"
    listed = set(re.findall(r"\((\d{4}-[\w-]+\.md)\)", (folder / "README.md").read_text(encoding="utf-8")))
    assert listed == {p.name for p in folder.glob("0*.md")}
