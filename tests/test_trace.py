"""Traces: the figures they give and the two ways of drawing them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from partita.errors import UsageError
from partita.report import chrome_trace, timeline, write_chrome
from partita.trace import Event, Trace

TRACE = Trace(
    events=(
        Event("cpu:0", "F0.0", "F", 0, 0, 1.0, 2.0),
        Event("cpu:0", ">x@0.0:cpu:1", "SEND", 0, 0, 2.0, 2.0, 64),
        Event("cpu:1", "<x@1.0:cpu:0", "RECV", 1, 0, 1.0, 2.0, 64),
        Event("cpu:1", "F1.0", "F", 1, 0, 2.0, 3.0),
        Event("cpu:1", "B1.0", "B", 1, 0, 3.0, 5.0),
        Event("cpu:0", "B0.0", "B", 0, 0, 5.0, 7.0),
        Event("cpu:0", "W0", "W", 0, -1, 7.0, 9.0),
    ),
    memory=(("cpu:0", 2048), ("cpu:1", 1024)),
)


def test_a_step_lasts_from_the_first_event_to_the_last() -> None:
    assert TRACE.step_seconds == 8.0
    assert Trace(()).step_seconds == 0.0


def test_busy_counts_computing_and_not_waiting() -> None:
    assert [TRACE.busy_seconds(d) for d in ("cpu:0", "cpu:1")] == [5.0, 3.0]
    assert [TRACE.bubble(d) for d in ("cpu:0", "cpu:1")] == [1 - 5 / 8, 1 - 3 / 8]
    assert Trace(()).bubble("cpu:0") == 0.0


def test_the_timeline_is_drawn_as_it_happened() -> None:
    assert timeline(TRACE, width=8) == "cpu:0  F...BBWW   62%\ncpu:1  .FBB....   38%\n       0    8 s"


def test_a_trace_without_events_says_so() -> None:
    assert timeline(Trace(())) == "nothing was recorded"


@given(
    st.lists(
        st.tuples(st.sampled_from(["a", "bb"]), st.sampled_from(["F", "B", "W", "SEND", "REDUCE"]),
                  st.floats(0, 100), st.floats(0, 10)),
        min_size=1, max_size=20,
    ),
    st.integers(1, 80),
)  # fmt: skip
def test_every_timeline_line_has_the_width_asked_for(rows: list[tuple[str, str, float, float]], width: int) -> None:
    trace = Trace(tuple(Event(d, k, k, 0, 0, s, s + length) for d, k, s, length in rows))
    lines = timeline(trace, width=width).splitlines()
    label = max(len(d) for d, *_ in rows)
    for line in lines[:-1]:
        assert len(line) == label + 2 + width + 2 + 4


def test_the_chrome_trace_has_a_thread_a_device_and_microseconds() -> None:
    rows = TRACE.to_chrome()["traceEvents"]
    assert isinstance(rows, list)
    names = {r["tid"]: r["args"]["name"] for r in rows if r["ph"] == "M"}
    assert names == {0: "cpu:0", 1: "cpu:1"}
    last = next(r for r in rows if r.get("name") == "W0")
    assert (last["ts"], last["dur"], last["tid"], last["cat"]) == (7e6, 2e6, 0, "W")


def test_two_traces_are_two_processes_of_one_file(tmp_path: Path) -> None:
    simulated = Trace(TRACE.events, TRACE.memory, "simulated")
    write_chrome(tmp_path / "t.json", simulated, TRACE)
    read = json.loads((tmp_path / "t.json").read_text())
    assert read == json.loads(json.dumps(chrome_trace(simulated, TRACE)))
    processes = {r["pid"]: r["args"]["name"] for r in read["traceEvents"] if r["name"] == "process_name"}
    assert processes == {0: "simulated", 1: "measured"}
    assert sum(r["ph"] == "X" for r in read["traceEvents"]) == 2 * len(TRACE.events)


def test_a_trace_that_cannot_be_written_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot write the trace"):
        write_chrome(tmp_path / "none" / "t.json", TRACE)
