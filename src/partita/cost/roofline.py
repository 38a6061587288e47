"""Roofline of an op, or of its share on one of several devices, from its counts, dtype and shape.

    products      flops / (peak x efficiency(m, n, k)), efficiency = top x m n/(m n + a) x k/(k + c)
    all others    bytes / bandwidth; of both the slower counts                      (Williams et al., 2009)

``a``: outputs that fill half the device, in proportion to its peak; ``c``: where the inner dim is half used. Chains
of element-wise ops run as one kernel, as compilers and hand-written training kernels do. ``Assumptions`` holds every
constant; ``benchmarks/planner/megatron.py`` fits four of them on published runs and tests them on others.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

from partita.cluster import Device
from partita.cost.ops import family, saved_tensors, short
from partita.graph import ITEMSIZE, Dim, Graph, Op, Tensor, at
from partita.sharding.dims import OpDims, op_dims

REFERENCE_PEAK = 312e12
MASK = "partita.dropout_noise"
_FULL = frozenset({"cross_entropy_loss", "nll_loss", "nll_loss_nd", "log_softmax", "_log_softmax"})
_UNFUSED = frozenset({"embedding", "index_select", "cat", "gather", "scatter", "cumsum", "sort", "topk", "roll"})


@dataclass(frozen=True, slots=True)
class Assumptions:
    """``precision``: 'mixed' (16-bit products, activations, weights and gradients; 32-bit optimizer) or 'full'.

    Shares of published peaks: ``products`` (largest matrix products), ``attention`` (fused), ``convolutions``,
    ``memory``, ``links``. ``area``: outputs at which a product reaches half, on a device of 312 Tflop/s; ``inner``: the
    inner dim at which it does. ``reserve_bytes``: the driver's context and communication library on each device.
    ``hidden``: share of the gradients' reduction that runs beside backward. ``contention``: share of the compute lost
    while a collective runs beside it (DeepSeek-V3 report, 2024, section 3.2.2: 20 of the H800's 132 multiprocessors
    carry the traffic). ``messages_hidden``: share of a message between stages that does not hold up its receiver's
    device; 0: receiving and computing take turns, as in Megatron's 1F1B.
    """

    precision: str = "mixed"
    products: float = 0.68
    attention: float = 0.45
    convolutions: float = 0.5
    memory: float = 0.80
    links: float = 0.80
    area: float = 2.0**20
    inner: float = 128.0
    reserve_bytes: float = 2.0 * 2**30
    hidden: float = 0.0
    contention: float = 20 / 132
    messages_hidden: float = 0.0

    def itemsize(self, dtype: str) -> int:
        """Bytes of an element as it is held while training."""
        return 2 if self.precision == "mixed" and dtype == "float32" else ITEMSIZE.get(dtype, 4)

    def peak(self, device: Device) -> float:
        return (device.half_flops or device.flops) if self.precision == "mixed" else device.flops


DEFAULT = Assumptions()


@dataclass(frozen=True, slots=True)
class Share:
    """How an op is divided: its dim ``label`` over ``parts`` devices ('' : each device does all of it)."""

    label: str = ""
    parts: int = 1


ALL = Share()


class Shapes:
    """Counts of a graph's ops, looked up once: dims by label, and which results never reach memory."""

    def __init__(self, graph: Graph, assume: Assumptions = DEFAULT) -> None:
        self.graph, self.assume = graph, assume
        self._dims: dict[str, OpDims | None] = {}
        self.users: dict[str, list[Op]] = {}
        for op in graph.ops:
            for name in op.uses():
                self.users.setdefault(name, []).append(op)
        self.last = frozenset(graph.outputs)
        self._position = {op.name: i for i, op in enumerate(graph.ops)}

    def dims(self, op: Op) -> OpDims | None:
        if op.name not in self._dims:
            self._dims[op.name] = op_dims(self.graph, op)
        return self._dims[op.name]

    def position(self, op: Op) -> int:
        return self._position[op.name]

    def nbytes(self, tensor: Tensor, samples: int, part: float = 1.0, *, full: bool = False) -> float:
        size = 4 if full and tensor.dtype in ("float32", "bfloat16", "float16") else self.assume.itemsize(tensor.dtype)
        return prod(tensor.shape_at(samples)) * size / part

    def passing(self, op: Op, name: str) -> bool:
        """The tensor goes from one element-wise op straight to the next: it stays in registers."""
        if len(self.users.get(name, ())) != 1 or name in self.last:
            return False
        producer = self.graph.producer(name)
        return producer is not None and fusible(self.graph.ops[producer]) and fusible(op)


