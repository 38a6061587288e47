"""Rules of losses. Reduction 0: none, 1: mean, 2: sum. A mean divides into weighted ones, or by a total."""

from __future__ import annotations

from partita.graph import Ref
from partita.sharding.call import Call, Refusal, Rewrite, Ruled, Ruling
from partita.sharding.registry import rule_for

_FLOAT = frozenset({"float64", "float32", "float16", "bfloat16"})


def _reduced(left: str, kept: str, reduction: int, averaged: str) -> str:
    if reduction == 0:
        return f"{left} -> {kept}"
    return f"{left} -> ()" + (f" ; mean {averaged}" if reduction == 1 else "")


def _elementwise(call: Call, at: int) -> str:
    count = len(call.operands())
    return _reduced(", ".join(["x.."] * count), "x..", call.number(at, 1, name="reduction"), "x")


@rule_for("mse_loss l1_loss smooth_l1_loss huber_loss soft_margin_loss kl_div")
def two_operands(call: Call) -> Ruling:
    """Input and target, element by element."""
    if len(call.operands()) != 2 or len({len(t.shape) for t in call.operands()}) > 1:
        return Refusal("its arguments have different shapes")
    return _elementwise(call, 2)


@rule_for("binary_cross_entropy")
def binary_cross_entropy(call: Call) -> Ruling:
    """With a weight of the same shape, or one that broadcasts."""
    return _elementwise(call, 3)


@rule_for("binary_cross_entropy_with_logits")
def with_logits(call: Call) -> Ruling:
    """With weight and positive weight, which broadcast."""
    return _elementwise(call, 4)


@rule_for("poisson_nll_loss")
def poisson(call: Call) -> Ruling:
    """Input and target, element by element; the reduction stands last."""
    return _elementwise(call, 5)


@rule_for("hinge_embedding_loss")
def hinge(call: Call) -> Ruling:
    """Input and target, element by element."""
    return _elementwise(call, 3)


@rule_for("margin_ranking_loss")
def margin_ranking(call: Call) -> Ruling:
    """Two scores and a sign."""
    return _elementwise(call, 4)


@rule_for("triplet_margin_loss")
def triplet(call: Call) -> Ruling:
    """Three rows a sample."""
    return _reduced("x.. [d], x.. [d], x.. [d]", "x..", call.number(7, 1, name="reduction"), "x")


@rule_for("cosine_embedding_loss")
def cosine_embedding(call: Call) -> Ruling:
    """Two rows and a sign a sample."""
    if len(call.shape(0)) != 2:
        return Refusal("its input has no batch dim")
    return _reduced("b [d], b [d], b", "b", call.number(4, 1, name="reduction"), "b")


@rule_for("multi_margin_loss multilabel_margin_loss")
def margins(call: Call) -> Ruling:
    """A row of scores a sample."""
    if len(call.shape(0)) != 2:
        return Refusal("its input has no batch dim")
    multi = call.op.target.startswith("aten.multi_margin")
    weight = ", [c]" if multi and len(call.operands()) == 3 else ""
    target = "b" if multi else "b [c]"
    return _reduced(f"b [c], {target}{weight}", "b", call.number(5 if multi else 2, 1, name="reduction"), "b")


@rule_for("cross_entropy_loss nll_loss nll_loss_nd nll_loss2d")
def cross_entropy(call: Call) -> Ruling:
    """Class scores (dim 1) and targets. The mean is over the targets that count, known from the targets alone."""
    scores, target = call.tensor(0), call.tensor(1)
    if scores is None or target is None or len(scores.shape) < 2:
        return Refusal("its input has no batch dim")
    weight = call.tensor(2, name="weight")
    spoken = ", [c]" if weight else ""
    reduction = call.number(3, 1, name="reduction")
    if target.dtype in _FLOAT:
        if len(target.shape) != len(scores.shape):
            return Refusal("its target has an unusual shape")
        return _reduced(f"n [c] d.., n [c] d..{spoken}", "n d..", reduction, "n d")
    text = _reduced(f"n [c] d.., n d..{spoken}", "n d..", reduction, "n d")
    if reduction != 1:
        return text
    ignored = call.number(4, -100, name="ignore_index")
    rewrite = Rewrite("sum_over_total", 3, target.name, weight.name if weight else "", ignored)
    return Ruled(text, rewrite)


@rule_for("ctc_loss.Tensor ctc_loss.IntList")
def ctc(call: Call) -> Ruling:
    """A sequence a sample; the mean is over samples, each divided by its own length. Lengths are tensors."""
    if call.op.target.endswith("IntList") or not isinstance(call.arg(2), Ref):
        return Refusal("its lengths are baked in as numbers")
    if len(call.shape(0)) != 3 or len(call.shape(1)) != 2:
        return Refusal("its targets are not one row a sample")
    return _reduced("[t] b [c], b [s], b, b", "b", call.number(5, 1, name="reduction"), "b")
