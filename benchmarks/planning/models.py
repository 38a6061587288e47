"""Graphs of a GPT and of a residual CNN, written down op by op: planning needs no torch and no weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod

from partita.graph import Arg, Dim, Graph, Op, Ref, Size, Tensor, at


@dataclass
class Writer:
    """Collects tensors and ops; ``batch`` is the size of the example."""

    batch: int
    tensors: list[Tensor] = field(default_factory=list)
    ops: list[Op] = field(default_factory=list)
    count: dict[str, int] = field(default_factory=dict)

    def leaf(self, name: str, shape: tuple[Dim, ...], role: str, dtype: str = "float32") -> str:
        if all(t.name != name for t in self.tensors):
            self.tensors.append(Tensor(name, shape, dtype, role, name, name, role == "parameter"))
        return name

    def op(
        self, target: str, module: str, uses: tuple[str, ...], shape: tuple[Dim, ...], *, flops: int = 0,
        view: bool = False, args: tuple[Arg, ...] = (), dtype: str = "float32", grad: bool = True,
        writes: tuple[str, ...] = (),
    ) -> str:  # fmt: skip
        number = self.count[module, target] = self.count.get((module, target), -1) + 1  # type: ignore[index]
        name = f"{module}:{target.split('.')[1]}" + (f"_{number}" if number else "")
        out = f"t{len(self.ops)}"
        self.tensors.append(Tensor(out, shape, dtype, "op", "", uses[0] if view else out, grad))
        self.ops.append(
            Op(name, target, args or tuple(map(Ref, uses)), (), (out,), module, "", grad, False, (), writes, flops)
        )
        return out

    def linear(self, module: str, x: str, shape: tuple[Dim, ...], inputs: int, outputs: int) -> str:
        w = self.leaf(f"{module}.weight", (outputs, inputs), "parameter")
        b = self.leaf(f"{module}.bias", (outputs,), "parameter")
        rows = prod(at(d, self.batch) for d in shape[:-1])
        return self.op("aten.linear.default", module, (x, w, b), shape, flops=2 * rows * inputs * outputs)

    def graph(self, name: str, output: str) -> Graph:
        return Graph(name, name, self.batch, tuple(self.tensors), tuple(self.ops), (output,))


def gpt(
    layers: int = 48, *, width: int = 512, heads: int = 8, tokens: int = 128, vocabulary: int = 8192, batch: int = 32
) -> Graph:
    """A GPT-2-like decoder: 21 ops a layer."""
    w, n = Writer(batch), Size(0, 1)
    ids = w.leaf("ids", (n, tokens), "input", "int64")
    hidden, head = (n, tokens, width), (n, heads, tokens, width // heads)
    table = w.leaf("emb.weight", (vocabulary, width), "parameter")
    positions = w.leaf("pos", (tokens, width), "parameter")
    x = w.op("aten.embedding.default", "emb", (table, ids), hidden)
    inner = (n, tokens, heads, width // heads)

    def norm(module: str, x: str) -> str:
        scale, shift = (w.leaf(f"{module}.{p}", (width,), "parameter") for p in ("weight", "bias"))
        args = (Ref(x), (width,), Ref(scale), Ref(shift))
        return w.op("aten.layer_norm.default", module, (x, scale, shift), hidden, args=args)

    x = w.op("aten.add.Tensor", "", (x, positions), hidden)
    for i in range(layers):
        m = f"blocks.{i}"
        y = norm(f"{m}.ln1", x)
        qkv = w.linear(f"{m}.attn.qkv", y, (n, tokens, 3 * width), width, 3 * width)
        parts = []
        for k in range(3):
            cut = (Ref(qkv), 2, k * width, (k + 1) * width)
            p = w.op("aten.slice.Tensor", f"{m}.attn", (qkv,), hidden, view=True, args=cut)
            p = w.op("aten.view.default", f"{m}.attn", (p,), inner, view=True, args=(Ref(p), inner))
            parts.append(w.op("aten.transpose.int", f"{m}.attn", (p,), head, view=True, args=(Ref(p), 1, 2)))
        attention = 4 * batch * tokens * tokens * width
        y = w.op("aten.scaled_dot_product_attention.default", f"{m}.attn", tuple(parts), head, flops=attention)
        y = w.op("aten.transpose.int", f"{m}.attn", (y,), inner, view=True, args=(Ref(y), 1, 2))
        y = w.op("aten.reshape.default", f"{m}.attn", (y,), hidden, args=(Ref(y), hidden))
        y = w.linear(f"{m}.attn.proj", y, hidden, width, width)
        x = w.op("aten.add.Tensor", m, (x, y), hidden)
        y = norm(f"{m}.ln2", x)
        y = w.linear(f"{m}.mlp.0", y, (n, tokens, 4 * width), width, 4 * width)
        y = w.op("aten.gelu.default", f"{m}.mlp.1", (y,), (n, tokens, 4 * width))
        y = w.linear(f"{m}.mlp.2", y, hidden, 4 * width, width)
        x = w.op("aten.add.Tensor", m, (x, y), hidden)
    y = w.linear("head", x, (n, tokens, vocabulary), width, vocabulary)
    return w.graph(f"GPT, {layers} layers", y)


def cnn(blocks: int = 375, *, channels: int = 32, size: int = 16, batch: int = 64) -> Graph:
    """A residual CNN: 8 ops a block, two convolutions each."""
    w, n = Writer(batch), Size(0, 1)
    image = w.leaf("image", (n, channels, size, size), "input")
    shape = (n, channels, size, size)
    x = image
    flops = 2 * batch * size * size * channels * channels * 9
    for i in range(blocks):
        m = f"layer{i // 25}.{i % 25}"
        y = x
        for k in (1, 2):
            kernel = w.leaf(f"{m}.conv{k}.weight", (channels, channels, 3, 3), "parameter")
            y = w.op("aten.conv2d.default", f"{m}.conv{k}", (y, kernel), shape, flops=flops)
            scale, shift = (w.leaf(f"{m}.gn{k}.{p}", (channels,), "parameter") for p in ("weight", "bias"))
            args = (Ref(y), 8, Ref(scale), Ref(shift))
            y = w.op("aten.group_norm.default", f"{m}.gn{k}", (y, scale, shift), shape, args=args)
            y = w.op("aten.relu.default", f"{m}", (y,), shape)
        y = w.op("aten.mul.Tensor", m, (y,), shape, args=(Ref(y), 0.5))
        x = w.op("aten.add.Tensor", m, (x, y), shape)
    x = w.op("aten.mean.dim", "pool", (x,), (n, channels), args=(Ref(x), (2, 3)))
    y = w.linear("head", x, (n, 10), channels, 10)
    return w.graph(f"CNN, {len(w.ops)} ops", y)
