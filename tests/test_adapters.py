"""Adapters: the same numbers through accelerate's maps, torch's pipelining and transformers' Trainer; or a refusal."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from dividing import cluster
from torch import nn
from torch.distributed.pipelining import PipelineStage, ScheduleInterleaved1F1B, SplitPoint

from partita import Plan, PlanError, Stage, UsageError
from partita.adapters.pipelining import plan_from_split_spec, stage_modules
from partita.plan import Batch
from partita.runtime.compare import compare, observe
from partita.runtime.module import ParallelModule

WORDS, WIDTH, BATCH, LENGTH = 50, 16, 8, 10


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Model(nn.Module):
    """Blocks with a skip from the embedding to the head, past every stage."""

    def __init__(self, blocks: int = 4) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.places = nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        first = self.words(words) + self.places(torch.arange(words.shape[1], device=words.device))
        x = first
        for block in self.blocks:
            x = block(x)
        return self.head(x + first)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randint(0, WORDS, (BATCH, LENGTH)), torch.randint(0, WORDS, (BATCH, LENGTH))


def cross_entropy(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(output.flatten(0, 1), target.flatten())


def proven(model: nn.Module, plan: Plan, args: tuple[Any, ...]) -> None:
    """Outputs and every gradient of the plan against the unsplit model."""
    expected = observe(model, model, args, {}, seed=1)
    divided = ParallelModule(model, plan, cluster(len(plan.devices)))
    found = compare(expected, observe(divided, model, args, {}, seed=1), rtol=1e-4, atol=1e-6)
    assert found.ok, found


# -- accelerate --------------------------------------------------------------------------------------------------------


@pytest.fixture
def accelerate() -> Any:
    pytest.importorskip("accelerate", reason="needs accelerate")
    from partita.adapters import accelerate

    return accelerate


HERE = {0: "cpu:0", 1: "cpu:1", 2: "cpu:2"}


def test_an_inferred_device_map_becomes_a_plan_with_the_same_numbers(accelerate: Any) -> None:
    from accelerate import infer_auto_device_map

    model, (words, _) = Model(), batch()
    inferred = infer_auto_device_map(model, max_memory={0: 9000, 1: 9000, 2: 30000}, no_split_module_classes=["Block"])
    assert set(inferred.values()) == {0, 1, 2}
    plan = accelerate.plan_from_device_map(model, (words,), inferred, devices=HERE, microbatches=2)
    assert plan.devices == ("cpu:0", "cpu:1", "cpu:2")
    for name, device in inferred.items():
        stage = next(s for s in plan.stages if s.devices == (HERE[device],))
        assert name in stage.modules or any(m.startswith(name + ".") for m in stage.modules), (name, plan)
    proven(model, plan, (words,))


def test_a_plan_becomes_the_device_map_it_came_from(accelerate: Any) -> None:
    from accelerate.utils import check_device_map

    model, (words, _) = Model(), batch()
    given = {"words": 0, "places": 0, "blocks.0": 0, "blocks.1": 0, "blocks.2": 1, "blocks.3": 1, "head": 1}
    plan = accelerate.plan_from_device_map(model, (words,), given)
    assert plan.devices == ("cuda:0", "cuda:1")
    assert {d for s in plan.stages for d in s.devices} == {"cuda:0", "cuda:1"}
    with pytest.raises(PlanError, match="begins or ends inside a module"):  # the embedding's sum is the model's own op
        accelerate.device_map_of(plan, model)
    whole = replace(plan, stages=tuple(replace(stage, ops=()) for stage in plan.stages))
    assert accelerate.device_map_of(whole, model) == given
    check_device_map(model, accelerate.device_map_of(whole, model))


def test_a_plan_of_one_device_is_dispatched(accelerate: Any) -> None:
    from accelerate import dispatch_model

    model, (words, _) = Model(), batch()
    expected = model(words)
    plan = Plan((Stage(("cpu:0",), modules=("",)),), devices=("cpu:0",))
    dispatched = dispatch_model(model, accelerate.device_map_of(plan, model), force_hooks=True)
    assert torch.equal(dispatched(words), expected)


def test_a_map_that_returns_to_a_device_gets_another_stage_there(accelerate: Any) -> None:
    model, (words, _) = Model(), batch()
    given = {"": 0, "blocks.1": 1}
    plan = accelerate.plan_from_device_map(model, (words,), given, devices=HERE)
    assert [s.devices for s in plan.stages] == [("cpu:0",), ("cpu:1",), ("cpu:0",)]
    proven(model, plan, (words,))


def test_what_a_plan_cannot_say_of_a_device_map_is_refused_by_name(accelerate: Any) -> None:
    model, (words, _) = Model(), batch()
    given = {"": 0, "blocks.0": "disk", "blocks.1": "cpu", "head.weight": 0, "tail": 0}
    with pytest.raises(PlanError) as refusal:
        accelerate.plan_from_device_map(model, (words,), given)
    text = str(refusal.value)
    for expected in ("'blocks.0' is on 'disk'", "'head.weight' is a parameter", "'tail' is no"):
        assert expected in text
    assert len(refusal.value.problems) == 3


def test_weights_on_the_cpu_beside_accelerators_are_parameters_in_host_memory(accelerate: Any) -> None:
    model, (words, _) = Model(), batch()
    given = {"words": 0, "places": 0, "blocks.0": 0, "blocks.1": "cpu", "blocks.2": 1, "blocks.3": 1, "head": 1}
    plan = accelerate.plan_from_device_map(model, (words,), given)
    assert [(s.devices, s.offload.parameters) for s in plan.stages] == [(("cuda:0",), ("blocks.1",)), (("cuda:1",), ())]
    whole = replace(plan, stages=tuple(replace(stage, ops=()) for stage in plan.stages))
    assert accelerate.device_map_of(whole, model) == given
    cores = tuple(replace(s, devices=(f"cpu:{k}",)) for k, s in enumerate(plan.stages))
    proven(model, replace(plan, devices=("cpu:0", "cpu:1"), stages=cores), (words,))


def test_what_a_device_map_cannot_say_of_a_plan_is_refused_by_name(accelerate: Any) -> None:
    plan = Plan(
        (
            Stage(("cuda:0", "cuda:1"), modules=("words", "places"), ops=(":add",)),
            Stage(("cpu:0",), modules=("blocks@1",)), Stage(("cpu:1",), modules=("head",)),
        )
    )  # fmt: skip
    with pytest.raises(PlanError) as refusal:
        accelerate.device_map_of(plan, Model())
    text = str(refusal.value)
    for expected in ("2 devices", "inside a module (:add)", "one call of a module (blocks@1)", "as one 'cpu'"):
        assert expected in text
    loose = Plan((Stage(("cuda:0",), modules=("words", "places", "head")),))
    with pytest.raises(PlanError, match="no stage names a module that holds 'blocks.0.norm.weight'"):
        accelerate.device_map_of(loose, Model())


# -- torch.distributed.pipelining --------------------------------------------------------------------------------------


@pytest.fixture
def group() -> Iterator[None]:
    if dist.is_initialized():
        pytest.skip("a process group is open already")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def scheduled(
    model: nn.Module, plan: Plan, words: torch.Tensor, target: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(output, mean loss) of one step of torch's own schedule over the plan's stages; gradients on the model."""
    modules = stage_modules(model, plan, (words,))
    stages = [PipelineStage(m, i, len(modules), torch.device("cpu")) for i, m in enumerate(modules)]
    count = plan.batch.microbatches
    schedule = ScheduleInterleaved1F1B(stages, n_microbatches=count, loss_fn=cross_entropy)
    losses: list[torch.Tensor] = []
    output = schedule.step(words, target=target, losses=losses)
    return output, torch.stack(losses).mean()


