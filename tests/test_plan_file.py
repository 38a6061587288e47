"""Plan files: what is written reads back the same, and every mistake is named with its line."""

from __future__ import annotations

import os
import pickle
from copy import deepcopy
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from partita import device_names, plan_file
from partita.errors import PlanError, UsageError
from partita.plan import Batch, Offload, Plan, Predicted, Stage
from partita.plan_text import counted, shorten

BY_HAND = """\
partita: 1
model: {name: GPT, fingerprint: 9f2c…}
cluster: {devices: [cpu:0, cpu:1]}
batch: {size: 32, microbatches: 8}
schedule: 1f1b
stages:
  - devices: [cpu:0]
    modules: [emb, blocks.0, blocks.1, blocks.2]        # or ops, where a cut is inside a module
    recompute: [blocks.0]
  - devices: [cpu:1]
    modules: [blocks.3, ln, head]
    shard: {head.weight: [Shard(0)]}
predicted: {step_seconds: 0.41, bottleneck: cpu:1, memory: {cpu:0: 212MiB, cpu:1: 198MiB}}
"""

names = st.one_of(
    st.from_regex(r"[a-z_]{1,6}(\.[0-9]{1,2}|\.[a-z]{1,4}){0,3}(:[a-z_0-9]{1,8})?", fullmatch=True),
    st.sampled_from(
        ["0", "1.10", "on", "null", "~", "1e3", "0x1f", "2026-01-01", "yes", "é", "a b", "- x", "#", "a: b"]
    ),
    st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), min_size=1, max_size=8),
)
devices = st.sampled_from(["cpu:0", "cpu:1", "cuda:0", "node1/cuda:7"])
placements = st.sampled_from(["Shard(0)", "Replicate()", "Shard(1), Replicate()", "Partial(sum)"])
stages = st.builds(
    Stage,
    devices=st.lists(devices, min_size=1, max_size=3, unique=True).map(tuple),
    modules=st.lists(names, max_size=5).map(tuple),
    ops=st.lists(names, max_size=3).map(tuple),
    recompute=st.lists(names, max_size=3).map(tuple),
    compile=st.sampled_from([(), ("",), ("blocks.0", "head")]),
    offload=st.builds(Offload, *[st.lists(names, max_size=2).map(tuple)] * 2),
    shard=st.dictionaries(names, placements, max_size=2).map(lambda d: tuple(d.items())),
)
batches = st.one_of(
    st.builds(Batch, size=st.integers(0, 10**6), microbatches=st.integers(1, 64)),
    st.lists(st.integers(1, 9), min_size=1, max_size=5).map(lambda s: Batch(sum(s), len(s), tuple(s))),
)
seconds = st.floats(0, 1e4).map(lambda x: float(f"{x:.4g}"))
memory = st.dictionaries(devices, st.integers(0, 2**20).map(lambda n: n * 2**20), max_size=3)
plans = st.builds(
    Plan,
    stages=st.lists(stages, min_size=1, max_size=4).map(tuple),
    model=st.one_of(st.just(""), names),
    fingerprint=st.from_regex(r"[0-9a-f]{0,16}", fullmatch=True),
    devices=st.lists(devices, min_size=1, max_size=4, unique=True).map(tuple),
    batch=batches,
    schedule=st.sampled_from(["gpipe", "1f1b", "interleaved", "zero_bubble"]),
    batch_norm=st.sampled_from(["exact", "per_microbatch"]),
    predicted=st.one_of(
        st.none(),
        st.builds(
            Predicted,
            step_seconds=seconds,
            bottleneck=devices,
            memory=memory.map(lambda d: tuple(d.items())),
            one_device_seconds=seconds,
        ),
    ),
    status=st.sampled_from(["manual", "optimal", "feasible"]),
    gap=st.floats(0, 1),
    reasons=st.lists(names, max_size=3).map(tuple),
)


def problems(text: str) -> str:
    with pytest.raises(PlanError) as caught:
        plan_file.loads(text, "'p.yaml'")
    return str(caught.value)


def test_the_documented_plan_is_read_as_written() -> None:
    plan = plan_file.loads(BY_HAND)
    assert plan == Plan(
        stages=(
            Stage(devices=("cpu:0",), modules=("emb", "blocks.0", "blocks.1", "blocks.2"), recompute=("blocks.0",)),
            Stage(devices=("cpu:1",), modules=("blocks.3", "ln", "head"), shard=(("head.weight", "Shard(0)"),)),
        ),
        model="GPT",
        fingerprint="9f2c…",
        devices=("cpu:0", "cpu:1"),
        batch=Batch(32, 8),
        predicted=Predicted(0.41, "cpu:1", (("cpu:0", 212 * 2**20), ("cpu:1", 198 * 2**20))),
    )


@given(plans)
def test_a_plan_written_reads_back_equal(plan: Plan) -> None:
    assert plan_file.loads(plan_file.dumps(plan)) == plan


@given(plans)
def test_writing_is_stable(plan: Plan) -> None:
    once = plan_file.dumps(plan)
    assert plan_file.dumps(plan_file.loads(once)) == once


