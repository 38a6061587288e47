"""Optimizer: any ``torch.optim.Optimizer``'s state by parameter names, taken apart and put together again.

A parameter's state is a few values. How each is kept: ``like``: a tensor of the parameter's shape, divided as the
parameter is; ``scalar``: one number as a tensor, the same wherever the parameter is; ``own``: a tensor of another shape
(Adafactor's factors), which belongs to an undivided parameter; ``spanning``: tensors that cover several parameters
(L-BFGS), of one process only; ``value``: anything without tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from partita.checkpoint.holdings import Box, Held, Holdings, Owned, unsavable
from partita.checkpoint.manifest import Manifest, OptimizerIndex
from partita.errors import UsageError

_NOT_OPTIONS = ("params", "param_names")


@dataclass(slots=True, eq=False)
class Parts:
    """An optimizer taken apart. ``tensors``: by DCP key; ``values``: name -> key -> value; ``others``: state under no
    parameter; ``groups``: per param group its names and options.
    """

    kind: str
    tensors: dict[str, Held] = field(default_factory=dict)
    kept: dict[str, dict[str, str]] = field(default_factory=dict)
    values: dict[str, dict[str, Any]] = field(default_factory=dict)
    others: dict[Any, Any] = field(default_factory=dict)
    groups: list[tuple[tuple[str, ...], dict[str, Any]]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def without_tensors(self) -> Parts:
        """What other ranks need of it."""
        return replace(self, tensors={}, problems=[])


def key_of(name: str, key: str) -> str:
    return f"optimizer.state.{name}.{key}"


def apart(optimizer: torch.optim.Optimizer, model: Holdings, *, alone: bool) -> Parts:
    """The optimizer's state by names. ``alone``: one process holds everything."""
    parts = Parts(type(optimizer).__name__)
    parts.problems += strangers(optimizer, model)
    for group in optimizer.param_groups:
        options = {k: v for k, v in group.items() if k not in _NOT_OPTIONS}
        parts.groups.append((names_of(group, model), options))
    for key, value in optimizer.state.items():
        if not isinstance(key, torch.Tensor):
            parts.others[key] = value
        elif id(key) in model.parameters:
            _take(parts, model.parameters[id(key)], value, model, alone=alone)
    parts.problems += unsavable(parts.tensors)
    return parts


def _take(parts: Parts, owned: Owned, state: Mapping[str, Any], model: Holdings, *, alone: bool) -> None:
    whole = model.tensors.get(owned.name)
    for key, value in state.items():
        kind = _kind(value, owned)
        parts.kept.setdefault(owned.name, {})[key] = kind
        where = f"the optimizer's '{key}' of '{owned.name}'"
        if kind == "strange":
            parts.problems.append(f"{where} is a {type(value).__name__}, whose contents cannot be divided: "
                                  "use an optimizer with plain tensors")  # fmt: skip
        elif kind == "spanning" and not alone:
            parts.problems.append(f"{where} covers several parameters, which other processes hold: "
                                  f"{parts.kind} can be saved and loaded in one process only")  # fmt: skip
        elif kind == "own" and not _is_whole(model, owned):
            parts.problems.append(f"{where} has the shape {tuple(value.shape)}, but of the parameter only a part is "
                                  "here: use a plan that leaves this parameter whole")  # fmt: skip
        elif whole is None:
            continue  # none of the parameter is here; other ranks write what belongs to it
        elif kind == "like":
            boxes = tuple(Box(b.offsets, _region(value, owned, b), b.mine) for b in owned.boxes)
            held = parts.tensors.get(key_of(owned.name, key))
            before = held.boxes if held is not None else ()
            parts.tensors[key_of(owned.name, key)] = Held(value.dtype, whole.shape, before + boxes)
        elif isinstance(value, torch.Tensor):
            mine = any(box.mine for box in owned.boxes)
            tensor = _local(value)
            shape = tuple(tensor.shape)
            parts.tensors[key_of(owned.name, key)] = Held(tensor.dtype, shape, (Box((0,) * len(shape), tensor, mine),))
        else:
            parts.values.setdefault(owned.name, {})[key] = value


