"""Options that several verbs of the command line share, and how they write."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from partita.errors import UsageError

Factory = Annotated[
    str, typer.Argument(metavar="FACTORY", help="module:function or file.py:function returning (model, example_args)")
]
PlanPath = Annotated[str | None, typer.Option("--plan", help="A plan file; without it the planner finds one.")]
Devices = Annotated[str, typer.Option(help="2, auto, cpu:0,cpu:1, 2x8xH100, or a cluster file.")]
Memory = Annotated[str | None, typer.Option(help="Limit per device: 2GiB.")]
BatchSize = Annotated[int | None, typer.Option("--batch", help="Samples of a step, where not the example's.")]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]
Out = Annotated[str | None, typer.Option("--output", "-o", help="File to write.")]


def print_json(value: Any) -> None:
    """On one line, as msgspec spells nouns."""
    print(msgspec.json.encode(value).decode())


def writable(path: str | None) -> None:
    """Refuse a hopeless output path before the work, not after it."""
    if path is None:
        return
    if Path(path).is_dir():
        raise UsageError(f"cannot write '{path}': it is a directory; name a file in it")
    if not Path(path).absolute().parent.is_dir():
        raise UsageError(f"cannot write '{path}': there is no directory '{Path(path).parent}'; make it first")
