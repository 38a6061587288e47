"""Compare: outputs, every named gradient and buffers of a divided model against the unsplit one."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from partita.torch_compat import pytree


@dataclass(frozen=True, slots=True)
class Difference:
    """One tensor: largest absolute difference, and that relative to the tensor's largest value.

    ``rounding``: beyond the tolerance, yet no further from the float64 result than the unsplit model's own float32.
    """

    kind: str
    name: str
    absolute: float
    relative: float
    equal: bool
    rounding: bool = False


@dataclass(frozen=True, slots=True)
class Comparison:
    """All tensors compared; ``ok`` when each is equal within the tolerances (integers exactly)."""

    differences: tuple[Difference, ...]
    rtol: float
    atol: float

    @property
    def ok(self) -> bool:
        return all(d.equal for d in self.differences)

    @property
    def worst(self) -> Difference | None:
        return max(self.differences, key=lambda d: (not d.equal, d.relative), default=None)

    def counts(self) -> Mapping[str, int]:
        kinds = dict.fromkeys(d.kind for d in self.differences)
        return {kind: sum(d.kind == kind for d in self.differences) for kind in kinds}

    def __str__(self) -> str:
        counts = ", ".join(f"{n} {kind}s" for kind, n in self.counts().items())
        if self.ok:
            worst = self.worst
            tail = f"; largest relative difference {worst.relative:.1e} ({worst.name})" if worst else ""
            rounded = sum(d.rounding for d in self.differences)
            if rounded:
                tail += (
                    f"; {rounded} beyond the tolerance but as near to the float64 result as the unsplit model itself, "
                    "whose float32 rounding is that large"
                )
            return f"equal: {counts}{tail}"
        bad = [d for d in self.differences if not d.equal]
        rows = "".join(f"\n  {d.kind} {d.name}: off by {d.absolute:.3g} (relative {d.relative:.2g})" for d in bad[:8])
        return f"DIFFERENT: {len(bad)} of {counts}{rows}"


def tensors_in(value: Any, path: str = "output") -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor in any structure, with where it stands."""
    seen: set[int] = set()

    def visit(item: Any, where: str) -> Iterator[tuple[str, torch.Tensor]]:
        if isinstance(item, torch.Tensor):
            yield where, item
        elif item is None or isinstance(item, str | int | float | bool) or id(item) in seen:
            return
        else:
            seen.add(id(item))
            if isinstance(item, Mapping):
                for key in item:
                    yield from visit(item[key], f"{where}.{key}")
            elif isinstance(item, list | tuple):
                for i, part in enumerate(item):
                    yield from visit(part, f"{where}[{i}]")
            elif hasattr(item, "__dict__") and not isinstance(item, nn.Module):
                for key, part in vars(item).items():
                    yield from visit(part, f"{where}.{key}")

    yield from visit(value, path)


def default_loss(output: Any) -> torch.Tensor | None:
    """A weighted mean of every differentiable output: distinct weights, so that a misplaced row shows."""
    total: torch.Tensor | None = None
    for index, (_, tensor) in enumerate(tensors_in(output)):
        if not tensor.requires_grad or not tensor.numel():
            continue
        real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        weight = torch.cos(torch.arange(real.numel(), dtype=torch.float32, device=real.device) + index)
        finite = torch.where(torch.isfinite(real.detach()), real, torch.zeros_like(real)).float()
        term = (finite * weight.reshape(real.shape)).mean()
        total = term if total is None else total + term
    return total


@dataclass(frozen=True)
class Observed:
    """One forward and backward: what came out, gradients by name, buffers by name."""

    outputs: dict[str, torch.Tensor]
    gradients: dict[str, torch.Tensor]
    buffers: dict[str, torch.Tensor]


def observe(
    call: Callable[..., Any], model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, seed: int = 1,
    whole_gradients: Callable[[], dict[str, torch.Tensor]] | None = None,
) -> Observed:  # fmt: skip
    """Run ``call`` once with the given seed; the model's gradients and buffers are read, then put back.
    ``whole_gradients``: gives them by name where the model's own parameters do not hold them."""
    kept_grads = {n: p.grad for n, p in model.named_parameters()}
    kept_buffers = {n: b.clone() for n, b in model.named_buffers()}
    kept_random = torch.get_rng_state(), random.getstate(), np.random.get_state()
    try:
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        for parameter in model.parameters():
            parameter.grad = None
        clone = lambda t: t.detach().clone().requires_grad_(t.requires_grad) if isinstance(t, torch.Tensor) else t  # noqa: E731
        own_args, own_kwargs = pytree.tree_map(clone, (args, dict(kwargs)))
        output = call(*own_args, **own_kwargs)
        loss = default_loss(output)
        if loss is not None:
            loss.backward()  # type: ignore[no-untyped-call]
        outputs = {n: t.detach().clone() for n, t in tensors_in(output)}
        if whole_gradients is not None:
            gradients = whole_gradients()
        else:
            gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        for i, leaf in enumerate(pytree.tree_leaves((own_args, own_kwargs))):
            if isinstance(leaf, torch.Tensor) and leaf.grad is not None:
                gradients[f"input {i}"] = leaf.grad
        return Observed(outputs, gradients, {n: b.clone() for n, b in model.named_buffers()})
    finally:
        for name, parameter in model.named_parameters():
            parameter.grad = kept_grads[name]
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                if name in kept_buffers and buffer.shape == kept_buffers[name].shape:
                    buffer.copy_(kept_buffers[name])
        torch.set_rng_state(kept_random[0])
        random.setstate(kept_random[1])
        np.random.set_state(kept_random[2])