def _is_whole(model: Holdings, owned: Owned) -> bool:
    return owned.name in model.tensors and model.tensors[owned.name].whole


def _kind(value: Any, owned: Owned) -> str:
    if not isinstance(value, torch.Tensor):
        return "spanning" if _has_tensors(value) else "value"
    local, parameter = _local(value), _local(owned.parameter)
    if type(local) not in (torch.Tensor, torch.nn.Parameter):
        return "strange"
    if local.shape == parameter.shape:
        return "like"
    if local.numel() == 1:
        return "scalar"
    return "own" if local.numel() <= parameter.numel() else "spanning"


def _has_tensors(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_has_tensors, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_has_tensors, value))
    return isinstance(value, torch.Tensor)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """A DTensor's part in this process; any other tensor itself."""
    to_local = getattr(tensor, "to_local", None)
    return to_local().detach() if to_local is not None else tensor


def _region(value: torch.Tensor, owned: Owned, box: Box) -> torch.Tensor:
    """The part of a state tensor that lies where ``box`` lies in the parameter."""
    local, parameter = _local(value), _local(owned.parameter)
    if box.tensor.shape == parameter.shape:
        return local
    assert local.stride() == parameter.stride(), f"{owned.name}: state laid out unlike its parameter"
    begin = box.tensor.storage_offset() - parameter.storage_offset()
    return local.as_strided(box.tensor.shape, box.tensor.stride(), local.storage_offset() + begin)


def strangers(optimizer: object, model: Holdings) -> list[str]:
    """Parameters that the optimizer has and the model has not, a line each (empty ones, of ranks with none, aside)."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise UsageError(f"optimizer must be a torch.optim.Optimizer; got {type(optimizer).__name__}")
    return [
        f"parameter {i} of the optimizer's group {g}, of shape {tuple(parameter.shape)}, is not one of the model's: "
        "make the optimizer from this model's parameters()"
        for g, group in enumerate(optimizer.param_groups)
        for i, parameter in enumerate(group["params"])
        if id(parameter) not in model.parameters and parameter.numel()
    ]


def names_of(group: Mapping[str, Any], model: Holdings) -> tuple[str, ...]:
    """The model's names of the parameters in a param group, in its order."""
    return tuple(model.parameters[id(p)].name for p in group["params"] if id(p) in model.parameters)


def index(parts: Iterable[Parts]) -> OptimizerIndex:
    """What every rank took apart, as one table."""
    parameters: list[dict[str, None]] = []
    kept: dict[str, dict[str, str]] = {}
    kind = ""
    for part in parts:
        kind = part.kind
        for g, (names, _) in enumerate(part.groups):
            if g == len(parameters):
                parameters.append({})
            parameters[g].update(dict.fromkeys(names))
        kept.update(part.kept)
    return OptimizerIndex(kind, tuple(map(tuple, parameters)), kept)


def misfits(optimizer: torch.optim.Optimizer, model: Holdings, manifest: Manifest, *, alone: bool) -> list[str]:
    """Why the saved state does not fit this optimizer as far as it is in this process, a line each."""
    saved = manifest.optimizer
    if saved is None:
        return ["the checkpoint has no optimizer state: load it with optimizer=None"]
    problems = strangers(optimizer, model)
    kind = type(optimizer).__name__
    if kind != saved.kind:
        problems.append(f"the state is {saved.kind}'s, this optimizer is {kind}: load it into {saved.kind}")
    if len(optimizer.param_groups) != len(saved.parameters):
        count = len(optimizer.param_groups)
        problems.append(f"the checkpoint's optimizer has {len(saved.parameters)} param groups, this one has {count}")
        return problems
    member = {name: g for g, names in enumerate(saved.parameters) for name in names}
    for g, group in enumerate(optimizer.param_groups):
        for name in names_of(group, model):
            found = member.get(manifest.ties.get(name, name))
            if found is None:
                problems.append(f"'{name}' has no place in the checkpoint's optimizer")
            elif found != g:
                problems.append(f"'{name}' is in param group {g}, but was saved in group {found}")
    for owned in model.parameters.values():
        for key, how in saved.state.get(manifest.ties.get(owned.name, owned.name), {}).items():
            if how == "own" and not _is_whole(model, owned):
                problems.append(f"the optimizer's '{key}' of '{owned.name}' is not of the parameter's shape and "
                                "needs it whole: use a plan that leaves this parameter whole")  # fmt: skip
            elif how == "spanning" and not alone:
                problems.append(f"the optimizer's '{key}' of '{owned.name}' covers several parameters: "
                                f"{saved.kind} can be saved and loaded in one process only")  # fmt: skip
    spanning = any(how == "spanning" for kept in saved.state.values() for how in kept.values())
    if spanning and alone and tuple(names_of(g, model) for g in optimizer.param_groups) != saved.parameters:
        problems.append(f"{saved.kind}'s state depends on the order of the parameters, which is another here")
    return problems


