"""While a trace is made: module calls are noted, opaque pieces run whole, and calls that never become ops are met."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from partita import torch_compat as tc
from partita.capture.pieces import function_piece, method_piece, module_piece
from partita.capture.reading import read_tensor

if TYPE_CHECKING:
    from partita.capture.tracer import Tracer

# Methods of Tensor that leave the world of ops, or whose effect a graph cannot repeat.
_OUTSIDE = {
    "__dlpack__", "data_ptr", "storage", "untyped_storage", "__deepcopy__", "register_hook",
    "register_post_accumulate_grad_hook", "retain_grad", "backward", "__reduce_ex__", "share_memory_", "resize_",
    "set_",
}  # fmt: skip
_active = threading.local()


class FunctionCalls(tc.TorchFunctionMode):
    """Sees calls of the Python API that never become ops."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tracer = self.tracer
        name = getattr(func, "__name__", "")
        if tracer.inside or not args or not isinstance(args[0], torch.Tensor):
            return func(*args, **kwargs)
        if name == "__get__":
            if getattr(getattr(func, "__self__", None), "__name__", "") == "data":
                return args[0].detach()
        elif name == "__set__":
            attribute = getattr(func.__self__, "__name__", "?")
            if attribute == "requires_grad" and self.harmless(args[0], args[1]):
                return None
            raise tracer.stop(f"Tensor.{attribute} is assigned")
        elif name in ("tolist", "numpy", "__array__"):
            return read_tensor(tracer, name, args[0])
        elif name == "requires_grad_":
            if not self.harmless(args[0], args[1] if len(args) > 1 else kwargs.get("requires_grad", True)):
                raise tracer.stop("Tensor.requires_grad_ changes what gradients flow")
            return args[0]
        elif name in _OUTSIDE:
            raise tracer.stop(f"Tensor.{name} leaves the world of ops")
        return func(*args, **kwargs)

    def harmless(self, tensor: torch.Tensor, wanted: Any) -> bool:
        """Whether setting ``requires_grad`` changes nothing anyone sees: an inner tensor wants a gradient."""
        if tensor.requires_grad == wanted:
            return True
        inner = bool(wanted) and id(tensor) not in self.tracer.originals
        if inner:
            self.tracer.wants_gradient.add(id(tensor))
        return inner


@contextmanager
def patched(tracer: Tracer) -> Iterator[None]:
    """In this thread, module calls, autograd functions and autograd calls come by the tracer."""
    call, apply = nn.Module.__call__, torch.autograd.Function.__dict__["apply"]
    grad, backward = torch.autograd.grad, torch.autograd.backward
    distribution, made = torch.distributions.Distribution, torch.distributions.Distribution.__init__
    _active.tracer = tracer

    def mine() -> bool:
        return getattr(_active, "tracer", None) is tracer and not tracer.inside

    def module_call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        path = tracer.paths.get(id(module)) if mine() else None
        if path is None:
            return call(module, *args, **kwargs)
        with tracer.within(path):
            if path in tracer.pieces:
                return module_piece(tracer, path, module, args, kwargs)
            return call(module, *args, **kwargs)

    def function_apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if not mine():
            return apply.__func__(cls, *args, **kwargs)
        if cls.__name__ == "CheckpointFunction" and cls.__module__ == "torch.utils.checkpoint":
            return _reentrant(tracer, *args)
        return function_piece(tracer, cls, lambda *a, **k: apply.__func__(cls, *a, **k), args, kwargs)

    def make_distribution(self: Any, *args: Any, **kwargs: Any) -> None:
        tracer.trace.unchecked |= mine()
        made(self, *args, **kwargs)

    def refusing(original: Callable[..., Any], reason: str) -> Callable[..., Any]:
        def refuse(*args: Any, **kwargs: Any) -> Any:
            if mine():
                raise tracer.stop(reason)
            return original(*args, **kwargs)

        return refuse

    def method_call(module: nn.Module, path: str, name: str) -> Callable[..., Any]:
        def call_method(*args: Any, **kwargs: Any) -> Any:
            if not mine():
                return getattr(type(module), name)(module, *args, **kwargs)
            return method_piece(tracer, path, module, name, args, kwargs)

        return call_method

    seeds = [(m, n, getattr(m, n)) for m in (torch, torch.random) for n in ("manual_seed", "seed", "set_rng_state")]
    for owner, name, original in seeds:
        setattr(owner, name, refusing(original, "the random generator is set inside forward"))
    replaced: list[tuple[nn.Module, str]] = []
    for path, module in tracer.model.named_modules():
        for piece in tracer.pieces:
            if piece.endswith("()") and piece.removesuffix("()").rpartition(".")[0] == path:
                name = piece.removesuffix("()").rpartition(".")[2]
                if name not in module.__dict__:
                    module.__dict__[name] = method_call(module, piece, name)
                    replaced.append((module, name))
    nn.Module.__call__ = module_call  # type: ignore[method-assign]
    torch.autograd.Function.apply = classmethod(function_apply)  # type: ignore[method-assign,assignment]
    torch.autograd.grad, torch.autograd.backward = (
        refusing(original, "gradients are taken inside forward") for original in (grad, backward)
    )
    distribution.__init__ = make_distribution  # type: ignore[method-assign]
    try:
        with tc.unchecked_distributions():
            yield
    finally:
        distribution.__init__ = made  # type: ignore[method-assign]
        nn.Module.__call__ = call  # type: ignore[method-assign]
        torch.autograd.Function.apply = apply  # type: ignore[method-assign]
        torch.autograd.grad, torch.autograd.backward = grad, backward
        for owner, name, original in seeds:
            setattr(owner, name, original)
        _active.tracer = None
        for module, name in replaced:
            module.__dict__.pop(name, None)


def _reentrant(tracer: Tracer, function: Any, preserve: Any, *args: Any) -> Any:
    """``checkpoint(use_reentrant=True)`` as its author sees it: no gradient inside unless an argument needs one."""
    needs = any(isinstance(a, torch.Tensor) and (a.requires_grad or id(a) in tracer.wants_gradient) for a in args)
    with torch.set_grad_enabled(needs and torch.is_grad_enabled()):
        return function(*args)
