"""Records what a model does, op by op, above autograd and before composite ops fall apart.

The model runs once on fake tensors (shapes without memory). A mode in torch's PreDispatch slot sees every op as the
user wrote it (``linear``, ``layer_norm``, ``scaled_dot_product_attention``); a function mode sees the reads of values
that never become ops (``.numpy()``, ``.tolist()``). What cannot be recorded faithfully raises ``Break``.
"""

from __future__ import annotations

import inspect
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from partita import torch_compat as tc
from partita.capture import randomness
from partita.capture.encode import NotEncodable, encode
from partita.capture.frames import TORCH, user_line
from partita.capture.records import Break, Call, Read, Trace, Value, flat, packet
from partita.capture.shadow import Shadow
from partita.capture.state import python_draws
from partita.graph import Arg, Ref, refs

# Ops that answer with a number instead of a tensor, from metadata alone: never recorded.
_METADATA = {
    "prim.device", "aten.size", "aten.sym_size", "aten.sym_stride", "aten.sym_numel", "aten.sym_storage_offset",
    "aten.dim", "aten.stride", "aten.numel", "aten.is_contiguous", "aten.is_same_size", "aten.storage_offset",
    "aten.is_complex", "aten.is_floating_point", "aten.is_signed", "aten.is_nonzero_meta", "aten.is_inference",
    "aten._version", "aten.is_leaf", "aten.output_nr", "aten.result_type", "aten.can_cast", "aten.promote_types",
    "aten.is_conj", "aten.is_neg", "aten.is_pinned", "aten._has_compatible_shallow_copy_type",
    "aten.sym_is_contiguous", "aten.is_non_overlapping_and_dense", "aten.is_strides_like_format",
    "aten.__dispatch_is_coalesced", "aten.get_device", "aten.is_distributed", "aten._fw_primal_meta",
    "aten._nested_tensor_size_meta", "prim.layout", "aten._is_zerotensor", "aten._debug_has_internal_overlap",
    "aten._use_cudnn_ctc_loss", "aten._use_miopen_ctc_loss", "aten._chunk_cat_meta", "aten.is_set_to",
}  # fmt: skip

# Ops whose answer depends on the values of a tensor.
_READS = {
    "aten.item", "aten._local_scalar_dense", "aten.is_nonzero", "aten.equal", "aten.allclose",
}  # fmt: skip

# Reads of values through Python's own protocols, and what they give.
_PROTOCOLS: dict[str, Callable[[Any], Any]] = {
    "tolist": lambda t: t.tolist(),
    "numpy": lambda t: t.numpy(force=True).copy(),
    "__array__": lambda t: t.numpy(force=True).copy(),
}

# Ops that change a running statistic their schema does not declare: op -> (positions of the statistics, of the flag).
_STATISTICS = {
    "aten.batch_norm": ((3, 4), 5), "aten.native_batch_norm": ((3, 4), 5), "aten.cudnn_batch_norm": ((3, 4), 5),
    "aten.instance_norm": ((3, 4), 5), "aten._native_batch_norm_legit": ((3, 4), 5),
    "aten.miopen_batch_norm": ((3, 4), 5), "aten._batch_norm_with_update": ((3, 4), None),
}  # fmt: skip

# Ops whose result's shape follows the values of their integer and bool arguments only.
_SHAPE_FROM_INTEGERS = {
    "aten._pack_padded_sequence", "aten._pad_packed_sequence", "aten.lstm", "aten.gru", "aten.rnn_tanh",
    "aten.rnn_relu", "aten.repeat_interleave", "aten.tensor_split",
}  # fmt: skip

# Composite ops that hold nothing autocast would treat, and are better kept whole.
_AUTOCAST_NEUTRAL = {
    "aten.dropout", "aten.dropout_", "aten.feature_dropout", "aten.feature_dropout_", "aten.alpha_dropout", "aten.to",
    "aten.reshape", "aten.contiguous", "aten.flatten", "aten.chunk", "aten.split", "aten.type_as", "aten.expand_as",
    "aten.view_as", "aten.movedim", "aten.swapaxes", "aten.unflatten", "aten.tensor_split", "aten.narrow", "aten.float",
    "aten.item", "aten.is_nonzero", "aten.embedding_bag", "aten.numpy_T", "aten.mT", "aten.matrix_H", "aten.square",
    "aten.size", "aten.stack", "aten.pad", "aten.max_pool2d", "aten.adaptive_avg_pool2d", "aten.selu", "aten.relu6",
}  # fmt: skip

# Ops whose result's shape follows the number of trues in their masks.
_SHAPE_FROM_MASKS = {"aten.index", "aten.masked_select", "aten.index_put", "aten.index_put_"}

