"""Reports: predicted beside measured, in text and on one page that needs nothing else."""

from __future__ import annotations

import builtins
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from partita.errors import UsageError
from partita.plan import Batch, Plan, Predicted, Stage
from partita.report import comparison_table, write_page
from partita.report.figures import compare
from partita.trace import Event, Trace

PLAN = Plan(
    stages=(Stage(("cpu:0",), ("emb", "blocks.0")), Stage(("cpu:1",), ("head<b>",), recompute=("head<b>",))),
    model="GPT",
    devices=("cpu:0", "cpu:1"),
    batch=Batch(32, 4),
    predicted=Predicted(0.4, "cpu:1", (("cpu:0", 2**20),)),
    reasons=("cut where 2 MiB cross & nothing else",),
)


def trace(origin: str, scale: float) -> Trace:
    events = (
        Event("cpu:0", "F0.0", "F", 0, 0, 0.0, 1.0 * scale),
        Event("cpu:1", "F1.0", "F", 1, 0, 1.0 * scale, 2.0 * scale),
        Event("cpu:1", "B1.0", "B", 1, 0, 2.0 * scale, 4.0 * scale),
    )
    return Trace(events, (("cpu:0", int(100 * scale)), ("cpu:1", 200)), origin)


def test_predicted_and_measured_stand_side_by_side() -> None:
    rows = {row.name: row for row in compare(trace("simulated", 1.1), trace("measured", 1.0))}
    assert (rows["step"].show(rows["step"].predicted), rows["step"].show(rows["step"].measured)) == ("4.4 s", "4 s")
    assert rows["step"].off == "+10%"
    assert rows["cpu:0 peak memory"].off == "+10%"
    assert rows["cpu:1 idle"].off == "+0 points"
    assert rows["cpu:0 idle"].show(rows["cpu:0 idle"].measured) == "75%"


def test_a_side_that_is_not_known_is_a_dash() -> None:
    row = compare(None, trace("measured", 1.0))[0]
    assert (row.show(row.predicted), row.off) == ("-", "-")


def test_the_table_prints() -> None:
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(comparison_table(trace("simulated", 1.1), trace("measured", 1.0)))
    text = console.export_text()
    assert re.search(r"step\s+4.4 s\s+4 s\s+\+10%", text)
    assert re.search(r"cpu:1 peak memory\s+200B\s+200B\s+\+0%", text)


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_the_page_is_self_contained_and_shows_both_timelines_on_one_scale(tmp_path: Path) -> None:
    pytest.importorskip("jinja2")
    write_page(tmp_path / "r.html", PLAN, trace("simulated", 2.0), trace("measured", 1.0))
    text = (tmp_path / "r.html").read_text()
    page = _Page()
    page.feed(text)
    assert [tag for tag, _ in page.tags].count("svg") == 2
    boxes = [attrs for tag, attrs in page.tags if tag == "rect"]
    assert len(boxes) == 6
    assert float(str(boxes[0]["width"])) == pytest.approx(2 * float(str(boxes[3]["width"])), rel=0.01)
    assert not re.search(r"(src|href)=|@import|url\(", text)
    assert "cut where 2 MiB cross &amp; nothing else" in text
    assert "head&lt;b&gt;" in text


def test_a_page_of_a_plan_alone_prints_too(tmp_path: Path) -> None:
    pytest.importorskip("jinja2")
    write_page(tmp_path / "r.html", PLAN)
    assert "<svg" not in (tmp_path / "r.html").read_text()


def test_without_jinja2_the_page_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: object, **more: object) -> object:
        if name == "jinja2":
            raise ImportError(name)
        return real(name, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UsageError, match=r"pip install 'partita\[report\]'"):
        write_page(tmp_path / "r.html", PLAN)


def test_an_unwritable_page_is_a_usage_error(tmp_path: Path) -> None:
    pytest.importorskip("jinja2")
    with pytest.raises(UsageError, match="cannot write the report"):
        write_page(tmp_path / "none" / "r.html", PLAN)
