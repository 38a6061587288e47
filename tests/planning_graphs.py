"""Small graphs written by hand for the tests of cost, simulation, planning and checking."""

from __future__ import annotations

from dataclasses import replace

from partita.cluster import Cluster, Device, Link
from partita.graph import Graph, Op, Ref, Size, Tensor

N = Size(0, 1)


def mlp(layers: int = 4, *, width: int = 64, batch: int = 8, deep: bool = False, act: str = "relu") -> Graph:
    """``layers`` times linear and ``act``; ``deep``: under ``blocks.i`` with ``fc`` and ``act`` inside."""
    tensors = [Tensor("x", (N, width), "float32", "input", "args[0]", "x")]
    ops: list[Op] = []
    now = "x"
    for i in range(layers):
        module, other = (f"blocks.{i}.fc", f"blocks.{i}.act") if deep else (f"fc{i}", f"act{i}")
        tensors.append(Tensor(f"w{i}", (width, width), "float32", "parameter", f"{module}.weight", f"w{i}", True))
        tensors.append(Tensor(f"h{i}", (N, width), "float32", "op", "", f"h{i}", True))
        tensors.append(Tensor(f"r{i}", (N, width), "float32", "op", "", f"r{i}", True))
        ops.append(
            Op(f"{module}:linear", "aten.linear.default", (Ref(now), Ref(f"w{i}")), (), (f"h{i}",), module,
               "net.py:3: self.fc(x)", flops=2 * batch * width * width)
        )  # fmt: skip
        ops.append(Op(f"{other}:{act}", f"aten.{act}.default", (Ref(f"h{i}"),), (), (f"r{i}",), other))
        now = f"r{i}"
    return Graph("MLP", "f" * 16, batch, tuple(tensors), tuple(ops), (now,))


def normed(layers: int = 4, *, at: int = 2, width: int = 64, batch: int = 16) -> Graph:
    """``mlp`` with a batch norm (in training) after layer ``at``."""
    graph = mlp(layers, width=width, batch=batch, deep=True)
    names = ("scale", "shift", "mean", "var")
    roles = ("parameter", "parameter", "buffer", "buffer")
    extra = [
        Tensor(n, (width,), "float32", role, f"bn.{n}", n, role == "parameter")
        for n, role in zip(names, roles, strict=True)
    ]
    out = Tensor("n", (N, width), "float32", "op", "", "n", True)
    source = f"r{at}"
    args = (Ref(source), *(Ref(n) for n in names), True, 0.1, 1e-5, False)
    norm = Op("bn:batch_norm", "aten.batch_norm.default", args, (), ("n",), "bn", writes=("mean", "var"))
    ops = list(graph.ops)
    after = ops[2 * at + 2]
    ops[2 * at + 2] = replace(after, args=(Ref("n"), after.args[1]))
    ops.insert(2 * at + 2, norm)
    return replace(graph, tensors=(*graph.tensors, *extra, out), ops=tuple(ops))


def cluster(count: int = 2, *, memory: int = 10**9, kind: str = "cpu", speeds: tuple[float, ...] = ()) -> Cluster:
    """Devices of 1 Gflop/s (times ``speeds``) with free transfers."""
    devices = []
    for i in range(count):
        speed = speeds[i] if speeds else 1.0
        name = kind if not speeds else f"{kind} at {speed}"
        devices.append(Device(f"{kind}:{i}", name, memory, 1e9 * speed, 1e10 * speed, (), 1e-6))
    return Cluster(tuple(devices), (Link("*", "*", 1e12, 0.0),))