def test_torchs_pipelining_runs_a_plans_stages_with_the_same_numbers(group: None) -> None:
    model, (words, target) = Model(), batch()
    plain = copy.deepcopy(model)
    plan = plan_from_split_spec(
        model, (words,), {"blocks.3": SplitPoint.BEGINNING, "blocks.0": SplitPoint.END}, ["cpu:0", "cpu:1", "cpu:2"],
        microbatches=4,
    )  # fmt: skip
    assert [s.modules for s in plan.stages] == [
        ("words", "places", "blocks.0"), ("blocks.1", "blocks.2"), ("blocks.3", "head"),
    ]  # fmt: skip
    output, loss = scheduled(model, plan, words, target)
    expected = plain(words)
    expected_loss = cross_entropy(expected, target)
    expected_loss.backward()
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(loss, expected_loss)
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6, msg=name)
    proven(plain, plan, (words,))


def test_stages_hold_the_models_own_parameters_under_their_names() -> None:
    model, (words, _) = Model(), batch()
    plan = plan_from_split_spec(model, (words,), {"blocks.2": SplitPoint.BEGINNING}, ["cpu:0", "cpu:1"])
    stages = stage_modules(model, plan, (words,))
    held = {name: p for stage in stages for name, p in stage.named_parameters()}
    expected = dict(model.named_parameters())
    assert held.keys() == expected.keys()
    assert all(held[name] is expected[name] for name in held)
    assert stages[0].gives == stages[1].takes and len(stages[0].gives) == 2  # the skip is handed through


