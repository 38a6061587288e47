"""The error tree: every refusal names the thing, what was found, what is needed and the next step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Remedy:
    """The nearest request that works: it was planned. ``text``: a line with its numbers. ``change``: what differs from
    the request, as keyword arguments of the planner (``cluster``, ``batch``, ``optimizer``, ``constraints``).
    """

    text: str
    change: Mapping[str, Any]


class PartitaError(Exception):
    """Base of everything partita raises on purpose. ``exit_code`` is what the command line returns."""

    exit_code = 2


class UsageError(PartitaError):
    """A call that cannot be meant: wrong argument, unknown name, unreadable or unwritable path."""


class ClusterError(PartitaError):
    """A device or cluster description that does not describe anything present or possible."""


class CaptureError(PartitaError):
    """A model (or its example inputs) that cannot be analysed; names the module and the user's line."""


class PlanError(PartitaError):
    """A plan that cannot be carried out. ``problems`` holds every finding, each with its remedy.

    Where constraints contradict each other, ``remedies`` are requests near by that were planned.
    """

    def __init__(self, message: str, problems: tuple[str, ...] = (), remedies: tuple[Remedy, ...] = ()) -> None:
        lines = (*problems, *(r.text for r in remedies))
        super().__init__(message if not lines else message + "".join(f"\n  - {line}" for line in lines))
        self.problems = problems
        self.remedies = remedies


class InfeasibleError(PartitaError):
    """No plan fits. The message carries the reason; ``remedies`` are the nearest requests that work, with numbers."""

    exit_code = 3

    def __init__(self, message: str, remedies: tuple[Remedy, ...] = ()) -> None:
        super().__init__(message + "".join(f"\n  - {r.text}" for r in remedies))
        self.remedies = remedies


class ExecutionError(PartitaError):
    """A stage failed while running; carries stage, module and user line. ``__cause__`` is the original."""


class VerificationError(PartitaError):
    """The divided model's numbers differ from the unsplit model's; names the worst tensors."""


class CheckpointError(PartitaError):
    """A checkpoint that is damaged, of another model, or cannot be written. ``problems``: each finding, a line each."""

    def __init__(self, message: str, problems: tuple[str, ...] = ()) -> None:
        super().__init__(message + "".join(f"\n  - {problem}" for problem in problems))
        self.problems = problems
