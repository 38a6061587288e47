"""The error tree: every refusal names the thing, what was found, what is needed and the next step."""

from __future__ import annotations


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
    """A plan that cannot be carried out. ``problems`` holds every finding, each with its remedy."""

    def __init__(self, message: str, problems: tuple[str, ...] = ()) -> None:
        super().__init__(message if not problems else message + "".join(f"\n  - {p}" for p in problems))
        self.problems = problems


class InfeasibleError(PartitaError):
    """No plan fits. The message carries the reason and the nearest remedies with their numbers."""

    exit_code = 3


class ExecutionError(PartitaError):
    """A stage failed while running; carries stage, module and user line. ``__cause__`` is the original."""


class VerificationError(PartitaError):
    """The divided model's numbers differ from the unsplit model's; names the worst tensors."""
