"""From an op to what runs: torch's own operators, user code, and partita's few."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import torch

from partita.capture import Captured, resolve
from partita.capture.state import Generators
from partita.graph import Op
from partita.program import Program, Segment
from partita.runtime.collectives import Group
from partita.runtime.spmd_ops import IN_GROUP
from partita.runtime.sync_norm import batch_norm
from partita.runtime.weight_grad import APART
from partita.sharding.call import Rewrite


def dropout_noise(shape: list[int], dtype: torch.dtype, p: float, order: list[int]) -> torch.Tensor:
    """What eager dropout multiplies by: ``empty_like(x).bernoulli_(1 - p).div_(1 - p)``, memory order included."""
    physical = torch.empty([shape[d] for d in order], dtype=dtype)
    inverse = [0] * len(order)
    for position, dim in enumerate(order):
        inverse[dim] = position
    noise = physical.permute(inverse)
    return noise.bernoulli_(1 - p).div_(1 - p)


dropout_noise.returns_sequence = False  # type: ignore[attr-defined]


def rewritten(function: Callable[..., Any], rewrite: Rewrite) -> Callable[..., Any]:
    """The op as it must run on a microbatch (see ``Rewrite``)."""
    if rewrite.kind == "weighted":
        return lambda share, *args, **kwargs: function(*args, **kwargs) * share
    if rewrite.kind == "sum_over_total":

        def summed(wholes: list[torch.Tensor], *args: Any, **kwargs: Any) -> Any:
            counted = wholes[0] != rewrite.ignore_index
            total = wholes[1][wholes[0][counted]].sum() if len(wholes) > 1 else counted.sum()
            values = list(args)
            if rewrite.reduction_arg < len(values):
                values[rewrite.reduction_arg] = 2
            else:
                kwargs = {**kwargs, "reduction": 2}
            return function(*values, **kwargs) / total

        return summed
    return function


def drawn(function: Callable[..., Any]) -> Callable[..., Any]:
    """A random op that every member of a group runs: one after the other, each from the leader's random state."""

    def run(*args: Any, group: Group, **kwargs: Any) -> Any:
        mine = torch.frombuffer(bytearray(pickle.dumps(Generators.save())), dtype=torch.uint8)
        before = group.broadcast(mine if group.rank == 0 else None)
        result = None
        for turn in range(group.size):
            if turn == group.rank:
                if turn:
                    pickle.loads(before.numpy().tobytes()).restore()
                result = function(*args, **kwargs)
            group.broadcast(mine[:1] if turn == group.rank else None, turn)
        return result

    run.in_group = True  # type: ignore[attr-defined]
    run.returns_sequence = returns_sequence(function)  # type: ignore[attr-defined]
    return run


def told(function: Callable[..., Any], op: str) -> Callable[..., Any]:
    """What the members of a group run together; a member that waits for others can say for which op."""

    def run(*args: Any, group: Group, **kwargs: Any) -> Any:
        group.op = op
        return function(*args, group=group, **kwargs)

    run.in_group = True  # type: ignore[attr-defined]
    run.returns_sequence = returns_sequence(function)  # type: ignore[attr-defined]
    return run


def returns_sequence(function: Callable[..., Any]) -> bool:
    """Whether a call gives a list or tuple even where it holds one tensor (``split``, ``unbind``, user code)."""
    schema = getattr(function, "_schema", None)
    if schema is None:
        return bool(getattr(function, "returns_sequence", True))
    returns = schema.returns
    return len(returns) > 1 or (len(returns) == 1 and "List" in str(returns[0].type))


OWN: dict[str, Callable[..., Any]] = {"partita.dropout_noise": dropout_noise}


def resolver(
    captured: Captured, program: Program, segment: Segment, *, members: int = 1
) -> Callable[[Op], Callable[..., Any]]:
    """op -> callable, for one segment. ``members``: of the group that runs it."""
    parts = len(program.sizes) > 1 and segment.phase == "split"

    def find(op: Op) -> Callable[..., Any]:
        if op.target in IN_GROUP:
            return told(IN_GROUP[op.target], op.name)
        if op.random and members > 1:
            return told(drawn(plain(op)), op.name)
        return plain(op)

    def plain(op: Op) -> Callable[..., Any]:
        if op.target in OWN:
            return OWN[op.target]
        if op.target in captured.opaques:
            return captured.opaques[op.target]
        if parts and program.synchronised and op.target == "aten.batch_norm.default":
            return batch_norm(op.name)
        if parts and op.target in APART:
            return APART[op.target]
        return resolve(op.target)

    return find
