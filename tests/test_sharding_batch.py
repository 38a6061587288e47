"""Phases of whole graphs: what runs once, what is recomputed, what couples the batch, and memory changed in place."""

from __future__ import annotations

from typing import Any

import pytest

from partita.errors import UsageError
from partita.graph import Graph, Op, Ref, Size, Tensor
from partita.program import Fixed, Once, Partial, Split, Whole
from partita.sharding.batch import layouts

B = Size(0, 1)
X = Tensor("x", (B, 3), "float32", "input", "args[0]")
IDS = Tensor("ids", (B, 4), "int64", "input", "args[1]")
W = Tensor("w", (3, 3), "float32", "parameter", "w", "", True)
BUFFER = Tensor("buf", (3,), "float32", "buffer", "buf")


def op(name: str, target: str, *args: Any, **more: Any) -> Op:
    return Op(name, f"aten.{target}", args, (), more.pop("outputs", (name,)), **more)


def t(name: str, *shape: int | Size, grad: bool = True, dtype: str = "float32", base: str = "") -> Tensor:
    return Tensor(name, shape, dtype, needs_grad=grad, base=base)


def graph(tensors: tuple[Tensor, ...], ops: tuple[Op, ...], *outputs: str) -> Graph:
    return Graph("m", "", 4, (X, IDS, W, BUFFER, *tensors), ops, outputs)


def linear(name: str, x: str) -> Op:
    return op(name, "linear.default", Ref(x), Ref("w"), flops=100)


def test_a_position_table_is_made_once_and_cut_where_it_meets_the_batch() -> None:
    g = graph(
        (t("pos", B, grad=False, dtype="int64"), t("e", B, 3), t("y", B, 3)),
        (
            op("pos", "arange.default", B),
            op("e", "embedding.default", Ref("w"), Ref("pos")),
            op("y", "add.Tensor", Ref("x"), Ref("e")),
        ),
        "y",
    )
    found = layouts(g)
    assert found.of["pos"] == Once() and found.phase["pos"] == "once"
    assert found.of["e"] == Split(0, 1) and found.take("e", "pos") == Split(0, 1)


def test_what_follows_from_parameters_alone_is_made_in_every_microbatch() -> None:
    g = graph(
        (t("n", 3, 3), t("y", B, 3)),
        (op("n", "mul.Tensor", Ref("w"), 2.0), op("y", "mm.default", Ref("x"), Ref("n"))),
        "y",
    )
    assert layouts(g).of["n"] == Fixed() and layouts(g).phase["n"] == "split"


def test_a_token_expanded_to_the_batch_is_made_at_the_microbatchs_size() -> None:
    g = graph((t("y", B, 3, 3),), (op("y", "expand.default", Ref("w"), (B, 3, 3)),), "y")
    found = layouts(g)
    assert found.of["y"] == Split(0, 1) and found.sizes_follow_microbatch(g.ops[0])


def test_a_number_that_follows_the_batch_is_no_size() -> None:
    g = graph((t("y", B, 3),), (op("y", "div.Tensor", Ref("x"), B),), "y")
    found = layouts(g)
    assert found.of["y"] == Split(0, 1) and not found.sizes_follow_microbatch(g.ops[0])


def test_whole_is_absorbing_and_only_its_first_op_is_a_coupling() -> None:
    g = graph(
        (t("a", B, 3), t("s", B, 3), t("y", B, 3)),
        (linear("a", "x"), op("s", "softmax.int", Ref("a"), 0), linear("y", "s")),
        "y",
    )
    found = layouts(g)
    assert found.phase == {"a": "split", "s": "whole", "y": "whole"} and found.of["y"] == Whole()
    assert [c.op for c in found.couplings] == ["s"] and found.microbatchable


