"""A graph answers only what it was made for, and leaves behind what the undivided model would.

Each scenario runs the same script on a model and on the model divided; what the script returns must agree. Between
calls something changes that the graph depends on; or forward itself changes something beside its result.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import partita
from partita.errors import CaptureError, UsageError
from partita.runtime import bind

Script = Callable[[nn.Module, Callable[..., Any]], list[Any]]
SETTINGS = {"scale": 2.0}
MEMORY: list[torch.Tensor] = []
TABLES: dict[int, torch.Tensor] = {}


def x(rows: int = 4) -> torch.Tensor:
    return torch.randn(rows, 4)


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 4)
        self.setup()

    def setup(self) -> None: ...

    def hidden(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.a(x))

    def forward(self, x: torch.Tensor) -> Any:
        return self.b(self.hidden(x))


def both(make: Callable[[], nn.Module], script: Script, example: tuple[Any, ...] | None = None) -> None:
    """The script on the plain model, then on the divided one, with the same seeds."""
    results: list[list[Any]] = []
    for kind in ("plain", "divided"):
        MEMORY.clear()
        TABLES.clear()
        table.cache_clear()
        SETTINGS["scale"] = 2.0
        torch.manual_seed(0)
        model = make()
        if kind == "plain":
            call: Any = model
        else:
            inputs = (x(),) if example is None else example
            call = partita.parallelize(model, inputs, devices=["cpu", "cpu"], profile=False, constraints={"stages": 2})
        torch.manual_seed(1)
        results.append([t.detach().clone() if isinstance(t, torch.Tensor) else t for t in script(model, call)])
        if kind == "divided":
            call.close()
    for number, (want, have) in enumerate(zip(*results, strict=True)):
        if isinstance(want, torch.Tensor):
            assert isinstance(have, torch.Tensor) and type(have) is torch.Tensor, f"result {number}: {type(have)}"
            torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-6, msg=lambda m, n=number: f"result {n}: {m}")
        else:
            assert have == want, f"result {number}"


# -- what a graph was made for -----------------------------------------------------------------------------------------


class Slots:
    __slots__ = ("scale",)

    def __init__(self) -> None:
        self.scale = 1.0


class Configured(Base):
    factor = 1.0

    def finish(self, y: torch.Tensor) -> torch.Tensor:
        return y

    def setup(self) -> None:
        self.act = torch.relu
        self.options = {"inner": {"scale": 1.0}, "list": [[1.0]]}
        self.config = type("Config", (), {})()
        self.config.deep = type("Config", (), {})()
        self.config.deep.scale = 1.0
        self.flat = type("Config", (), {"scale": 1.0})()
        self.slots = Slots()
        self.post = functools.partial(lambda y, options: y * options["scale"], options={"scale": 1.0})
        self.temperature = torch.tensor(0.9)  # no buffer
        self.register_buffer("mode", torch.tensor(0))

    def forward(self, x: torch.Tensor) -> Any:
        y = self.act(self.b(self.hidden(x))) * self.options["inner"]["scale"] * self.options["list"][0][0]
        y = self.post(self.finish(y) * self.config.deep.scale * self.flat.scale * self.slots.scale * self.factor)
        if self.temperature > 0.5:
            y = y * 2
        return -y if self.mode.item() == 1 else y


def other_config(model: Any) -> None:
    model.flat = type("Config", (), {"scale": 3.0})()


def set_(owner: Any, key: Any, value: Any) -> None:
    owner[key] = value


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m, "act", torch.tanh),
        other_config,
        lambda m: setattr(m, "options", {"inner": {"scale": 5.0}, "list": [[1.0]]}),
        lambda m: set_(m.options["inner"], "scale", 4.0),
        lambda m: set_(m.options["list"][0], 0, 4.0),
        lambda m: setattr(m.config.deep, "scale", 4.0),
        lambda m: setattr(m.slots, "scale", 4.0),
        lambda m: set_(m.post.keywords["options"], "scale", 4.0),
        lambda m: setattr(type(m), "factor", 4.0),
        lambda m: setattr(type(m), "finish", lambda self, y: y * 4),
        lambda m: m.temperature.fill_(0.1),
        lambda m: setattr(m, "temperature", torch.tensor(0.1)),
        lambda m: setattr(m, "mode", torch.tensor(1)),
        lambda m: setattr(
            m.a, "__class__", type("Twice", (nn.Linear,), {"forward": lambda s, x: 2 * (x @ s.weight.T)})
        ),
        lambda m: setattr(m.a, "forward", lambda x: 3 * (x @ m.a.weight.T)),
    ],
    ids=[
        "function",
        "config",
        "dict",
        "nested",
        "list",
        "object",
        "slots",
        "partial",
        "class_attribute",
        "class_method",
        "value",
        "tensor",
        "buffer",
        "class",
        "method",
    ],
)
def test_what_the_model_holds_may_change_between_calls(change: Callable[[Any], None]) -> None:
    def script(model: nn.Module, call: Callable[..., Any]) -> list[Any]:
        first = call(x())
        change(model)
        return [first, call(x())]

    kept = {name: vars(Configured)[name] for name in ("factor", "finish")}

    def make() -> nn.Module:
        for name, value in kept.items():
            setattr(Configured, name, value)
        return Configured()

    try:
        both(make, script)
    finally:
        make()


def test_a_value_that_changes_in_every_call_is_named() -> None:
    torch.manual_seed(0)
    model = Configured()
    parallel = partita.parallelize(model, (x(),), devices=["cpu", "cpu"], profile=False)
    parallel._binder._again = bind.AGAIN - 1
    parallel(x())
    model.options["inner"]["scale"] = 7.0
    with pytest.warns(UserWarning, match="what a dict holds, reached from the model"):
        parallel(x())
    parallel.close()


class Makes(dict[str, Any]):
    """Gives out something new at each look, as transformers' table of activations does."""

    def __getitem__(self, key: str) -> Any:
        return super().__getitem__(key)()

    def values(self) -> Any:
        raise AssertionError("looked into by its own means")

    items = values


