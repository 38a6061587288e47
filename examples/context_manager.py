"""The context manager: any model called inside is divided; the program itself does not change."""

import torch
from cnn import CNN, data, same_numbers, unsplit
from torch import nn

import partita

torch.manual_seed(0)
model = CNN()
plain = unsplit(model)
x, target = data()

with partita.autoparallel(devices=["cpu", "cpu"]):
    y = model(x)
    loss = nn.functional.cross_entropy(y, target)
    loss.backward()

same_numbers(model, plain, loss, x, target)