def test_a_value_summed_over_the_batch_passes_linear_ops_only() -> None:
    tensors = (t("l"), t("h"), t("y"))
    mean = op("l", "mean.default", Ref("x"))
    half = op("h", "mul.Tensor", Ref("l"), 0.5)
    found = layouts(graph(tensors, (mean, half, op("y", "add.Tensor", Ref("h"), Ref("l"))), "y"))
    assert found.of["y"] == Partial() and found.rewrites["l"].kind == "weighted"
    assert layouts(graph(tensors, (mean, half, op("y", "add.Tensor", Ref("h"), 1.0)), "y")).of["y"] == Whole()
    assert layouts(graph(tensors, (mean, half, op("y", "mul.Tensor", Ref("h"), Ref("l"))), "y")).of["y"] == Whole()
    assert layouts(graph(tensors, (mean, half, op("y", "exp.default", Ref("h"))), "y")).of["y"] == Whole()


def test_a_count_over_the_inputs_is_taken_before_the_microbatches() -> None:
    tensors = (t("m", B, 4, grad=False, dtype="bool"), t("c", grad=False, dtype="int64"), t("s"), t("y"))
    ops = (
        op("m", "ne.Scalar", Ref("ids"), 0),
        op("c", "max.default", Ref("m")),
        op("s", "sum.default", Ref("x")),
        op("y", "div.Tensor", Ref("s"), Ref("c")),
    )
    found = layouts(graph(tensors, ops, "y"))
    assert found.phase == {"m": "once", "c": "once", "s": "split", "y": "split"} and found.of["y"] == Partial()


def test_a_mean_loss_over_targets_is_divided_by_a_total_known_from_the_targets() -> None:
    tensors = (t("a", B, 3), t("target", B, grad=False, dtype="int64"), t("y"))
    ops = (
        linear("a", "x"),
        op("target", "select.int", Ref("ids"), 1, 0),
        op("y", "cross_entropy_loss.default", Ref("a"), Ref("target")),
    )
    found = layouts(graph(tensors, ops, "y"))
    assert found.of["y"] == Partial() and found.rewrites["y"].kind == "sum_over_total" and found.of["target"] == Once()


def test_a_mean_loss_over_targets_that_the_model_makes_runs_whole() -> None:
    tensors = (t("a", B, 3), t("target", B, grad=False, dtype="int64"), t("y"))
    ops = (
        linear("a", "x"),
        op("target", "argmax.default", Ref("a"), 1),
        op("y", "cross_entropy_loss.default", Ref("a"), Ref("target")),
    )
    found = layouts(graph(tensors, ops, "y"))
    assert found.phase["y"] == "whole" and not found.rewrites


def test_random_numbers_that_do_not_depend_on_data_are_drawn_once() -> None:
    g = graph(
        (t("r", B, 3, grad=False), t("y", B, 3)),
        (op("r", "rand.default", (B, 3), random=True), op("y", "mul.Tensor", Ref("x"), Ref("r"))),
        "y",
    )
    found = layouts(g)
    assert found.of["r"] == Once() and found.take("y", "r") == Split(0, 1)
    dependent = graph((t("r", B, 3, grad=False),), (op("r", "bernoulli.default", Ref("x"), random=True),), "r")
    assert layouts(dependent).phase["r"] == "whole"


def test_samples_inside_a_merged_dim_stay_divided_until_they_are_parted_again() -> None:
    tensors = (t("a", 5, B, 3), t("m", Size(0, 5), 3), t("l", Size(0, 5), 3), t("y", 5, B, 3))
    ops = (
        op("a", "expand.default", Ref("x"), (5, B, 3)),
        op("m", "reshape.default", Ref("a"), (Size(0, 5), 3)),
        linear("l", "m"),
        op("y", "view.default", Ref("l"), (5, B, 3)),
    )
    found = layouts(graph(tensors, ops, "y"))
    assert found.of["l"] == Split(0, 1, 5) and found.of["y"] == Split(1, 1)
    assert layouts(graph(tensors, ops, "l")).of["m"] == Whole()  # joining would interleave the rows


