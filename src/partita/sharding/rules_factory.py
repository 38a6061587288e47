"""Rules of ops that make tensors: uniform content can be made for any part of the batch alone."""

from __future__ import annotations

from partita.sharding.call import Call, Refusal, Ruling, labels, term
from partita.sharding.early import is_row_count
from partita.sharding.registry import define, rule_for

define("zeros_like ones_like full_like empty_like", "x.. -> x..")


@rule_for("zeros ones full empty")
def factory(call: Call) -> Ruling:
    """The same value everywhere (``empty``: none anybody may read)."""
    if call.operands():
        return Refusal("its fill value is a tensor")
    return f" -> {term(labels(len(call.out())))}"


@rule_for("new_zeros new_ones new_full new_empty")
def like_factory(call: Call) -> Ruling:
    """Only dtype and device of the first tensor are read."""
    if len(call.operands()) != 1:
        return Refusal("its fill value is a tensor")
    return f"# -> {term(labels(len(call.out())))}"


@rule_for("arange")
def row_numbers(call: Call) -> Ruling:
    """Only where it counts rows to index them; everywhere else it is made once, whole."""
    return " -> n" if is_row_count(call.op) else Refusal("it numbers the samples")
