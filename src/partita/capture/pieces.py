"""Opaque pieces while tracing: run once for real, recorded as one op, answered with fake tensors of the same looks."""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from partita import torch_compat as tc
from partita.capture.frames import user_line
from partita.capture.opaque import Opaque, OpaqueFunction, OpaqueMethod, OpaqueModule, alike
from partita.capture.state import Generators, ModuleState
from partita.capture.structure import Structure, put_together, take_apart
from partita.graph import Ref

if TYPE_CHECKING:
    from partita.capture.tracer import Tracer


def module_piece(tracer: Tracer, path: str, module: nn.Module, args: Any, kwargs: Any) -> Any:
    """The module's answer, recorded as one op."""
    own = owned(tracer, module)
    label = f"module {path} ({type(module).__name__})"

    def make(arguments: Structure) -> Opaque:
        return OpaqueModule(label, user_line(), arguments, module=module, own=tuple(real for _, real, _ in own))

    return _piece(tracer, path, module, own, make, args, kwargs)


def method_piece(tracer: Tracer, path: str, module: nn.Module, name: str, args: Any, kwargs: Any) -> Any:
    """The method's answer, recorded as one op that reads only the parameters the method's code can name."""
    method = getattr(type(module), name)
    children = named_in(method, type(module))
    own = [o for o in owned(tracer, module) if children is None or o[0] in children]

    def make(arguments: Structure) -> Opaque:
        return OpaqueMethod(f"method {path}", user_line(), arguments, module=module, method=method,
                            own=tuple(real for _, real, _ in own))  # fmt: skip

    return _piece(tracer, path, module, own, make, args, kwargs)


def function_piece(tracer: Tracer, cls: Any, apply: Any, args: Any, kwargs: Any) -> Any:
    """An autograd function's answer, recorded as one op that keeps its own backward."""

    def make(arguments: Structure) -> Opaque:
        return OpaqueFunction(f"autograd function {cls.__name__}", user_line(), arguments, function=cls)

    return _piece(tracer, "", None, [], make, args, kwargs)


Owned = list[tuple[str, torch.Tensor, torch.Tensor]]


def owned(tracer: Tracer, module: nn.Module) -> Owned:
    """(first part of the name, user's tensor, fake) of every parameter and buffer of the module, each once."""
    real_of = tracer.originals
    found: dict[int, tuple[str, torch.Tensor, torch.Tensor]] = {}
    every = [*module.named_parameters(), *module.named_buffers()]
    for name, fake in every:
        real = real_of.get(id(fake))
        if real is None:
            raise tracer.stop(f"the parameter or buffer {name} was replaced during forward")
        found.setdefault(id(real), (name.split(".")[0], real, fake))
    return list(found.values())


def named_in(method: Any, cls: type) -> set[str] | None:
    """Attribute names a method's code can reach through ``self``, other methods followed; None: could be any."""
    names: set[str] = set()
    pending, seen = [method], set()
    while pending:
        function = pending.pop()
        code = getattr(_unwrapped(function), "__code__", None)
        if code is None or code in seen:
            continue
        seen.add(code)
        for inner in _codes(code):
            if not _REFLECTION.isdisjoint(inner.co_names):
                return None
            names.update(inner.co_names)
            for name in inner.co_names:
                other = getattr(cls, name, None)
                if isinstance(other, types.FunctionType) and not hasattr(nn.Module, name):
                    pending.append(other)
                elif isinstance(other, property):
                    pending.append(other.fget)
    return names


_REFLECTION = {"getattr", "parameters", "named_parameters", "modules", "named_modules", "children", "named_children",
               "buffers", "named_buffers", "__dict__", "_modules", "_parameters", "get_submodule", "get_parameter",
               "vars", "state_dict", "__call__", "get_input_embeddings", "get_output_embeddings"}  # fmt: skip


def _unwrapped(function: Any) -> Any:
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _piece(tracer: Tracer, path: str, module: nn.Module | None, own: Owned, make: Any, args: Any, kwargs: Any) -> Any:
    tracer.inside += 1  # nothing done here is the user's doing
    try:
        return _recorded(tracer, path, module, own, make, args, kwargs)
    finally:
        tracer.inside -= 1


def _recorded(
    tracer: Tracer, path: str, module: nn.Module | None, own: Owned, make: Any, args: Any, kwargs: Any
) -> Any:
    leaves, arguments = take_apart((args, kwargs))
    if any(n.kind == "atom" and isinstance(n.value, nn.Module) for n in arguments.nodes):
        raise tracer.stop("a module is passed to a piece that runs as one op", outer(path))
    fakes = [tracer.stand_in(t) for t in leaves]
    names = [tracer.name_of(t) for t in fakes]
    reads = [tracer.name_of(tracer.stand_ins[id(real)]) for _, real, _ in own]
    opaque = make(arguments)
    shadow = tracer.shadow
    if shadow is None or not shadow.real:
        raise tracer.stop(f"{opaque.label} must run as one piece, and the example inputs have no data", outer(path))
    shadow.run(lambda: None, ())
    real_args = [shadow.values[n] for n in names]
    real_own = [shadow.values[n] for n in reads]
    before = [tc.version(t) for t in (*real_args, *real_own)]
    probe = _for_probe(opaque, own)
    drawn = _generators()
    out = _run(tracer, probe, module, real_args, (*real_own, *real_own))
    random = module is not None or not drawn.same(_generators())
    with tc.no_modes():
        drawn.restore()
    results, structure = take_apart(out)
    after = [tc.version(t) for t in (*real_args, *real_own)]
    _check_shapes(tracer, opaque, probe, module, path, real_args, real_own, results, structure)
    writes = dict.fromkeys(
        tracer.trace.values[n].base
        for n, x, y in zip((*names, *reads), before, after, strict=True) if x != y
    )  # fmt: skip
    if module is not None and module.training:
        writes.update(dict.fromkeys(n for n, (_, _, fake) in zip(reads, own, strict=True)
                                    if tracer.trace.values[n].role == "buffer"))  # fmt: skip
    pairs = [*zip(real_args, fakes, strict=True), *zip(real_own, _own_fakes(own), strict=True)]
    answers = _imitate(tracer, results, pairs)
    opaque.result = structure
    target = f"opaque:{len(tracer.trace.opaques)}"
    tracer.trace.opaques[target] = opaque
    taint = frozenset(["opaque code"]) if module is not None else frozenset()
    call = tracer.record(target, tuple(Ref(n) for n in names), (), list(answers), grad=torch.is_grad_enabled(),
                         writes=tuple(writes), reads=tuple(reads), random=random, taint=taint)  # fmt: skip
    shadow.values.update((n, t) for n, t in zip(call.outputs, results, strict=True) if n)
    shadow.done.add(call.name)
    return put_together(structure, answers)