# Ops that look at values inside, while their result's shape follows shapes alone.
_SHAPE_FIXED = {"aten.ctc_loss", "aten._ctc_loss", "aten.embedding_bag", "aten._embedding_bag"}


def packet(target: str) -> str:
    """``aten.add.Tensor`` -> ``aten.add``."""
    return target.rsplit(".", 1)[0]


def target_of(op: Any) -> str:
    """``torch.ops.aten.add.Tensor`` -> ``'aten.add.Tensor'``."""
    return str(op)


class Tracer(tc.PreDispatchMode):
    """One recording. ``enter`` names the tensors that come from outside; ``run`` makes the trace.

    ``pieces``: paths of modules (``blocks.0``) and methods (``blocks.0.route()``) that run as one op.
    """

    def __init__(self, model: nn.Module, *, pieces: frozenset[str] = frozenset(), guards: bool = True,
                 watch: bool = False) -> None:  # fmt: skip
        super().__init__()
        self.model, self.pieces, self.guards, self.watch = model, pieces, guards, watch
        self.fake = tc.FakeTensorMode(allow_non_fake_inputs=True)
        self.trace = Trace()
        self.shadow: Shadow | None = None
        self.names: dict[int, str] = {}
        self.places: dict[Any, str] = {}
        self.bases: dict[int, str] = {}
        self.taints: dict[str, frozenset[str]] = {}
        self.base_taints: dict[str, frozenset[str]] = {}
        self.alive: list[torch.Tensor] = []
        self.stand_ins: dict[int, torch.Tensor] = {}  # id of a real tensor -> its fake
        self.entered: list[tuple[torch.Tensor, torch.Tensor]] = []  # (real, fake)
        self.originals: dict[int, torch.Tensor] = {}  # id of a fake -> the real tensor
        self.paths = {id(m): path for path, m in reversed(list(model.named_modules(remove_duplicate=False)))}
        self.stack: list[str] = []
        self.calls_of: Counter[str] = Counter()
        self.ops_of: Counter[str] = Counter()
        self.broken: Break | None = None
        self.inside = 0
        self.drawn: Any = None
        self.failed_in = ""
        self.buffer_at: dict[tuple[str, str], torch.Tensor] = {}  # (module path, name) -> the fake put there
        self.wants_gradient: set[int] = set()  # ids of inner tensors that forward told to require a gradient

    # ---- names ----------------------------------------------------------------------------------------------------

    def know(self, name: str, tensor: torch.Tensor, role: str = "op", path: str = "") -> None:
        """From now on this tensor object goes by this name."""
        base = self.bases.setdefault(tc.storage_key(tensor), name)
        self.names[id(tensor)] = name
        self.places[_place(tensor)] = name
        self.alive.append(tensor)
        self.trace.values[name] = Value(name, tuple(tensor.shape), tuple(tensor.stride()),
                                        str(tensor.dtype).removeprefix("torch."), role, path, base,
                                        tensor.requires_grad)  # fmt: skip

    def enter(self, name: str, real: torch.Tensor, role: str, path: str) -> torch.Tensor:
        """A fake stand-in for a tensor from outside, under this name."""
        with self.fake:
            fake: torch.Tensor = self.fake.from_tensor(real)
        self.stand_ins[id(real)] = fake
        self.originals[id(fake)] = real
        self.entered.append((real, fake))
        self.alive.append(real)
        self.know(name, fake, role, path)
        taint = {"input": "input", "parameter": "parameters", "buffer": f"buffer {name}"}.get(role)
        self.taints[name] = frozenset([taint]) if taint else frozenset()
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
        if name is None:
            raise self.stop(f"a tensor of shape {tuple(tensor.shape)} whose origin was not seen is used")
        return name

    def stand_in(self, value: Any) -> Any:
        """The fake tensor for a real one: a parameter reached by another way, or a constant."""
        if isinstance(value, torch.Tensor):
            if isinstance(value, tc.FakeTensor):
                return value
            if id(value) in self.stand_ins:
                return self.stand_ins[id(value)]
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
        if short in _METADATA:
            return func(*args, **kwargs)
        if short == "aten.lift_fresh" and not isinstance(args[0], tc.FakeTensor):
            return self.constant(args[0])
        if short == "aten.detach_" and not args[0].requires_grad:  # torch.tensor ends with one
            return func(*args, **kwargs)
        if short == "aten.scaled_dot_product_attention":
            bound = _bind(func, args, kwargs)
            if bound["dropout_p"] > 0:
                with self:
                    return randomness.sdpa_with_dropout(**bound)
        device = autocasting()
        if device and tc.autocast_kernel(func, device):
            with self:
                return tc.autocast_call(func, device, args, kwargs)
        if device and tc.decomposes(func) and short not in _AUTOCAST_NEUTRAL:
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
        if short in _READS:
            return self.read(short.removeprefix("aten."), lambda *a: func(*a, **kwargs), encoded)
        grad = torch.is_grad_enabled()
        out = self.execute(func, args, kwargs, encoded, encoded_kwargs)
        self.record(target, encoded, encoded_kwargs, out, grad=grad, writes=self.writes_of(func, args, kwargs))
        return given[0] if args and out is args[0] and given[0] is not args[0] else out

    def execute(self, func: Any, args: Any, kwargs: Any, encoded: Any, encoded_kwargs: Any) -> Any:
        """The op on fake tensors; where its result depends on values, on real ones."""
        self.inside += 1
        try:
            return func(*args, **kwargs)
        except (tc.DataDependentOutputException, tc.DynamicOutputShapeException) as error:
            what = f"{func} gives a result whose shape or value depends on data"
            return self.by_value(func, args, encoded, encoded_kwargs, what, error)
        except tc.UnsupportedOperatorException as error:
            raise self.stop(f"{func} cannot run without data (it has no fake implementation)") from error
        except RuntimeError as error:
            if self.shadow is None or not self.shadow.real or "fake" in str(error).lower():
                raise
            return self.shaped_like_real(func, args, encoded, encoded_kwargs, error)
        finally:
            self.inside -= 1

    def shaped_like_real(self, func: Any, args: Any, encoded: Any, encoded_kwargs: Any, error: Exception) -> Any:
        """The fake implementation refuses what the real one may accept: shapes from a real run."""
        try:
            real = self.on_real(func, encoded, encoded_kwargs)
        except Exception:
            raise error from None
        return self.imitate(flat(real), args, isinstance(real, list | tuple))

    def on_real(self, func: Any, encoded: Any, encoded_kwargs: Any) -> Any:
        assert self.shadow is not None
        names = [k for k, _ in encoded_kwargs]
        count = len(encoded)
        return self.shadow.run(lambda *a: func(*a[:count], **dict(zip(names, a[count:], strict=True))),
                               (*encoded, *(v for _, v in encoded_kwargs)))  # fmt: skip

    def imitate(self, real: list[Any], args: Any, many: bool) -> Any:
        """Fake tensors that look like these fresh real ones."""
        needs = torch.is_grad_enabled() and any(isinstance(a, torch.Tensor) and a.requires_grad for a in flat(args))
        made = []
        for tensor in real:
            fake = self.fake.from_tensor(tensor.detach())
            made.append(fake.requires_grad_().clone() if needs and fake.is_floating_point() else fake)
        return tuple(made) if many else made[0]

    def by_value(self, func: Any, args: Any, encoded: Any, encoded_kwargs: Any, what: str, error: Exception) -> Any:
        """An op whose result's shape follows values: allowed where these follow from the inputs; then guarded."""
        used = list(refs(encoded)) + [r for _, v in encoded_kwargs for r in refs(v)]
        if packet(str(func)) in _SHAPE_FIXED:
            if self.shadow is None or not self.shadow.real:
                raise self.stop(what) from error
            return self.shaped_like_real(func, args, encoded, encoded_kwargs, error)
        if packet(str(func)) in _SHAPE_FROM_MASKS:
            used = [n for n in used if self.trace.values[n].dtype in ("bool", "uint8")]
            self.allow(used, what)
            for name in used:
                self.read(f"the number of trues in a mask of {func}", _trues, (Ref(name),))
            real = self.on_real(func, encoded, encoded_kwargs)
            return self.imitate(flat(real), args, isinstance(real, list | tuple))
        if packet(str(func)) in _SHAPE_FROM_INTEGERS:
            used = [n for n in used if not _is_float(self.trace.values[n].dtype)]
        elif len(used) > 1 or not used:
            raise self.stop(what) from error
        self.allow(used, what)
        real = self.on_real(func, encoded, encoded_kwargs)
        if packet(str(func)) in _SHAPE_FROM_INTEGERS:
            for name in used:
                self.read(f"an argument of {func}", _values, (Ref(name),))
        else:
            keywords = [k for k, _ in encoded_kwargs]
            count = len(encoded)

            def shapes(*a: Any) -> list[tuple[int, ...]]:
                out = func(*a[:count], **dict(zip(keywords, a[count:], strict=True)))
                return [tuple(t.shape) for t in flat(out)]

            self.read(f"the result's shape of {func}", shapes, (*encoded, *(v for _, v in encoded_kwargs)))
        return self.imitate(flat(real), args, isinstance(real, list | tuple))

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
        for base in writes:
            self.base_taints[base] = self.base_taints.get(base, frozenset()) | taint
        self.trace.calls.append(call)
        return call

    def taint(self, name: str) -> frozenset[str]:
        """What a value follows from: 'input', 'parameters', 'buffer …', 'randomness', 'opaque code'."""
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
        statistics = _STATISTICS.get(packet(str(func)))
        if statistics is not None:
            positions, flag = statistics
            if flag is None or args[flag]:
                found.update(
                    dict.fromkeys(self.bases[tc.storage_key(args[p])] for p in positions if args[p] is not None)
                )
        return tuple(found)

    def constant(self, real: torch.Tensor) -> torch.Tensor:
        """``torch.tensor([...])`` in forward: the data, kept."""
        name = f"constant:{len(self.trace.constants)}"
        fake = self.enter(name, real, "constant", "")
        self.trace.constants[name] = real
        self.trace.fresh.add(name)
        return fake

    # ---- values ---------------------------------------------------------------------------------------------------

    def allow(self, names: list[str], what: str) -> frozenset[str]:
        """What these values follow from. Raises Break unless it is inputs and untouched buffers alone."""
        taint: frozenset[str] = frozenset().union(*(self.taint(n) for n in names))
        bad = sorted(t for t in taint if t != "input" and not t.startswith("buffer "))
        if bad:
            raise self.stop(f"{what}, which follows from {' and '.join(bad)}")
        if taint and not self.guards:
            raise self.stop(what)
        if self.shadow is None or (taint and not self.shadow.real):
            raise self.stop(f"{what}, and the example inputs have no data")
        return taint

    def read(self, what: str, function: Callable[..., Any], args: tuple[Arg, ...]) -> Any:
        """A value for Python: real, and guarded where it follows from the inputs."""
        taint = self.allow(list(refs(args)), f"{what} reads the value of a tensor")
        assert self.shadow is not None
        self.inside += 1
        try:
            value = self.shadow.run(function, args)
        finally:
            self.inside -= 1
        if taint:
            buffers = tuple(t.removeprefix("buffer ") for t in taint if t.startswith("buffer "))
            self.trace.reads.append(
                Read(len(self.trace.calls), function, args, value, self.module, user_line(), what, buffers)
            )
        return value

    def read_tensor(self, what: str, tensor: torch.Tensor) -> Any:
        """``.tolist()``, ``.numpy()``."""
        return self.read(what, _PROTOCOLS[what], (encode(self.stand_in(tensor), self.name_of),))

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
        if event in ("call", "return") and not tracer.inside and isinstance(frame.f_locals.get("self"), nn.Module):
            if id(frame.f_locals["self"]) in tracer.paths:
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


