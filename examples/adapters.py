"""Adapters: plans from and to what other libraries use: accelerate, torch.distributed.pipelining, transformers."""

import copy
import tempfile

import torch
import torch.distributed as dist
from accelerate import infer_auto_device_map
from torch import nn
from torch.distributed.pipelining import PipelineStage, ScheduleInterleaved1F1B, SplitPoint

import partita
from partita.adapters.accelerate import plan_from_device_map
from partita.adapters.pipelining import plan_from_split_spec, stage_modules

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
x, target = torch.randn(8, 16), torch.randint(0, 4, (8,))
loss_fn = nn.functional.cross_entropy

# a device_map, which runs one device at a time, as a plan, which keeps all of them busy
device_map = infer_auto_device_map(model, max_memory={0: 24_000, 1: 40_000})
plan = plan_from_device_map(model, (x,), device_map, devices={0: "cpu:0", 1: "cpu:1"}, microbatches=2)
print(f"device_map {dict(device_map)}: {[(s.devices[0], s.modules) for s in plan.stages]}")
print(partita.verify(model, (x,), plan=plan))

# split points of torch.distributed.pipelining as a plan, and a plan's stages under its schedules
plan = plan_from_split_spec(model, (x,), {"2": SplitPoint.BEGINNING}, ["cpu:0", "cpu:1"], microbatches=4)
plain = copy.deepcopy(model)
loss_fn(plain(x), target).backward()
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
modules = stage_modules(model, plan, (x,))
stages = [PipelineStage(m, i, len(modules), torch.device("cpu")) for i, m in enumerate(modules)]
ScheduleInterleaved1F1B(stages, n_microbatches=4, loss_fn=loss_fn).step(x, target=target)
dist.destroy_process_group()
for p, q in zip(model.parameters(), plain.parameters(), strict=True):
    torch.testing.assert_close(p.grad, q.grad)
print("torch.distributed.pipelining ran the plan's stages: gradients equal")

# transformers' Trainer over a divided model
if not hasattr(torch.ops.torchvision, "nms"):  # PyPI's torchvision imports beside a CPU torch only with this declared
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments  # noqa: E402

from partita.adapters.trainer import ParallelTrainer  # noqa: E402

gpt = GPT2LMHeadModel(
    GPT2Config(vocab_size=50, n_positions=12, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
)
words = torch.randint(0, 50, (16, 12))
settings = TrainingArguments(
    tempfile.mkdtemp(), max_steps=3, logging_steps=1, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True,
    per_device_train_batch_size=8,
)  # fmt: skip
trainer = ParallelTrainer(
    gpt, settings, train_dataset=[{"input_ids": w, "labels": w} for w in words], devices=["cpu", "cpu"]
)
trainer.train()
print(f"Trainer trained a model divided over {trainer.parallel.parallel.plan.devices}")