ACTIVATIONS = Makes(tanh=nn.Tanh)


class Picks(Base):
    def forward(self, x: torch.Tensor) -> Any:
        return ACTIVATIONS["tanh"](self.b(self.hidden(x)))


def test_dicts_that_make_what_they_give_stay_as_they_are() -> None:
    both(Picks, lambda model, call: [call(x()), call(x()), dict.__getitem__(ACTIVATIONS, "tanh") is nn.Tanh])


@functools.lru_cache(None)
def table(size: int) -> torch.Tensor:
    return torch.arange(size).float() / size


def scaled(y: torch.Tensor) -> torch.Tensor:
    return y * SETTINGS["scale"] * table(y.shape[1])


class ReadsGlobals(Base):
    def forward(self, x: torch.Tensor) -> Any:
        return scaled(self.b(self.hidden(x)))


def test_module_level_settings_may_change_between_calls() -> None:
    def script(model: nn.Module, call: Callable[..., Any]) -> list[Any]:
        first = call(x())
        SETTINGS["scale"] = 3.0
        return [first, call(x()), table(4)]  # the table is real: nothing of the trace is left in the cache

    both(ReadsGlobals, script)


class WithOptions(Base):
    def forward(self, x: torch.Tensor, options: Any, f: Callable[[torch.Tensor], torch.Tensor]) -> Any:
        return f(self.b(self.hidden(x)) * options.scale)


def test_arguments_that_are_no_tensors_may_change_between_calls() -> None:
    class Options:
        scale = 2.0

    def script(model: nn.Module, call: Callable[..., Any]) -> list[Any]:
        options, factor = Options(), [1.0]
        double = lambda t: t * factor[0]  # noqa: E731
        first = call(x(), options, double)
        options.scale = 3.0
        second = call(x(), options, double)
        factor[0] = 5.0
        return [first, second, call(x(), options, double)]

    both(WithOptions, script, (x(), Options(), torch.relu))


class LooksAtStrides(Base):
    def forward(self, x: torch.Tensor) -> Any:
        return self.b(self.hidden(x)) * (1.0 if x.is_contiguous() else 2.0)


def test_strides_are_seen() -> None:
    both(LooksAtStrides, lambda model, call: [call(x()), call(torch.randn(4, 4).t())])


# -- gradients of what is no parameter of the model --------------------------------------------------------------------


class Hidden(Base):
    def setup(self) -> None:
        self.secret = [nn.Linear(4, 4)]  # in a plain list: not registered

    def forward(self, x: torch.Tensor) -> Any:
        return self.secret[0](self.b(self.hidden(x)))


def test_a_parameter_in_a_plain_list_gets_its_gradient() -> None:
    def script(model: Any, call: Callable[..., Any]) -> list[Any]:
        y = call(x())
        y.sum().backward()
        return [y, model.secret[0].weight.grad, model.a.weight.grad]

    both(Hidden, script)


# -- what forward leaves behind ----------------------------------------------------------------------------------------


class LeavesLosses(Base):
    def setup(self) -> None:
        self.aux = torch.zeros(())
        self.maps: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> Any:
        h = self.hidden(x)
        self.aux = h.pow(2).mean()
        self.maps = [h, x]
        self.answer = torch.distributions.Normal(self.b(h), 1.0)
        return self.answer.mean * 2


