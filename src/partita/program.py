"""Program: a Plan with every choice made: segments of ops, and per device the exact order of instructions.

    device cpu:0:  F0.0 > F0.1 > F0.2 . . < B0.0 ...      '>' sends, '<' receives
    device cpu:1:  < F1.0 B1.0 > ...

A worker walks its list and decides nothing; the simulator walks the same list with a clock.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Split:
    """A tensor of which every microbatch holds rows: along ``dim``, ``factor`` rows a sample.

    ``outer``: how often the samples come round along ``dim`` (``(S, B, H)`` viewed as ``(S * B, H)``: S times). Such
    a tensor lives among ops of the split phase only: it is never joined and never cut from a whole.
    """

    dim: int
    factor: int = 1
    outer: int = 1


@dataclass(frozen=True, slots=True)
class Partial:
    """A tensor that is the sum of what the microbatches hold."""


@dataclass(frozen=True, slots=True)
class Whole:
    """A tensor that needs the whole batch: made once all microbatches are joined."""


@dataclass(frozen=True, slots=True)
class Once:
    """A tensor that does not depend on the batch's data and needs no gradient: made once a step."""


@dataclass(frozen=True, slots=True)
class Fixed:
    """A tensor that does not depend on the batch's data: the same in every microbatch (parameters too)."""


Layout = Split | Partial | Whole | Once | Fixed


@dataclass(frozen=True, slots=True)
class Use:
    """A tensor a segment takes from outside. ``source``: producing segment's index, or -1 (input, parameter...).

    ``layout``: how the producer holds it; ``take``: how the consumer wants it (``Split``: the rows of its microbatch;
    ``Whole``/``Once``/``Fixed``: all of it). Rows of a whole are sliced, parts of a split are joined.
    """

    tensor: str
    source: int
    layout: Layout
    take: Layout


@dataclass(frozen=True, slots=True)
class Segment:
    """Ops that run as one unit under autograd: of one stage, in one phase.

    ``phase``: 'once' (before everything, no gradient), 'split' (for each microbatch), 'whole' (after the join).
    ``outputs``: tensors other segments or the caller need. ``recompute``: index ranges [a, b) of ``ops`` whose
    activations are dropped and made again in backward. ``offload``: ranges of which something waits in host memory till
    backward: of each (tensor, position) in ``away`` its memory goes after the op there; of each (position, parameters)
    in ``lent`` the parameters live there, and are copied for the range that begins there. ``choices``: (op, tensor,
    index into ``uses``) where a segment takes one tensor in two ways. ``rescaled``: ops whose result must be told the
    microbatch's share of the batch. ``compiled``: index ranges of ``ops`` that ``torch.compile`` makes one function of.
    """

    stage: int
    phase: str
    ops: tuple[str, ...]
    uses: tuple[Use, ...]
    outputs: tuple[str, ...]
    recompute: tuple[tuple[int, int], ...] = ()
    choices: tuple[tuple[str, str, int], ...] = ()
    rescaled: tuple[str, ...] = ()
    offload: tuple[tuple[int, int], ...] = ()
    away: tuple[tuple[str, int], ...] = ()
    lent: tuple[tuple[int, tuple[str, ...]], ...] = ()
    compiled: tuple[tuple[int, int], ...] = ()

    def is_compiled(self, position: int) -> bool:
        """Whether the op there is part of a compiled function."""
        return any(start <= position < stop for start, stop in self.compiled)


@dataclass(frozen=True, slots=True)
class Instruction:
    """``kind``: F, B, W (weight gradients), SEND, RECV, REDUCE. ``microbatch`` -1: the whole batch.

    SEND and RECV carry ``tensor`` (its gradient where ``grad``) between ``segment``'s device and ``peer``.
    """

    kind: str
    segment: int
    microbatch: int = -1
    tensor: str = ""
    peer: str = ""
    grad: bool = False
    nbytes: int = 0

    def __str__(self) -> str:
        where = f"{self.segment}" if self.microbatch < 0 else f"{self.segment}.{self.microbatch}"
        if self.kind in ("SEND", "RECV"):
            arrow = ">" if self.kind == "SEND" else "<"
            return f"{arrow}{'d' if self.grad else ''}{self.tensor}@{where}:{self.peer}"
        return f"{self.kind}{where}"


@dataclass(frozen=True, slots=True)
class Program:
    """``instructions``: device name -> its list. ``sizes``: samples of each microbatch.

    ``placement``: device of (segment, microbatch): ``placement[segment][microbatch]``, one entry where the segment
    runs once. ``train``: with backward, else forward only. ``synchronised``: batch norms combine their statistics over
    the microbatches, which run at the same time, one a device. ``groups``: leader -> the devices that divide its ops
    with it, itself first: ``devices``, ``placement`` and ``instructions`` name leaders only, and the others walk their
    leader's list. Member i takes its messages from member i of its peer's group, modulo that group's size.
    """

    devices: tuple[str, ...]
    sizes: tuple[int, ...]
    segments: tuple[Segment, ...]
    placement: tuple[tuple[str, ...], ...]
    instructions: tuple[tuple[str, tuple[Instruction, ...]], ...]
    layouts: tuple[tuple[str, Layout], ...]
    output_device: str
    train: bool = True
    synchronised: bool = False
    groups: tuple[tuple[str, tuple[str, ...]], ...] = ()

    @property
    def replicas(self) -> tuple[str, ...]:
        """Of a program of one stage whose every replica runs one microbatch, the devices in order; else none.

        Where they share a memory, a weight's gradient is one product over all of them (``runtime.weight_share``).
        """
        split = [places for s, places in zip(self.segments, self.placement, strict=True) if s.phase == "split"]
        if len(split) != 1 or not 1 < len(self.sizes) == len(set(split[0])) or self.groups:
            return ()
        return split[0]

    @property
    def lent(self) -> frozenset[str]:
        """Parameters that live in host memory."""
        return frozenset(name for s in self.segments for _, names in s.lent for name in names)

    def members(self, leader: str) -> tuple[str, ...]:
        """The devices of a leader's group; itself alone where it has none."""
        return dict(self.groups).get(leader, (leader,))
