"""A custom fused operator joins in: one line says how its dims follow the inputs', and the rest is automatic.

Here convolution, bias and ReLU are one ``torch.library.custom_op`` with its own backward. Without the rule partita
would not guess: the op would run on the whole batch at once. Dims in brackets are needed whole; n (samples) and
k (channels made) may be divided.
"""

import torch
from cnn import data
from torch import nn
from torch.nn import functional as F

import partita


@partita.sharding_rule("n [c] [h] [w], k [c] [i] [j], k -> n k [y] [x]")
@torch.library.custom_op("example::conv_bias_relu", mutates_args=())
def conv_bias_relu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return F.conv2d(x, weight, bias, padding=1).relu_()


@conv_bias_relu.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[0], *x.shape[2:])


def remember(ctx, inputs, output) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight, output)


def backward(ctx, grad):
    x, weight, output = ctx.saved_tensors
    grad = grad * (output > 0)
    of_x = torch.nn.grad.conv2d_input(x.shape, weight, grad, padding=1)
    of_weight = torch.nn.grad.conv2d_weight(x, weight.shape, grad, padding=1)
    return of_x, of_weight, grad.sum((0, 2, 3))


conv_bias_relu.register_autograd(backward, setup_context=remember)


class FusedCNN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, 1, 1)
        self.conv2 = nn.Conv2d(64, 128, 3, 1, 1)
        self.fc = nn.Linear(128 * 28 * 28, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = conv_bias_relu(x, self.conv1.weight, self.conv1.bias)
        x = conv_bias_relu(x, self.conv2.weight, self.conv2.bias)
        return self.fc(torch.flatten(x, 1))


torch.manual_seed(0)
model = FusedCNN()
x, _ = data()

pm = partita.split(model, (x,), at=["fc"], devices=["cpu", "cpu"], microbatches=4)
print(pm.plan.explain())
print(pm(x).shape)
result = partita.verify(model, (x,), plan=pm.plan)
print(result)
assert result.ok
