"""What a step has come to: what the caller gave, what each device holds, which forwards wait for their backward."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from time import perf_counter

import torch

from partita.graph import Graph
from partita.program import Program, Split
from partita.runtime.away import Traffic
from partita.runtime.codegen import SegmentCode
from partita.runtime.collectives import LocalGroup
from partita.runtime.route import Inlet, Key
from partita.runtime.weight_grad import WeightQueue
from partita.trace import Event

Edge = torch.autograd.graph.GradientEdge


@dataclass(eq=False)
class Run:
    """One forward of a segment that waits for its backward: leaves that want a gradient, and where gradients enter.

    ``outputs`` are edges of the autograd graph, not tensors: a result nobody reads any more does not stay for them.
    """

    leaves: list[tuple[Inlet, torch.Tensor]]
    outputs: dict[Key, Edge]


@dataclass(eq=False)
class DeviceState:
    """What one device holds during a step."""

    device: torch.device
    values: dict[Key, torch.Tensor] = field(default_factory=dict)
    grads: dict[Key, torch.Tensor] = field(default_factory=dict)
    outgoing: dict[tuple[str, int, int], torch.Tensor | None] = field(default_factory=dict)
    runs: dict[tuple[int, int], Run] = field(default_factory=dict)
    aliases: dict[str, torch.Tensor] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    queue: WeightQueue = field(default_factory=WeightQueue)
    clones: dict[str, torch.Tensor] = field(default_factory=dict)
    traffic: Traffic | None = None


@dataclass(eq=False)
class StepState:
    """One step: what the caller gave, what each device holds, what came out. ``keeps``: this backward is not the last
    one, so what it goes through stays. ``groups``: leader -> the sides of its group's members."""

    graph: Graph
    program: Program
    codes: tuple[SegmentCode, ...]
    given: dict[str, torch.Tensor]
    parameters: dict[str, torch.Tensor]
    devices: dict[str, DeviceState]
    grad: bool
    once: dict[str, torch.Tensor] = field(default_factory=dict)
    results: dict[Key, torch.Tensor] = field(default_factory=dict)
    input_grads: dict[str, torch.Tensor] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    origin: float = field(default_factory=perf_counter)
    record: bool = False
    keeps: bool = False
    groups: dict[str, tuple[LocalGroup, ...]] = field(default_factory=dict)
    inference: bool = field(default_factory=torch.is_inference_mode_enabled)
    batch: int = field(init=False)

    def __post_init__(self) -> None:
        self.batch = sum(self.program.sizes)

    def rows(self, layout: Split, microbatch: int) -> tuple[int, int, int]:
        """(dim, start, length) of a microbatch's rows."""
        sizes = self.program.sizes
        return layout.dim, sum(sizes[:microbatch]) * layout.factor, sizes[microbatch] * layout.factor
