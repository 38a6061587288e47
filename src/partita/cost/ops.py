"""What one op costs, from its counts: a roofline of operations and bytes above a floor (Williams et al., 2009).

    forward  = overhead + max(flops / (efficiency * device.flops), bytes / device.memory_bandwidth)
    backward = as much again to the inputs and, where it has weights, as much again for them

Accuracy: within a factor of about two on real devices; measured timings replace it where the machine is at hand.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import prod
from types import MappingProxyType

from partita.cluster import Device
from partita.cost.affine import Affine, through
from partita.graph import Graph, Op, Ref, at

_FAMILIES = {
    "matmul": "linear mm addmm bmm baddbmm matmul einsum addmv mv dot",
    "conv": "convolution conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d _convolution",
    "attention": "scaled_dot_product_attention _scaled_dot_product_flash_attention_for_cpu "
    "multi_head_attention_forward",
    "view": "view reshape _unsafe_view transpose t permute expand squeeze unsqueeze select slice narrow split "
    "split_with_sizes chunk unbind alias detach flatten unflatten view_as expand_as swapaxes movedim diagonal "
    "as_strided unfold numpy_T contiguous lift_fresh size getitem broadcast_to real imag view_as_real view_as_complex",
    "linear": "add add_ sub sub_ neg sum mean cat stack clone _to_copy to copy_ pad constant_pad_nd rsub cumsum roll "
    "flip repeat index_select embedding masked_fill masked_fill_ upsample_nearest2d "
    "copied take all_gather all_gather_copied all_reduce reduce_scatter exchange",
    "output": "relu relu_ sigmoid sigmoid_ tanh tanh_ exp softmax _softmax log_softmax _log_softmax sqrt rsqrt "
    "reciprocal hardtanh relu6",
}
FAMILY = MappingProxyType({name: family for family, names in _FAMILIES.items() for name in names.split()})
"""Op's short name -> 'matmul', 'conv', 'attention', 'view' (no work), 'linear' (saves nothing), 'output' (saves its
result); everything else saves its inputs."""

EFFICIENCY = MappingProxyType({"matmul": 1.0, "conv": 0.7, "attention": 0.5})
_ELEMENTWISE_EFFICIENCY = 0.25


@cache
def short(target: str) -> str:
    """``aten.linear.default`` -> ``linear``."""
    parts = target.split(".")
    return parts[1] if len(parts) > 1 and not target.startswith("opaque:") else target


def family(op: Op) -> str:
    return FAMILY.get(short(op.target), "other")


@dataclass(frozen=True, slots=True)
class Counts:
    """One op, at a number of samples: flops and bytes moved; ``weights``: bytes of parameters it takes."""

    flops: float
    nbytes: float
    weights: float


def counts(graph: Graph, op: Op, samples: int) -> Counts:
    """Flops scale with the elements that follow the batch; bytes are those of every operand once."""
    tensors = [graph.tensor(name) for name in (*op.uses(), *(o for o in op.outputs if o))]
    moved = float(sum(t.nbytes(samples) for t in tensors))
    weights = float(sum(t.nbytes(samples) for t in tensors if t.role == "parameter"))
    if family(op) == "view":
        return Counts(0.0, 0.0, 0.0)
    if short(op.target) == "embedding":
        rows = sum(graph.tensor(o).nbytes(samples) for o in op.outputs if o)
        return Counts(0.0, 2.0 * rows, weights)
    flops = float(op.flops)
    if graph.batch and any(t.follows_batch for t in tensors):
        flops *= samples / graph.batch
    if not flops:
        flops = float(sum(prod(at(d, samples) for d in graph.tensor(o).shape) for o in op.outputs if o))
    return Counts(flops, moved, weights)


def forward_seconds(graph: Graph, op: Op, samples: int, device: Device) -> float:
    c = counts(graph, op, samples)
    if not c.nbytes and not c.flops:
        return 0.4 * device.overhead_seconds
    rate = device.flops * EFFICIENCY.get(family(op), _ELEMENTWISE_EFFICIENCY)
    return device.overhead_seconds + max(c.flops / rate, c.nbytes / device.memory_bandwidth)


@dataclass(frozen=True, slots=True)
class OpCost:
    """Seconds of one op on one kind of device, for a microbatch."""

    forward: Affine
    backward: Affine
    weight: Affine


def op_cost(graph: Graph, op: Op, device: Device) -> OpCost:
    """The line through the roofline at one sample and at the graph's batch. ``weight`` includes adding the new
    gradient to the one of earlier microbatches (read both, write one), which is bound by memory.
    """
    batch = max(graph.batch, 1)
    low, high = (1, batch) if batch > 1 else (1, 2)
    first = forward_seconds(graph, op, low, device)
    forward = through(low, first, high, forward_seconds(graph, op, high, device))
    outputs_need = any(graph.tensor(o).needs_grad for o in op.outputs if o)
    if not (op.grad and outputs_need):
        return OpCost(forward, Affine(), Affine())
    uses = [graph.tensor(name) for name in op.uses()]
    parameters = [t for t in uses if t.role == "parameter" and t.needs_grad]
    others = any(t.needs_grad and t.role != "parameter" for t in uses)
    kind = family(op)
    heavy = kind in ("matmul", "conv")
    factor = 2.0 if (heavy and not parameters) or kind == "attention" else 1.0 if heavy or kind == "view" else 1.5
    backward = forward.scaled(factor) if others else Affine(device.overhead_seconds)
    if not parameters:
        return OpCost(forward, backward, Affine())
    gathered = 3.0 * sum(t.nbytes(1) for t in parameters) / device.memory_bandwidth
    product = forward if heavy or kind == "other" else Affine(device.overhead_seconds)
    return OpCost(forward, backward, product + Affine(gathered))


PRODUCTS = frozenset({"mul", "mul_", "matmul", "mm", "bmm", "linear"})


_TURNS = frozenset({"transpose", "permute", "t", "numpy_T", "swapaxes", "movedim", "expand"})
_CUTS = frozenset({"slice", "narrow"})
_FOLLOWS = frozenset(
    {"add", "sub", "mul", "div", "neg", "relu", "gelu", "silu", "sigmoid", "tanh", "dropout", "clone", "to", "_to_copy"}
)


def copies_input(graph: Graph, op: Op) -> bool:
    """Whether a linear op works on a copy of its input, and keeps that: of rows that do not lie one after another."""
    first = op.args[0] if op.args else None
    if short(op.target) != "linear" or not isinstance(first, Ref) or len(graph.tensor(first.name).shape) < 3:
        return False
    name = first.name
    while (made := graph.producer(name)) is not None:
        maker = graph.ops[made]
        kind = short(maker.target)
        if kind in _TURNS or (kind in _CUTS and maker.args[1:2] != (0,)):
            return True
        shape = graph.tensor(name).shape
        alike = [n for n in maker.uses() if graph.tensor(n).shape == shape]
        if kind.rstrip("_") not in _FOLLOWS or not alike:
            return False
        name = alike[0]  # its result lies in memory as this does
    return False


def saved_tensors(graph: Graph, op: Op) -> tuple[str, ...]:
    """Tensors autograd keeps for this op's backward (parameters, buffers and constants not counted)."""
    known = graph.known("saved_tensors")
    if op.name not in known:
        known[op.name] = _saved_tensors(graph, op)
    found: tuple[str, ...] = known[op.name]
    return found


