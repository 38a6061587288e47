"""Worker threads: errors surface with their place, nothing hangs, threads end, Ctrl-C works, modules do not disturb
each other."""

from __future__ import annotations

import copy
import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dividing import cluster, divided
from torch import nn

import partita
from partita.api import parallelize
from partita.errors import ExecutionError
from partita.plan import Batch, Plan, Stage
from partita.runtime.module import ParallelModule
from partita.runtime.team import Team

pytestmark = [pytest.mark.timeout(90), pytest.mark.filterwarnings("ignore::UserWarning")]


class Picky(torch.autograd.Function):
    """Fails where told, in its forward or its backward."""

    fail = ""

    @staticmethod
    def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
        if Picky.fail == "forward":
            raise ValueError("no thank you")
        return x * 2

    @staticmethod
    def backward(ctx: object, *grads: torch.Tensor) -> torch.Tensor:
        if Picky.fail == "backward":
            raise ValueError("not backwards either")
        return grads[0] * 2


class Fails(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)
        self.inner = nn.ModuleDict({"b": nn.Linear(6, 6)})
        self.emb = nn.Embedding(5, 6)

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        h = self.inner["b"](torch.relu(self.a(x)))
        return Picky.apply(h) + self.emb(ids)  # the user's line


@pytest.fixture(autouse=True)
def _reset() -> None:
    torch.manual_seed(0)
    Picky.fail = ""


def failing(microbatches: int = 2) -> tuple[ParallelModule, torch.Tensor, torch.Tensor]:
    x, ids = torch.randn(4, 6), torch.tensor([0, 1, 2, 3])
    return divided(Fails(), (x, ids), at=["inner.b"], microbatches=microbatches), x, ids


def threads_of(devices: int = 2) -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("partita ")]


def test_an_error_in_a_worker_names_stage_module_and_the_users_line_and_the_module_still_works() -> None:
    parallel, x, ids = failing()
    expected = parallel(x, ids)
    with pytest.raises(ExecutionError) as caught:
        parallel(x, ids + 4)
    text = str(caught.value)
    assert "IndexError" in text and "stage 1 on cpu:1" in text and "module 'emb'" in text, text
    assert "test_runtime_threads.py" in text and "the user's line" in text, text
    assert isinstance(caught.value.__cause__, IndexError)
    torch.testing.assert_close(parallel(x, ids), expected)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_an_error_in_user_code_forward_or_backward_reaches_the_caller(where: str) -> None:
    parallel, x, ids = failing()
    parallel(x, ids).sum().backward()
    Picky.fail = where
    with pytest.raises(ExecutionError, match="no thank you|not backwards either") as caught:
        parallel(x, ids).sum().backward()
    assert "stage 1 on cpu:1" in str(caught.value)
    Picky.fail = ""
    parallel(x, ids).sum().backward()


def test_an_error_in_backward_of_divided_ops_names_their_modules() -> None:
    x, ids = torch.randn(4, 6), torch.tensor([0, 1, 2, 3])
    plan = Plan((Stage(("cpu:0", "cpu:1"), ("",), tensor=2),), batch=Batch(4, 1))
    parallel = parallelize(Fails(), (x, ids), plan=plan, devices=2, profile=False)
    Picky.fail = "backward"
    with pytest.raises(ExecutionError, match="not backwards either") as caught:
        parallel(x, ids).sum().backward()
    assert "backward of stage 0 on cpu:" in str(caught.value) and "modules 'a' to " in str(caught.value)


