"""Capture: a graph equals the model on other inputs and other random numbers, bit for bit, or there is none."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from capture_reference import assert_same_bits, check, interpret, step
from torch import nn
from torch.utils.checkpoint import checkpoint

from partita.capture import capture, decode_symbol, resolve
from partita.errors import CaptureError, ExecutionError
from partita.graph import Ref, Size, Symbol

Build = Callable[[], tuple[nn.Module, tuple[Any, ...], dict[str, Any]]]


class Fn(nn.Module):
    """A module around a function of (module, x); ``parts`` are its submodules."""

    def __init__(self, function: Callable[..., Any], **parts: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


def of(function: Callable[..., Any], *shape: int, **parts: Callable[[], nn.Module]) -> Build:
    """A builder of an Fn on one random input."""
    return lambda: (Fn(function, **{k: p() for k, p in parts.items()}), (torch.randn(*(shape or (4, 8))),), {})


def linear() -> nn.Module:
    return nn.Linear(8, 8)


class Block(nn.Module):
    def __init__(self, dim: int = 16, p: float = 0.1) -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim), nn.Dropout(p))
        self.p = p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, d = x.shape
        q, k, v = (y.view(b, t, 2, d // 2).transpose(1, 2) for y in self.qkv(self.ln1(x)).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.p if self.training else 0.0, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(b, t, d))
        return x + self.mlp(self.ln2(x))


class GPT(nn.Module):
    def __init__(self, p: float = 0.1) -> None:
        super().__init__()
        self.tok, self.pos = nn.Embedding(50, 16), nn.Embedding(12, 16)
        self.blocks = nn.ModuleList(Block(p=p) for _ in range(2))
        self.head = nn.Linear(16, 50, bias=False)
        self.head.weight = self.tok.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tok(ids) + self.pos(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def gpt() -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    return GPT(), (torch.randint(0, 50, (4, 12)),), {}


class Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.sign()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient.clamp(-1, 1)


class Noisy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x + torch.rand_like(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * 2


@dataclass
class Answer:
    logits: torch.Tensor
    extra: Any = None


class Bag:
    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)


class Ema(nn.Module):
    def __init__(self, rebind: bool) -> None:
        super().__init__()
        self.rebind, self.steps = rebind, 0
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.steps += 1
        with torch.no_grad():
            if self.rebind:
                self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
            else:
                self.mean.mul_(0.9).add_(x.mean(0), alpha=0.1)
        return x - self.mean


class Memo(nn.Module):
    """Keeps a table it makes on first use."""

    def __init__(self) -> None:
        super().__init__()
        self.table: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.table is None:
            self.table = torch.arange(8.0)
        return x + self.table


class Router(nn.Module):
    """Data-dependent: each row goes to the expert its largest score names."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(8, 3), nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        p, k = self.gate(x).softmax(-1).max(-1)
        y = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows = (k == i).nonzero(as_tuple=True)[0]
            if rows.numel():
                y = y.index_add(0, rows, expert(x[rows]) * p[rows, None])
        return y


class LayerDrop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if random.random() < 0.5 else self.inner(x)


