"""Gradients of leaves in memory of their own, before the next microbatch adds to them in place.

    tokens.view(1, 8) + linear(h)      one sample: tokens.grad is a view of the gradient that linear's W step waits for

Autograd keeps what it is given as a leaf's gradient where nobody else holds that tensor; whether somebody holds another
tensor over the same memory it does not ask.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from partita.torch_compat import shares_storage


def set_apart(leaves: Mapping[str, torch.Tensor], known: set[str]) -> bool:
    """Copy those gradients that share memory; ``known``: leaves that were looked at. Whether all have been."""
    all_there = True
    for name, leaf in leaves.items():
        if name in known or not leaf.requires_grad:
            continue
        if leaf.grad is None:
            all_there = False
            continue
        known.add(name)
        if shares_storage(leaf.grad):
            leaf.grad = leaf.grad.clone()
    return all_there