def autocasting() -> str:
    """The device type for which autocast is on here; '' where it is off or already at work."""
    for device in ("cpu", "cuda"):
        if torch.is_autocast_enabled(device) and not tc.autocast_excluded(device):
            return device
    return ""


def _bind(func: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """All arguments of a call by name, defaults filled in."""
    bound = {a.name: a.default_value for a in func._schema.arguments if a.has_default_value()}
    bound.update(zip((a.name for a in func._schema.arguments), args, strict=False))
    bound.update(kwargs)
    return bound


def _trues(mask: torch.Tensor) -> int:
    return int(torch.count_nonzero(mask))


def _values(tensor: torch.Tensor) -> Any:
    return tensor.detach().cpu().numpy().copy()


def _is_float(dtype: str) -> bool:
    return dtype.startswith(("float", "bfloat", "complex"))


def _place(tensor: torch.Tensor) -> tuple[Any, ...]:
    """The memory a tensor shows, and how."""
    return (tc.storage_key(tensor), tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype)


def methods_on_stack(paths: dict[int, str], module: str) -> tuple[str, ...]:
    """Methods of the current module between its forward and here, innermost first: ``blocks.0.route()``."""
    found: list[str] = []
    frame = sys._getframe(2)
    while frame is not None:
        code = frame.f_code
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and paths.get(id(owner)) == module:
            if code.co_name == "forward":
                break
            method = getattr(type(owner), code.co_name, None)
            if inspect.isfunction(method) and inspect.unwrap(method).__code__ is code and not code.co_name.startswith("_call"):
                if not code.co_filename.startswith(TORCH):
                    found.append(f"{module}.{code.co_name}()" if module else f"{code.co_name}()")
        frame = frame.f_back  # type: ignore[assignment]
    else:
        return ()
    return tuple(found)