def test_batch_norm_runs_whole_in_one_microbatch_and_is_refused_in_several() -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
    plain, x = copy.deepcopy(model), torch.randn(BATCH, 4)
    plan = plan_from_split_spec(model, (x,), {"1": SplitPoint.BEGINNING}, ["cpu:0", "cpu:1"])
    first, second = stage_modules(model, plan, (x,))
    assert torch.equal(second(first(x)), plain(x))
    assert torch.equal(model[1].running_var, plain[1].running_var)
    with pytest.raises(PlanError, match=r"1:batch_norm needs the whole batch: use one microbatch"):
        stage_modules(model, replace(plan, batch=Batch(BATCH, 2)), (x,))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.drop = nn.Dropout(0.1)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.words.weight

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return self.head(self.drop(self.words(words))).mean()


def test_what_pipelining_would_compute_otherwise_is_refused_by_name() -> None:
    model, (words, _) = Tied(), batch()
    plan = plan_from_split_spec(model, (words,), {"head": SplitPoint.BEGINNING}, ["cpu:0", "cpu:1"], microbatches=3)
    with pytest.raises(PlanError) as refusal:
        stage_modules(model, plan, (words,))
    text = str(refusal.value)
    for expected in (
        "'words.weight' is used by stages 0 and 1",
        "random numbers",
        "is not one row",
        "(3, 3, 2) samples",
    ):
        assert expected in text
    wide = replace(plan, stages=(replace(plan.stages[0], devices=("cpu:0", "cpu:2")), plan.stages[1]),
                   devices=("cpu:0", "cpu:1", "cpu:2"))  # fmt: skip
    with pytest.raises(PlanError, match="stage 0 has 2 devices"):
        stage_modules(model, wide, (words,))


def test_a_split_spec_that_names_nothing_is_refused() -> None:
    model, (words, _) = Model(), batch()
    spec = {"head": SplitPoint.END, "tail": SplitPoint.BEGINNING}
    with pytest.raises(PlanError, match=r"nothing runs after 'head'[\s\S]*'tail' names no module"):
        plan_from_split_spec(model, (words,), spec, ["cpu:0", "cpu:1"])


# -- transformers.Trainer ----------------------------------------------------------------------------------------------


_LIBRARIES: list[torch.library.Library] = []


def _declare_torchvision() -> None:
    """PyPI's torchvision, which transformers and lightning import, imports beside a CPU torch only with this."""
    if not hasattr(torch.ops.torchvision, "nms"):
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _LIBRARIES.append(library)


class Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __init__(self, count: int = 24) -> None:
        generator = torch.Generator().manual_seed(5)
        self.words = torch.randint(0, WORDS, (count, LENGTH), generator=generator)

    def __len__(self) -> int:
        return len(self.words)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.words[row], "labels": self.words[row]}