def test_tensors_that_forward_leaves_on_modules_are_there_and_carry_gradients() -> None:
    def script(model: Any, call: Callable[..., Any]) -> list[Any]:
        y = call(x())
        (y.sum() + model.aux + model.maps[0].sum() + model.answer.log_prob(torch.ones(4)).mean()).backward()
        graphs = len(call._binder.entries) if call is not model else 1
        call(x(3))
        call(x(3))
        more = len(call._binder.entries) - graphs if call is not model else 1
        return [y, model.aux, model.maps[0], model.answer.mean, model.a.weight.grad, model.b.weight.grad, more]

    both(LeavesLosses, script)


class Sums(LeavesLosses):
    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x).sum()


def test_a_training_step_leaves_them_too() -> None:
    def script(model: Any, call: Any) -> list[Any]:
        if call is model:
            model(inputs := x()).backward()
        else:
            call.train_step(inputs := x())
        return [
            inputs,
            model.aux,
            model.maps[0],
            model.a.weight.grad,
            not (call is not model and model.aux.requires_grad),
        ]

    both(Sums, script)


class KeepsInDict(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.losses = nn.Linear(6, 6), dict[str, torch.Tensor]()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.losses["norm"] = x.pow(2).mean()
        return self.inner(x)


class HasKeeper(Base):
    def setup(self) -> None:
        self.keeper = KeepsInDict()

    def forward(self, x: torch.Tensor) -> Any:
        return self.b(self.keeper(self.hidden(x)))


def test_losses_kept_in_a_dict_carry_gradients() -> None:
    def script(model: Any, call: Callable[..., Any]) -> list[Any]:
        y = call(x())
        (y.sum() + model.keeper.losses["norm"]).backward()
        return [y, model.keeper.losses["norm"], model.a.weight.grad]

    both(HasKeeper, script)


class ChangesArguments(Base):
    def forward(self, batch: dict[str, Any], history: list[torch.Tensor]) -> Any:
        batch["hidden"] = self.hidden(batch.pop("x"))
        history.append(self.b(batch["hidden"]))
        return batch


def test_lists_and_dicts_that_forward_changes_are_changed() -> None:
    def script(model: nn.Module, call: Callable[..., Any]) -> list[Any]:
        batch: dict[str, Any] = {"x": x(), "n": 3}
        history: list[torch.Tensor] = []
        out = call(batch, history)
        history[0].sum().backward()
        return [out is batch, list(batch), batch["hidden"], len(history), history[0], model.a.weight.grad]

    both(ChangesArguments, script, ({"x": x(), "n": 3}, []))


class Remembers(Base):
    def forward(self, x: torch.Tensor) -> Any:
        y = self.b(self.hidden(x))
        MEMORY.append(y.detach())
        if 4 not in TABLES:
            TABLES[4] = torch.linspace(0, 1, 4)
        return y + TABLES[4]


def test_what_forward_adds_to_module_level_lists_is_there_once_a_call() -> None:
    both(Remembers, lambda model, call: [call(x()), call(x()), len(MEMORY), *MEMORY])


# -- hooks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["", "a"])
def test_what_hooks_collect_is_what_the_calls_made(where: str) -> None:
    def script(model: nn.Module, call: Callable[..., Any]) -> list[Any]:
        seen: list[torch.Tensor] = []
        first = call(x())
        handle = model.get_submodule(where).register_forward_hook(lambda module, inputs, output: seen.append(output))
        second = call(x())
        (second.sum() + seen[0].pow(2).sum()).backward()
        handle.remove()
        return [first, second, call(x()), len(seen), *seen, model.a.weight.grad]  # type: ignore[union-attr,list-item]

    both(Base, script)


def test_hooks_for_all_modules_act() -> None:
    def script(model: nn.Module, call: Callable[..., Any]) -> list[Any]:
        first = call(x())
        double = lambda module, inputs, output: output * 2 if isinstance(module, nn.Linear) else None  # noqa: E731
        handle = nn.modules.module.register_module_forward_hook(double)
        try:
            second = call(x())
        finally:
            handle.remove()
        return [first, second, call(x())]

    both(Base, script)


# -- random generators -------------------------------------------------------------------------------------------------


class Seeds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(7)
            noise = torch.rand_like(x)
        return self.inner(x) + noise + torch.rand_like(x)


class SeedsInside(Base):
    def setup(self) -> None:
        self.seeds, self.drop = Seeds(), nn.Dropout(0.3)

    def forward(self, x: torch.Tensor) -> Any:
        return self.drop(self.b(self.seeds(self.drop(self.hidden(x)))))


def test_a_generator_set_inside_forward() -> None:
    both(SeedsInside, lambda model, call: [call(x()), call(x()), torch.rand(3)])


# -- what no graph can hold runs as it is, or is refused with advice ---------------------------------------------------


def scripted() -> nn.Module:
    return torch.jit.trace(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4)), torch.randn(4, 4))  # type: ignore[no-any-return]


