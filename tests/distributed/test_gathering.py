"""Under ZeRO 3 the ops of a divided program ask for their parameters, and stay the ops they were."""

from __future__ import annotations

from partita.graph import Op, Ref
from partita.runtime.distributed.gathering import Units, asking
from partita.runtime.spmd_ops import IN_GROUP


def test_an_op_that_asks_for_its_parameter_is_still_told_its_group() -> None:
    """A parameter that two stages use whole is taken by a collective op itself."""
    op = Op("o", "partita.copied", (Ref("w"),), (), ("y",))
    found = asking(lambda op: IN_GROUP[op.target], Units((("w",),), {"w": 0}), lambda: None)(op)
    assert found is not IN_GROUP["partita.copied"]
    for name in ("in_group", "returns_sequence"):
        assert getattr(found, name) == getattr(IN_GROUP["partita.copied"], name)