def test_a_buffer_changed_by_values_of_the_model_is_changed_at_the_end() -> None:
    tensors = (t("l", B, 3), t("a", 3), t("b", 3, base="buf"), t("y", B, 3))
    ops = (
        linear("l", "x"),
        op("a", "mean.dim", Ref("l"), (0,)),
        op("b", "add_.Tensor", Ref("buf"), Ref("a"), writes=("buf",)),
        op("y", "add.Tensor", Ref("x"), Ref("buf")),
    )
    found = layouts(graph(tensors, ops, "y"))
    assert found.phase["b"] == "whole" and found.phase["y"] == "whole"


def test_a_buffer_changed_by_values_of_the_inputs_is_changed_before_the_microbatches() -> None:
    tensors = (t("a", 3, grad=False), t("b", 3, grad=False, base="buf"), t("y", B, 3))
    ops = (
        op("a", "mean.dim", Ref("x"), (0,)),
        op("b", "add_.Tensor", Ref("buf"), Ref("a"), writes=("buf",)),
        op("y", "add.Tensor", Ref("x"), Ref("buf")),
    )
    assert layouts(graph(tensors, ops, "y")).phase == {"a": "once", "b": "once", "y": "split"}


def test_random_numbers_are_drawn_in_the_models_order() -> None:
    tensors = (t("r", B, 3, grad=False), t("z", B, 3, grad=False), t("y", B, 3))
    ops = (
        op("r", "bernoulli.default", Ref("x"), random=True),
        op("z", "rand.default", (B, 3), random=True),
        op("y", "mul.Tensor", Ref("x"), Ref("z")),
    )
    assert set(layouts(graph(tensors, ops, "y")).phase.values()) == {"whole"}
    assert layouts(graph(tensors, (ops[1], ops[0], ops[2]), "y")).phase == {"z": "once", "r": "whole", "y": "split"}


def test_a_counter_that_no_sample_touches_is_moved_once() -> None:
    tensors = (t("b", 3, grad=False, base="buf"), t("y", B, 3))
    ops = (op("b", "add_.Tensor", Ref("buf"), 1, writes=("buf",)), op("y", "add.Tensor", Ref("x"), Ref("buf")))
    found = layouts(graph(tensors, ops, "y"))
    assert found.phase == {"b": "once", "y": "split"}


def test_a_buffer_read_by_microbatches_before_it_is_changed_is_changed_after_them() -> None:
    tensors = (t("y", B, 3), t("b", 3, grad=False, base="buf"))
    ops = (op("y", "add.Tensor", Ref("x"), Ref("buf")), op("b", "add_.Tensor", Ref("buf"), 1, writes=("buf",)))
    found = layouts(graph(tensors, ops, "y"))
    assert found.phase == {"y": "split", "b": "whole"}


def test_zeros_that_the_batch_is_written_into_are_made_for_every_microbatch() -> None:
    tensors = (t("z", B, 3, grad=False), t("v", B, grad=False, base="z"), t("c", B, base="z"), t("s", B), t("y", B, 3))
    ops = (
        op("z", "zeros.default", (B, 3)),
        op("v", "select.int", Ref("z"), 1, 0),
        op("s", "select.int", Ref("x"), 1, 1),
        op("c", "copy_.default", Ref("v"), Ref("s"), writes=("z",)),
        op("y", "mul.Tensor", Ref("z"), 2.0),
    )
    found = layouts(graph(tensors, ops, "y"))
    assert set(found.phase.values()) == {"split"} and found.sizes_follow_microbatch(ops[0])


def test_samples_written_into_memory_of_a_fixed_size_run_whole() -> None:
    tensors = (t("z", 3, 3, grad=False), t("s", 3), t("c", 3, 3, base="z"))
    ops = (
        op("z", "zeros.default", (3, 3)),
        op("s", "amax.default", Ref("x"), (0,)),
        op("c", "add_.Tensor", Ref("z"), Ref("s"), writes=("z",)),
    )
    assert set(layouts(graph(tensors, ops, "c")).phase.values()) == {"whole"}


