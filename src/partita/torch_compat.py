"""Every private torch name partita uses, each with its reason and the public way it waits for."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar, cast

import torch

# A fake tensor has shape, dtype and autograd history but no memory. Public: none (torch.export uses it inside).
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
)

# The one kind of mode that the PreDispatch slot accepts beside make_fx's own. Public: none.
from torch._subclasses.schema_check_mode import SchemaCheckMode
from torch.overrides import TorchFunctionMode

# Nested containers as leaves and a structure. Public: torch.utils.pytree, announced, not in every release from 2.11 on.
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from partita.uncollected import uncollected

__all__ = [
    "DataDependentOutputException",
    "DynamicOutputShapeException",
    "FakeTensor",
    "OpOverload",
    "PreDispatchMode",
    "TorchDispatchMode",
    "TorchFunctionMode",
    "UnsupportedOperatorException",
    "all_gather_single",
    "autocast_call",
    "compiled_allocations",
    "autocast_excluded",
    "autocast_kernel",
    "decomposes",
    "enable_python_dispatcher",
    "fake_mode",
    "force_eager",
    "global_hooks",
    "has_grad_hooks",
    "keeps_graph",
    "no_function_modes",
    "no_modes",
    "no_view",
    "not_compiled",
    "local_part",
    "pytree",
    "run_backward",
    "safe_softmax",
    "saving_is_hooked",
    "shares_storage",
    "storage_key",
    "tcp_store",
    "transforming",
    "unchecked_distributions",
    "version",
    "watched",
    "whole_compilation",
    "without_pre_dispatch",
    "wrapped",
]

# One resolved overload of an operator (``aten.linear.default``). Public: none.
OpOverload = torch._ops.OpOverload


class PreDispatchMode(SchemaCheckMode):  # type: ignore[no-untyped-call]
    """A mode that sees ops before autograd and before composite ops fall apart. Public: none."""

    def __init__(self) -> None:
        TorchDispatchMode.__init__(self, torch._C.DispatchKey.PreDispatch)  # type: ignore[no-untyped-call]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # otherwise the first op imports torch._dynamo, which takes seconds


def fake_mode() -> FakeTensorMode:
    """The mode under which ops run on fake tensors, real ones beside them. Its first one imports torch._dynamo."""
    with uncollected():
        return FakeTensorMode(allow_non_fake_inputs=True)


def storage_key(tensor: torch.Tensor) -> int:
    """The identity of a tensor's memory, also of a fake tensor's. Public: none for storages without data."""
    return cast(int, tensor.untyped_storage()._cdata)


def safe_softmax(scores: torch.Tensor) -> torch.Tensor:
    """Softmax over the last dim; rows of -inf give zeros, as inside attention. Public: none."""
    return cast(torch.Tensor, torch.ops.aten._safe_softmax.default(scores, -1))


def version(tensor: torch.Tensor) -> int:
    """How often the tensor was changed in place. Public: none."""
    return tensor._version


def decomposes(op: Any) -> bool:
    """Whether the op is made of other ops above autograd. Public: none."""
    return bool(op._can_decompose())


def autocast_kernel(op: Any, device: str) -> bool:
    """Whether autocast treats this op in a way of its own. Public: none."""
    name, dispatch_key = op.name(), getattr(torch._C.DispatchKey, _AUTOCAST[device])
    return bool(
        torch._C._dispatch_has_kernel_for_dispatch_key(name, dispatch_key)
        and not torch._C._dispatch_kernel_for_dispatch_key_is_fallthrough(name, dispatch_key)
    )


_AUTOCAST = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}


def autocast_call(op: Any, device: str, args: Any, kwargs: Any) -> Any:
    """The op as autocast runs it: casts, then the op again with autocast out of the way. Public: none."""
    return op._op_dk(getattr(torch._C.DispatchKey, _AUTOCAST[device]), *args, **kwargs)


def autocast_excluded(device: str) -> bool:
    """Whether we are inside an op that autocast has already treated. Public: none."""
    return bool(torch._C._dispatch_tls_is_dispatch_key_excluded(getattr(torch._C.DispatchKey, _AUTOCAST[device])))


def autocasting() -> str:
    """The device type for which autocast is on here; '' where it is off or already at work."""
    for device in ("cpu", "cuda"):
        if torch.is_autocast_enabled(device) and not autocast_excluded(device):
            return device
    return ""


@contextmanager
def force_eager() -> Iterator[None]:
    """Functions under ``torch.compile`` run as plain Python inside."""
    if "torch._dynamo" not in sys.modules:
        yield
        return
    stance: Callable[[str], Any] = torch.compiler.set_stance
    with stance("force_eager"):
        yield


def transforming() -> bool:
    """Whether a functorch transform (vmap, grad, jvp) is at work around. Public: none."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def no_view(tensor: torch.Tensor) -> torch.Tensor:
    """The same, not known to autograd as a view: what an autograd function gives can then be changed in place, as the
    result of the op that it stands for can. Only for memory that nobody else has. Public: none."""
    return torch.ops.aten._unsafe_view.default(tensor, tensor.shape)  # type: ignore[no-any-return]


