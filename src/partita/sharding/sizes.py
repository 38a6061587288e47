"""Which ops take sizes: their ``Size`` arguments follow the samples an op really holds, all others the full batch."""

from __future__ import annotations

from collections.abc import Iterator

from partita.graph import Arg, Op, Size

_TRUE_SIZES = frozenset(
    [
        "view",
        "reshape",
        "_unsafe_view",
        "unflatten",
        "expand",
        "broadcast_to",
        "repeat",
        "repeat_interleave",
        "tile",
        "view_copy",
        "expand_copy",
        "_reshape_alias",
        "new_zeros",
        "new_ones",
        "new_full",
        "new_empty",
        "zeros",
        "ones",
        "full",
        "empty",
        "rand",
        "randn",
        "randint",
        "arange",
        "slice",
        "narrow",
        "conv1d",
        "conv2d",
        "conv3d",
        "convolution",
        "conv_transpose1d",
        "conv_transpose2d",
        "conv_transpose3d",
        "affine_grid_generator",
    ]
)


def sizes_are_true(op: Op) -> bool:
    """Whether every ``Size`` among the op's arguments is the size of something."""
    parts = op.target.split(".")
    return parts[0] == "aten" and len(parts) > 1 and parts[1] in _TRUE_SIZES


def has_size(op: Op) -> Iterator[Size]:
    """Every ``Size`` among the arguments."""
    stack: list[Arg] = [*op.args, *(value for _, value in op.kwargs)]
    while stack:
        item = stack.pop()
        if isinstance(item, Size):
            yield item
        elif isinstance(item, tuple):
            stack += item