def test_memory_that_a_reshape_may_or_may_not_share_is_not_changed_in_parts() -> None:
    tensors = (t("a", B, 3), t("r", B, 3), t("w1", B, 3, base="r"), t("y", B, 3))
    ops = (
        linear("a", "x"),
        op("r", "reshape.default", Ref("a"), (B, 3)),
        op("w1", "relu_.default", Ref("r"), writes=("r",)),
        op("y", "add.Tensor", Ref("w1"), Ref("a")),
    )
    assert layouts(graph(tensors, ops, "y")).phase["w1"] == "whole"


def test_row_numbers_that_index_the_batch_are_counted_in_every_microbatch() -> None:
    tensors = (t("n", B, grad=False, dtype="int64"), t("last", B, grad=False, dtype="int64"), t("y", B))
    ops = (
        op("n", "arange.default", B),
        op("last", "argmax.default", Ref("ids"), 1),
        op("y", "index.Tensor", Ref("x"), (Ref("n"), Ref("last"))),
    )
    found = layouts(graph(tensors, ops, "y"))
    assert found.phase["n"] == "split" and found.of["y"] == Split(0, 1)
    used_otherwise = graph((*tensors, t("k", B)), (*ops, op("k", "mul.Tensor", Ref("n"), Ref("y"))), "y", "k")
    assert layouts(used_otherwise).phase["y"] == "whole"


def test_batch_norm_in_training_couples_the_batch_unless_the_user_allows_parts() -> None:
    tensors = (t("y", B, 3),)
    ops = (
        op(
            "y",
            "batch_norm.default",
            Ref("x"),
            None,
            None,
            Ref("buf"),
            Ref("buf"),
            True,
            0.1,
            1e-5,
            False,
            writes=("buf",),
        ),
    )
    assert layouts(graph(tensors, ops, "y")).phase["y"] == "whole"
    assert layouts(graph(tensors, ops, "y"), batch_norm="per_microbatch").phase["y"] == "split"
    with pytest.raises(UsageError, match="needs 'exact' or 'per_microbatch'"):
        layouts(graph(tensors, ops, "y"), batch_norm="sometimes")


def test_without_a_batch_dim_nothing_is_divided() -> None:
    g = Graph("m", "", 0, (X, W, t("y", B, 3)), (linear("y", "x"),), ("y",))
    assert not layouts(g).microbatchable and layouts(g).phase == {"y": "whole"}


def test_an_output_that_pairs_every_sample_with_every_other_runs_whole() -> None:
    tensors = (t("tr", 3, B), t("y", B, B))
    ops = (op("tr", "t.default", Ref("x")), op("y", "mm.default", Ref("x"), Ref("tr")))
    found = layouts(graph(tensors, ops, "y"))
    assert found.phase["y"] == "whole" and "pairs every sample" in found.couplings[0].reason


def test_row_numbers_that_a_whole_op_reads_are_those_of_the_whole_batch() -> None:
    tensors = (t("n", B, grad=False, dtype="int64"), t("s", B, 3), t("y", B))
    ops = (
        op("n", "arange.default", B),
        op("s", "softmax.int", Ref("x"), 0),
        op("y", "index.Tensor", Ref("s"), (Ref("n"), Ref("n"))),
    )
    assert layouts(graph(tensors, ops, "y")).phase["n"] == "once"
    once = (*ops[:2], op("y", "index.Tensor", Ref("s"), (Ref("n"), 0)))
    assert layouts(graph(tensors, once, "y")).phase["n"] == "once"


def test_row_numbers_that_look_up_a_table_are_those_of_the_whole_batch() -> None:
    tensors = (t("n", B, grad=False, dtype="int64"), t("y", B, 3))
    ops = (op("n", "arange.default", B), op("y", "index.Tensor", Ref("w"), (Ref("n"),)))
    found = layouts(graph(tensors, ops, "y"))
    assert found.phase["n"] == "once" and found.take("y", "n") == Split(0, 1)