def saving_is_hooked() -> bool:
    """Whether hooks of this thread see what autograd saves (``torch.utils.checkpoint``, ``save_on_cpu``).

    Public: ``torch.autograd.graph.saved_tensors_hooks`` sets them, none asks.
    """
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def keeps_graph() -> bool:
    """Whether the backward at work was told to keep its graph (``retain_graph=True``). Public: none."""
    return bool(torch._C._autograd._get_current_graph_task_keep_graph())


def global_hooks() -> tuple[int, ...]:
    """Identities of the hooks registered for all modules at once. Public: registering them only."""
    module = sys.modules["torch.nn.modules.module"]
    kinds = ("forward_pre", "forward", "backward_pre", "backward")
    return tuple(id(hook) for kind in kinds for hook in getattr(module, f"_global_{kind}_hooks", {}).values())


F = TypeVar("F", bound=Callable[..., Any])


def not_compiled(function: F) -> F:
    """The function runs as plain Python inside what ``torch.compile`` compiles.

    ``torch.compiler.disable`` imports torch._dynamo, which takes seconds: asked only where that has been imported.
    """
    made: list[Any] = []

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        if not made:
            made.append(torch.compiler.disable(function))  # type: ignore[no-untyped-call]
        return made[0](*args, **kwargs)

    return cast(F, run)


def wrapped(tensor: torch.Tensor) -> bool:
    """Whether a functorch transform (vmap, grad, jvp) has wrapped the tensor. Public: none."""
    functorch = torch._C._functorch
    return bool(functorch.is_functorch_wrapped_tensor(tensor))


@contextmanager
def whole_compilation() -> Iterator[None]:
    """What ``torch.compile`` compiles inside, it compiles at once, backward too, for any number of backwards after one
    forward, and whatever modes are active around. Public: none of the settings."""
    from torch._functorch import config
    from torch.utils._python_dispatch import _disable_current_modes

    wanted = {"donated_buffer": False, "force_non_lazy_backward_lowering": True}
    with config.patch({k: v for k, v in wanted.items() if hasattr(config, k)}), _disable_current_modes():
        yield


def watched() -> bool:
    """Whether a dispatch mode is active under which compiled code does not run. Public: none asks."""
    stack = range(torch._C._len_torch_dispatch_stack())
    modes = [torch._C._get_dispatch_stack_at(i) for i in stack]
    return any(not getattr(mode, "ignore_compile_internals", bool)() for mode in modes)


