"""The rule language: what it reads, what it refuses and how, and what a fitted rule says of every dim."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

import partita.sharding.rules  # noqa: F401
from partita.errors import UsageError
from partita.graph import Graph, Op, Ref, Size, Tensor
from partita.program import Partial, Split
from partita.sharding import registry
from partita.sharding.batch import layouts
from partita.sharding.notation import Axis, Rule, Term, fit, parse
from partita.sharding.registry import sharding_rule, target_name

B = Size(0, 1)


@pytest.mark.parametrize(
    "text",
    [
        "b.. k, n k, +n? -> b.. n",
        "x.. [d] -> x.. [d]",
        "b (h d), _, # -> (b h) d",
        "b k, k -> () ; mean k",
        "m k, k n -> m n ; bilinear",
        "b 1 [s..] -> b, b",
    ],
)
def test_a_rule_reads_back_as_it_is_written(text: str) -> None:
    assert str(parse(text)) == text and parse(str(parse(text))) == parse(text)


_labels = st.sampled_from(["a", "b", "c", "d2", "head"])


@st.composite
def _rules(draw: st.DrawFn) -> Rule:
    names = draw(st.lists(_labels, unique=True, min_size=1, max_size=4))
    order = draw(st.permutations(names))
    axes = tuple(Axis((name,), whole=draw(st.booleans())) for name in names)
    return Rule((Term(axes, optional=draw(st.booleans())),), (Term(tuple(Axis((n,)) for n in order)),))


@given(_rules())
def test_every_rule_round_trips_through_text(rule: Rule) -> None:
    assert parse(str(rule)) == rule


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("b k, k n", "exactly one '->'"),
        ("b k -> n -> m", "exactly one '->'"),
        ("b k ->", "names no result"),
        ("b k, , n -> b", "empty term"),
        ("b [k -> b", "opens '[' without ']'"),
        ("b [h w] -> b", "one dim each"),
        ("b (h [d]) -> b", "plain labels"),
        ("b b -> b", "'b' twice"),
        ("b.. s.. -> b..", "two '..'"),
        ("b.. k, b k -> k", "both as one dim and as 'b..'"),
        ("b k -> b ; mean z", "averages 'z'"),
        ("b k -> b ; mean b", "averages 'b'"),
        ("b k -> b ; largest k", "'mean LABELS'"),
        ("b k -> b?", "results are plain dims"),
        ("b k -> b s..", "out of nothing"),
        ("b k! -> b", "cannot be read at '! "),
    ],
)
def test_a_malformed_rule_names_the_spot_and_the_remedy(text: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(text)
    assert said.strip() in str(caught.value) and "sharding rule" in str(caught.value)


def test_dims_of_size_one_broadcast_and_carry_no_label() -> None:
    fitted = fit(parse("x.., x.. -> x.."), [(B, 1, 3), (4, 1)], [(B, 4, 3)])
    assert fitted.inputs == ((("x.2",), (), ("x.0",)), (("x.1",), ()))
    assert fitted.outputs == ((("x.2",), ("x.1",), ("x.0",)),)


def test_a_rule_that_does_not_fit_its_op_says_how_many_dims_it_met() -> None:
    with pytest.raises(UsageError, match="'b k' has 3 dims"):
        fit(parse("b k -> b"), [(2, 3, 4)], [(2,)])


def _graph(target: str, args: tuple[object, ...], result: tuple[int | Size, ...]) -> Graph:
    tensors = (
        Tensor("x", (B, 3), "float32", "input"),
        Tensor("w", (3, 4), "float32", "parameter", "w", "", True),
        Tensor("y", result, "float32", needs_grad=True),
    )
    op = Op("f", target, args, (), ("y",), source="model.py:7: y = fused(x, w)")  # type: ignore[arg-type]
    return Graph("m", "", 2, tensors, (op,), ("y",))


def test_a_custom_op_without_a_rule_runs_whole_and_says_that_one_line_would_help() -> None:
    found = layouts(_graph("lib.fused.default", (Ref("x"), Ref("w")), (B, 4)))
    assert not found.microbatchable and found.phase == {"f": "whole"}
    assert "sharding_rule" in found.couplings[0].reason and "model.py:7" in found.couplings[0].reason


def test_a_custom_op_with_a_rule_is_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_CUSTOM", {})
    sharding_rule("b k, k n -> b n", op="lib::fused")
    found = layouts(_graph("lib.fused.default", (Ref("x"), Ref("w")), (B, 4)))
    assert found.microbatchable and found.of["y"] == Split(0, 1)


def test_a_custom_rule_that_drops_the_batch_sums_over_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_CUSTOM", {})
    sharding_rule("b k -> k", op="lib::total")
    assert layouts(_graph("lib.total.default", (Ref("x"),), (3,))).of["y"] == Partial()


def test_a_custom_rule_that_does_not_fit_is_an_error_that_names_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_CUSTOM", {})
    sharding_rule("b s k, k n -> b s n", op="lib::fused")
    with pytest.raises(UsageError, match=r"(?s)lib\.fused.*model\.py:7.*has 2 dims.*Correct the text"):
        layouts(_graph("lib.fused.default", (Ref("x"), Ref("w")), (B, 4)))


def test_the_decorator_knows_functions_custom_ops_and_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(registry, "_CUSTOM", {})

    class CustomOp:
        _qualname = "mylib::fused"

    def plain(x: int) -> int:
        return x

    assert target_name(CustomOp()) == "mylib.fused"
    assert target_name(torch.ops.aten.add.Tensor) == "aten.add.Tensor"
    assert target_name(torch.ops.aten.linear) == "aten.linear"
    assert target_name(torch.ops.aten.linear.default) == "aten.linear"
    assert target_name(plain).endswith("plain")
    assert sharding_rule("b -> b")(plain) is plain
    with pytest.raises(UsageError, match="cannot tell which op"):
        target_name(object())
