"""Graph: a model's operations and tensors as counts, without seconds and without torch.

Ops stand in the order the model ran them. A size that follows the batch is a ``Size``; everything else
is a plain number, so one Graph answers for every batch size its capture vouches for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from types import MappingProxyType
from typing import Any, TypeAlias, Union


@dataclass(frozen=True, slots=True)
class Size:
    """``fixed + per_sample * batch``: a dimension (or another number) that follows the batch size."""

    fixed: int
    per_sample: int

    def at(self, batch: int) -> int:
        return self.fixed + self.per_sample * batch


@dataclass(frozen=True, slots=True)
class Ref:
    """A use of the tensor called ``name``."""

    name: str


@dataclass(frozen=True, slots=True)
class Symbol:
    """A torch constant by its name: ``torch.float32``, ``torch.strided``, ``device:cpu``."""

    text: str


Dim: TypeAlias = int | Size
Arg: TypeAlias = Union[Ref, Symbol, Size, int, float, complex, bool, str, None, tuple["Arg", ...]]

ITEMSIZE = MappingProxyType(
    {
        "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "complex64": 8, "complex128": 16,
        "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "bool": 1,
    }
)  # fmt: skip


def at(dim: Dim, batch: int) -> int:
    """The dimension's number at this batch size."""
    return dim.at(batch) if isinstance(dim, Size) else dim


def refs(arg: Arg) -> Iterator[str]:
    """Names of all tensors used in an argument, in order."""
    if isinstance(arg, Ref):
        yield arg.name
    elif isinstance(arg, tuple):
        for item in arg:
            yield from refs(item)


@dataclass(frozen=True, slots=True)
class Tensor:
    """One value. ``role``: 'input', 'parameter', 'buffer', 'constant' or 'op' (an op's result).

    ``path``: the qualified name (parameter, buffer) or the position in the call (input: ``args[0]``).
    ``base``: the tensor whose memory this one is a view of (itself where it owns its memory).
    ``needs_grad``: autograd flows through it.
    """

    name: str
    shape: tuple[Dim, ...]
    dtype: str
    role: str = "op"
    path: str = ""
    base: str = ""
    needs_grad: bool = False
    _nbytes: tuple[int, ...] = field(init=False, repr=False, compare=False, default=())
    _kind: str = field(init=False, repr=False, compare=False, default="")

    def shape_at(self, batch: int) -> tuple[int, ...]:
        return tuple(at(d, batch) for d in self.shape)

    def nbytes(self, batch: int) -> int:
        """Bytes of the elements, were the tensor contiguous."""
        if not self._nbytes:  # of plain dims; then the two numbers of each size
            plain = prod(d for d in self.shape if not isinstance(d, Size)) * ITEMSIZE.get(self.dtype, 4)
            sizes = (n for d in self.shape if isinstance(d, Size) for n in (d.fixed, d.per_sample))
            object.__setattr__(self, "_nbytes", (plain, *sizes))
        result, *sizes_of = self._nbytes
        for k in range(0, len(sizes_of), 2):
            result *= sizes_of[k] + sizes_of[k + 1] * batch
        return result

    @property
    def kind(self) -> str:
        """All of it but names, in words."""
        if not self._kind:
            object.__setattr__(self, "_kind", f"{self.role}:{self.dtype}:{self.shape}:{self.needs_grad}")
        return self._kind

    @property
    def follows_batch(self) -> bool:
        return any(isinstance(d, Size) and d.per_sample for d in self.shape)


@dataclass(frozen=True, slots=True)
class Op:
    """One call of ``target`` (``aten.linear.default``; ``partita.…`` for our own; ``opaque:N`` for user code).

    ``name``: unique and stable over batch sizes: ``blocks.0.attn:linear_1``. ``module``: the path of the
    module call it ran in; a second call of the same module is ``blocks.0@1``. ``source``: ``file:line: code``.
    ``reads`` holds implicit tensor uses (an opaque module's parameters). ``writes``: bases it mutates.
    ``flops``: at ``Graph.batch``.
    """

    name: str
    target: str
    args: tuple[Arg, ...]
    kwargs: tuple[tuple[str, Arg], ...]
    outputs: tuple[str, ...]
    module: str = ""
    source: str = ""
    grad: bool = True
    random: bool = False
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    flops: int = 0
    _uses: tuple[str, ...] | None = field(init=False, repr=False, compare=False, default=None)

    def uses(self) -> tuple[str, ...]:
        """Every tensor it reads, in order, once."""
        if self._uses is None:
            found = dict.fromkeys(refs(self.args))
            for _, value in self.kwargs:
                found.update(dict.fromkeys(refs(value)))
            found.update(dict.fromkeys(self.reads))
            object.__setattr__(self, "_uses", tuple(found))
        assert self._uses is not None
        return self._uses


@dataclass(frozen=True, slots=True)
class Graph:
    """A captured model at batch size ``batch`` (0: no batch dim found, one microbatch only).

    ``outputs``: the tensors the call returns, in the order of its flattened result. ``ties``: every other
    qualified name of a parameter or buffer -> the name it is held under. ``mode``: 'train' or 'eval'.
    ``notes``: what capture had to do that a reader should know (opaque modules, guards), one line each.
    """

    name: str
    fingerprint: str
    batch: int
    tensors: tuple[Tensor, ...]
    ops: tuple[Op, ...]
    outputs: tuple[str, ...]
    ties: tuple[tuple[str, str], ...] = ()
    mode: str = "train"
    notes: tuple[str, ...] = ()
    _by_name: Mapping[str, Tensor] = field(init=False, repr=False, compare=False)
    _producer: Mapping[str, int] = field(init=False, repr=False, compare=False)
    _known: dict[str, dict[str, Any]] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_by_name", {t.name: t for t in self.tensors})
        producer = {out: i for i, op in enumerate(self.ops) for out in op.outputs if out}
        object.__setattr__(self, "_producer", producer)

    def tensor(self, name: str) -> Tensor:
        return self._by_name[name]

    def producer(self, name: str) -> int | None:
        """Index of the op that makes the tensor; None for inputs, parameters, buffers, constants."""
        return self._producer.get(name)

    def known(self, what: str) -> dict[str, Any]:
        """By name of a tensor or op: what was worked out of this graph alone before, so that it is done once."""
        return self._known.setdefault(what, {})

    def of_role(self, *roles: str) -> tuple[Tensor, ...]:
        return tuple(t for t in self.tensors if t.role in roles)

    def __reduce__(self) -> tuple[object, ...]:
        return (
            Graph,
            (self.name, self.fingerprint, self.batch, self.tensors, self.ops, self.outputs, self.ties,
             self.mode, self.notes),
        )  # fmt: skip
