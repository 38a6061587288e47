"""Plan: who runs what, readable and editable; a person's file and a planner's answer alike.

Ops and parameters are named as in the user's model. A stage lists whole modules (``blocks.0``) and, where a cut
goes through a module, single ops (``blocks.3.attn:linear_1``). A module listed by two stages belongs to the one that
lists the longer name. What no stage lists runs where its inputs are (``lower.assign``).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from os import PathLike


@dataclass(frozen=True, slots=True)
class Offload:
    """What of a stage waits in host memory: ``activations``: modules or ops whose saved tensors leave the device in
    forward and come back for backward. ``parameters``: modules or ops whose parameters live there, with their gradients
    and the optimizer's state; the device has copies while it needs them.
    """

    activations: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.activations or self.parameters)


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of the model. Several devices: replicas, which take the microbatches in turn.

    ``tensor`` > 1: every ``tensor`` devices in a row are one replica and divide its ops among them, as ``shard`` says
    for what it names ((parameter or op, placements), ...) and the library finds for the rest. ``compile``: modules or
    ops that ``torch.compile`` makes other code of; ``""`` is all of the stage.
    """

    devices: tuple[str, ...]
    modules: tuple[str, ...] = ()
    ops: tuple[str, ...] = ()
    recompute: tuple[str, ...] = ()
    shard: tuple[tuple[str, str], ...] = ()
    tensor: int = 1
    offload: Offload = Offload()
    compile: tuple[str, ...] = ()

    @property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """The devices of each replica: with ``tensor`` 2, (a, b, c, d) is ((a, b), (c, d))."""
        return tuple(
            self.devices[i : i + max(self.tensor, 1)] for i in range(0, len(self.devices), max(self.tensor, 1))
        )


@dataclass(frozen=True, slots=True)
class Batch:
    """``size``: samples per step the plan was made for. ``microbatches``: parts it is cut into.

    ``sizes``: samples of each microbatch where they differ by more than one (unequal devices).
    """

    size: int = 0
    microbatches: int = 1
    sizes: tuple[int, ...] = ()

    def split(self, size: int) -> tuple[int, ...]:
        """Samples of each microbatch for a batch of ``size``: near-equal, larger first, none empty."""
        if self.sizes and sum(self.sizes) == size:
            return self.sizes
        parts = max(1, min(self.microbatches, size))
        if self.sizes and size >= len(self.sizes):
            total, done, cuts = sum(self.sizes), 0, [0]
            for part in self.sizes:
                done += part
                cuts.append(round(done * size / total))
            split = tuple(b - a for a, b in zip(cuts, cuts[1:], strict=False))
            if min(split) > 0:
                return split
        return tuple(size // parts + (i < size % parts) for i in range(parts))


@dataclass(frozen=True, slots=True)
class Predicted:
    """What the planner expects of one step. Seconds; bytes per device at the peak."""

    step_seconds: float = 0.0
    bottleneck: str = ""
    memory: tuple[tuple[str, int], ...] = ()
    one_device_seconds: float = 0.0


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Plan:
    """``schedule``: gpipe, 1f1b, interleaved or zero_bubble. ``reasons``: why it is so, a line each.

    ``zero``: 1 shards optimizer state over a stage's replicas, 2 gradients too, 3 parameters too (ZeRO's stages).
    ``batch_norm``: 'exact' (statistics of the whole batch) or 'per_microbatch' (the user allows it).
    ``status``: 'manual', 'optimal' or 'feasible' with ``gap`` (how far the best possible may still be, as a ratio).
    """

    stages: tuple[Stage, ...]
    model: str = ""
    fingerprint: str = ""
    devices: tuple[str, ...] = ()
    batch: Batch = field(default_factory=Batch)
    schedule: str = "1f1b"
    batch_norm: str = "exact"
    zero: int = 0
    predicted: Predicted | None = None
    status: str = "manual"
    gap: float = 0.0
    reasons: tuple[str, ...] = ()

    def save(self, path: str | PathLike[str]) -> None:
        """Write the plan as YAML, all of the file or nothing. Raises UsageError where that is not possible."""
        from partita import plan_file

        plan_file.save(self, path)

    @staticmethod
    def load(path: str | PathLike[str]) -> Plan:
        """Read a plan file. Raises PlanError naming every mistake with its line."""
        from partita import plan_file

        return plan_file.load(path)

    def explain(self) -> str:
        """The plan in plain words: its stages, what is predicted, and why it is so."""
        from partita import plan_text

        return plan_text.explain(self)
