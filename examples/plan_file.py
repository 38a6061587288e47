"""A plan is a file: save what the planner found, read it, edit it, run it. Or write one by hand."""

import tempfile
from pathlib import Path

import torch
from cnn import CNN, data, same_numbers, unsplit
from torch import nn

import partita

torch.manual_seed(0)
model = CNN()
plain = unsplit(model)
x, target = data()
folder = Path(tempfile.mkdtemp())

found = partita.find_plan(model, (x,), devices=["cpu", "cpu"])  # nothing is run
found.save(folder / "found.yaml")
assert partita.Plan.load(folder / "found.yaml").stages == found.stages

by_hand = folder / "by_hand.yaml"
by_hand.write_text(
    """
partita: 1
model: {name: CNN}
cluster: {devices: [cpu:0, cpu:1]}
batch: {size: 8, microbatches: 4}
schedule: gpipe
stages:
  - devices: [cpu:0]
    modules: [conv1]
  - devices: [cpu:1]
    modules: [conv2, fc]
"""
)
pm = partita.parallelize(
    model, example_args=(x,), devices=["cpu", "cpu"], plan=by_hand, loss_fn=nn.functional.cross_entropy
)
print(pm.plan.explain())
loss = pm.train_step(x, target)
same_numbers(pm.module, plain, loss, x, target)