def _generators() -> Generators:
    with tc.no_modes():
        return Generators.save()


def _own_fakes(own: Owned) -> list[torch.Tensor]:
    return [fake for _, _, fake in own]


def outer(path: str) -> str:
    """The module around a piece."""
    return path.removesuffix("()").rpartition(".")[0]


def _for_probe(opaque: Opaque, own: Owned) -> Opaque:
    """The piece such that real stand-ins replace the fakes in the module, and the originals in lists of weights."""
    if isinstance(opaque, OpaqueModule | OpaqueMethod):
        return replace(opaque, own=(*_own_fakes(own), *(real for _, real, _ in own)))
    return opaque


def _run(tracer: Tracer, opaque: Opaque, module: nn.Module | None, tensors: list[Any], own: tuple[Any, ...]) -> Any:
    """One real run that leaves no mark on the module's Python state."""
    tracer.inside += 1
    state = ModuleState(module) if module is not None else None
    try:
        with tc.no_modes():
            args, kwargs = put_together(opaque.arguments, tensors)
            out = opaque.call(args, kwargs, own)
        if state is not None:
            for _, name, _ in state.outside_changes():
                raise tracer.stop(
                    f"{opaque.label} (or a hook of it) changes {name}, which is no part of the model,", ""
                )
            for inside, name in state.changes():
                if any(t.requires_grad for t in take_apart(vars(state.modules[inside]).get(name))[0]):
                    raise tracer.stop(f"{opaque.label} keeps a tensor through which gradients flow in {name!r}", "")
        return out
    finally:
        tracer.inside -= 1
        if state is not None:
            state.restore()


def _check_shapes(
    tracer: Tracer, opaque: Opaque, probe: Opaque, module: nn.Module | None, path: str, real_args: list[Any],
    real_own: list[Any], results: list[Any], structure: Structure,
) -> None:  # fmt: skip
    """A second run on other values must give the same shapes and numbers, or the piece is too small."""
    if module is None:
        return
    saved = _generators()
    try:
        with tc.no_modes():
            other_args = [_other(t) for t in real_args]
            other_own = [t.detach().clone().requires_grad_(t.requires_grad) for t in real_own]
        try:
            again = _run(tracer, probe, module, other_args, (*other_own, *other_own))
        except Exception:
            return  # values out of range: no evidence; the check at run time remains
        found, shape = take_apart(again)
    finally:
        with tc.no_modes():
            saved.restore()
    if not alike(structure, shape) or [t.shape for t in found] != [t.shape for t in results]:
        raise tracer.stop(f"{opaque.label} returns shapes or numbers that depend on values", outer(path))


def _other(tensor: torch.Tensor) -> torch.Tensor:
    """Other values of the same kind: rolled, floats stirred, masks and counts with another sum."""
    new = tensor.detach().clone()
    if new.numel():
        flat = new.flatten().roll(1)
        if flat.dtype == torch.bool:
            flat[0] = ~flat[0]
        elif not flat.is_floating_point() and not flat.is_complex():
            flat[0] = flat[-1]
        new = flat.reshape(new.shape)
        if new.is_floating_point():
            new = new + 0.1 * torch.randn_like(new) * new.abs().mean()
    return new.requires_grad_(tensor.requires_grad)


def _imitate(tracer: Tracer, results: list[Any], pairs: list[tuple[Any, Any]]) -> list[Any]:
    """Fake tensors for real results: the argument itself, a view of an argument, or new memory."""
    same = {id(real): fake for real, fake in pairs}
    by_storage = {tc.storage_key(real): fake for real, fake in reversed(pairs)}
    made: list[Any] = []
    tracer.inside += 1
    try:
        with tc.without_pre_dispatch():
            for real in results:
                key = tc.storage_key(real)
                if id(real) in same:
                    fake = same[id(real)]
                elif key in by_storage and by_storage[key].dtype == real.dtype:
                    with torch.set_grad_enabled(real.requires_grad):
                        fake = by_storage[key].as_strided(real.shape, real.stride(), real.storage_offset())
                else:
                    fake = tracer.fake.from_tensor(real.detach())
                    if real.requires_grad:
                        fake = fake.requires_grad_().clone()
                    by_storage[key] = fake
                made.append(fake)
    finally:
        tracer.inside -= 1
    return made