@given(plans)
def test_plans_copy_and_pickle(plan: Plan) -> None:
    assert deepcopy(plan) == plan == pickle.loads(pickle.dumps(plan))


def test_predictions_are_written_to_whole_mebibytes_rounded_up() -> None:
    plan = Plan(stages=(Stage(("cpu:0",)),), predicted=Predicted(memory=(("cpu:0", 222_298_113), ("cpu:1", 1500))))
    assert "memory: {cpu:0: 213MiB, cpu:1: 2KiB}" in plan_file.dumps(plan)


def test_the_file_is_short_where_nothing_is_said() -> None:
    text = plan_file.dumps(Plan(stages=(Stage(("cpu:0",), ("a", "0")),), devices=("cpu:0",)))
    assert text == (
        "partita: 1\ncluster: {devices: [cpu:0]}\nbatch: {size: 0, microbatches: 1}\nschedule: 1f1b\n"
        "stages:\n  - devices: [cpu:0]\n    modules: [a, '0']\n"
    )


def test_modules_of_a_sequential_stay_names() -> None:
    text = "partita: 1\nstages:\n  - {devices: [cpu:0], modules: [0, 1.10, on, null]}\n"
    assert plan_file.loads(text).stages[0].modules == ("0", "1.10", "on", "null")


def test_devices_default_to_those_the_stages_name() -> None:
    text = "partita: 1\nstages:\n  - {devices: [cpu:1]}\n  - {devices: [cpu:0, cpu:1]}\n"
    assert plan_file.loads(text).devices == ("cpu:1", "cpu:0")


