"""Optimizers that would compute something else from a part of the parameters: refused at their first step.

SGD, Adam and most others treat each number by itself, so a rank that has some of the parameters, or some rows of one,
makes of these what one process would. Some take dot products over all parameters (L-BFGS, Liu and Nocedal 1989;
Prodigy, Mishchenko and Defazio 2023), some look at a whole matrix (Muon) or at its norms (LAMB): a rank's part gives
them other numbers, and nothing would show it. DTensors (ZeRO's shards) know of their other rows; a divided operator's
rows do not.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from partita.errors import UsageError
from partita.runtime.distributed.world import elsewhere

if TYPE_CHECKING:
    from partita.runtime.distributed.module import RankModule

ACROSS = frozenset({
    "LBFGS", "FullBatchLBFGS", "LBFGSNew", "Prodigy", "DAdaptSGD", "DAdaptAdam", "DAdaptAdaGrad", "DAdaptLion",
    "DAdaptAdan",
})  # fmt: skip
WITHIN = frozenset({
    "Adafactor", "Muon", "Shampoo", "SOAP", "Lamb", "LAMB", "Lars", "LARS", "NovoGrad", "NvNovoGrad",
})  # fmt: skip

_modules: weakref.WeakSet[RankModule] = weakref.WeakSet()
_listens: list[object] = []


def guard(module: RankModule) -> None:
    """From now on, a step of an optimizer that this module's parameters do not suit raises UsageError."""
    _modules.add(module)
    if not _listens:
        _listens.append(register_optimizer_step_pre_hook(_before_step))


def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    names = {kind.__name__ for kind in type(optimizer).__mro__}
    if not names & (ACROSS | WITHIN):
        return
    theirs = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for module in list(_modules):
        if any(id(p) in theirs for p in module.parameters()):
            problem = across(module) if names & ACROSS else within(module)
            if problem:
                error = UsageError(f"{type(optimizer).__name__} {problem}")
                raise elsewhere(error) if module.world.rank else error


def across(module: RankModule) -> str:
    """Why an optimizer that looks at all parameters at once does not suit the module; '' where every rank has them all.
    The same on every rank."""
    holding, everyone = module.holding, tuple(range(module.world.size))
    apart = [
        name
        for name, parameter in holding.parameters.items()
        if parameter.requires_grad and (holding.of[name].sets != (everyone,) or module.plan.zero)
    ]
    if not apart:
        return ""
    return (
        f"looks at all parameters at once, and no rank has all of them ({apart[0]} is held in parts or by some ranks "
        "only): its steps would differ from those of one process. Use an optimizer that treats each number by itself "
        "(AdamW, SGD), or a plan of one stage with neither tensor nor zero"
    )


def within(module: RankModule) -> str:
    """Why one that looks at whole matrices does not suit the module; '' where no operator takes rows of a parameter."""
    cut = [name for name in module.holding.cuts if module.holding.parameters[name].requires_grad]
    if not cut:
        return ""
    return (
        f"looks at each parameter as a whole, and of {len(cut)} of them ({cut[0]}, ...) a rank has only the rows that "
        "its part of a divided operator uses: its steps would differ from those of one process. Use an optimizer that "
        "treats each number by itself (AdamW, SGD), or a plan without tensor"
    )
