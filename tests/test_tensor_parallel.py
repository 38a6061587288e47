"""Models whose single ops are divided over worker threads: outputs, every gradient, buffers and training as unsplit."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from dividing import cluster
from torch import nn
from torch.nn import functional as F

from partita.api import parallelize
from partita.capture import capture
from partita.check import check
from partita.cluster import Device, Link
from partita.cost.blocks import signature
from partita.demo.models import CharGPT, DigitViT
from partita.divide import divide
from partita.errors import PlanError
from partita.plan import Batch, Plan, Stage
from partita.planners.shards import with_shards
from partita.predict import predict
from partita.runtime.compare import Comparison, compare, observe
from partita.runtime.module import ParallelModule
from partita.sharding.batch import layouts

torch.set_num_threads(1)


class GroupedHeads(nn.Module):
    """Llama's block: grouped key and value heads, rotary positions, a gated MLP, no biases."""

    def __init__(self, width: int = 24, heads: int = 6, groups: int = 3) -> None:
        super().__init__()
        self.heads, self.groups, self.size = heads, groups, width // heads
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q, self.o = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.k = nn.Linear(width, groups * self.size, bias=False)
        self.v = nn.Linear(width, groups * self.size, bias=False)
        self.gate_up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(2 * width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, t, c = x.shape
        y = self.norm1(x)
        angle = torch.arange(t)[:, None] * torch.tensor([1.0, 0.1])[None, :]
        turn = torch.cat((angle, angle), -1)
        q, k, v = (
            linear(y).view(n, t, h, self.size).transpose(1, 2)
            for linear, h in ((self.q, self.heads), (self.k, self.groups), (self.v, self.groups))
        )
        q, k = (z * turn.cos() + torch.cat((-z[..., 2:], z[..., :2]), -1) * turn.sin() for z in (q, k))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o(y.transpose(1, 2).reshape(n, t, c))
        gate, up = self.gate_up(self.norm2(x)).chunk(2, dim=-1)
        out: torch.Tensor = x + self.down(F.silu(gate) * up)
        return out


class Llama(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(31, 24, padding_idx=0)
        self.blocks = nn.ModuleList(GroupedHeads() for _ in range(2))
        self.head = nn.Linear(24, 31, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.tokens(x)
        for block in self.blocks:
            y = block(y)
        logits: torch.Tensor = self.head(y)
        return F.cross_entropy(logits[:, :-1].reshape(-1, 31), x[:, 1:].reshape(-1), label_smoothing=0.1)


class EncoderDecoder(nn.Module):
    """T5's way: relative positions as a bias of every head, scores by matmul, a memory that every layer reads."""

    def __init__(self, width: int = 24, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.near = nn.Embedding(9, heads)
        self.parts = nn.ModuleList(nn.ModuleDict({n: nn.Linear(width, width, bias=False) for n in "qkvo"})
                                   for _ in range(3))  # fmt: skip
        self.up, self.down = nn.Linear(width, 32), nn.Linear(32, width)

    def attend(self, part: Any, x: torch.Tensor, memory: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        n = x.shape[0]
        q, k, v = (
            part[name](y).view(n, -1, self.heads, y.shape[-1] // self.heads).transpose(1, 2)
            for name, y in (("q", x), ("k", memory), ("v", memory))
        )
        scores = q @ k.transpose(-1, -2)
        weights = (scores if bias is None else scores + bias).softmax(-1)
        out: torch.Tensor = x + part["o"]((weights @ v).transpose(1, 2).flatten(2))
        return out

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        far = (torch.arange(x.shape[1])[None] - torch.arange(x.shape[1])[:, None]).clamp(-4, 4) + 4
        memory = self.attend(self.parts[0], x, x, self.near(far).permute(2, 0, 1)[None])
        y = self.attend(self.parts[1], y, memory, None)
        y = self.attend(self.parts[2], y, memory, None)
        out: torch.Tensor = y + self.down(self.up(y).relu_())
        return out


class Experts(nn.Module):
    """Stacked expert weights, the two best of five experts a token."""

    def __init__(self, width: int = 12, experts: int = 5) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts)
        self.up = nn.Parameter(torch.randn(experts, width, 16) * 0.3)
        self.down = nn.Parameter(torch.randn(experts, 16, width) * 0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chance = self.router(x).softmax(-1)
        best, which = chance.topk(2, dim=-1)
        weight = torch.zeros_like(chance).scatter(-1, which, best)
        hidden = F.gelu(torch.einsum("ntc,ecd->entd", x, self.up))
        return x + torch.einsum("entd,edc,nte->ntc", hidden, self.down, weight)


class Convolutions(nn.Module):
    """Batch norms in training, grouped and depthwise convolutions, group norm, joined channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.depthwise, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8)
        self.grouped, self.gn = nn.Conv2d(16, 12, 1, groups=4), nn.GroupNorm(4, 12)
        self.head = nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.stem(x)), inplace=True)
        y = F.max_pool2d(torch.cat((x, F.relu6(self.bn2(self.depthwise(x)))), 1), 2)
        out: torch.Tensor = self.head(self.gn(self.grouped(y)).mean((2, 3)))
        return out


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[torch.Tensor, ...]]]] = {
    "GPT, fused and tied": (
        lambda: CharGPT(23, context=8, width=24, depth=2, heads=4), lambda: (torch.randint(0, 23, (4, 8)),)),
    "llama, grouped heads": (Llama, lambda: (torch.randint(0, 31, (4, 8)),)),
    "T5, encoder and decoder": (EncoderDecoder, lambda: (torch.randn(4, 6, 24), torch.randn(4, 5, 24))),
    "experts": (Experts, lambda: (torch.randn(4, 6, 12),)),
    "CNN with batch norm": (Convolutions, lambda: (torch.randn(4, 3, 8, 8),)),
    "ViT": (lambda: DigitViT(width=24, depth=2, heads=4), lambda: (torch.randn(4, 1, 8, 8),)),
}  # fmt: skip


def tensor_plan(model: nn.Module, args: tuple[Any, ...], members: int, stages: int, microbatches: int = 1) -> Plan:
    """Cut between ops into near-equal stages, each divided by ``members``."""
    graph = capture(model, args, {}).graph
    ops = [op.name for op in graph.ops]
    bounds = [len(ops) * k // stages for k in range(stages + 1)]
    made = (
        Stage(
            tuple(f"cpu:{s * members + i}" for i in range(members)),
            ops=tuple(ops[bounds[s] : bounds[s + 1]]),
            tensor=members,
        )
        for s in range(stages)
    )
    return Plan(tuple(made), batch=Batch(4, microbatches))


def compared(name: str, members: int, stages: int, microbatches: int = 1) -> tuple[Comparison, ParallelModule]:
    torch.manual_seed(0)
    build, inputs = MODELS[name]
    model, args = build(), inputs()
    plan = tensor_plan(model, args, members, stages, microbatches)
    parallel = ParallelModule(model, plan, cluster(members * stages))
    fresh = inputs()
    found = compare(observe(model, model, fresh, {}), observe(parallel, model, fresh, {}), atol=3e-6)
    parallel.close()
    return found, parallel


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("members", "stages", "microbatches"), [(2, 1, 1), (3, 1, 2), (2, 2, 2)], ids=["tp=2", "tp=3", "pp=2 x tp=2"]
)
def test_a_model_of_divided_ops_gives_the_unsplit_models_numbers(
    name: str, members: int, stages: int, microbatches: int
) -> None:
    found, parallel = compared(name, members, stages, microbatches)
    assert found.ok, found
    (engine,) = [e.engine for e in parallel._binder.entries]
    assert engine is not None
    (lowered,) = engine._lowered.values()
    assert lowered.division is not None
    graph = engine.captured.graph
    options = {n: o for choice in lowered.division.choices.values() for n, o in choice.options.items()}
    work = sum(op.flops for op in graph.ops)
    shared = sum(op.flops for op in graph.ops if op.name in options and options[op.name].cut is not None)
    assert shared > 0.9 * work, f"only {shared / work:.0%} of the work is divided"


class Codebook(nn.Module):
    """Vector quantisation whose codes move with what they were nearest to: several buffers, each read and changed."""

    def __init__(self) -> None:
        super().__init__()
        self.enc, self.dec = nn.Linear(8, 4), nn.Linear(4, 8)
        self.register_buffer("codes", torch.randn(16, 4))
        self.register_buffer("count", torch.ones(16))
        self.register_buffer("total", torch.randn(16, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.enc(x)
        near = F.one_hot(torch.cdist(z, self.codes).argmin(-1), 16).to(z)
        found = near @ self.codes
        with torch.no_grad():
            self.count.mul_(0.9).add_(near.sum(0), alpha=0.1)
            self.total.mul_(0.9).add_(near.t() @ z, alpha=0.1)
            self.codes.copy_(self.total / (self.count + 1e-5)[:, None])
        out: torch.Tensor = self.dec(z + (found - z).detach())
        return out


@pytest.mark.parametrize("microbatches", [1, 2])
def test_buffers_that_several_ops_change_and_read_are_changed_whole(microbatches: int) -> None:
    model, args = Codebook(), (torch.randn(4, 8),)
    plan = tensor_plan(model, args, 2, 1, microbatches)
    parallel = ParallelModule(model, plan, cluster(2))
    fresh = (torch.randn(4, 8),)
    found = compare(observe(model, model, fresh, {}), observe(parallel, model, fresh, {}))
    parallel.close()
    assert found.ok, found


def test_a_table_with_sparse_gradients_stays_whole() -> None:
    model = nn.Sequential(nn.Embedding(12, 8, sparse=True), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    args = (torch.randint(0, 12, (4, 3)),)
    parallel = ParallelModule(model, tensor_plan(model, args, 2, 1), cluster(2))
    found = compare(observe(model, model, args, {}), observe(parallel, model, args, {}))
    parallel.close()
    assert found.ok, found


def test_training_with_adamw_gives_the_unsplit_losses() -> None:
    torch.manual_seed(0)
    model = CharGPT(23, context=8, width=24, depth=2, heads=4)
    own, x, y = copy.deepcopy(model), torch.randint(0, 23, (4, 8)), torch.randint(0, 23, (4, 8))

    def loss_fn(out: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(out.flatten(0, 1), target.flatten())

    parallel = ParallelModule(model, tensor_plan(model, (x,), 2, 2, 2), cluster(4), loss_fn=loss_fn)
    optimizers = [torch.optim.AdamW(m.parameters(), 1e-3) for m in (model, own)]
    for step in range(6):
        torch.manual_seed(step)
        loss = parallel.train_step(x, y)
        torch.manual_seed(step)
        expected = loss_fn(own(x), y)
        expected.backward()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    parallel.close()


def test_gradients_lie_in_memory_as_their_parameters_so_that_a_fused_optimizer_takes_the_right_numbers() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    for layer in (model[0], model[2]):
        layer.weight = nn.Parameter(layer.weight.detach().t().contiguous().t())
    own, x, y = copy.deepcopy(model), torch.randn(4, 6), torch.randn(4, 4)
    parallel = ParallelModule(model, tensor_plan(model, (x,), 2, 1, 2), cluster(2), loss_fn=F.mse_loss)
    optimizers = [torch.optim.AdamW(m.parameters(), 1e-2, fused=True) for m in (model, own)]
    for _ in range(3):
        parallel.train_step(x, y)
        F.mse_loss(own(x), y).backward()
        assert [p.grad.stride() for p in model.parameters()] == [p.grad.stride() for p in own.parameters()]  # type: ignore[union-attr]
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for mine, theirs in zip(model.parameters(), own.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    parallel.close()


def test_replicas_of_groups_divide_the_batch_and_the_ops() -> None:
    torch.manual_seed(0)
    model, x = CharGPT(23, context=8, width=24, depth=1, heads=4), torch.randint(0, 23, (4, 8))
    plan = Plan((Stage(tuple(f"cpu:{i}" for i in range(4)), ("",), tensor=2),), batch=Batch(4, 2))
    parallel = ParallelModule(model, plan, cluster(4))
    found = compare(observe(model, model, (x,), {}), observe(parallel, model, (x,), {}))
    parallel.close()
    assert found.ok, found


def test_recomputed_parts_run_their_collectives_again_in_the_same_order() -> None:
    torch.manual_seed(0)
    model, x = CharGPT(23, context=8, width=24, depth=2, heads=4), torch.randint(0, 23, (4, 8))
    plan = Plan((Stage(("cpu:0", "cpu:1"), ("",), recompute=("blocks.0", "blocks.1"), tensor=2),), batch=Batch(4, 2))
    parallel = ParallelModule(model, plan, cluster(2))
    found = compare(observe(model, model, (x,), {}), observe(parallel, model, (x,), {}))
    parallel.close()
    assert found.ok, found


def test_an_error_in_one_member_ends_all_and_names_the_module() -> None:
    torch.manual_seed(0)
    model, x = CharGPT(23, context=8, width=24, depth=1, heads=4), torch.randint(0, 23, (4, 8))
    parallel = ParallelModule(model, tensor_plan(model, (x,), 2, 1), cluster(2))
    with pytest.raises(Exception, match=r"stage 0 on cpu:\d, module 'tokens'"):
        parallel(torch.full((4, 8), 99))
    parallel.close()


def slow_link(members: int) -> Any:
    """A link that costs more than reading memory, less than the work."""
    return replace(cluster(members), links=(Link("*", "*", 1e9, 0.0),))


def test_the_search_finds_megatrons_column_and_row_pairs() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 128), nn.Linear(128, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = x + self.down(F.gelu(self.up(self.norm(x))))
            return out

    model, x = Pair(), torch.randn(8, 4, 32)
    graph = capture(model, (x,), {}).graph

    def sent(whole: tuple[str, ...]) -> tuple[dict[str, str], list[str]]:
        """What is divided where these ops are not, and what the members send."""
        asked = tuple((name, "Replicate") for name in whole)
        plan = Plan((Stage(("cpu:0", "cpu:1"), ("",), shard=asked, tensor=2),), batch=Batch(8, 1))
        named = with_shards(graph, layouts(graph), plan, slow_link(2))
        division = divide(graph, layouts(graph), named, batch=8)
        assert division is not None
        parameters = {name: how for name, how in named.stages[0].shard if name not in whole}
        return parameters, [op.target for op in division.graph.ops if op.target.startswith("partita.")]

    pair = {"down.weight": "Shard(1)", "up.bias": "Shard(0)", "up.weight": "Shard(0)"}
    assert sent(("norm:layer_norm", ":add")) == (pair, ["partita.copied", "partita.all_reduce"])  # backward, forward
    # left to itself it divides what is between the pairs too, by rows (Korthikanti et al., 2022), for as many bytes
    rows = ["partita.take", "partita.all_gather_copied", "partita.reduce_scatter", "partita.all_gather"]
    assert sent(()) == (pair, rows)


def test_the_loss_of_a_divided_vocabulary_gathers_no_logits() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 501, bias=False)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return F.cross_entropy(self.head(self.norm(x)), y)

    model, args = Head(), (torch.randn(6, 16), torch.randint(0, 501, (6,)))
    plan = Plan((Stage(("cpu:0", "cpu:1"), ("",), tensor=2, shard=(("head.weight", "Shard(0)"),)),), batch=Batch(6, 1))
    graph = capture(model, args, {}).graph
    division = divide(graph, layouts(graph), plan, batch=6)
    assert division is not None
    sent = [op.target for op in division.graph.ops if op.target.startswith("partita.")]
    assert sent == ["partita.copied", "partita.divided_cross_entropy"]
    assert division.graph.tensor("head.weight").shape == (251, 16)
    assert division.members[1].graph.tensor("head.weight").shape == (250, 16)


def test_a_wished_placement_is_kept_and_nonsense_is_refused_with_a_remedy() -> None:
    model, x = CharGPT(23, context=8, width=24, depth=1, heads=4), torch.randint(0, 23, (4, 8))
    graph = capture(model, (x,), {}).graph

    def problems(**changes: Any) -> str:
        stage = replace(Stage(("cpu:0", "cpu:1"), ("",), tensor=2), **changes)
        return " | ".join(check(Plan((stage,), batch=Batch(4, 1)), graph, cluster(2), layouts(graph)))

    assert problems(shard=(("blocks.*.up.weight", "Shard(0)"),)) == ""
    assert "did you mean 'blocks.0.up.weight'" in problems(shard=(("blocks.0.upp.weight", "Shard(0)"),))
    assert "which has dims 0 to 1" in problems(shard=(("blocks.0.up.weight", "Shard(2)"),))
    assert "is no placement" in problems(shard=(("blocks.0.up.weight", "Sharded"),))
    assert "needs that dim whole; dims it can be divided along: 0, 1" in problems(
        shard=(("blocks.0.norm1:layer_norm", "Shard(2)"),)
    )
    assert "divides its ops by 3 and has 2 devices" in problems(tensor=3)
    assert "do not make groups of 2" in problems(devices=("cpu:0", "cpu:1", "cpu:2"))


def test_a_fixed_degree_is_planned_predicted_saved_and_run() -> None:
    torch.manual_seed(0)
    model, x = CharGPT(23, context=8, width=24, depth=2, heads=4), torch.randint(0, 23, (4, 8))
    where = cluster(4)
    parallel = parallelize(model, (x,), devices=where, constraints={"stages": 2, "tensor": 2})
    plan = parallel.plan
    assert [(len(s.devices), s.tensor) for s in plan.stages] == [(2, 2), (2, 2)]
    assert all(s.shard for s in plan.stages)
    found = compare(observe(model, model, (x,), {}), observe(parallel, model, (x,), {}))
    parallel.close()
    assert found.ok, found
    trace = predict(capture(model, (x,), {}).graph, plan, where)
    assert {d for d, _ in trace.memory} == {"cpu:0", "cpu:1", "cpu:2", "cpu:3"}
    with pytest.raises(PlanError, match="tensor 8 needs 8 devices"):
        parallelize(model, (x,), devices=where, constraints={"tensor": 8})


def test_a_divided_stage_is_predicted_faster_and_smaller_than_a_whole_one() -> None:
    model, x = CharGPT(64, context=32, width=128, depth=2, heads=4), torch.randint(0, 64, (8, 32))
    graph = capture(model, (x,), {}).graph
    where = cluster(2)
    where = replace(where, devices=tuple(Device(f"gpu:{i}", "gpu", 1 << 34, 1e10, 1e10) for i in range(2)))
    one = predict(graph, Plan((Stage(("gpu:0",), ("",)),), batch=Batch(8, 1)), where)
    two = predict(graph, Plan((Stage(("gpu:0", "gpu:1"), ("",), tensor=2),), batch=Batch(8, 1)), where)
    assert two.step_seconds < 0.7 * one.step_seconds
    assert dict(two.memory)["gpu:1"] < 0.75 * dict(one.memory)["gpu:0"]


def test_an_op_without_a_rule_runs_whole_and_says_which_line_would_divide_it() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.matrix_exp(self.a(x))

    model, x = Odd(), torch.randn(3, 16, 16) * 0.1
    plan = Plan((Stage(("cpu:0", "cpu:1"), ("",), tensor=2),), batch=Batch(3, 1))
    graph = capture(model, (x,), {}).graph
    notes = " ".join(with_shards(graph, layouts(graph), plan, cluster(2)).reasons)
    assert "linalg_matrix_exp" in notes and "partita.sharding_rule(" in notes


class Windows(nn.Module):
    """Overlapping windows taken out of memory in which the heads do not lie where they stand (Longformer's keys)."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(16, 16), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, t, _ = x.shape
        heads = self.q(x).view(n, t, 4, 4).transpose(1, 2)  # in memory: sample, step, head
        a, b, c, d = heads.stride()
        windows = heads.as_strided((n, 4, t // 2 - 1, 4, 4), (a, b, 2 * c, c, d))
        out: torch.Tensor = self.o(windows.mean(2).transpose(1, 2).reshape(n, 4, 16)[..., :8])
        return out


def test_what_counts_in_memory_finds_the_unsplit_models_order_there() -> None:
    torch.manual_seed(0)
    model, x = Windows(), torch.randn(4, 8, 16)
    for members, microbatches in ((2, 1), (1, 2), (2, 2)):
        plan = tensor_plan(model, (x,), members, 1, microbatches)
        parallel = ParallelModule(model, plan, cluster(members))
        y = torch.randn(4, 8, 16)
        found = compare(observe(model, model, (y,), {}), observe(parallel, model, (y,), {}))
        assert found.ok, found
        parallel.close()


class DrawsAcross(nn.Module):
    """Random numbers for a tensor that lies in memory in another order than it stands."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.a(x).transpose(1, 2)
        h = h + torch.randn_like(h) + torch.rand_like(h) * torch.randint_like(h, 2, 5)
        h = h * torch.empty_like(h).bernoulli_(0.5) + h.detach().clone().exponential_()
        out: torch.Tensor = self.b(F.alpha_dropout(h, 0.2, training=True))
        return out


def test_random_numbers_stand_where_they_do_in_the_unsplit_model_whatever_the_order_in_memory() -> None:
    torch.manual_seed(0)
    model, x = DrawsAcross(), torch.randn(4, 6, 8)
    for members, microbatches in ((2, 1), (1, 2), (2, 2)):
        plan = tensor_plan(model, (x,), members, 1, microbatches)
        parallel = ParallelModule(model, plan, cluster(members))
        y = torch.randn(4, 6, 8)
        found = compare(observe(model, model, (y,), {}), observe(parallel, model, (y,), {}))
        assert found.ok, found
        parallel.close()


class RepeatsMask(nn.Module):
    """A mask repeated for every head, with the number of rows said (diffusers' prior)."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        n, t, _ = x.shape
        q, k, v = (y.view(n, t, 4, 4).transpose(1, 2).reshape(n * 4, t, 4) for y in self.q(x).chunk(3, -1))
        mask = mask[:, None, :].repeat_interleave(4, dim=0, output_size=4 * n)
        y = ((q @ k.transpose(1, 2)) + mask).softmax(-1) @ v
        out: torch.Tensor = self.o(y.view(n, 4, t, 4).transpose(1, 2).reshape(n, t, 16))
        return out


def test_a_mask_repeated_for_divided_heads_is_repeated_for_a_members_own() -> None:
    torch.manual_seed(0)
    model, inputs = RepeatsMask(), (torch.randn(4, 6, 16), torch.randn(4, 6))
    for microbatches in (1, 2):
        plan = tensor_plan(model, inputs, 2, 1, microbatches)
        parallel = ParallelModule(model, plan, cluster(2))
        found = compare(observe(model, model, inputs, {}), observe(parallel, model, inputs, {}))
        assert found.ok, found
        parallel.close()


class SharedWithAPiece(nn.Module):
    """A table that divided ops use and a part that runs as one op (it draws from Python's generator) as well."""

    class Part(nn.Module):
        def __init__(self, table: nn.Embedding) -> None:
            super().__init__()
            self.table = table

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.table(x % 20) * (1.0 if random.random() < 2 else 0.0)

    def __init__(self) -> None:
        super().__init__()
        table = nn.Embedding(40, 16)
        self.part, self.b, self.head = self.Part(table), nn.Linear(16, 16), nn.Linear(16, 40, bias=False)
        self.head.weight = table.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.b(self.part(x)))
        return out


def test_a_parameter_that_a_piece_takes_whole_stays_whole() -> None:
    torch.manual_seed(0)
    model, x = SharedWithAPiece(), torch.randint(0, 40, (4, 6))
    parallel = ParallelModule(model, tensor_plan(model, (x,), 2, 1), cluster(2))
    found = compare(observe(model, model, (x,), {}), observe(parallel, model, (x,), {}))
    assert found.ok, found
    parallel.close()


class Pooled(nn.Module):
    """Two equal layers, one of them on a parameter (a pooling head's latent query)."""

    def __init__(self) -> None:
        super().__init__()
        self.latent, self.q, self.proj = nn.Parameter(torch.randn(1, 1, 16)), nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query = self.q(self.latent.expand(x.shape[0], -1, -1))
        return self.proj(query * x.mean(1, keepdim=True))  # type: ignore[no-any-return]


def test_a_layer_on_a_parameter_is_not_taken_for_an_equal_one_on_an_activation() -> None:
    graph = capture(Pooled(), (torch.randn(4, 6, 16),), {}).graph
    q, proj = (op for op in graph.ops if op.target.startswith("aten.linear"))
    assert signature(graph, [q]) != signature(graph, [proj])
