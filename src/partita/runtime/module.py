"""ParallelModule: the user's model, divided; a drop-in ``nn.Module`` with the same names and the same numbers."""

from __future__ import annotations

import contextlib
import copy
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from partita.capture import Captured
from partita.cluster import Cluster
from partita.cost.measured import Measured
from partita.errors import UsageError
from partita.graph import Graph
from partita.plan import Plan
from partita.predict import predict
from partita.runtime.bind import Binder, Bound
from partita.runtime.calibration import Calibration
from partita.runtime.live import dispatched, placed_modules
from partita.runtime.local import Local, Lowered, deliver, torch_device
from partita.runtime.loss import WithLoss
from partita.runtime.pieces import Piece, local_pieces
from partita.runtime.progress import StepState
from partita.runtime.team import Team
from partita.sharding.batch import layouts
from partita.torch_compat import keeps_graph, not_compiled
from partita.trace import Trace
from partita.united import with_united


class _Pipeline(torch.autograd.Function):
    """The divided forward as one node of the caller's autograd graph; its backward is the divided backward."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        outputs = call.forward()
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(
            *(o for o, name in zip(outputs, call.made, strict=True) if not call.graph.tensor(name).needs_grad)
        )
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise UsageError(
                "create_graph=True asks for gradients of gradients, which a divided model does not give; "
                "take them on the unsplit model (.module)"
            )
        return (None, *ctx.call.backward(grads))


class _Call:
    """One call of a ParallelModule: what goes in, the step in flight, what comes out."""

    def __init__(
        self, bound: Bound, lowered: Lowered, *, grad: bool, record: bool, device: torch.device,
        done: Callable[[Trace], None],
    ) -> None:  # fmt: skip
        assert bound.engine is not None
        self.engine, self.lowered, self.given, self.parameters = bound.engine, lowered, bound.given, bound.parameters
        self.grad, self.record, self.device, self.done = grad, record, device, done
        self.graph = bound.captured.graph
        self.made = bound.made()
        inputs = {n: t for n, t in self.given.items() if t.requires_grad}
        self.differentiable = [*inputs, *(n for n, t in self.parameters.items() if t.requires_grad)] if grad else []
        self.state: StepState | None = None
        self.trace: Trace | None = None

    def tensors(self) -> list[torch.Tensor]:
        return [self.given.get(n, self.parameters.get(n)) for n in self.differentiable]  # type: ignore[misc]

    def forward(self) -> tuple[torch.Tensor, ...]:
        program = self.lowered.forward
        state = self.engine.begin(
            program, self.lowered.codes, self.given, self.parameters, grad=self.grad, record=self.record
        )
        self.engine.run(state, program)
        outputs = tuple(self.engine.gather(state, name, self.device) for name in self.made)
        state.results.clear()
        if self.grad:
            self.state = state
        if self.record:
            self.trace = self.engine.trace(state)
        return outputs

    def backward(self, grads: tuple[torch.Tensor | None, ...]) -> tuple[torch.Tensor | None, ...]:
        state = self.state
        if state is None or self.lowered.backward is None:
            kept = "keep them with retain_graph=True, " if self.engine.repeats else ""
            raise UsageError(
                "backward was called a second time on one call of a ParallelModule; its activations are gone. "
                f"Call the module again, {kept}or add the losses before one backward()"
            )
        state.keeps = self.engine.repeats and keeps_graph()
        if not state.keeps:
            self.state = None
        for name, grad in zip(self.made, grads, strict=True):
            if grad is not None:
                self.engine.seed(state, name, grad)
        self.engine.run(state, self.lowered.backward)
        found = self.engine.parameter_grads(state)
        if self.record:
            self.trace = self.engine.trace(state)
            self.done(self.trace)
        found = {**state.input_grads, **found}
        state.input_grads.clear()
        return tuple(found.pop(n, None) for n in self.differentiable)


class ParallelModule(nn.Module):
    """``pm(x)`` runs the user's model over its devices; ``pm.train_step(x, target)`` a whole step.

    Parameters are the user's own. ``plan``: what it runs; ``cluster``: where; ``trace``: the last recorded step.
    """

    def __init__(
        self,
        module: nn.Module,
        plan: Plan,
        cluster: Cluster,
        *,
        loss_fn: Callable[..., torch.Tensor] | None = None,
        replan: Callable[[], tuple[Plan, Measured | None]] | None = None,
        measured: Measured | None = None,
    ) -> None:
        """``replan``: measures the model's parts again and plans. ``measured``: timings on which the plan's prediction
        rests, so that steps are held against it."""
        super().__init__()
        self.module = module
        self.cluster = cluster
        self.loss_fn = loss_fn
        self.trace: Trace | None = None
        self.record = False
        self._lock = threading.RLock()
        self._replan = replan
        self._take(plan, measured)
        self.training = module.training  # its parts keep theirs: a frozen BatchNorm stays in eval mode
        self.register_load_state_dict_pre_hook(_own_names)  # type: ignore[no-untyped-call]

    def _take(self, plan: Plan, measured: Measured | None) -> None:
        """Run ``plan`` from the next call on."""
        self.plan, self._measured = plan, measured
        self.output_device = torch_device(plan.stages[-1].devices[0])
        names = dict.fromkeys(d for s in plan.stages for d in s.devices)
        used = with_united(self.cluster, names)
        self._team = Team(tuple(used.device(n) for n in names))
        self._binder = Binder(self.module, partial(_engine, plan, used, self._team))
        promised = plan.predicted.step_seconds if plan.predicted is not None and measured is not None else 0.0
        self.calibration = Calibration(promised, plan.batch.size) if promised else None

    # -- calling ---------------------------------------------------------------------------------------------------

    @not_compiled
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        bound = self._bind("call", self.module, args, kwargs)
        if bound.engine is None:
            with self._lock, dispatched(self.module, placed_modules(self.module, self.plan), self._team):
                return self.module(*args, **kwargs)
        graph = bound.captured.graph
        wants = [*bound.parameters.values(), *bound.given.values()]
        grad = torch.is_grad_enabled() and any(t.requires_grad for t in wants)
        lowered = bound.engine.lowered(graph.batch, grad)
        call = _Call(
            bound, lowered, grad=grad, record=self.record, device=self.output_device, done=_setter(weakref.ref(self))
        )
        with self._lock:
            outputs = _Pipeline.apply(call, *call.tensors()) if grad else call.forward()  # type: ignore[no-untyped-call]
        if self.record:
            self.trace = call.trace
        return bound.answer(dict(zip(call.made, outputs, strict=True)))

    @not_compiled
    def train_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Forward, loss and backward of one batch, microbatch by microbatch as the schedule says.

        The last positional argument is the target handed to ``loss_fn``; without a ``loss_fn`` the model's own
        ``loss`` (or first output) is the loss. Gradients are added to ``.grad``. Returns the loss, detached.
        """
        step = WithLoss(self.module, self.loss_fn)
        with torch.enable_grad():
            bound = self._bind("step", step, args, kwargs)
            if bound.engine is None:  # no graph holds the loss: the model divided, its loss here
                loss: torch.Tensor = WithLoss(self.forward, self.loss_fn)(*args, **kwargs)
                loss.backward()  # type: ignore[no-untyped-call]
                return loss.detach()
            engine, graph = bound.engine, bound.captured.graph
            self._check_loss(graph)
            lowered = engine.lowered(graph.batch, True)
            watch = self.calibration
            last = watch is not None and watch.wants_trace(graph.batch)
            with self._lock:
                began, spent = time.perf_counter(), time.process_time() if last else 0.0
                state = engine.begin(
                    lowered.step, lowered.codes, bound.given, bound.parameters, grad=True, record=self.record or last
                )
                name = graph.outputs[0]
                engine.seed(state, name, torch.ones((), dtype=getattr(torch, graph.tensor(name).dtype)))
                engine.run(state, lowered.step)
                loss = engine.gather(state, name, self.output_device)
                deliver(bound.parameters, engine.parameter_grads(state))
                if state.input_grads:
                    wanting = [bound.given[n] for n in state.input_grads]
                    torch.autograd.backward(wanting, list(state.input_grads.values()))
                if watch is not None:
                    watch.note(graph.batch, time.perf_counter() - began)
                if self.record:
                    self.trace = engine.trace(state)
                if last and watch is not None:
                    spent = time.process_time() - spent
                    watch.tell(engine.trace(state), partial(self._predict, graph), spent)
            made = {n: engine.gather(state, n, self.output_device).detach() for n in bound.made() if n != name}
        bound.answer({name: loss, **made})
        return loss

    def replan(self, *, apply: bool = False) -> Plan:
        """The plan that is best by timings taken now; ``apply``: it runs from the next call on.

        Raises UsageError where the module was not made by ``parallelize``.
        """
        if self._replan is None:
            raise UsageError(
                "replan() needs the example that parallelize() was given; this module was made by hand, copied or "
                "loaded: call parallelize() again"
            )
        found, measured = self._replan()
        if apply:
            with self._lock:
                self._team.close()
                self._take(found, measured)
        return found

    def _predict(self, graph: Graph) -> Trace:
        return predict(graph, self.plan, self.cluster, optimizer="none", measured=self._measured)

    @contextlib.contextmanager
    def tracing(self) -> Iterator[ParallelModule]:
        """While open, each call and step is recorded; ``trace`` is the last one (a backward with its forward)."""
        before, self.record = self.record, True
        try:
            yield self
        finally:
            self.record = before

    def measure_memory(
        self, *args: Any, optimizer: torch.optim.Optimizer | None = None, **kwargs: Any
    ) -> dict[str, int]:
        """Peak bytes on each device in one ``train_step`` of this call; in eval mode, in one forward.

        Parameters a device keeps, gradients, the state ``optimizer`` has now, activations, what it received;
        ``"caller"``: made outside the devices.
        Gradients are afterwards as they were; ``trace`` is the step's, with its ``memory``.
        """
        with self.tracing():
            found = self._peaks(args, kwargs, optimizer)
        if self.trace is not None:
            self.trace = replace(self.trace, memory=tuple(found.items()))
        return found

    def _peaks(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], optimizer: torch.optim.Optimizer | None
    ) -> dict[str, int]:
        from partita.runtime.memory import measure_memory

        return measure_memory(self, args, kwargs, optimizer=optimizer)

    def _check_loss(self, graph: Graph) -> None:
        """Refuse a step whose end is not one number that depends on the parameters."""
        name = graph.outputs[0] if graph.outputs else ""
        shape = graph.tensor(name).shape_at(graph.batch) if name else ()
        if not name or shape:
            found = f"a tensor of shape {tuple(shape)}" if name else "no tensor"
            if self.loss_fn is None:
                raise UsageError(
                    f"train_step needs a loss, but the model returns {found}; "
                    "give one: parallelize(..., loss_fn=...), called as loss_fn(output, target)"
                )
            raise UsageError(
                f"loss_fn must return a scalar, got {found.removeprefix('a tensor of ')}; reduce it, by .mean() say"
            )
        if not graph.tensor(name).needs_grad:
            raise UsageError(
                "the loss does not depend on any parameter that requires a gradient; nothing can be trained"
            )

    # -- plumbing --------------------------------------------------------------------------------------------------

    def _bind(self, what: str, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Bound:
        """The engine for a call like this (captured now if there is none yet), and the call's tensors by name."""
        loss_fn = forward.loss_fn if isinstance(forward, WithLoss) else None
        return self._binder.bind(what, forward, args, kwargs, loss_fn)

    # -- as a module -----------------------------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            inner = self.__dict__.get("_modules", {}).get("module")
            if inner is not None and name in inner._modules:
                return inner._modules[name]
            if inner is None or not hasattr(inner, name):
                raise
        raise AttributeError(
            f"{type(self).__name__} has no attribute '{name}'; the model that it divides has one: .module.{name}"
        )

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, nn.Module | nn.Parameter) and name not in ("module", "loss_fn"):
            raise UsageError(f"set the model's parts on the model itself, .module.{name}: here nothing would use it")
        super().__setattr__(name, value)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Whole, under the user's model's own names."""
        return self.module.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.module.load_state_dict(*args, **kwargs)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        return self.module.named_parameters(*args, **kwargs)

    def named_buffers(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, torch.Tensor]]:
        return self.module.named_buffers(*args, **kwargs)

    def pieces(self) -> tuple[Piece, ...]:
        """The parts of every named parameter and buffer that this process holds (in one process: all, whole)."""
        return local_pieces(self.module)

    def gradients(self) -> dict[str, torch.Tensor]:
        """Every parameter's gradient whole, by name; those that have none are left out."""
        return {name: p.grad for name, p in self.named_parameters() if p.grad is not None}

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> torch.Tensor:
        """``torch.nn.utils.clip_grad_norm_`` over all the model's parameters, wherever they are. Returns the norm."""
        return torch.nn.utils.clip_grad_norm_(self.parameters(), max_norm, norm_type)

    def close(self) -> None:
        """End the worker threads; the next call starts new ones."""
        self._team.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> ParallelModule:
        return ParallelModule(copy.deepcopy(self.module, memo), self.plan, self.cluster, loss_fn=self.loss_fn)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self.module, self.plan, self.cluster, self.loss_fn)


def _rebuild(module: nn.Module, plan: Plan, cluster: Cluster, loss_fn: Any) -> ParallelModule:
    return ParallelModule(module, plan, cluster, loss_fn=loss_fn)


def _engine(plan: Plan, cluster: Cluster, team: Team, captured: Captured) -> Local:
    return Local(captured, layouts(captured.graph, batch_norm=plan.batch_norm), plan, cluster, team)


def _setter(parallel: weakref.ref[ParallelModule]) -> Callable[[Trace], None]:
    """Hands a step's trace to its module, without keeping the module alive."""

    def done(trace: Trace) -> None:
        found = parallel()
        if found is not None:
            found.trace = trace

    return done


def _own_names(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """A module around this one loads what it saved: under the user's names, without ``module.``."""
    for key in [k for k in state_dict if k.startswith(prefix)]:
        state_dict[f"{prefix}module.{key.removeprefix(prefix)}"] = state_dict.pop(key)
