"""Manual: name the modules before which to cut; the same checks, the same runtime, no planner."""

import torch
from cnn import CNN, data, same_numbers, unsplit
from torch import nn

import partita

torch.manual_seed(0)
model = CNN()
plain = unsplit(model)
x, target = data()

pm = partita.split(
    model,
    (x,),
    at=["conv2"],  # conv1 on the first device; conv2 and fc on the second
    devices=["cpu", "cpu"],
    microbatches=4,
    loss_fn=nn.functional.cross_entropy,
)
print(pm.plan.explain())
loss = pm.train_step(x, target)
same_numbers(pm.module, plain, loss, x, target)

try:
    partita.split(model, (x,), at=["conv3"], devices=["cpu", "cpu"])
except partita.PlanError as error:
    print(f"a wrong name is answered at once: {error}")