def gpt2(dropout: float = 0.1) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=WORDS, n_positions=LENGTH, n_embd=WIDTH, n_layer=2, n_head=2, resid_pdrop=dropout,
        embd_pdrop=dropout, attn_pdrop=dropout, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def settings(where: Path, **options: Any) -> Any:
    from transformers import TrainingArguments

    return TrainingArguments(
        str(where), per_device_train_batch_size=8, max_steps=4, logging_steps=1, report_to=[], use_cpu=True,
        save_strategy="no", disable_tqdm=True, learning_rate=1e-3, **options,
    )  # fmt: skip


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture
def trainers() -> Any:
    pytest.importorskip("transformers", reason="needs transformers")
    _declare_torchvision()
    pytest.importorskip("accelerate", reason="transformers.Trainer needs accelerate")
    from partita.adapters import trainer

    return trainer


def test_the_trainer_trains_a_divided_model_as_the_unsplit_one(trainers: Any, tmp_path: Path) -> None:
    from transformers import GPT2LMHeadModel, Trainer

    plan = Plan(
        (
            Stage(("cpu:0",), modules=("transformer.wte", "transformer.wpe", "transformer.drop", "transformer.h.0")),
            Stage(("cpu:1",), modules=("transformer.h.1", "transformer.ln_f", "lm_head")),
        ),
        devices=("cpu:0", "cpu:1"), batch=Batch(8, 2),
    )  # fmt: skip
    options = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.5}
    plain = Trainer(gpt2(), settings(tmp_path / "a", **options), train_dataset=Rows(), eval_dataset=Rows(9))
    plain.train()
    divided = trainers.ParallelTrainer(
        gpt2(), settings(tmp_path / "b", **options), train_dataset=Rows(), eval_dataset=Rows(9), plan=plan,
        devices=["cpu", "cpu"],
    )  # fmt: skip
    divided.train()
    assert divided.parallel.parallel.plan == plan
    assert losses(divided) == pytest.approx(losses(plain), rel=1e-4)
    assert divided.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-4)
    for (name, p), q in zip(divided.model.named_parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5, msg=name)
    divided.save_model(str(tmp_path / "c"))
    again = GPT2LMHeadModel.from_pretrained(tmp_path / "c")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), divided.model.parameters(), strict=True))


def test_a_model_divided_before_is_trained_as_it_is(trainers: Any, tmp_path: Path) -> None:
    model = gpt2(dropout=0.0)
    plan = Plan((Stage(("cpu:0",), modules=("",)),), devices=("cpu:0",))
    parallel = ParallelModule(model, plan, cluster(1))
    trainer = trainers.ParallelTrainer(parallel, settings(tmp_path), train_dataset=Rows())
    trainer.train()
    assert trainer.parallel is parallel and trainer.model is model
    assert losses(trainer)[-1] < losses(trainer)[0]


def test_what_goes_around_the_division_is_refused_by_name(trainers: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"label_smoothing_factor.*nor with auto_find_batch_size"):
        trainers.ParallelTrainer(
            gpt2(), settings(tmp_path, label_smoothing_factor=0.1, auto_find_batch_size=True), train_dataset=Rows()
        )


# -- Lightning ---------------------------------------------------------------------------------------------------------


def test_lightning_trains_a_divided_model(tmp_path: Path) -> None:
    _declare_torchvision()
    lightning = pytest.importorskip("lightning", reason="needs lightning")
    model = Model()
    plain = copy.deepcopy(model)
    words, target = batch()
    plan = Plan(
        (Stage(("cpu:0",), modules=("words", "places", "blocks.0")), Stage(("cpu:1",), modules=("blocks", "head"))),
        devices=("cpu:0", "cpu:1"), batch=Batch(BATCH, 2),
    )  # fmt: skip

    class Task(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = ParallelModule(model, plan, cluster(2))

        def training_step(self, rows: Any, _: int) -> torch.Tensor:
            return cross_entropy(self.net(rows[0]), rows[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    rows = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(words, target), batch_size=BATCH)
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=str(tmp_path),
    )  # fmt: skip
    trainer.fit(Task(), rows)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    cross_entropy(plain(words), target).backward()
    optimizer.step()
    for (name, p), q in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(p, q[1], rtol=1e-4, atol=1e-6, msg=name)