@dataclass(slots=True, eq=False)
class Fresh:
    """An optimizer's new state, not yet its own. ``tensors``: by DCP key, to be read into."""

    tensors: dict[str, Held]
    state: dict[Any, dict[str, Any]]


def fresh(
    optimizer: torch.optim.Optimizer, model: Holdings, manifest: Manifest, values: Mapping[str, Mapping[str, Any]]
) -> Fresh:
    """Empty tensors for the saved state of the parameters here, and the values that are no tensors."""
    assert manifest.optimizer is not None
    made = Fresh({}, {})
    on_device = {
        id(p): bool(g.get("capturable") or g.get("fused")) for g in optimizer.param_groups for p in g["params"]
    }
    for identity, owned in model.parameters.items():
        name = manifest.ties.get(owned.name, owned.name)
        kept = manifest.optimizer.state.get(name)
        if kept is None or identity not in on_device:
            continue
        state = made.state[owned.parameter] = {}
        parameter = _local(owned.parameter)
        for key, how in kept.items():
            if how in ("value", "spanning") and key_of(name, key) not in manifest.tensors:
                state[key] = values[name][key]
                continue
            saved = manifest.tensors[key_of(name, key)]
            dtype = getattr(torch, saved.dtype)
            if how == "like":
                tensor = torch.empty_like(parameter, dtype=dtype, requires_grad=False)
                boxes = tuple(Box(b.offsets, _region(tensor, owned, b)) for b in owned.boxes)
                state[key] = _as_parameter(tensor, owned.parameter)
            else:
                stays = key == "step" and not on_device[identity]  # as Optimizer.load_state_dict places it
                tensor = torch.empty(saved.shape, dtype=dtype, device="cpu" if stays else parameter.device)
                boxes = (Box((0,) * len(saved.shape), tensor),)
                state[key] = tensor
            before = made.tensors.get(key_of(name, key))
            known = before.boxes if before is not None else ()
            made.tensors[key_of(name, key)] = Held(dtype, saved.shape, known + boxes)
    return made


def _as_parameter(local: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """``local`` as a DTensor where the parameter is one."""
    if not hasattr(parameter, "to_local"):
        return local
    from torch.distributed.tensor import DTensor

    assert isinstance(parameter, DTensor)
    return DTensor.from_local(
        local, parameter.device_mesh, parameter.placements, run_check=False,
        shape=parameter.shape, stride=parameter.stride(),
    )  # fmt: skip


def install(
    optimizer: torch.optim.Optimizer, made: Fresh, groups: Iterable[Mapping[str, Any]], others: Mapping[Any, Any]
) -> None:
    """Give the optimizer its new state and options, as ``Optimizer.load_state_dict`` ends."""
    for group, options in zip(optimizer.param_groups, groups, strict=True):
        for key in [k for k in group if k not in options and k not in _NOT_OPTIONS]:
            del group[key]
        group.update(options)
    optimizer.state.clear()
    optimizer.state.update({**made.state, **others})
    optimizer.__setstate__({"state": optimizer.state, "param_groups": optimizer.param_groups})