class HasScripted(Base):
    def setup(self) -> None:
        self.inner = scripted()

    def forward(self, x: torch.Tensor) -> Any:
        return self.b(self.hidden(self.inner(x)))


@pytest.mark.parametrize("make", [scripted, HasScripted], ids=["whole", "part"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_modules(make: Callable[[], nn.Module]) -> None:
    def script(model: nn.Module, call: Callable[..., Any]) -> list[Any]:
        y = call(x())
        y.sum().backward()
        return [y, *(p.grad for p in model.parameters())]

    both(make, script)


class Ensemble(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.members = nn.Linear(4, 4), nn.ModuleList(nn.Linear(4, 2) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values, buffers = torch.func.stack_module_state(list(self.members))
        one = copy.deepcopy(self.members[0]).to("meta")
        run = lambda v, b, x: torch.func.functional_call(one, (v, b), (x,))  # noqa: E731
        result: torch.Tensor = torch.func.vmap(run, (0, 0, None))(values, buffers, torch.tanh(self.first(x)))
        return result


def test_a_module_copied_in_a_forward_that_runs_live_is_a_module_of_its_own() -> None:
    def script(model: Any, call: Callable[..., Any]) -> list[Any]:
        y = call(x())
        y.sum().backward()
        return [y, model.first.weight.grad]

    both(Ensemble, script)


class TakesSparse(Base):
    def forward(self, adjacency: torch.Tensor, x: torch.Tensor) -> Any:
        return self.b(self.hidden(torch.sparse.mm(adjacency, x)))


def test_sparse_inputs() -> None:
    eye = torch.eye(4).to_sparse()
    both(TakesSparse, lambda model, call: [call(eye, x()), call(eye * 2, x())], (eye, x()))


def pair() -> partita.ParallelModule:
    return partita.parallelize(Base(), (x(),), devices=["cpu", "cpu"], profile=False)


def test_transforms_of_torch_func_are_refused_with_advice() -> None:
    with pytest.raises(UsageError, match="undivided model"):
        torch.func.vmap(pair())(torch.randn(2, 4, 4))


def test_lazy_modules_are_refused_with_advice() -> None:
    with pytest.raises(CaptureError, match=r"0\.weight has no shape yet .* Call the model once"):
        partita.parallelize(nn.Sequential(nn.LazyLinear(4)), (x(),), devices=["cpu", "cpu"])


def test_wrong_inputs_say_what_the_model_says() -> None:
    with pytest.raises(CaptureError, match="cannot be multiplied"):
        pair()(torch.randn(4, 5))


def test_a_loss_may_be_a_module() -> None:
    parallel = partita.parallelize(Base(), (x(),), devices=["cpu", "cpu"], profile=False, loss_fn=nn.MSELoss())
    parallel.loss_fn = nn.L1Loss()
    given = x()
    target = torch.zeros_like(parallel.module(given))
    torch.testing.assert_close(parallel.train_step(given, target), nn.L1Loss()(parallel.module(given), target).detach())


def test_parts_are_found_and_cannot_be_set_where_nothing_would_use_them() -> None:
    parallel = pair()
    assert parallel.a is parallel.module.a
    values = {name: p.detach() * 0.5 for name, p in parallel.named_parameters()}
    given = x()
    expected = torch.func.functional_call(parallel.module, values, (given,))
    torch.testing.assert_close(torch.func.functional_call(parallel, values, (given,)), expected)
    with pytest.raises(UsageError, match=r"\.module\.a"):
        parallel.a = nn.Linear(4, 6)
    with pytest.raises(AttributeError, match=r"\.module\.setup"):
        parallel.setup  # noqa: B018


class Taught(Base):
    """A frozen teacher that ``state_dict`` does not see."""

    def setup(self) -> None:
        self.teacher = [nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).requires_grad_(False)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            told = self.teacher[0](x)
        return self.b(self.hidden(x)) - told


def test_the_mode_and_the_tensors_of_a_module_hidden_in_a_list_are_followed() -> None:
    def script(model: nn.Module, call: Callable[..., Any]) -> list[Any]:
        teacher = model.teacher[0]
        found = []
        for change in (teacher.train, teacher.eval, lambda: setattr(teacher[0], "bias", None), teacher.train):
            change()
            torch.manual_seed(2)
            found.append(call(x()))
        return found

    both(Taught, script)