class NumpyMask(nn.Module):
    """A method draws from NumPy; the rest of forward is plain."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.spare = nn.Linear(8, 8), nn.Linear(8, 8), nn.Parameter(torch.randn(8))

    def mask(self, x: torch.Tensor) -> torch.Tensor:
        rows = torch.from_numpy(np.random.rand(x.shape[0]) < 0.5)
        x = x.clone()
        x[rows] = self.spare
        return x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.mask(self.first(x)))


class Remembers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.last: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x if self.last is None else x + self.last
        self.last = x.detach()
        return y


class Grows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(len(self.seen))
        return x * len(self.seen)


class WarmUp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.steps = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.steps += 1
        return x * 2 if self.steps > 1000 else x


def _masked(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = m.a(x)
    y[:, ::2] = 0.0
    y.add_(1)
    return m.b(y)


def _views(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = m.a(x)
    z = torch.zeros_like(y)
    z[1:] = y[:-1]
    z[0, 0] += 3
    return z * y


def _constant_changed(m: Any, x: torch.Tensor) -> torch.Tensor:
    c = torch.tensor([1.0, 2.0])
    c += 1
    return m.a(x)[:, :2] * c


def _two_noises(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = m.a(x)
    y = y + torch.randn_like(y) * 0.1 + torch.rand(y.shape) + torch.empty(8).normal_()
    y = y + torch.bernoulli(torch.full((8,), 0.5))
    return F.dropout(y, 0.3) * (torch.randperm(8) + torch.randint(0, 5, (8,)))


def _all_dropouts(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = m.a(x)
    y = F.alpha_dropout(F.dropout(y, 0.2), 0.1, training=True)
    z = F.dropout2d(y.view(4, 2, 2, 2), 0.4).transpose(1, 3)
    z = F.dropout(z, 0.5)
    z = F.dropout(z * 2, 0.3, inplace=True)
    z = F.dropout(F.dropout(z, 0.0), 0.4, training=False)
    return F.rrelu(F.dropout(z.expand(2, 4, 2, 2, 2), 0.1), training=True) + F.dropout(z, 1.0)


def _attention(m: Any, x: torch.Tensor) -> torch.Tensor:
    q = m.a(x).view(4, 2, 3, 8)
    mask = torch.ones(3, 3, dtype=torch.bool).tril()
    y = F.scaled_dot_product_attention(q, q * 2, q + 1, attn_mask=mask, dropout_p=0.2)
    y = y + F.scaled_dot_product_attention(q, q, q, attn_mask=torch.randn(3, 3), dropout_p=0.3, scale=0.4)
    y = y + F.scaled_dot_product_attention(q, q[:, :1], q[:, :1], dropout_p=0.3, enable_gqa=True)
    return y + F.scaled_dot_product_attention(q, q, q, is_causal=True, dropout_p=0.1)


def _caught(m: Any, x: torch.Tensor) -> torch.Tensor:
    try:
        flag = bool(m.a(x).sum() > 0)
    except Exception:
        flag = True
    return x if flag else -x


GRAPHS: dict[str, Build] = {
    "mlp": lambda: (nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 4)),
                    (torch.randn(6, 8),), {}),
    "cnn with batch norm": lambda: (
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout2d(0.3),
                      nn.Flatten(),
                      nn.Linear(36, 5)), (torch.randn(4, 3, 8, 8),), {}),
    "gpt, tied, sdpa dropout": gpt,
    "instance norm with statistics": lambda: (nn.InstanceNorm1d(3, affine=True, track_running_stats=True),
                                              (torch.randn(4, 3, 5),), {}),
    "lstm with dropout": lambda: (nn.LSTM(8, 8, 2, dropout=0.3, batch_first=True), (torch.randn(4, 5, 8),), {}),
    "gru, bidirectional": lambda: (nn.GRU(8, 4, bidirectional=True), (torch.randn(5, 4, 8),), {}),
    "transformer layer": lambda: (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (torch.randn(4, 5, 8),), {}),
    "in-place on slices": of(_masked, a=linear, b=linear),
    "writes through views": of(_views, a=linear),
    "a constant changed in place": of(_constant_changed, a=linear),
    "random factories": of(_two_noises, a=linear),
    "every kind of dropout": of(_all_dropouts, a=linear),
    "attention with dropout, masks, scale, grouped heads": of(_attention, 4, 6, 8, a=linear),
    "custom autograd function": of(lambda m, x: m.b(Sign.apply(m.a(x))), a=linear, b=linear),
    "autograd function that draws": of(lambda m, x: F.dropout(Noisy.apply(m.a(x)), 0.1), a=linear),
    "checkpoint": of(lambda m, x: checkpoint(m.b, m.a(x), use_reentrant=False), 4, 3, 8, a=linear, b=lambda: Block(8)),
    "checkpoint, reentrant": of(
        lambda m, x: checkpoint(m.b, m.a(x), use_reentrant=True), 4, 3, 8, a=linear, b=lambda: Block(8)),
    "checkpoint, reentrant, no gradient into it": of(
        lambda m, x: m.b(checkpoint(m.a, x, use_reentrant=True)), a=linear, b=linear),
    "no_grad inside": of(lambda m, x: m.b(_frozen(m.a, x)), a=linear, b=linear),
    "buffer changed in place, steps counted": of(lambda m, x: m.e(m.a(x)), a=linear, e=lambda: Ema(False)),
    "buffer bound anew": of(lambda m, x: m.e(m.a(x)), a=linear, e=lambda: Ema(True)),
    "table made on first use": of(lambda m, x: m.e(m.a(x)), a=linear, e=Memo),
    "router as one piece": of(lambda m, x: m.b(m.r(m.a(x))), a=linear, b=linear, r=Router),
    "layer drop by random.random": of(lambda m, x: m.b(m.d(m.a(x))), a=linear, b=linear, d=LayerDrop),
    "numpy in a method": lambda: (NumpyMask(), (torch.randn(4, 8),), {}),
    "state kept in a child": of(lambda m, x: m.s(m.a(x)), a=linear, s=Remembers),
    "list grown in a child": of(lambda m, x: m.s(m.a(x)), a=linear, s=Grows),
    "steps acted on in a child": of(lambda m, x: m.s(m.a(x)), a=linear, s=WarmUp),
    "shared module twice": of(lambda m, x: m.a(torch.relu(m.a(x))), a=linear),
    "spectral norm": of(lambda m, x: m.a(x), a=lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8))),
    "weight norm by hooks": of(lambda m, x: m.a(x), a=lambda: nn.utils.weight_norm(nn.Linear(8, 8))),
    "einsum": of(lambda m, x: torch.einsum("bi,bj,ij->bi", x, m.a(x), m.a.weight), a=linear),
    "vmap as one piece": of(lambda m, x: m.v(m.a(x)), a=linear, v=lambda: Fn(lambda s, x: torch.vmap(torch.sin)(x))),
    "gradient inside as one piece": of(lambda m, x: m.v(m.a(x)), a=linear, v=lambda: Fn(_force, w=linear())),
    "channels last": lambda: (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(0.4)),
                              (torch.randn(4, 3, 8, 8).to(memory_format=torch.channels_last),), {}),
    "half precision": lambda: (nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.4)).bfloat16(),
                               (torch.randn(4, 8).bfloat16(),), {}),
    "batch of one": lambda: (GPT(), (torch.randint(0, 50, (1, 12)),), {}),
    "autocast inside": of(lambda m, x: _autocast(m, x), a=linear, b=linear, n=lambda: nn.LayerNorm(8)),
    "buffer dtype and scalar output": of(lambda m, x: (m.a(x).sum(), x.shape[1], None, "text"), a=linear),
}  # fmt: skip


def _frozen(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return module(x)


def _force(m: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        (g,) = torch.autograd.grad(m.w(x).pow(2).sum(), x, create_graph=True)
    return g


def _autocast(m: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = m.n(m.a(x))
        y = torch.einsum("bi,bj->ij", y, m.b(y)).softmax(-1)
        with torch.autocast("cpu", enabled=False):
            y = y.float() @ m.a.weight
    return m.b(y)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", GRAPHS)
def test_graph_has_the_models_bits_on_fresh_inputs_over_several_steps(name: str, train: bool) -> None:
    captured = check(GRAPHS[name], train=train, steps=3)
    assert not captured.live, captured.live


LIVES: dict[str, tuple[Build, str]] = {
    "branch on an activation": (of(lambda m, x: x if m.a(x).sum() > 0 else -x, a=linear), "is_nonzero"),
    "branch on an activation, the stop caught": (of(_caught, a=linear), "is_nonzero"),
    "item of a random number": (of(lambda m, x: m.a(x) * torch.rand(()).item(), a=linear), "randomness"),
    "python random numbers at the top": (of(lambda m, x: m.a(x) * random.random(), a=linear), "generator"),
    "state at the top": (lambda: (Remembers(), (torch.randn(4, 8),), {}), "'last'"),
    "list at the top": (lambda: (Grows(), (torch.randn(4, 8),), {}), "'seen'"),
    "steps acted on at the top": (lambda: (WarmUp(), (torch.randn(4, 8),), {}), "number that it changes"),
    "nonzero of an activation": (of(lambda m, x: x[m.a(x) > 0].sum() * x, a=linear), "depends on data"),
}


@pytest.mark.parametrize("name", LIVES)
def test_what_no_graph_can_hold_is_said_not_baked(name: str) -> None:
    build, reason = LIVES[name]
    captured = check(build)
    assert reason in captured.live
    assert "test_capture.py" in captured.live
    assert not captured.graph.ops


def test_reads_that_follow_from_inputs_are_guarded() -> None:
    def forward(m: Any, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        y = m.a(x)
        return y if mask.all() else y * mask[:, None]

    model = Fn(forward, a=linear())
    full, part = torch.ones(4, dtype=torch.bool), torch.tensor([True, False, True, True])
    captured = capture(model, (torch.randn(4, 8), full))
    x = torch.randn(4, 8)
    assert not captured.live
    assert captured.guards_hold([x, full])
    assert not captured.guards_hold([x, part])
    assert "mask.all()" in str(captured.guards[0])
    again = capture(model, (x, part))
    assert torch.equal(interpret(again, model, (x, part), {}), model(x, part))


def test_guards_run_on_copies_and_see_writes_through_views() -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        z = torch.zeros(4)
        z[1:] = x[:3, 0]
        x += 1
        return m.a(x) if z.sum() > 0 else x

    model = Fn(forward, a=linear())
    positive = torch.ones(4, 8)
    captured = capture(model, (positive.clone(),))
    leaf = positive.clone()
    assert captured.guards_hold([leaf])
    assert torch.equal(leaf, positive)
    assert not captured.guards_hold([-positive])


def test_lengths_in_inputs_give_a_graph_for_those_lengths() -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.GRU(8, 8, batch_first=True)

        def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
            packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            return nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0]

    model = Packed()
    captured = capture(model, (torch.randn(3, 6, 8), torch.tensor([6, 2, 4])))
    assert not captured.live
    fresh = torch.randn(3, 6, 8)
    assert captured.guards_hold([fresh, torch.tensor([6, 2, 4])])
    assert not captured.guards_hold([fresh, torch.tensor([6, 3, 4])])
    lengths = torch.tensor([6, 2, 4])
    assert torch.equal(interpret(captured, model, (fresh, lengths), {}), model(fresh, lengths))


def test_without_guards_a_module_that_reads_inputs_is_one_piece() -> None:
    class Reads(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    model = nn.Sequential(nn.Identity(), Reads(), nn.Linear(8, 8))
    assert not capture(model, (torch.randn(4, 8),)).opaques
    captured = capture(model, (torch.randn(4, 8),), guards=False)
    assert len(captured.opaques) == 1 and not captured.guards
    x = torch.randn(4, 8)
    assert torch.equal(interpret(captured, model, (x,), {}), model(x))


def test_numbers_that_read_only_constants_need_no_guard() -> None:
    def forward(m: Any, x: torch.Tensor) -> list[torch.Tensor]:
        lengths = torch.tensor([x.shape[1], 2, 3])
        return [m.a(x)[:, :n] for n in lengths.tolist()]

    captured = capture(Fn(forward, a=linear()), (torch.randn(4, 8),))
    assert not captured.live and not captured.guards


def test_gradient_of_custom_function_is_its_own() -> None:
    model = Fn(lambda m, x: Sign.apply(m.a(x)), a=linear())
    captured = capture(model, (torch.randn(4, 8),))
    x = torch.randn(4, 8)
    interpret(captured, model, (x,), {}).sum().backward()
    assert model.a.weight.grad.abs().sum() > 0


def test_outputs_keep_their_structure() -> None:
    def forward(m: Any, x: torch.Tensor) -> Any:
        y = m.a(x)
        pair = [y, y]
        bag = Bag(tensor=y * 2, deep={"list": pair}, number=3, none=None)
        bag.itself = bag
        return Answer(logits=y, extra=(bag, x, m.a.weight, {"pair": pair}, 7, None))

    model = Fn(forward, a=linear())
    captured = capture(model, (torch.randn(4, 8),))
    x = torch.randn(4, 8)
    out = interpret(captured, model, (x,), {})
    assert type(out) is Answer
    bag, same_x, weight, mapping, seven, none = out.extra
    assert same_x is x and weight is model.a.weight and seven == 7 and none is None
    assert bag.itself is bag and bag.deep["list"] is mapping["pair"]
    assert mapping["pair"][0] is out.logits and mapping["pair"][1] is out.logits
    assert torch.equal(bag.tensor, out.logits * 2)


def test_other_structure_or_other_numbers_are_another_call() -> None:
    model = Fn(lambda m, x, scale=1.0, options=None: m.a(x) * scale, a=linear())
    x = torch.randn(4, 8)
    captured = capture(model, (x,), {"scale": 2.0, "options": {"k": [1, None]}})
    assert captured.inputs == ("args[0]",)
    assert captured.flatten((x,), {"scale": 2.0, "options": {"k": [1, None]}}) is not None
    assert captured.flatten((x,), {"scale": 3.0, "options": {"k": [1, None]}}) is None
    assert captured.flatten((x,), {"scale": 2.0, "options": {"k": [2, None]}}) is None
    assert captured.flatten((x,), {"scale": 2}) is None
    assert captured.flatten((x, x), {}) is None


def test_names_of_inputs_say_where_they_stand() -> None:
    model = Fn(lambda m, x, more: m.a(x) + more["y"][1], a=linear())
    captured = capture(model, (torch.randn(4, 8),), {"more": {"y": [None, torch.randn(4, 8)]}})
    assert captured.inputs == ("args[0]", "kwargs['more']['y'][1]")


def test_sizes_follow_the_batch() -> None:
    graph = capture(GPT(), (torch.randint(0, 50, (4, 12)),)).graph
    assert graph.batch == 4
    view = next(op for op in graph.ops if op.target == "aten.view.default")
    assert view.args[1] == (Size(0, 1), 12, 2, 8)
    assert graph.tensor(graph.outputs[0]).shape == (Size(0, 1), 12, 50)
    noise = next(op for op in graph.ops if op.target == "partita.dropout_noise")
    assert noise.args[0][0] == Size(0, 1) and noise.random and not noise.grad and noise.uses() == ()


def test_sizes_that_are_no_straight_line_mean_no_microbatches() -> None:
    graph = capture(Fn(lambda m, x: (m.a(x) @ x.T).view(-1), a=linear()), (torch.randn(4, 8),)).graph
    assert graph.batch == 0 and "not a straight line" in graph.notes[0]
    graph = capture(Fn(lambda m, x: torch.stack([m.a(r) for r in x]), a=linear()), (torch.randn(4, 8),)).graph
    assert graph.batch == 0
    graph = capture(Fn(lambda m, x: m.a(x)[: x.shape[0] // 2], a=linear()), (torch.randn(4, 8),)).graph
    assert graph.batch == 0
    graph = capture(Fn(lambda m, x: m.a(x) * (1.0 / x.shape[0]), a=linear()), (torch.randn(4, 8),)).graph
    assert graph.batch == 0


def test_a_batch_of_one_has_sizes_only_if_larger_batches_agree() -> None:
    assert capture(GPT(), (torch.randint(0, 50, (1, 12)),)).graph.batch == 1
    squeezed = capture(Fn(lambda m, x: m.a(x).squeeze(), a=linear()), (torch.randn(1, 8),)).graph
    assert squeezed.batch == 0


def test_names_are_unique_and_stable_over_batch_sizes() -> None:
    one = capture(GPT(), (torch.randint(0, 50, (4, 12)),)).graph
    two = capture(GPT(), (torch.randint(0, 50, (7, 12)),)).graph
    names = [op.name for op in one.ops]
    assert len(names) == len(set(names))
    assert names == [op.name for op in two.ops]
    assert one.fingerprint == two.fingerprint
    assert "blocks.0.qkv:linear" in names and "blocks.1.mlp.0:linear" in names


def test_fingerprint_tells_models_apart() -> None:
    ids = torch.randint(0, 50, (4, 12))
    wide = GPT()
    wide.head = nn.Linear(16, 60)
    assert capture(GPT(), (ids,)).graph.fingerprint != capture(wide, (ids,)).graph.fingerprint


def test_second_call_of_a_module_has_a_path_of_its_own() -> None:
    graph = capture(Fn(lambda m, x: m.a(torch.relu(m.a(x))), a=linear()), (torch.randn(4, 8),)).graph
    assert [op.module for op in graph.ops] == ["a", "", "a@1"]
    assert [op.name for op in graph.ops] == ["a:linear", ":relu", "a@1:linear"]


def test_every_op_names_the_users_line() -> None:
    graph = capture(GPT(), (torch.randint(0, 50, (4, 12)),)).graph
    assert all("test_capture.py:" in op.source for op in graph.ops)
    softmax = next(op for op in graph.ops if "_safe_softmax" in op.target)
    assert "F.scaled_dot_product_attention" in softmax.source


def test_ties_name_one_parameter() -> None:
    graph = capture(GPT(), (torch.randint(0, 50, (4, 12)),)).graph
    assert graph.ties == (("head.weight", "tok.weight"),)
    head = next(op for op in graph.ops if op.name == "head:linear")
    assert Ref("tok.weight") in head.args


def test_batch_norm_writes_its_statistics_in_training_only() -> None:
    model = nn.BatchNorm1d(8)
    ops = capture(model, (torch.randn(4, 8),)).graph.ops
    assert {w for op in ops for w in op.writes} == {"running_mean", "running_var", "num_batches_tracked"}
    assert not any(op.writes for op in capture(model.eval(), (torch.randn(4, 8),)).graph.ops)


def test_views_and_in_place_ops_name_the_memory_they_share() -> None:
    graph = capture(Fn(_views, a=linear()), (torch.randn(4, 8),)).graph
    written = {w for op in graph.ops for w in op.writes}
    assert written == {":zeros_like"}
    assert {t.base for t in graph.tensors if t.name.startswith((":select", ":slice"))} >= {":zeros_like"}


def test_pure_ops_nobody_uses_are_dropped() -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        m.a(x)
        torch.rand(3)
        return m.b(x)

    graph = capture(Fn(forward, a=linear(), b=linear()), (torch.randn(4, 8),)).graph
    assert [op.target for op in graph.ops] == ["aten.rand.default", "aten.linear.default"]
    assert {t.name for t in graph.of_role("parameter")} == {"a.weight", "a.bias", "b.weight", "b.bias"}


def test_flops_of_products_are_two_per_multiply_add() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.Unflatten(1, (4, 2, 2)), nn.Conv2d(4, 6, 1))
    ops = capture(model, (torch.randn(4, 8),)).graph.ops
    assert [op.flops for op in ops] == [2 * 4 * 8 * 16, 0, 2 * 4 * 6 * 4 * 4]


def test_custom_ops_stay_whole() -> None:
    @torch.library.custom_op("partita_tests::fused", mutates_args=())
    def fused(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch.relu(x @ w)

    @fused.register_fake
    def _(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return x @ w

    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, w, y = ctx.saved_tensors
        g = g * (y > 0)
        return g @ w.T, x.T @ g

    fused.register_autograd(backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs, output))
    captured = check(of(lambda m, x: fused(x, m.a.weight), a=linear))
    assert [op.target for op in captured.graph.ops] == ["partita_tests.fused.default"]
    assert resolve("partita_tests.fused.default") is torch.ops.partita_tests.fused.default


def test_symbols_come_back() -> None:
    assert decode_symbol(Symbol("torch.float32")) is torch.float32
    assert decode_symbol(Symbol("torch.channels_last")) is torch.channels_last
    assert decode_symbol(Symbol("device:cpu")) == torch.device("cpu")


def test_models_without_memory_are_captured() -> None:
    with torch.device("meta"):
        model = GPT()
        ids = torch.zeros(4, 12, dtype=torch.long)
    graph = capture(model, (ids,)).graph
    assert graph.batch == 4
    assert graph.fingerprint == capture(GPT(), (torch.zeros(4, 12, dtype=torch.long),)).graph.fingerprint


def test_reads_of_values_without_memory_are_refused_with_the_line() -> None:
    with torch.device("meta"):
        model, x = Fn(lambda m, x: x if m.r(x).sum() > 0 else -x, r=Router()), torch.randn(4, 8)
    with pytest.raises(CaptureError, match=r"(?s)nonzero.*Router|test_capture.py.*meta"):
        capture(model, (x,))


def test_loss_is_captured_with_the_models_names() -> None:
    model, loss = nn.Sequential(linear(), nn.ReLU(), linear()), nn.CrossEntropyLoss()
    captured = capture(model, (torch.randn(4, 8), torch.randint(0, 8, (4,))), forward=lambda x, t: loss(model(x), t))
    assert {t.name for t in captured.graph.of_role("parameter")} == {"0.weight", "0.bias", "2.weight", "2.bias"}
    x, t = torch.randn(4, 8), torch.randint(0, 8, (4,))
    assert torch.equal(interpret(captured, model, (x, t), {}), loss(model(x), t))
    assert captured.graph.ops[-1].target == "aten.cross_entropy_loss.default"


def test_backward_hooks_make_a_module_one_piece_and_are_honoured() -> None:
    seen: list[str] = []
    model = nn.Sequential(linear(), nn.ReLU(), linear())
    model[2].register_full_backward_hook(lambda m, gi, go: seen.append("called"))
    captured = capture(model, (torch.randn(4, 8),))
    assert "2 runs as one piece: it has backward hooks" in captured.graph.notes
    interpret(captured, model, (torch.randn(4, 8),), {}).sum().backward()
    assert seen == ["called"]


def test_forward_hooks_are_part_of_the_graph() -> None:
    model = nn.Sequential(linear(), linear())
    model[0].register_forward_hook(lambda m, args, out: out * 2)
    x = torch.randn(4, 8)
    captured = capture(model, (torch.randn(4, 8),))
    assert torch.equal(interpret(captured, model, (x,), {}), model(x))


def test_nothing_in_the_model_is_changed() -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        m.cache.append(x)
        m.info["k"] = m.a(x)
        m.new = 3
        return m.s(m.e(m.a(x)))

    model = Fn(forward, a=linear(), e=Ema(True), s=Remembers())
    model.cache, model.info = [], {"k": 1}
    before = {k: v for k, v in vars(model).items() if not k.startswith("_")}
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    values = {n: t.clone() for n, t in {**parameters, **buffers}.items()}
    captured = capture(model, (torch.randn(4, 8),))
    assert "'cache'" in captured.live or "'info'" in captured.live
    assert {k: v for k, v in vars(model).items() if not k.startswith("_")} == before
    assert model.cache == [] and model.info == {"k": 1} and model.e.steps == 0 and model.s.last is None
    for name, tensor in {**dict(model.named_parameters()), **dict(model.named_buffers())}.items():
        assert tensor is {**parameters, **buffers}[name] and torch.equal(tensor, values[name])
    assert "forward" not in vars(model.a)
    assert nn.Module.__call__.__name__ == "_wrapped_call_impl"


def test_a_failing_forward_leaves_torch_as_it_was() -> None:
    model = Fn(lambda m, x: m.a(x) @ torch.ones(3), a=linear())
    with pytest.raises(CaptureError, match="test_capture.py"):
        capture(model, (torch.randn(4, 8),))
    assert not isinstance(model.a(torch.randn(4, 8)), torch._subclasses.FakeTensor)
    assert isinstance(model.a.weight, nn.Parameter) and type(model.a.weight.data) is torch.Tensor


def test_counted_steps_are_moved_on_by_after_call() -> None:
    model = Fn(lambda m, x: m.e(x), e=Ema(False))
    captured = capture(model, (torch.randn(4, 8),))
    assert len(captured.effects) == 1 and not captured.opaques
    captured.after_call()
    assert model.e.steps == 1


def test_an_opaque_piece_refuses_answers_of_another_shape() -> None:
    class Cuts(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x[: 4 if x.sum() > -1e9 else 2]

    model = nn.Sequential(nn.Identity(), Cuts(), linear())
    captured = capture(model, (torch.randn(4, 8),), guards=False)
    assert not captured.live and len(captured.opaques) == 1
    with pytest.raises(ExecutionError, match="depends on values"):
        interpret(captured, model, (torch.full((4, 8), -1e12),), {})


def test_two_captures_of_one_model_agree() -> None:
    model = GPT()
    ids = torch.randint(0, 50, (4, 12))
    assert capture(model, (ids,)).graph == capture(model, (ids,)).graph


def test_autocast_around_the_call_is_in_the_graph() -> None:
    model = GPT(p=0.0)
    ids = torch.randint(0, 50, (4, 12))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        captured = capture(model, (ids,))
        expected = step(lambda: model(ids), model, 1)
    found = step(lambda: interpret(captured, model, (ids,), {}), model, 1)
    assert_same_bits(expected, found)