def _saved_tensors(graph: Graph, op: Op) -> tuple[str, ...]:
    if not op.grad or not any(graph.tensor(o).needs_grad for o in op.outputs if o):
        return ()
    kind, outputs = family(op), tuple(o for o in op.outputs if o)
    if kind in ("view", "linear"):
        if short(op.target) in ("embedding", "index_select", "masked_fill", "masked_fill_"):
            return tuple(n for n in op.uses() if graph.tensor(n).role == "op" and not graph.tensor(n).needs_grad)
        return ()
    if kind == "output":
        return outputs[:1]
    inputs = tuple(n for n in op.uses() if graph.tensor(n).role in ("op", "input"))
    if short(op.target) in ("div", "div_") and len(inputs) < 2:
        return ()
    if short(op.target) in PRODUCTS:  # of two factors each is needed for the other's gradient
        wanted = [n for n in op.uses() if graph.tensor(n).needs_grad]
        twice = sum(isinstance(a, Ref) for a in op.args) > len(op.uses())  # a square; times a number, nothing is kept
        inputs = tuple(n for n in inputs if twice or any(other != n for other in wanted))
        if copies_input(graph, op):
            inputs = tuple(n for n in inputs if n != op.uses()[0])
    return (*inputs, *outputs[:1]) if kind == "attention" or op.target.startswith("opaque:") else inputs


RECURRENT = MappingProxyType(
    {"lstm": 20, "gru": 12, "rnn_tanh": 4, "rnn_relu": 4, "lstm_cell": 8, "gru_cell": 6, "rnn_tanh_cell": 2,
     "rnn_relu_cell": 2}
)  # fmt: skip
"""Numbers a layer keeps for backward per number of its output: gates and states (oneDNN's workspace for an LSTM)."""


KEEPS_A_COPY = frozenset(
    {"silu_", "hardswish_", "mish_", "gelu_", "hardsigmoid_", "clamp_", "clamp_min_", "clamp_max_", "abs_", "pow_",
     "log_", "sin_", "cos_", "square_"}
)  # fmt: skip
"""In-place ops whose backward needs what they overwrite: autograd keeps a copy of it."""


def workspace_bytes(graph: Graph, op: Op, samples: int) -> float:
    """What backward needs beyond tensors of the graph: a recurrent layer's workspace, a copied input, a layer norm's
    statistics, attention's sums, a max pooling's positions, a copy of what is overwritten, and as much as its result
    for code that cannot be looked into.
    """
    name = short(op.target)
    if not op.grad or not op.outputs or not op.outputs[0]:
        return 0.0
    out = graph.tensor(op.outputs[0])
    if name in RECURRENT:
        counts = [a for a in op.args if isinstance(a, int) and not isinstance(a, bool)]
        layers = 1 if name.endswith("_cell") else max(counts[:1], default=1)
        return float(RECURRENT[name] * layers * out.nbytes(samples))
    if copies_input(graph, op) and any(graph.tensor(n).needs_grad for n in op.uses()[1:]):
        return float(graph.tensor(op.uses()[0]).nbytes(samples))
    if name.startswith("opaque:") or (name in KEEPS_A_COPY and out.needs_grad):
        return float(out.nbytes(samples))
    if name in ("layer_norm", "native_layer_norm"):
        normalised = op.args[1] if len(op.args) > 1 and isinstance(op.args[1], tuple) else ()
        return 8.0 * prod(out.shape_at(samples)[: -len(normalised) or None])
    if family(op) == "attention" and len(out.shape) > 1:
        return 4.0 * prod(out.shape_at(samples)[:-1])
    if name.startswith(("max_pool", "adaptive_max_pool")) and not any(op.outputs[1:]):
        return 8.0 * prod(out.shape_at(samples))
    return 0.0
