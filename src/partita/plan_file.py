"""Plan files: YAML a person would write, strictly read, and written back the same.

Everything round-trips exactly but the prediction, which is written to whole MiB (KiB below one) and four digits. Many
devices are written as ranges (``node0..127/cuda:0..7``; ``device_names``).
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable
from typing import Any, Literal

import msgspec

from partita.device_names import expanded, shortened, shortened_keys
from partita.errors import PlanError, UsageError
from partita.plan import Batch, Offload, Plan, Predicted, Stage
from partita.strict_yaml import Flow, FlowList, Reader, dump, read_text, write_text
from partita.units import parse_bytes

VERSION = 1
WHOLE: dict[Any, list[str]] = {"true": [""], "True": [""], "false": [], "False": []}
_COMMA = re.compile(r"\s*,\s*(?![^()]*\))")


class _Model(msgspec.Struct):
    name: str = ""
    fingerprint: str = ""


class _Cluster(msgspec.Struct):
    devices: tuple[str, ...] = ()


class _Batch(msgspec.Struct):
    size: int = 0
    microbatches: int = 1
    sizes: tuple[int, ...] = ()


class _Offload(msgspec.Struct):
    activations: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()


class _Stage(msgspec.Struct):
    devices: tuple[str, ...]
    modules: tuple[str, ...] = ()
    ops: tuple[str, ...] = ()
    recompute: tuple[str, ...] = ()
    shard: dict[str, tuple[str, ...]] = {}
    tensor: int = 1
    offload: _Offload = msgspec.field(default_factory=_Offload)
    compile: tuple[str, ...] = ()


class _Predicted(msgspec.Struct):
    step_seconds: float = 0.0
    one_device_seconds: float = 0.0
    bottleneck: str = ""
    memory: dict[str, str] = {}


class _File(msgspec.Struct):
    partita: str
    stages: tuple[_Stage, ...]
    model: _Model = msgspec.field(default_factory=_Model)
    cluster: _Cluster = msgspec.field(default_factory=_Cluster)
    batch: _Batch = msgspec.field(default_factory=_Batch)
    schedule: Literal["gpipe", "1f1b", "interleaved", "zero_bubble"] = "1f1b"
    batch_norm: Literal["exact", "per_microbatch"] = "exact"
    zero: int = 0
    predicted: _Predicted | None = None
    status: Literal["manual", "optimal", "feasible"] = "manual"
    gap: float = 0.0
    why: tuple[str, ...] = ()


def loads(text: str, source: str = "the plan") -> Plan:
    """The Plan a YAML text describes. Raises PlanError naming every mistake with its line, UsageError if not YAML."""
    reader = Reader(text, source)
    tree = reader.tree
    if not isinstance(tree, dict):
        raise PlanError(f"{source} is not a plan: it should begin with 'partita: {VERSION}' and list stages")
    version = tree.get("partita")
    if version is not None and version != str(VERSION):
        hint = (
            "update partita" if str(version).isdecimal() and int(version) > VERSION else f"write 'partita: {VERSION}'"
        )
        raise PlanError(
            f"{source}: line {reader.lines[('partita',)]}: this is a plan of version {version!r}; "
            f"this partita reads version {VERSION}; {hint}"
        )
    if tree.get("schedule") == "zero-bubble":
        tree["schedule"] = "zero_bubble"
    for stage in tree["stages"] if isinstance(tree.get("stages"), list) else ():
        word = stage.get("compile") if isinstance(stage, dict) else None
        if isinstance(word, str) and word in WHOLE:
            stage["compile"] = list(WHOLE[word])
    file = reader.fill(_File, tree)
    if file is not None:
        file = _named(reader, file)
        _check(reader, file)
    if file is None or reader.problems:
        raise PlanError(f"{source} cannot be used as a plan:", reader.sorted_problems())
    return _to_plan(file)


def _named(reader: Reader, file: _File) -> _File:
    """With every device by its own name where the file says ``cuda:0..7``."""

    def names(entries: Iterable[str], *path: str | int) -> tuple[str, ...]:
        found: list[str] = []
        for i, entry in enumerate(entries):
            try:
                found += expanded(entry)
            except UsageError as error:
                reader.problem((*path, i), str(error))
        return tuple(found)

    stages = tuple(
        msgspec.structs.replace(stage, devices=names(stage.devices, "stages", i, "devices"))
        for i, stage in enumerate(file.stages)
    )
    predicted = file.predicted
    if predicted is not None:
        memory = {n: text for key, text in predicted.memory.items() for n in names((key,), "predicted", "memory", key)}
        predicted = msgspec.structs.replace(predicted, memory=memory)
    cluster = msgspec.structs.replace(file.cluster, devices=names(file.cluster.devices, "cluster", "devices"))
    return msgspec.structs.replace(file, stages=stages, predicted=predicted, cluster=cluster)


def _check(reader: Reader, file: _File) -> None:
    """What types cannot say: counts that must be positive, amounts that must be amounts."""
    if not file.stages:
        reader.problem(("stages",), "a plan needs at least one stage")
    if file.zero not in (0, 1, 2, 3):
        reader.problem(("zero",), f"must be 0, 1, 2 or 3, found {file.zero}")
    for i, stage in enumerate(file.stages):
        if not stage.devices:
            reader.problem(("stages", i, "devices"), "a stage needs at least one device")
        if stage.tensor < 1 or len(stage.devices) % max(stage.tensor, 1):
            reader.problem(
                ("stages", i, "tensor"),
                f"the stage's {len(stage.devices)} devices are not made of groups of {stage.tensor}; give a divisor",
            )
    if file.batch.size < 0:
        reader.problem(("batch", "size"), f"must not be negative, found {file.batch.size}")
    if file.batch.microbatches < 1:
        reader.problem(("batch", "microbatches"), f"must be at least 1, found {file.batch.microbatches}")
    if any(size < 1 for size in file.batch.sizes):
        reader.problem(("batch", "sizes"), "every microbatch needs at least one sample")
    elif file.batch.sizes and len(file.batch.sizes) != file.batch.microbatches:
        reader.problem(
            ("batch", "sizes"),
            f"{len(file.batch.sizes)} sizes for {file.batch.microbatches} microbatches; give one each",
        )
    for device, amount in (file.predicted.memory if file.predicted else {}).items():
        try:
            parse_bytes(amount)
        except UsageError as error:
            reader.problem(("predicted", "memory", device), str(error))


def _to_plan(file: _File) -> Plan:
    stages = tuple(
        Stage(
            devices=stage.devices,
            modules=stage.modules,
            ops=stage.ops,
            recompute=stage.recompute,
            shard=tuple((name, ", ".join(placements)) for name, placements in stage.shard.items()),
            tensor=stage.tensor,
            offload=Offload(stage.offload.activations, stage.offload.parameters),
            compile=stage.compile,
        )
        for stage in file.stages
    )
    named = tuple(dict.fromkeys(device for stage in stages for device in stage.devices))
    predicted = None
    if file.predicted is not None:
        predicted = Predicted(
            step_seconds=file.predicted.step_seconds,
            bottleneck=file.predicted.bottleneck,
            memory=tuple((device, parse_bytes(amount)) for device, amount in file.predicted.memory.items()),
            one_device_seconds=file.predicted.one_device_seconds,
        )
    return Plan(
        stages=stages,
        model=file.model.name,
        fingerprint=file.model.fingerprint,
        devices=file.cluster.devices or named,
        batch=Batch(file.batch.size, file.batch.microbatches, file.batch.sizes),
        schedule=file.schedule,
        batch_norm=file.batch_norm,
        zero=file.zero,
        predicted=predicted,
        status=file.status,
        gap=file.gap,
        reasons=file.why,
    )


def memory_text(count: int) -> str:
    """222_298_113 -> '212MiB': whole MiB (KiB below one), rounded up."""
    return f"{math.ceil(count / 2**20)}MiB" if count >= 2**20 else f"{math.ceil(count / 2**10)}KiB"


def dumps(plan: Plan) -> str:
    """The plan as YAML in the form of the documentation; ``loads`` gives the plan back."""
    tree: dict[str, Any] = {"partita": VERSION}
    if plan.model or plan.fingerprint:
        tree["model"] = Flow(name=plan.model, fingerprint=plan.fingerprint)
    if plan.devices:
        tree["cluster"] = Flow(devices=FlowList(shortened(plan.devices)))
    tree["batch"] = Flow(size=plan.batch.size, microbatches=plan.batch.microbatches)
    if plan.batch.sizes:
        tree["batch"]["sizes"] = FlowList(plan.batch.sizes)
    tree["schedule"] = plan.schedule
    if plan.batch_norm != "exact":
        tree["batch_norm"] = plan.batch_norm
    if plan.zero:
        tree["zero"] = plan.zero
    tree["stages"] = [_stage_tree(stage) for stage in plan.stages]
    if plan.predicted is not None:
        tree["predicted"] = Flow(
            step_seconds=_digits(plan.predicted.step_seconds),
            one_device_seconds=_digits(plan.predicted.one_device_seconds),
            bottleneck=plan.predicted.bottleneck,
            memory=Flow(shortened_keys([(device, memory_text(count)) for device, count in plan.predicted.memory])),
        )
    if plan.status != "manual":
        tree["status"] = plan.status
    if plan.gap:
        tree["gap"] = plan.gap
    if plan.reasons:
        tree["why"] = list(plan.reasons)
    return dump(tree)


def _stage_tree(stage: Stage) -> dict[str, Any]:
    tree: dict[str, Any] = {"devices": FlowList(shortened(stage.devices))}
    for key in ("modules", "ops", "recompute"):
        if getattr(stage, key):
            tree[key] = FlowList(getattr(stage, key))
    if stage.offload:
        kinds = {"activations": stage.offload.activations, "parameters": stage.offload.parameters}
        tree["offload"] = Flow({kind: FlowList(names) for kind, names in kinds.items() if names})
    if stage.compile:
        tree["compile"] = True if stage.compile == ("",) else FlowList(stage.compile)
    if stage.tensor > 1:
        tree["tensor"] = stage.tensor
    if stage.shard:
        tree["shard"] = Flow({name: FlowList(_COMMA.split(text)) for name, text in stage.shard})
    return tree


def _digits(number: float) -> float:
    return float(f"{number:.4g}")


def load(path: str | os.PathLike[str]) -> Plan:
    """``Plan.load``."""
    return loads(read_text(path, "plan file"), f"'{os.fspath(path)}'")


def save(plan: Plan, path: str | os.PathLike[str]) -> None:
    """``Plan.save``: all of the file or nothing."""
    write_text(path, dumps(plan), "plan file")
