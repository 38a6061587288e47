"""Automatic: partita looks at the model and the machine, divides the one over the other, and says why."""

import torch
from torch import nn

import partita

model = nn.Sequential(
    nn.Linear(256, 1024), nn.GELU(),
    nn.Linear(1024, 1024), nn.GELU(),
    nn.Linear(1024, 1024), nn.GELU(),
    nn.Linear(1024, 10),
)  # fmt: skip
x, target = torch.randn(64, 256), torch.randint(10, (64,))

pm = partita.parallelize(model, example_args=(x,), devices=["cpu", "cpu"], loss_fn=nn.functional.cross_entropy)
print(pm.plan.explain())

optimizer = torch.optim.AdamW(pm.parameters(), lr=1e-3)  # any optimizer; the parameters are the model's own
for step in range(5):
    optimizer.zero_grad()
    loss = pm.train_step(x, target)  # forward, loss and backward on all devices at once
    optimizer.step()
    print(f"step {step}: loss {loss.item():.4f}")

y = pm(x)  # or call it as any module, and backward as always
nn.functional.cross_entropy(y, target).backward()

result = partita.verify(model, (x,), plan=pm.plan)  # outputs and every gradient against the unsplit model
print(result)
assert result.ok