def fusible(op: Op) -> bool:
    name = short(op.target)
    kind = family(op)
    plain = not op.target.startswith("opaque:") and kind in ("linear", "output", "other", "view")
    return plain and name not in _UNFUSED and name not in _FULL and "norm" not in name


def idle(op: Op) -> bool:
    """No work: views, and dropout that drops nothing (one that does is captured as noise and a product)."""
    if short(op.target) == "dropout":
        return True
    return family(op) == "view" and short(op.target) not in ("reshape", "contiguous", "flatten")


@dataclass(frozen=True, slots=True)
class Seconds:
    """Of one op on one device. ``backward``: to its inputs and its weights; ``weight``: the latter's part of it."""

    forward: float
    backward: float = 0.0
    weight: float = 0.0


def op_seconds(shapes: Shapes, op: Op, samples: int, device: Device, share: Share = ALL) -> Seconds:
    """Seconds for ``samples`` of this device's share of the op."""
    if idle(op):
        return Seconds(0.0)
    graph, assume = shapes.graph, shapes.assume
    dims = shapes.dims(op)
    trains = op.grad and any(graph.tensor(o).needs_grad for o in op.outputs if o)
    kind = family(op)
    if kind in ("matmul", "conv", "attention"):
        return _product(shapes, op, dims, samples, device, share, kind, trains)
    full = short(op.target) in _FULL
    outs = [o for o in op.outputs if o]
    moved = held = 0.0
    alone = True
    for name in op.uses():
        if shapes.passing(op, name):
            alone = False
            continue
        part = _part(dims, name, share)
        size = shapes.nbytes(graph.tensor(name), samples, part, full=full)
        if short(op.target) == "embedding" and graph.tensor(name).role == "parameter":
            size = sum(shapes.nbytes(graph.tensor(o), samples, _part(dims, o, share)) for o in outs)
        moved += size
        held += size if graph.tensor(name).needs_grad and graph.tensor(name).role in ("op", "input") else 0.0
    for name in outs:
        if not _joins(shapes, name):
            size = shapes.nbytes(graph.tensor(name), samples, _part(dims, name, share), full=full)
            moved += size
            held += size
    rate = device.memory_bandwidth * assume.memory
    launch = device.overhead_seconds if alone else 0.0
    forward = launch + moved / rate
    if not trains:
        return Seconds(forward)
    kept = sum(_kept(shapes, name, samples, share, dims) for name in kept_tensors(graph, op))
    return Seconds(forward, launch + (held + kept) / rate)


def _joins(shapes: Shapes, name: str) -> bool:
    """The result is used by exactly one op, which takes it up in its own kernel."""
    users = shapes.users.get(name, [])
    return len(users) == 1 and shapes.passing(users[0], name)


def kept_tensors(graph: Graph, op: Op) -> tuple[str, ...]:
    """Tensors autograd keeps for this op: as in ``cost.ops``, and of products only what the other's gradient needs."""
    name = short(op.target)
    if idle(op) or not op.grad or not any(graph.tensor(o).needs_grad for o in op.outputs if o):
        return ()
    if name in ("mul", "mul_", "div", "div_", "matmul", "bmm"):
        inputs = [n for n in op.uses() if graph.tensor(n).role in ("op", "input", "parameter")]
        if len(inputs) == 2:
            a, b = inputs
            pairs = ((a, b), (b, a))
            return tuple(
                x for x, other in pairs if graph.tensor(other).needs_grad and graph.tensor(x).role != "parameter"
            )
    return saved_tensors(graph, op)


def _kept(shapes: Shapes, name: str, samples: int, share: Share, dims: OpDims | None) -> float:
    return kept_bytes(shapes, name, samples) / _part(dims, name, share)


