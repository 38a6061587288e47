"""Nobody waits for what cannot come: a step in which all would wait for one another ends, at once and with a word."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from dividing import cluster
from torch import nn

from partita.plan import Batch, Plan, Stage
from partita.runtime.collectives import LocalGroup
from partita.runtime.compare import compare, observe
from partita.runtime.module import ParallelModule
from partita.runtime.transport import Exchange
from partita.runtime.waits import Deadlock, Stopped, Waits

torch.set_num_threads(1)


def walked(jobs: dict[str, Callable[[], Any]], waits: Waits, stop: Callable[[], None]) -> dict[str, Any]:
    """What each device's job gives or raises."""
    found: dict[str, Any] = {}

    def walk(device: str, job: Callable[[], Any]) -> None:
        try:
            with waits.walking(device, lambda: "at work"):
                found[device] = job()
        except BaseException as error:
            found[device] = error
            stop()

    threads = [threading.Thread(target=walk, args=item) for item in jobs.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads)
    return found


def texts(found: dict[str, Any]) -> str:
    return "\n".join(str(error) for error in found.values() if isinstance(error, Deadlock))


def test_a_member_that_ends_before_its_collective_is_named_and_the_others_end() -> None:
    exchange = Exchange(("a", "b", "c"))
    group = LocalGroup.make(3, exchange.waits)
    jobs: dict[str, Callable[[], Any]] = {
        name: lambda m=m: m.all_reduce(torch.ones(3)) for name, m in zip("ab", group, strict=False)
    }
    found = walked({**jobs, "c": lambda: None}, exchange.waits, exchange.stop)
    assert "a, at work: waits for all_reduce" in texts(found) and "c has ended" in texts(found)
    assert all(isinstance(found[d], Deadlock | Stopped | type(None)) for d in "abc")


def test_members_that_meet_for_different_things_exchange_nothing() -> None:
    exchange = Exchange(("a", "b"))
    a, b = LocalGroup.make(2, exchange.waits)
    a.op, b.op = "head:linear", "norm:layer_norm"
    found = walked(
        {"a": lambda: a.all_reduce(torch.ones(2)), "b": lambda: b.all_gather(torch.ones(2), 0, (2, 2))},
        exchange.waits, exchange.stop,
    )  # fmt: skip
    assert "member 0: all_reduce of head:linear" in texts(found)
    assert "member 1: all_gather of norm:layer_norm" in texts(found)


def test_a_message_that_nobody_sends_is_named_with_the_wait_it_is_waited_for_in() -> None:
    exchange = Exchange(("a", "b"))
    group = LocalGroup.make(2, exchange.waits)

    def send_then_meet() -> Any:
        exchange.send("b", ("x", 0, -1, False), 1)
        return group[0].all_reduce(torch.ones(2))

    def receive_then_meet() -> Any:
        assert exchange.receive("b", ("x", 0, -1, False)) == 1
        return exchange.receive("b", ("y", 1, -1, True))

    found = walked({"a": send_then_meet, "b": receive_then_meet}, exchange.waits, exchange.stop)
    assert "b, at work: waits for the gradient of y, microbatch 1" in texts(found) and "all_reduce" in texts(found)


def test_messages_and_meetings_that_come_late_are_no_deadlock() -> None:
    exchange = Exchange(("a", "b"))
    group = LocalGroup.make(2, exchange.waits)

    def work(me: str, other: str, member: LocalGroup) -> float:
        total = 0.0
        for i in range(300):
            exchange.send(other, (me, i, -1, False), i)
            total += float(member.all_reduce(torch.ones(1))) + exchange.receive(me, (other, i, -1, False))
        return total

    found = walked(
        {"a": lambda: work("a", "b", group[0]), "b": lambda: work("b", "a", group[1])}, exchange.waits, exchange.stop
    )
    assert found == {"a": 600 + 299 * 150, "b": 600 + 299 * 150}


class _Picky(torch.autograd.Function):
    """Fails in the backward of one thread."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        if threading.current_thread().name.endswith("cpu:1"):
            raise ValueError("only here")
        return grads[0]


class Failing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = _Picky.apply(self.first(x).relu())  # type: ignore[no-untyped-call]
        out: torch.Tensor = self.down(self.up(y).relu())
        return out


def divided_in_two(model: nn.Module, batch: int) -> ParallelModule:
    return ParallelModule(model, Plan((Stage(("cpu:0", "cpu:1"), ("",), tensor=2),), batch=Batch(batch, 1)), cluster(2))


def test_a_member_that_fails_in_backward_ends_the_others_and_its_error_is_the_one_raised() -> None:
    """The collectives that autograd holds are of the forward; they hear of a backward that was stopped."""
    torch.manual_seed(0)
    parallel = divided_in_two(Failing(), 4)
    out = parallel(torch.randn(4, 4))
    with pytest.raises(Exception, match=r"ValueError in backward of stage 0 on cpu:1.*only here"):
        out.sum().backward()
    parallel.close()


class Clipping(nn.Module):
    """Gemma 3n's way: a weight is clipped where it lies, in each forward, and it is used before and after."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.mix = nn.Linear(8, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.down(self.up(self.first(x)).relu())
        with torch.no_grad():
            self.mix.weight.mul_(0.5)
        out: torch.Tensor = self.mix(y).tanh()
        return out


class Into(nn.Module):
    """A sum that is still spread over the members goes into a part of what is read afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 16), nn.Linear(16, 8, bias=False)
        self.last = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        streams = torch.stack((y, y.relu()))
        part = streams[1:]
        part += self.down(self.up(y).relu())
        out: torch.Tensor = self.last(streams).sum(0)
        return out


@pytest.mark.parametrize("make", [Clipping, Into])
def test_what_is_changed_in_place_is_changed_once_and_for_all_members(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = make(), torch.randn(4, 4)
    kept = {n: p.detach().clone() for n, p in model.named_parameters()}

    def observed(parallel: nn.Module) -> tuple[Any, dict[str, torch.Tensor]]:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(kept[name])
        found = observe(parallel, model, (x,), {})
        return found, {n: p.detach().clone() for n, p in model.named_parameters()}

    expected, weights = observed(model)
    parallel = divided_in_two(model, 4)
    found, then = observed(parallel)
    parallel.close()
    assert compare(expected, found).ok, compare(expected, found)
    assert all(torch.equal(then[n], w) for n, w in weights.items())
