"""Records what a model does, op by op, above autograd and before composite ops fall apart.

The model runs once on fake tensors (shapes without memory). A mode in torch's PreDispatch slot sees every op as the
user wrote it (``linear``, ``layer_norm``, ``scaled_dot_product_attention``); a function mode sees the reads of values
that never become ops (``.numpy()``, ``.tolist()``). What cannot be recorded faithfully raises ``Break``.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from partita import torch_compat as tc
from partita.capture import randomness
from partita.capture.encode import NotEncodable, encode
from partita.capture.frames import checkpointing_module, methods_on_stack, user_line
from partita.capture.reading import execute, read
from partita.capture.records import Break, Call, Trace, Value, flat, packet
from partita.capture.shadow import Shadow
from partita.capture.state import python_draws
from partita.capture.tables import AUTOCAST_NEUTRAL, METADATA, READS, STATISTICS
from partita.graph import Arg, refs


class Tracer(tc.PreDispatchMode):  # type: ignore[no-untyped-call]
    """One recording. ``enter`` names the tensors that come from outside; ``run`` makes the trace.

    ``pieces``: paths of modules (``blocks.0``) and methods (``blocks.0.route()``) that run as one op.
    """

    def __init__(self, model: nn.Module, *, pieces: frozenset[str] = frozenset(), guards: bool = True,
                 watch: bool = False) -> None:  # fmt: skip
        super().__init__()
        self.model, self.pieces, self.guards, self.watch = model, pieces, guards, watch
        self.fake = tc.fake_mode()
        self.trace = Trace()
        self.shadow: Shadow | None = None
        self.names: dict[int, str] = {}
        self.places: dict[Any, str] = {}
        self.bases: dict[int, str] = {}
        self.taints: dict[str, frozenset[str]] = {}
        self.base_taints: dict[str, frozenset[str]] = {}
        self.alive: list[torch.Tensor] = []
        self.sharing: dict[str, list[tuple[str, torch.Tensor]]] = {}  # base -> all that was made over its memory
        self.stand_ins: dict[int, torch.Tensor] = {}  # id of a real tensor -> its fake
        self.entered: list[tuple[torch.Tensor, torch.Tensor]] = []  # (real, fake)
        self.originals: dict[int, torch.Tensor] = {}  # id of a fake -> the real tensor
        self.paths = {id(m): path for path, m in reversed(list(model.named_modules(remove_duplicate=False)))}
        self.stack: list[str] = []
        self.calls_of: Counter[str] = Counter()
        self.ops_of: Counter[str] = Counter()
        self.broken: Break | None = None
        self.out: Any = None
        self.given: dict[int, Any] = {}  # lists, dicts and objects among the arguments
        self.filled: dict[int, Any] = {}  # arguments (by node of their structure) that forward changed: what they hold
        self.inside = 0
        self.drawn: Any = None
        self.failed_in = ""
        self.buffer_at: dict[tuple[str, str], torch.Tensor] = {}  # (module path, name) -> the fake put there
        self.ordered: dict[int, torch.Tensor] = {}  # by id: inner tensors that lie in the same order everywhere
        self.wants_gradient: set[int] = set()  # ids of inner tensors that forward told to require a gradient

    # ---- names ----------------------------------------------------------------------------------------------------

    def know(self, name: str, tensor: torch.Tensor, role: str = "op", path: str = "") -> None:
        """From now on this tensor object goes by this name."""
        base = self.bases.setdefault(tc.storage_key(tensor), name)
        self.names[id(tensor)] = name
        self.places[_place(tensor)] = name
        self.alive.append(tensor)
        self.sharing.setdefault(base, []).append((name, tensor))
        self.trace.values[name] = Value(name, tuple(tensor.shape), tuple(tensor.stride()),
                                        str(tensor.dtype).removeprefix("torch."), role, path, base,
                                        _flows(tensor, role))  # fmt: skip

    def enter(self, name: str, real: torch.Tensor, role: str, path: str) -> torch.Tensor:
        """A fake stand-in for a tensor from outside, under this name."""
        with self.fake:
            fake: torch.Tensor = self.fake.from_tensor(real)
        self.stand_ins[id(real)] = fake
        self.originals[id(fake)] = real
        self.entered.append((real, fake))
        self.alive.append(real)
        self.know(name, fake, role, path)
        taint = {"input": "input", "parameter": "parameters", "buffer": f"buffer {name}"}.get(role, f"constant {name}")
        self.taints[name] = frozenset([taint])
        return fake

    def name_of(self, tensor: torch.Tensor) -> str:
        name = self.names.get(id(tensor))
        if name is None and not tensor.requires_grad:  # torch.zeros hands out a detached twin of the op's result
            name = self.places.get(_place(tensor))
            if name is not None and self.trace.values[name].needs_grad:
                name = None
            elif name is not None:
                self.names[id(tensor)] = name
                self.alive.append(tensor)
                self.sharing[self.trace.values[name].base].append((name, tensor))
        if name is None:
            raise self.stop(f"a tensor of shape {tuple(tensor.shape)} whose origin was not seen is used")
        return name

    def stand_in(self, value: Any) -> Any:
        """The fake tensor for a real one: a parameter reached by another way, or a constant."""
        if isinstance(value, torch.Tensor):
            if isinstance(value, tc.FakeTensor):
                return value
            known = self.stand_ins.get(id(value))
            foreign = known is None or self.trace.values[self.names[id(known)]].role == "constant"
            if foreign and value.requires_grad and torch.is_grad_enabled():
                raise self.stop("a tensor that requires a gradient and is no parameter of the model is used", "")
            if known is not None:
                return known
            if tc.wrapped(value):
                raise self.stop("a functorch transform (vmap, grad, jvp) runs")
            if type(value) not in (torch.Tensor, nn.Parameter) or value.layout != torch.strided:
                raise self.stop(f"a {type(value).__name__} ({value.layout}) is used, which has no place in a graph")
            name = f"constant:{len(self.trace.constants)}"
            fake = self.enter(name, value, "constant", "")
            self.trace.constants[name] = value
            return fake
        if isinstance(value, list | tuple):
            mapped = [self.stand_in(v) for v in value]
            return mapped if isinstance(value, list) else tuple(mapped)
        return value

    # ---- where we are ---------------------------------------------------------------------------------------------

    @property
    def module(self) -> str:
        return self.stack[-1] if self.stack else ""

    def stop(self, reason: str, module: str | None = None) -> Break:
        """The Break to raise here; remembered, should the user's code catch it after all."""
        where = self.module if module is None else module
        methods = methods_on_stack(self.paths, where.partition("@")[0]) if module is None else ()
        found = Break(reason, where, user_line(), methods)
        self.broken = self.broken or found
        return found

    def op_name(self, op: str) -> str:
        key = f"{self.module}:{op}"
        count = self.ops_of[key]
        self.ops_of[key] += 1
        return f"{key}_{count}" if count else key

    @contextmanager
    def within(self, path: str) -> Iterator[str]:
        self.look_for_draws()
        count = self.calls_of[path]
        self.calls_of[path] += 1
        self.stack.append(f"{path}@{count}" if count else path)
        try:
            yield self.stack[-1]
            self.look_for_draws()
        except Exception:
            self.failed_in = self.failed_in or path
            raise
        finally:
            self.stack.pop()

    def look_for_draws(self) -> None:
        """While watching: stop in the module that drew from Python's or NumPy's generator."""
        if not self.watch:
            return
        now = python_draws()
        if self.drawn is not None and now != self.drawn:
            raise self.stop("numbers are drawn from Python's or NumPy's generator")
        self.drawn = now

    # ---- recording ------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not isinstance(func, tc.OpOverload):
            raise self.stop(f"the higher-order operator {func} runs")
        target = str(func)
        short = packet(target)
        if short in METADATA:
            return func(*args, **kwargs)
        if short == "aten.lift_fresh" and not isinstance(args[0], tc.FakeTensor):
            return self.constant(args[0])
        if short == "aten.detach_" and not args[0].requires_grad:  # torch.tensor ends with one
            return func(*args, **kwargs)
        if short == "aten.as_strided" and isinstance(args[0], tc.FakeTensor):
            args = (self.in_memory_order(args[0]), *args[1:])
        if args and isinstance(args[0], tc.FakeTensor) and id(args[0]) not in self.ordered:
            order = randomness.along_memory(short, args, kwargs)
            if order is not None:
                with self:
                    return randomness.drawn(short, order, args, kwargs, self.ordered)
            if short in ("aten.alpha_dropout", "aten.alpha_dropout_"):
                with self:
                    return func.decompose(*args, **kwargs)
        if short == "aten.scaled_dot_product_attention":
            bound = _bind(func, args, kwargs)
            if bound["dropout_p"] > 0:
                with self:
                    return randomness.sdpa_with_dropout(**bound)
        device = tc.autocasting()
        if device and tc.autocast_kernel(func, device):
            with self:
                return tc.autocast_call(func, device, args, kwargs)
        if device and tc.decomposes(func) and short not in AUTOCAST_NEUTRAL:
            with self:
                return func.decompose(*args, **kwargs)
        given = args
        args = self.stand_in(args)
        kwargs = {k: self.stand_in(v) for k, v in kwargs.items()}
        try:
            encoded = tuple(encode(a, self.name_of) for a in args)
            encoded_kwargs = tuple((k, encode(v, self.name_of)) for k, v in kwargs.items())
        except NotEncodable as error:
            raise self.stop(f"{target} takes a {error}") from None
        if short in READS:
            return read(self, short.removeprefix("aten."), lambda *a: func(*a, **kwargs), encoded)
        grad = torch.is_grad_enabled()
        if short == "aten.dropout" and randomness.inactive(_bind(func, args, kwargs)):
            out = args[0]  # as eager's; the fake implementation gives a copy
        else:
            out = execute(self, func, args, kwargs, encoded, encoded_kwargs)
        self.record(target, encoded, encoded_kwargs, out, grad=grad, writes=self.writes_of(func, args, kwargs))
        return given[0] if args and out is args[0] and given[0] is not args[0] else out

    def record(
        self, target: str, args: tuple[Arg, ...], kwargs: tuple[tuple[str, Arg], ...], out: Any, *,
        grad: bool, writes: tuple[str, ...] = (), reads: tuple[str, ...] = (), random: bool = False,
        taint: frozenset[str] = frozenset(),
    ) -> Call:  # fmt: skip
        """Append one op whose results are ``out``."""
        name = self.op_name("opaque" if target.startswith("opaque:") else target.split(".")[1])
        results = flat(out) if out is not None else []
        outputs: list[str] = []
        used = [*refs(args), *(r for _, v in kwargs for r in refs(v))]
        taint = taint.union(*(self.taint(n) for n in (*used, *reads)))
        for i, tensor in enumerate(results):
            if tensor is None:
                outputs.append("")
                continue
            label = name if len(results) == 1 else f"{name}.{i}"
            if not isinstance(tensor, torch.Tensor):
                raise self.stop(f"{target} returns a {type(tensor).__name__}")
            if not isinstance(tensor, tc.FakeTensor):
                raise self.stop(f"{target} gives a {type(tensor).__name__} beside the graph")
            outputs.append(label)
            old = self.names.get(id(tensor))
            self.know(label, tensor)
            if old is not None and not writes and self.trace.values[old].role != "op":
                self.names[id(tensor)] = old  # x.contiguous() that is x: a parameter keeps its name
        call = Call(name, target, args, kwargs, tuple(outputs), self.module, user_line(), grad, random, reads, writes)
        if random or randomness.may_draw(call):
            taint |= {"randomness"}
        for i, output in enumerate(outputs):
            alone = target == "aten._pack_padded_sequence.default" and i == 1  # made from the lengths alone
            self.taints[output] = self.taint(used[1]) if alone else taint
        if any(self.trace.values[base].role == "buffer" for base in writes):
            self.look_for_checkpoint(call)
        for base in writes:
            self.base_taints[base] = self.base_taints.get(base, frozenset()) | taint
            if grad:
                self.look_for_gradients(base)
        self.trace.calls.append(call)
        return call

    def look_for_checkpoint(self, call: Call) -> None:
        """Around a write to a buffer: what ``torch.utils.checkpoint`` runs again in backward changes it again then."""
        around = checkpointing_module()
        if around is not None:
            what = f"{call.target} changes a buffer inside torch.utils.checkpoint, which changes it again in backward,"
            raise self.stop(what, around)

    def look_for_gradients(self, base: str) -> None:
        """After a write: ``zeros`` into which something differentiable was written carries its gradient on."""
        for name, tensor in self.sharing.get(base, ()):
            value = self.trace.values[name]
            if not value.needs_grad and value.role == "op" and _flows(tensor, "op"):
                self.trace.values[name] = replace(value, needs_grad=True)

    def taint(self, name: str) -> frozenset[str]:
        """What a value follows from: 'input', 'parameters', 'buffer …', 'constant …', 'randomness', 'opaque code'."""
        value = self.trace.values[name]
        return self.taints.get(name, frozenset()) | self.base_taints.get(value.base, frozenset())

    def writes_of(self, func: Any, args: Any, kwargs: Any) -> tuple[str, ...]:
        """Bases of the tensors the op changes."""
        found: dict[str, None] = {}
        for position, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            found.update(dict.fromkeys(self.bases[tc.storage_key(t)] for t in flat(value) if t is not None))
        statistics = STATISTICS.get(packet(str(func)))
        if statistics is not None:
            positions, flag = statistics
            if flag is None or args[flag]:
                found.update(
                    dict.fromkeys(self.bases[tc.storage_key(args[p])] for p in positions if args[p] is not None)
                )
        return tuple(found)

    def in_memory_order(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same memory with its slowest dim first, for an op that counts in memory: elsewhere (gathered from several
        devices, joined from parts of the batch) the tensor may lie in another order, and is copied into this one."""
        order = randomness.memory_order(tuple(tensor.shape), tuple(tensor.stride()))
        with self:
            turned = tensor.permute(order)
            if turned.storage_offset() or not turned.is_contiguous():
                raise self.stop("as_strided looks at the memory around a tensor that is a part of another")
            return turned.contiguous()

    def constant(self, real: torch.Tensor) -> torch.Tensor:
        """``torch.tensor([...])`` in forward: the data, kept."""
        name = f"constant:{len(self.trace.constants)}"
        fake = self.enter(name, real, "constant", "")
        self.trace.constants[name] = real
        self.trace.fresh.add(name)
        self.taints[name] = frozenset()
        return fake

    # ---- running --------------------------------------------------------------------------------------------------

    def run(self, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The model's output on fake tensors; the trace fills up."""
        from partita.capture.patches import FunctionCalls, patched

        self.look_for_draws()
        before = python_draws()
        with ExitStack() as stack:
            stack.enter_context(tc.force_eager())
            stack.enter_context(patched(self))
            stack.enter_context(tc.enable_python_dispatcher())
            stack.enter_context(self.fake)
            stack.enter_context(FunctionCalls(self))
            stack.enter_context(self)
            if self.watch:
                stack.enter_context(watching_methods(self))
            torch.clear_autocast_cache()  # casts of real tensors
            try:
                out = forward(*args, **kwargs)
            finally:
                torch.clear_autocast_cache()  # casts of fake tensors
            self.look_for_draws()
        if self.broken is not None:
            raise self.broken
        if python_draws() != before:
            raise Draws
        return out


@contextmanager
def watching_methods(tracer: Tracer) -> Iterator[None]:
    """Stop at the end of the innermost method of a module that drew from Python's or NumPy's generator."""

    def notice(frame: Any, event: str, argument: Any) -> None:
        owner = frame.f_locals.get("self")
        if event not in ("call", "return") or tracer.inside or not isinstance(owner, nn.Module):
            return
        if id(owner) in tracer.paths:
            now = python_draws()
            if tracer.drawn is not None and now != tracer.drawn and tracer.broken is None:
                sys.setprofile(None)
                raise tracer.stop("numbers are drawn from Python's or NumPy's generator")
            tracer.drawn = now

    old = sys.getprofile()
    sys.setprofile(notice)
    try:
        yield
    finally:
        sys.setprofile(old)


class Draws(BaseException):
    """Python's or NumPy's generator was drawn from outside any opaque piece."""


def _bind(func: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """All arguments of a call by name, defaults filled in."""
    bound = {a.name: a.default_value for a in func._schema.arguments if a.has_default_value()}
    bound.update(zip((a.name for a in func._schema.arguments), args, strict=False))
    bound.update(kwargs)
    return bound


def _flows(tensor: torch.Tensor, role: str) -> bool:
    """Whether a gradient flows through it: a view made under ``no_grad`` requires one, and leads nowhere."""
    return tensor.requires_grad and (role != "op" or tensor.grad_fn is not None)


def _place(tensor: torch.Tensor) -> tuple[Any, ...]:
    """The memory a tensor shows, and how."""
    return (tc.storage_key(tensor), tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