@contextmanager
def compiled_allocations(told: Callable[[torch.Tensor], None]) -> Iterator[None]:
    """``told`` of each tensor for which compiled code takes CPU memory meanwhile, by no op that a mode would see. Code
    that is compiled meanwhile is not among it. Public: none."""
    codecache = sys.modules.get("torch._inductor.codecache")
    name = "empty_strided_cpu"
    modules = [m for m in codecache.PyCodeCache.modules if hasattr(m, name)] if codecache is not None else []
    before = [getattr(m, name) for m in modules]

    def made(*args: Any) -> torch.Tensor:
        tensor: torch.Tensor = before[0](*args)
        told(tensor)
        return tensor

    for module in modules:
        setattr(module, name, made)
    try:
        yield
    finally:
        for module, function in zip(modules, before, strict=True):
            setattr(module, name, function)


_ENGINE: Any = torch.autograd.Variable._execution_engine


def run_backward(roots: Sequence[object], grads: Sequence[torch.Tensor], keeps: bool = False) -> None:
    """``torch.autograd.backward`` from GradientEdges whose gradients fit them; ``keeps`` the graph. Public: that,
    which looks at every gradient in Python, twice what a small backward takes, and imports sympy to do so."""
    config = sys.modules.get("torch._functorch.config") if keeps else None
    with config.patch(donated_buffer=False) if config is not None else nullcontext():  # as in whole_compilation
        _ENGINE.run_backward(
            tuple(roots), tuple(grads), keeps, False, (), allow_unreachable=True, accumulate_grad=True
        )  # retain_graph, create_graph, inputs


def shares_storage(tensor: torch.Tensor) -> bool:
    """Whether another tensor lies in the same memory; False for sparse ones, to which nothing is added in place.
    Public: none."""
    if tensor.layout is not torch.strided:
        return False
    storage = tensor.untyped_storage()
    return torch._C._storage_Use_Count(storage._cdata) > 2  # the tensor and ``storage``


@contextmanager
def no_modes() -> Iterator[None]:
    """Ops inside run for real, whatever is being traced around. Public: none."""
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes(), torch._C._DisablePythonDispatcher():
        yield


@contextmanager
def no_function_modes() -> Iterator[None]:
    """Calls of torch's Python API inside are seen by no TorchFunctionMode. Public: none."""
    with torch._C.DisableTorchFunction():
        yield


@contextmanager
def without_pre_dispatch() -> Iterator[None]:
    """Ops inside are not seen by the PreDispatchMode above; fake tensors stay fake. Public: none."""
    if torch._ops._len_torch_dispatch_stack_pre_dispatch() == 0:  # type: ignore[no-untyped-call]
        yield
        return
    mode = torch._ops._pop_mode_from_pre_dispatch()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        torch._ops._set_mode_pre_dispatch(mode)  # type: ignore[no-untyped-call]


@contextmanager
def unchecked_distributions() -> Iterator[None]:
    """torch.distributions without the checks of their arguments, which look at values and raise or do nothing.

    Public: ``set_default_validate_args``, but no way to ask what it was.
    """
    kind = torch.distributions.Distribution
    before = kind._validate_args
    kind.set_default_validate_args(False)
    try:
        yield
    finally:
        kind.set_default_validate_args(before)


def has_grad_hooks(parameter: torch.Tensor) -> bool:
    """Whether hooks wait for the parameter's gradient. Public: registering them only, not asking for them."""
    return bool(getattr(parameter, "_backward_hooks", None) or getattr(parameter, "_post_accumulate_grad_hooks", None))


def all_gather_single(out: torch.Tensor, own: torch.Tensor, **options: Any) -> Any:
    """``torch.distributed.all_gather_single``, which releases before 2.13 call ``all_gather_into_tensor``."""
    distributed = torch.distributed
    gather = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
    return gather(out, own, **options)


def tcp_store(host: str, port: int, **options: Any) -> Any:
    """A client of the store through which ranks find each other. Public, but not exported to type checkers."""
    from torch import distributed

    return distributed.TCPStore(host, port, **options)  # type: ignore[attr-defined]


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """Of a DTensor what this process has of it; any other tensor itself. Public: ``DTensor.to_local``, which is an op
    and would be counted as one."""
    found: torch.Tensor = getattr(tensor, "_local_tensor", tensor)
    return found