def observe64(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, seed: int = 1) -> Observed:
    """``observe`` of a float64 copy of the unsplit model; empty where the model does not run in float64.

    Random draws differ between the types, so a model that draws cannot be judged by it.
    """
    wide = copy.deepcopy(model).double()
    raise_to = lambda t: t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t  # noqa: E731
    own_args, own_kwargs = pytree.tree_map(raise_to, (args, dict(kwargs)))
    try:
        return observe(wide, wide, own_args, own_kwargs, seed=seed)
    except (RuntimeError, TypeError, ValueError):
        return Observed({}, {}, {})


def compare(expected: Observed, actual: Observed, *, rtol: float = 1e-4, atol: float = 1e-6) -> Comparison:
    """Tensor by tensor; one that is missing or of another shape counts as different."""
    rows: list[Difference] = []
    for kind in ("output", "gradient", "buffer"):
        want: dict[str, torch.Tensor] = getattr(expected, kind + "s")
        have: dict[str, torch.Tensor] = getattr(actual, kind + "s")
        for name in dict.fromkeys([*want, *have]):
            rows.append(_difference(kind, name, want.get(name), have.get(name), rtol, atol))
    return Comparison(tuple(rows), rtol, atol)


def allow_rounding(found: Comparison, expected: Observed, actual: Observed, exact: Observed) -> Comparison:
    """The comparison with what is only rounding accepted: ``exact`` is the unsplit model observed in float64.

    A batch norm before an average pool can magnify float32 rounding by 1e5; the unsplit model is then itself that far
    from the true gradient. A tensor passes when the divided model is at most twice as far from it, in the largest and
    in the mean difference. Where the float64 model is no reference (it drew other random numbers), nothing passes.
    """
    rows = []
    for row in found.differences:
        have = [getattr(o, row.kind + "s").get(row.name) for o in (expected, actual, exact)]
        if not row.equal and all(t is not None and t.is_floating_point() and t.shape == have[0].shape for t in have):
            plain, divided, true = (t.double() for t in have)
            theirs, ours = (plain - true).abs(), (divided - true).abs()
            comparable = bool(theirs.max() <= 0.05 * true.abs().max())  # other random draws would show as larger
            if comparable and ours.max() <= 2 * theirs.max() and ours.mean() <= 2 * theirs.mean():
                row = replace(row, equal=True, rounding=True)
        rows.append(row)
    return replace(found, differences=tuple(rows))


def _difference(
    kind: str, name: str, a: torch.Tensor | None, b: torch.Tensor | None, rtol: float, atol: float
) -> Difference:
    if a is None or b is None:
        present = a if a is not None else b
        zero = kind == "gradient" and present is not None and not present.any()
        return Difference(kind, name, 0.0 if zero else float("inf"), 0.0 if zero else float("inf"), zero)
    a, b = (t.to_dense() if t.layout != torch.strided else t for t in (a, b))  # nn.Embedding(sparse=True)
    if a.shape != b.shape or a.dtype != b.dtype:
        return Difference(kind, name, float("inf"), float("inf"), False)
    if not a.is_floating_point() and not a.is_complex():
        same = bool(torch.equal(a, b))
        return Difference(kind, name, 0.0 if same else 1.0, 0.0 if same else 1.0, same)
    if a.numel() == 0:
        return Difference(kind, name, 0.0, 0.0, True)
    wide = torch.complex128 if a.is_complex() else torch.float64
    x, y = a.to(wide), b.to(device=a.device, dtype=wide)
    off = torch.nan_to_num((x - y).abs(), nan=0.0, posinf=0.0)
    scale = torch.nan_to_num(x.abs(), nan=0.0, posinf=0.0).max().item()
    equal = bool(torch.allclose(x, y, rtol=rtol, atol=atol + rtol * scale * 0.1, equal_nan=True))
    return Difference(kind, name, off.max().item(), off.max().item() / max(scale, 1e-30), equal)