def test_zero_bubble_may_be_written_with_a_hyphen() -> None:
    assert plan_file.loads(BY_HAND.replace("1f1b", "zero-bubble")).schedule == "zero_bubble"


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ("modules: [emb", "modlues: [emb", "line 8: stages[0].modlues: unknown key; did you mean 'modules'?"),
        ("batch:", "qqqq: red\nbatch:", "line 4: qqqq: unknown key (known: partita, stages, model, cluster"),
        ("microbatches: 8", "microbatches: many", "line 4: batch.microbatches: expected a whole number, found 'many'"),
        ("microbatches: 8", "microbatches: 0", "line 4: batch.microbatches: must be at least 1, found 0"),
        ("size: 32", "size: -1", "line 4: batch.size: must not be negative, found -1"),
        ("schedule: 1f1b", "schedule: 1f1", "line 5: schedule: expected one of gpipe, 1f1b, interleaved, zero_bubble, "
         "found '1f1'; did you mean '1f1b'?"),
        ("devices: [cpu:0]\n    modules", "devices: cpu:0\n    modules", "line 7: stages[0].devices: expected a list "
         "of names, found 'cpu:0'"),
        ("  - devices: [cpu:1]\n    mod", "  - mod", "line 10: stages[1]: 'devices' is missing"),
        ("devices: [cpu:1]", "devices: []", "line 10: stages[1].devices: a stage needs at least one device"),
        ("198MiB", "198 lots", "line 13: predicted.memory.cpu:1: '198 lots' is not an amount of memory"),
        ("partita: 1", "partita: 2", "'p.yaml': line 1: this is a plan of version '2'; this partita reads version 1; "
         "update partita"),
        ("partita: 1", "partita: one", "this is a plan of version 'one'"),
        ("partita: 1\n", "", "line 1: 'partita' is missing"),
        ("schedule: 1f1b\n", "schedule: 1f1b\nschedule: gpipe\n", "line 6: schedule: written twice; keep one"),
        ("microbatches: 8", "microbatches: 8, sizes: [30, 2]", "batch.sizes: 2 sizes for 8 microbatches; give one"),
        ("microbatches: 8", "microbatches: 2, sizes: [32, 0]", "batch.sizes: every microbatch needs at least one"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_with_its_line(old: str, new: str, text: str) -> None:
    assert old in BY_HAND
    assert text in problems(BY_HAND.replace(old, new, 1))


def test_all_mistakes_are_named_at_once_in_the_order_of_the_file() -> None:
    text = BY_HAND.replace("8}", "eight}").replace("1f1b", "none").replace("recompute", "recompute_")
    with pytest.raises(PlanError) as caught:
        plan_file.loads(text)
    assert [p.partition(":")[0] for p in caught.value.problems] == ["line 4", "line 5", "line 9"]


@pytest.mark.parametrize("text", ["", "just words", "- a\n- b\n", "# nothing\n"])
def test_what_is_no_mapping_is_no_plan(text: str) -> None:
    assert "'p.yaml' is not a plan: it should begin with 'partita: 1'" in problems(text)


@pytest.mark.parametrize(
    ("text", "where"), [("a: [1\nb", "line 2"), ("a: b: c", "line 1"), ("\tx: 1", "line 1"), ("x: \x00", "not YAML")]
)
def test_corrupt_yaml_is_named_with_its_line(text: str, where: str) -> None:
    with pytest.raises(UsageError, match="'p.yaml' is not YAML") as caught:
        plan_file.loads(text, "'p.yaml'")
    assert where in str(caught.value)


def test_an_alias_of_itself_does_not_hang() -> None:
    with pytest.raises(UsageError, match="nested too deeply"):
        plan_file.loads("partita: 1\nstages: &a [*a]\n")


@given(st.text(max_size=60))
def test_no_text_causes_anything_but_a_clear_refusal(text: str) -> None:
    try:
        plan_file.loads("partita: 1\nstages:\n" + text)
    except (PlanError, UsageError) as error:
        assert str(error)


def test_save_and_load_through_the_noun(tmp_path: Path) -> None:
    plan = plan_file.loads(BY_HAND)
    path = tmp_path / "plan.yaml"
    plan.save(path)
    assert Plan.load(path) == plan == Plan.load(str(path))
    assert [p.name for p in tmp_path.iterdir()] == ["plan.yaml"]


def test_saving_over_a_plan_that_cannot_be_written_keeps_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text("old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UsageError, match="No space left on device"):
        plan_file.loads(BY_HAND).save(path)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["plan.yaml"]


def test_unwritable_and_missing_paths_are_named(tmp_path: Path) -> None:
    plan = plan_file.loads(BY_HAND)
    with pytest.raises(UsageError, match="cannot write the plan file .*make the directory"):
        plan.save(tmp_path / "none" / "plan.yaml")
    with pytest.raises(UsageError, match="cannot write the plan file .*it is a directory"):
        plan.save(tmp_path)
    plan.save(tmp_path / "plan.yaml")
    with pytest.raises(UsageError, match="no plan file at .*did you mean 'plan.yaml'"):
        Plan.load(tmp_path / "plam.yaml")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="not UTF-8"):
        Plan.load(tmp_path / "binary")


def test_explain_shows_stages_prediction_and_reasons() -> None:
    plan = plan_file.loads(BY_HAND + "status: feasible\ngap: 0.031\nwhy:\n  - cut where only 2 MiB cross\n")
    assert plan.explain() == (
        "GPT: 2 stages on cpu:0-1; 8 microbatches, 32 samples; schedule 1f1b\n"
        "found by the planner (feasible, at most 3.1% from the best possible)\n"
        "\n"
        "stage  devices  runs                recomputes  peak memory\n"
        "-----  -------  ------------------  ----------  -----------\n"
        "0      cpu:0    emb, blocks.0-2     blocks.0    212MiB\n"
        "1      cpu:1    blocks.3, ln, head  -           198MiB\n"
        "\n"
        "sharded:\n"
        "  stage 1: head.weight as Shard(0)\n"
        "\n"
        "predicted: 410 ms a step; cpu:1 is the slowest\n"
        "\n"
        "why:\n"
        "  - cut where only 2 MiB cross"
    )


@given(plans)
def test_every_plan_can_be_explained(plan: Plan) -> None:
    assert plan.explain().startswith(plan.model or "model")


def test_runs_of_numbered_modules_are_shortened() -> None:
    assert shorten(("a", "b.0", "b.1", "b.2", "b.4", "c", "0", "1")) == "a, b.0-2, b.4, c, 0-1"
    assert shorten(("cpu:0", "cpu:1", "node1/cuda:1", "1.10", "x07")) == "cpu:0-1, node1/cuda:1, 1.10, x07"
    assert counted(("2MiB", "2MiB", "1MiB", "2MiB")) == "2 x 2MiB, 1MiB, 2MiB"
    assert shorten([f"m{i}x" for i in range(99)], limit=12) == "m0x, m1x, and 97 more"


numbered = st.builds(
    lambda node, stem, k: f"{node}{stem}{k}",
    st.sampled_from(["", "node0/", "node1/", "node2/", "node9/", "node10/", "rack/node3/", "node01/"]),
    st.sampled_from(["cuda:", "cpu:", "gpu", "a.", ""]),
    st.sampled_from(["0", "1", "2", "3", "09", "10", "11", "x", "007"]),
)


@given(st.lists(numbered, max_size=40))
def test_shortened_device_names_are_the_same_names(written: list[str]) -> None:
    assert tuple(n for entry in device_names.shortened(written) for n in device_names.expanded(entry)) == tuple(written)


def test_a_thousand_devices_are_one_word() -> None:
    every = tuple(f"node{n}/cuda:{i}" for n in range(2, 130) for i in range(8))
    assert device_names.shortened(every) == ("node2..129/cuda:0..7",)
    plan = Plan(
        (Stage(every, ("a",), tensor=8),), devices=every, status="feasible",
        predicted=Predicted(1.0, every[0], tuple((n, 2**30) for n in every)),
    )  # fmt: skip
    text = plan_file.dumps(plan)
    assert len(text) < 500 and plan_file.loads(text) == plan


@pytest.mark.parametrize("entry", ["cuda:7..0", "cuda:0..07", "node0..99999/cuda:0..99999"])
def test_a_range_that_means_nothing_is_refused_with_its_line(entry: str) -> None:
    with pytest.raises(PlanError, match="line 3: stages"):
        plan_file.loads(f"partita: 1\nstages:\n  - devices: [{entry}]\n")