def test_an_error_in_a_live_model_keeps_its_type_and_says_which_module_and_device() -> None:
    class Live(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.emb, self.total = nn.Linear(6, 6), nn.Embedding(5, 6), 0.0

        def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
            h = self.a(x)
            self.total = float(h.detach().sum()) + self.total
            return self.emb(ids) + h * (1 if self.total > 0 else 2)

    x, ids = torch.randn(4, 6), torch.tensor([0, 1, 2, 3])
    parallel = partita.split(Live(), (x, ids), at=["emb"], devices=cluster(2))
    parallel(x, ids)
    with pytest.raises(IndexError) as caught:
        parallel(x, ids + 4)
    assert caught.value.__notes__ == ["in module 'emb', which runs on cpu:1"]
    parallel(x, ids)


def test_an_error_keeps_no_step_alive_once_it_is_dropped() -> None:
    parallel, x, ids = failing()
    try:
        parallel(x, ids + 4)
    except ExecutionError as error:
        problem = weakref.ref(error)
    gc.collect()
    assert problem() is None


def test_threads_start_at_the_first_call_and_end_on_close() -> None:
    before = set(threads_of())
    parallel, x, ids = failing()
    assert set(threads_of()) == before
    parallel(x, ids)
    mine = set(threads_of()) - before
    assert {t.name for t in mine} == {"partita cpu:0", "partita cpu:1"}
    parallel.close()
    assert not any(t.is_alive() for t in mine)
    parallel(x, ids)
    parallel.close()


def test_threads_end_when_the_module_is_dropped() -> None:
    before = set(threads_of())
    parallel, x, ids = failing()
    y = parallel(x, ids)
    y.sum().backward()
    mine = set(threads_of()) - before
    del parallel, y
    gc.collect()
    deadline = time.monotonic() + 5
    while any(t.is_alive() for t in mine) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(t.is_alive() for t in mine)


def test_modules_in_several_threads_at_once_have_their_own_numbers() -> None:
    wrong: list[str] = []
    work: list[tuple[nn.Module, ParallelModule, torch.Tensor, torch.Tensor, list[torch.Tensor]]] = []
    for _ in range(3):
        model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
        x, t = torch.randn(8, 6), torch.randint(0, 4, (8,))
        F.cross_entropy(model(x), t).backward()
        expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        parallel = divided(model, (x,), at=["2"], microbatches=2, loss_fn=F.cross_entropy)
        parallel.train_step(x, t)
        work.append((model, parallel, x, t, expected))

    def train(
        model: nn.Module, parallel: ParallelModule, x: torch.Tensor, t: torch.Tensor, expected: list[Any]
    ) -> None:
        try:
            for _ in range(10):
                model.zero_grad()
                parallel.train_step(x, t)
                for grad, parameter in zip(expected, model.parameters(), strict=True):
                    torch.testing.assert_close(parameter.grad, grad, rtol=1e-4, atol=1e-6)
        except Exception as error:
            wrong.append(repr(error))

    threads = [threading.Thread(target=train, args=item) for item in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong and not any(t.is_alive() for t in threads), wrong


def test_one_module_called_from_two_threads_gives_each_its_own_outputs() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    unsplit = copy.deepcopy(model)  # while one thread's first call is traced, the model itself has stand-ins in it
    parallel = divided(model, (torch.randn(8, 6),), at=["2"], microbatches=2)
    wrong: list[object] = []

    def work() -> None:
        for _ in range(10):
            x = torch.randn(8, 6)
            if not torch.allclose(parallel(x), unsplit(x), rtol=1e-4, atol=1e-6):
                wrong.append(x)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong


def run_script(body: str, *, interrupt: bool = False) -> tuple[int, str, str]:
    """Run in a process of its own; with ``interrupt``, send it Ctrl-C once it says so."""
    here = Path(__file__).resolve().parent
    source = os.pathsep.join([str(here), str(here.parent / "src"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(body)], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        if interrupt:
            assert process.stdout is not None and process.stdout.readline().strip() == "ready"
            time.sleep(0.3)
            process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, out, err


SLOW = """
    import signal, sys, time, torch
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background is started deaf to it
    from torch import nn
    from dividing import cluster, divided
    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            time.sleep(0.2 if started else 0)
            return x * 1
        @staticmethod
        def backward(ctx, g):
            return g
    started = False
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        def forward(self, x):
            return self.b(Slow.apply(self.a(x)))
    x = torch.randn(4, 4)
    model = Net()
    parallel = divided(model, (x,), at=["b"], loss_fn=lambda y, t: (y - t).sum())
    parallel(x).sum().backward()
    parallel.train_step(x, x)
    started = True
"""


@pytest.mark.parametrize("call", ["parallel(x)", "parallel.train_step(x, x)", "parallel(x).sum().backward()"])
def test_ctrl_c_ends_a_step_and_the_module_works_afterwards(call: str) -> None:
    code, out, err = run_script(
        textwrap.dedent(SLOW)
        + textwrap.dedent(f"""
            print("ready", flush=True)
            try:
                while True:
                    {call}
            except KeyboardInterrupt:
                started = False
                parallel(x).sum().backward()
                print("still works", flush=True)
        """),
        interrupt=True,
    )
    assert code == 0 and "still works" in out, (code, out, err)


def test_a_process_ends_though_its_module_was_never_closed() -> None:
    code, out, err = run_script(textwrap.dedent(SLOW) + "print('end')\n")
    assert code == 0 and "end" in out and not err.strip(), (code, out, err)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_forked_child_starts_threads_of_its_own() -> None:
    code, out, err = run_script(
        textwrap.dedent(SLOW)
        + textwrap.dedent("""
            import os, warnings
            warnings.simplefilter("ignore")
            started = False
            child = os.fork()
            if child == 0:
                with torch.no_grad():
                    parallel(x)
                print("child", flush=True)
                os._exit(0)
            os.waitpid(child, 0)
            parallel(x)
            print("parent")
        """)
    )
    assert code == 0 and "child" in out and "parent" in out, (code, out, err)


def test_a_worker_computes_with_as_many_threads_as_it_has_cores() -> None:
    """Whatever the process's default: two threads on one core would wait for each other at every op."""
    found: dict[str, int] = {}
    cores = tuple(sorted(os.sched_getaffinity(0))[:1])

    def ask(name: str) -> Callable[[], None]:
        return lambda: found.update({name: torch.get_num_threads()})

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        team = Team(tuple(replace(device, cores=cores) for device in cluster(2).devices))
        team.run({device.name: ask(device.name) for device in team.devices}, lambda: None)
        assert torch.get_num_threads() == 2
        team.close()
    finally:
        torch.set_num_threads(before)
    assert found == {"cpu:0": 1, "cpu:1": 1}
