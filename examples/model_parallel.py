"""In DistributedDataParallel's shape: wrap the model, name the devices, train as always."""

import torch
from cnn import CNN, data, same_numbers, unsplit
from torch import nn

import partita

torch.manual_seed(0)
model = CNN()
plain = unsplit(model)
x, target = data()

# 0 and 1: the first and second GPU where there are GPUs, else the first and second group of this machine's cores
divided = partita.ModelParallel(model, device_ids=[0, 1], split_at=["conv2"])
loss = nn.functional.cross_entropy(divided(x), target)
loss.backward()

same_numbers(model, plain, loss, x, target)