def kept_bytes(shapes: Shapes, name: str, samples: int) -> float:
    """Bytes of a tensor kept for backward; dropout's noise is a mask of one an element, as in training kernels."""
    graph = shapes.graph
    tensor = graph.tensor(name)
    producer = graph.producer(name)
    if producer is not None and graph.ops[producer].target == MASK:
        return float(prod(tensor.shape_at(samples)))
    return shapes.nbytes(tensor, samples)


def _part(dims: OpDims | None, name: str, share: Share) -> float:
    """In how many parts a tensor of the op is divided."""
    if not share.label or dims is None:
        return 1.0
    for other, labelled in (*dims.inputs, *dims.outputs):
        if other == name:
            return float(share.parts) if any(share.label in labels for labels in labelled) else 1.0
    return 1.0


def _product(
    shapes: Shapes, op: Op, dims: OpDims | None, samples: int, device: Device, share: Share, kind: str, trains: bool
) -> Seconds:
    graph, assume = shapes.graph, shapes.assume
    flops = float(op.flops)
    tensors = [graph.tensor(n) for n in (*op.uses(), *(o for o in op.outputs if o))]
    if graph.batch and any(t.follows_batch for t in tensors):
        flops *= samples / graph.batch
    divided = bool(share.label) and dims is not None
    flops /= share.parts if divided else 1
    moved = sum(shapes.nbytes(t, samples, _part(dims, t.name, share)) for t in tensors)
    rate = device.memory_bandwidth * assume.memory
    peak = assume.peak(device)
    launch = device.overhead_seconds
    weighs = any(t.role == "parameter" and t.needs_grad for t in tensors)
    others = any(t.needs_grad and t.role != "parameter" and t.name not in op.outputs for t in tensors)
    if kind == "attention":
        seconds = flops / (peak * assume.attention)
        return Seconds(launch + max(seconds, moved / rate), (launch + max(2.5 * seconds, 2 * moved / rate)) * trains)
    m, n, k = _mnk(dims, op, graph, samples, share) or _square(flops)
    area = assume.area * peak / REFERENCE_PEAK
    top = assume.convolutions if kind == "conv" else assume.products

    def seconds_of(outputs: float, inner: float) -> float:
        speed = top * outputs / (outputs + area) * inner / (inner + assume.inner)
        return launch + max(flops / (peak * speed), moved / rate)

    batch = max(flops / (2.0 * m * n * k), 1.0)
    forward = seconds_of(batch * m * n, k)
    backward = weight = 0.0
    if trains and others:
        backward += seconds_of(batch * m * k, n)
    if trains and (weighs or (not weighs and kind == "matmul" and _both_need(graph, op))):
        other = seconds_of(batch * k * n, m)
        backward, weight = backward + other, other * weighs
    return Seconds(forward, backward, weight)


def _both_need(graph: Graph, op: Op) -> bool:
    return sum(graph.tensor(n).needs_grad for n in op.uses()) > 1


def _square(flops: float) -> tuple[float, float, float]:
    side = max((flops / 2.0) ** (1 / 3), 1.0)
    return side, side, side


def _mnk(dims: OpDims | None, op: Op, graph: Graph, samples: int, share: Share) -> tuple[float, float, float] | None:
    """Rows, columns and inner length of one product of the op."""
    if dims is None or len(dims.inputs) < 2 or not dims.outputs:
        return None
    first, second = dims.inputs[-2:] if short(op.target) in ("addmm", "baddbmm") else dims.inputs[:2]
    left, right, out = _flat(first[1]), _flat(second[1]), _flat(dims.outputs[0][1])

    def size(names: Iterable[str]) -> float:
        total = 1.0
        for name in names:
            length: Dim = dims.sizes.get(name, 1)
            total *= at(length, samples) / (share.parts if name == share.label else 1)
        return max(total, 1.0)

    return size(out - right), size((right & out) - left), size(right - out)


def _flat(labelled: tuple[tuple[str, ...], ...]) -> frozenset[str]:
    return frozenset(label for labels in labelled for label in labels)
