"""Values that Python takes out of tensors while tracing: real ones, guarded, or the trace stops."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from partita import torch_compat as tc
from partita.capture.encode import encode
from partita.capture.frames import user_line
from partita.capture.records import Read, flat, packet
from partita.capture.tables import SHAPE_FIXED, SHAPE_FROM_INTEGERS, SHAPE_FROM_MASKS
from partita.graph import Arg, Ref, refs

if TYPE_CHECKING:
    from partita.capture.tracer import Tracer


def _array(tensor: torch.Tensor) -> Any:
    """A copy; read-only, because what is written into ``t.numpy()`` would have to reach the tensor."""
    array = tensor.numpy(force=True).copy()
    array.setflags(write=False)
    return array


# Reads through Python's own protocols, and what they give.
_PROTOCOLS: dict[str, Callable[[Any], Any]] = {"tolist": lambda t: t.tolist(), "numpy": _array, "__array__": _array}


def execute(tracer: Tracer, func: Any, args: Any, kwargs: Any, encoded: Any, encoded_kwargs: Any) -> Any:
    """The op on fake tensors; where its result depends on values, on real ones."""
    tracer.inside += 1
    try:
        return func(*args, **kwargs)
    except (tc.DataDependentOutputException, tc.DynamicOutputShapeException) as error:
        what = f"{func} gives a result whose shape or value depends on data"
        return by_value(tracer, func, args, encoded, encoded_kwargs, what, error)
    except tc.UnsupportedOperatorException as error:
        raise tracer.stop(f"{func} cannot run without data (it has no fake implementation)") from error
    except RuntimeError as error:
        if tracer.shadow is None or not tracer.shadow.real or func._schema.is_mutable:
            raise
        return shaped_like_real(tracer, func, args, encoded, encoded_kwargs, error)
    finally:
        tracer.inside -= 1


def shaped_like_real(tracer: Tracer, func: Any, args: Any, encoded: Any, encoded_kwargs: Any, error: Exception) -> Any:
    """The fake implementation refuses what the real one may accept: shapes from a real run."""
    try:
        real = on_real(tracer, func, encoded, encoded_kwargs)
    except Exception:
        raise error from None
    return imitate(tracer, flat(real), args, isinstance(real, list | tuple))


def on_real(tracer: Tracer, func: Any, encoded: Any, encoded_kwargs: Any) -> Any:
    assert tracer.shadow is not None
    names = [k for k, _ in encoded_kwargs]
    count = len(encoded)
    return tracer.shadow.run(lambda *a: func(*a[:count], **dict(zip(names, a[count:], strict=True))),
                           (*encoded, *(v for _, v in encoded_kwargs)))  # fmt: skip


def imitate(tracer: Tracer, real: list[Any], args: Any, many: bool) -> Any:
    """Fake tensors that look like these fresh real ones."""
    needs = torch.is_grad_enabled() and any(isinstance(a, torch.Tensor) and a.requires_grad for a in flat(args))
    made = []
    for tensor in real:
        fake = tracer.fake.from_tensor(tensor.detach())
        made.append(fake.requires_grad_().clone() if needs and fake.is_floating_point() else fake)
    return tuple(made) if many else made[0]


def by_value(
    tracer: Tracer, func: Any, args: Any, encoded: Any, encoded_kwargs: Any, what: str, error: Exception
) -> Any:
    """An op whose result's shape follows values: allowed where these follow from the inputs; then guarded."""
    if func._schema.is_mutable:
        raise tracer.stop(what) from error
    used = list(refs(encoded)) + [r for _, v in encoded_kwargs for r in refs(v)]
    if packet(str(func)) in SHAPE_FIXED:
        if tracer.shadow is None or not tracer.shadow.real:
            raise tracer.stop(what) from error
        return shaped_like_real(tracer, func, args, encoded, encoded_kwargs, error)
    if packet(str(func)) in SHAPE_FROM_MASKS:
        used = [n for n in used if tracer.trace.values[n].dtype in ("bool", "uint8")]
        allow(tracer, used, what)
        for name in used:
            read(tracer, f"the number of trues in a mask of {func}", _trues, (Ref(name),))
        real = on_real(tracer, func, encoded, encoded_kwargs)
        return imitate(tracer, flat(real), args, isinstance(real, list | tuple))
    if packet(str(func)) in SHAPE_FROM_INTEGERS:
        used = [n for n in used if not _is_float(tracer.trace.values[n].dtype)]
    elif len(used) > 1 or not used:
        raise tracer.stop(what) from error
    allow(tracer, used, what)
    real = on_real(tracer, func, encoded, encoded_kwargs)
    if packet(str(func)) in SHAPE_FROM_INTEGERS:
        for name in used:
            read(tracer, f"an argument of {func}", _values, (Ref(name),))
    else:
        keywords = [k for k, _ in encoded_kwargs]
        count = len(encoded)

        def shapes(*a: Any) -> list[tuple[int, ...]]:
            out = func(*a[:count], **dict(zip(keywords, a[count:], strict=True)))
            return [tuple(t.shape) for t in flat(out)]

        read(tracer, f"the result's shape of {func}", shapes, (*encoded, *(v for _, v in encoded_kwargs)))
    return imitate(tracer, flat(real), args, isinstance(real, list | tuple))


def allow(tracer: Tracer, names: list[str], what: str) -> frozenset[str]:
    """What these values follow from. Raises Break unless it is inputs, constants and untouched buffers alone."""
    taint: frozenset[str] = frozenset().union(*(tracer.taint(n) for n in names))
    bad = sorted(t for t in taint if t != "input" and not t.startswith(("buffer ", "constant ")))
    if bad:
        raise tracer.stop(f"{what}, which follows from {' and '.join(bad)}")
    if taint and not tracer.guards:
        raise tracer.stop(what)
    if tracer.shadow is None or (taint and not tracer.shadow.real):
        raise tracer.stop(f"{what}, and the example inputs have no data")
    return taint


def read(tracer: Tracer, what: str, function: Callable[..., Any], args: tuple[Arg, ...]) -> Any:
    """A value for Python: real, and guarded where it follows from the inputs."""
    taint = allow(tracer, list(refs(args)), f"{what} reads the value of a tensor")
    assert tracer.shadow is not None
    tracer.inside += 1
    try:
        value = tracer.shadow.run(function, args)
    finally:
        tracer.inside -= 1
    if taint:
        buffers = tuple(t.removeprefix("buffer ") for t in taint if t.startswith("buffer "))
        tracer.trace.reads.append(
            Read(len(tracer.trace.calls), function, args, value, tracer.module, user_line(), what, buffers)
        )
    return value


def read_tensor(tracer: Tracer, what: str, tensor: torch.Tensor) -> Any:
    """``.tolist()``, ``.numpy()``."""
    return read(tracer, what, _PROTOCOLS[what], (encode(tracer.stand_in(tensor), tracer.name_of),))


def _trues(mask: torch.Tensor) -> int:
    return int(torch.count_nonzero(mask))


def _values(tensor: torch.Tensor) -> Any:
    return tensor.detach().cpu().numpy().copy()


def _is_float(dtype: str) -> bool:
    return dtype.startswith(("float", "bfloat", "complex"))
