"""Live: the last way to divide a model, for one whose Python decides by tensor values as it goes.

The user's own ``forward`` runs for every call; the modules a stage lists run on that stage's device, one device at a
time, as their calls come. One microbatch, PyTorch's own autograd graph, the numbers of the unsplit model bit for bit.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from partita.plan import Plan
from partita.runtime.local import torch_device
from partita.runtime.team import Team
from partita.torch_compat import pytree, saving_is_hooked, transforming


def placed_modules(module: nn.Module, plan: Plan) -> dict[str, str]:
    """Qualified name -> device, for the modules stages list, without those inside another of the same device."""
    placed: dict[str, str] = {}
    for stage in plan.stages:
        for name in stage.modules:
            placed[name.split("@")[0]] = stage.devices[0]
    known = dict(module.named_modules())
    return {n: d for n, d in placed.items() if n in known and n and not isinstance(known[n], nn.ModuleList)}


def children_bytes(module: nn.Module) -> tuple[tuple[str, int], ...]:
    """The modules worth placing, in order, with their parameters' bytes: through lists, down to what is called."""
    found: list[tuple[str, int]] = []

    def visit(name: str, child: nn.Module) -> None:
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            for key, item in child.named_children():
                visit(f"{name}.{key}" if name else key, item)
        else:
            found.append((name, sum(p.numel() * p.element_size() for p in child.parameters())))

    for key, item in module.named_children():
        visit(key, item)
    return tuple(found)


@contextlib.contextmanager
def dispatched(module: nn.Module, placed: dict[str, str], team: Team) -> Iterator[None]:
    """While open, calls of the placed modules run on their devices' threads."""
    known = dict(module.named_modules())
    patched: list[nn.Module] = []
    active: list[str] = []
    try:
        for name, device in placed.items():
            child = known[name]
            if "forward" in vars(child):
                continue
            sender = _sender(child.forward, name, device, team, active)
            object.__setattr__(child, "forward", _Sent(child, child.forward, sender))
            patched.append(child)
        yield
    finally:
        for child in patched:
            vars(child).pop("forward", None)


class _Sent:
    """Stands in for a module's ``forward``; in a copy of the module made meanwhile, the copy's own stands again."""

    def __init__(self, module: nn.Module, forward: Callable[..., Any], sender: Callable[..., Any]) -> None:
        self.module, self.__wrapped__, self.sender = module, forward, sender

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.sender(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = memo.get(id(self.module))
        return self if copied is None else types.MethodType(type(self.module).forward, copied)


def _sender(forward: Callable[..., Any], name: str, device: str, team: Team, active: list[str]) -> Callable[..., Any]:
    target = torch_device(device)

    def run(*args: Any, **kwargs: Any) -> Any:
        if active or torch.compiler.is_compiling():  # on a device's thread already; inside torch.cond, which compiles
            return forward(*args, **kwargs)
        if transforming():  # vmap, grad: of this thread alone
            return forward(*args, **kwargs)
        if target.type == "cpu" and saving_is_hooked():  # as in a checkpoint, likewise
            return forward(*args, **kwargs)
        grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        casts = [(k, torch.get_autocast_dtype(k)) for k in ("cpu", "cuda") if torch.is_autocast_enabled(k)]
        moved_args, moved_kwargs = args, kwargs
        if target.type != "cpu":
            move = lambda t: t.to(target) if isinstance(t, torch.Tensor) else t  # noqa: E731
            moved_args, moved_kwargs = pytree.tree_map(move, (args, kwargs))
        result: list[Any] = []

        def job() -> None:
            with contextlib.ExitStack() as stack:
                stack.enter_context(torch.inference_mode(inference))
                stack.enter_context(torch.set_grad_enabled(grad))
                for kind, dtype in casts:
                    stack.enter_context(torch.autocast(kind, dtype=dtype))
                result.append(forward(*moved_args, **moved_kwargs))

        active.append(device)
        try:
            team.run({device: job}, lambda: None)
        except Exception as error:
            error.add_note(f"in module '{name}', which runs on {device}")
            raise
        finally:
            active.pop()
        return result[0]

    return run
