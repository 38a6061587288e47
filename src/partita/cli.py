"""The command line: the verbs of ``api`` for a terminal. Exit codes: 0 done, 2 wrong usage or input, 3 nothing fits."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from partita.cli_options import BatchSize, Devices, Factory, Json, Memory, Out, PlanPath, print_json, writable
from partita.cli_plan import explain
from partita.cli_plan import plan as plan_verb
from partita.cluster import Cluster
from partita.errors import PartitaError, PlanError, UsageError, VerificationError
from partita.plan import Plan
from partita.trace import Trace
from partita.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from partita.graph import Graph

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Divide any PyTorch model over the devices you have: plan, check, simulate, run.",
)

app.command()(plan_verb)
app.command()(explain)


@app.command()
def verify(
    factory: Factory,
    plan_file: PlanPath = None,
    devices: Annotated[str | None, typer.Option(help="Without it, those the plan names, else all.")] = None,
    batch: BatchSize = None,
    rtol: float = 1e-4,
    atol: float = 1e-6,
    as_json: Json = False,
) -> None:
    """Compare outputs, every gradient and buffers of the divided model with the unsplit one's."""
    loaded = Plan.load(plan_file) if plan_file is not None else None
    from partita.factory import load

    model, args, kwargs = load(factory, batch)
    from partita import api

    result = api.verify(model, args, kwargs, plan=loaded, devices=devices, rtol=rtol, atol=atol)
    if _is_other_rank():  # rank 0 speaks for all
        raise typer.Exit(0 if result.ok else VerificationError.exit_code)
    if as_json:
        print(json.dumps({"equal": result.ok, "tensors": [_row(d) for d in result.differences]}))
        if not result.ok:
            raise typer.Exit(VerificationError.exit_code)
    elif result.ok:
        print(result)
    else:
        raise VerificationError(str(result))


@app.command()
def simulate(
    factory: Factory,
    plan_file: PlanPath = None,
    devices: Annotated[str | None, typer.Option(help="Without it, those the plan names.")] = None,
    memory: Memory = None,
    batch: BatchSize = None,
    optimizer: str = "adamw",
    trace: Annotated[str | None, typer.Option(help="Chrome trace to write; opens in Perfetto.")] = None,
    as_json: Json = False,
) -> None:
    """Predict time and memory of one step, without running it."""
    writable(trace)
    loaded = Plan.load(plan_file) if plan_file is not None else None
    cluster = _cluster(devices, loaded, memory)
    from partita.factory import load
    from partita.predict import predict
    from partita.report import timeline, write_chrome

    model, args, kwargs = load(factory, batch)
    graph = _graph(model, args, kwargs)
    chosen = _checked(loaded, graph, cluster, model, args, kwargs, optimizer)
    predicted = predict(graph, chosen, cluster, batch=batch or 0, optimizer=optimizer)
    if trace is not None:
        write_chrome(trace, predicted)
    if as_json:
        print_json(_summary(predicted))
        return
    _show(predicted, None)
    print(timeline(predicted))
    if trace is not None:
        print(f"\ntrace written to {trace}; open it in https://ui.perfetto.dev")


@app.command()
def report(
    factory: Factory,
    plan_file: PlanPath = None,
    devices: Annotated[str | None, typer.Option(help="Without it, those the plan names, else all.")] = None,
    memory: Memory = None,
    batch: BatchSize = None,
    optimizer: str = "adamw",
    steps: Annotated[int, typer.Option(min=1, help="Steps to run; the last is recorded.")] = 4,
    trace: Annotated[str | None, typer.Option(help="Chrome trace to write, predicted and measured.")] = None,
    output: Annotated[str | None, typer.Option("--output", "-o", help="HTML page to write.")] = None,
    as_json: Json = False,
) -> None:
    """Run a few steps and set what was predicted beside what was measured."""
    writable(output)
    writable(trace)
    loaded = Plan.load(plan_file) if plan_file is not None else None
    cluster = _cluster(devices, loaded, memory)
    from partita import api
    from partita.factory import load
    from partita.predict import predict
    from partita.report import timeline, write_chrome, write_page

    model, args, kwargs = load(factory, batch)
    graph = _graph(model, args, kwargs)
    chosen = _checked(loaded, graph, cluster, model, args, kwargs, optimizer)
    predicted = predict(graph, chosen, cluster, batch=batch or graph.batch, optimizer=optimizer)
    parallel = api.parallelize(model, args, kwargs, devices=cluster, plan=chosen, loss_fn=_mean_square)
    try:
        measured = _measure(parallel, args, kwargs, steps, optimizer)
    finally:
        parallel.close()
    if output is not None:
        write_page(output, chosen, predicted, measured)
    if trace is not None:
        write_chrome(trace, predicted, measured)
    if as_json:
        print_json({"predicted": _summary(predicted), "measured": _summary(measured)})
        return
    print(chosen.explain())
    _show(predicted, measured)
    for made in (predicted, measured):
        print(f"{made.origin}:\n{timeline(made)}\n")
    for path in filter(None, (output, trace)):
        print(f"written to {path}")


@app.command()
def measure(devices: Devices = "", output: Out = None, as_json: Json = False) -> None:
    """Measure this machine: its devices, their speed and memory, and the links between them.

    In processes started together (``partita run ... -m partita.cli measure``) the devices are the ranks, on all their
    hosts, and rank 0 writes and prints.
    """
    from partita.measure.detect import local_cluster, summary
    from partita.runtime.distributed import join_world, launched

    if launched():
        from partita.measure.ranks import rank_cluster

        world = join_world()
        cluster = rank_cluster(world, devices or "auto")
        if world.rank:
            return
        writable(output)
    else:
        writable(output)
        cluster = Cluster.detect(refresh=True)
        if devices:
            cluster = local_cluster(devices)
    if output is not None:
        cluster.save(output)
    if as_json:
        print_json(cluster)
    else:
        print(summary(cluster))
        for link in cluster.links:
            print(
                f"{link.source} - {link.target}: {format_bytes(link.bandwidth)}/s after "
                f"{format_seconds(link.latency_seconds)}"
                + f", and {format_seconds(link.overhead_seconds)} of software a message"
                * bool(link.overhead_seconds)
            )
        if output is not None:
            print(f"written to {output}")


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False}
)
def run(
    context: typer.Context,
    nproc: Annotated[int | None, typer.Option(help="Processes on this host; without it, one a GPU or core.")] = None,
    plan_file: PlanPath = None,
) -> None:
    """Run a training script on several processes, one a device: partita run [--nproc N] script.py [arguments]."""
    from partita import launch

    code = launch.run(context.args, nproc=nproc, plan=plan_file)
    if code:
        raise typer.Exit(code if code > 0 else 128 - code)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def demo(context: typer.Context) -> None:
    """Divide three real models, prove the numbers equal, and time them."""
    import importlib.util
    import runpy

    if importlib.util.find_spec("partita.demo") is None:
        raise UsageError("this installation has no demo; install partita with its 'demo' extra from a checkout")
    before = sys.argv
    sys.argv = ["partita demo", *context.args]
    try:
        runpy.run_module("partita.demo", run_name="__main__")
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("partita"):
            raise
        raise UsageError(f"the demo needs {error.name}; install it with: pip install 'partita[demo]'") from None
    finally:
        sys.argv = before


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what this installation and this machine offer, and what is missing."""
    from partita.doctor import findings

    found = findings()
    if not found:
        return  # rank 0 speaks for all
    if as_json:
        print(json.dumps([{"what": f.what, "found": f.found, "ok": f.ok, "next": f.next_step} for f in found]))
        return
    width = max(len(f.what) for f in found)
    for finding in found:
        mark = "ok  " if finding.ok else "note"
        print(
            f"{mark}  {finding.what.ljust(width)}  {finding.found}"
            + (f"; {finding.next_step}" if finding.next_step else "")
        )


def _is_other_rank() -> bool:
    """Whether this is one of several processes, and not the first."""
    from partita.runtime.distributed import join_world, launched

    return launched() and join_world().rank > 0


def _cluster(devices: str | None, loaded: Plan | None, memory: str | None) -> Cluster:
    """What the user names, else a description or this machine's devices that fit the plan's names."""
    if devices is not None:
        return Cluster.parse(devices, memory=memory)
    if loaded is not None and loaded.devices:
        return Cluster.parse(loaded.devices, memory=memory)
    return Cluster.parse("auto", memory=memory)


def _graph(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Graph:
    from partita.capture import capture

    captured = capture(model, args, kwargs)
    if captured.live:
        raise PlanError(f"this model runs as it is, so there is nothing to predict: {captured.live}")
    return captured.graph


def _checked(
    loaded: Plan | None, graph: Graph, cluster: Cluster, model: Any, args: Any, kwargs: Any, optimizer: str
) -> Plan:
    from partita import api
    from partita.check import require

    if loaded is None:
        return api.find_plan(model, args, kwargs, cluster=cluster, optimizer=optimizer)
    require(loaded, graph, cluster)
    return loaded


def _mean_square(output: Any, _: Any = None) -> Any:
    """A loss for any output: the mean square of its first differentiable tensor."""
    from partita.runtime.compare import tensors_in

    for _, tensor in tensors_in(output):
        if tensor.requires_grad and (tensor.is_floating_point() or tensor.is_complex()):
            return tensor.abs().float().square().mean()
    raise UsageError("the model's outputs need no gradient, so a training step cannot be measured")


def _measure(parallel: Any, args: tuple[Any, ...], kwargs: dict[str, Any], steps: int, optimizer: str) -> Trace:
    """The recorded trace of the last of ``steps`` training steps, with each device's peak memory in another one.

    No step changes a parameter. Memory is left out where the optimizer's state cannot be made for it.
    """
    import torch

    from partita.cost.memory import optimizer_factor
    from partita.runtime.memory import measure_memory

    call = (*args, torch.zeros(()))
    for step in range(steps):
        parallel.record = step == steps - 1
        parallel.zero_grad(set_to_none=True)
        parallel.train_step(*call, **kwargs)
    trace, parallel.record = parallel.trace, False
    assert isinstance(trace, Trace)
    state = None
    if optimizer in ("adam", "adamw"):
        state = torch.optim.AdamW(parallel.parameters(), lr=0.0, weight_decay=0.0)
        state.step()
    elif optimizer_factor(optimizer):
        return trace
    parallel.zero_grad(set_to_none=True)
    peaks = measure_memory(parallel, call, kwargs, optimizer=state)
    return replace(trace, memory=tuple((device, peaks[device]) for device in peaks if device != "caller"))


def _show(predicted: Trace | None, measured: Trace | None) -> None:
    from partita.report import comparison_table

    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(comparison_table(predicted, measured))


def _summary(trace: Trace) -> dict[str, Any]:
    devices = dict.fromkeys(event.device for event in trace.events)
    return {
        "step_seconds": trace.step_seconds,
        "busy_seconds": {device: trace.busy_seconds(device) for device in devices},
        "memory": dict(trace.memory),
    }


def _row(difference: Any) -> dict[str, Any]:
    return {name: getattr(difference, name) for name in ("kind", "name", "absolute", "relative", "equal")}


def _tell_other_ranks(error: PartitaError) -> None:
    """What this rank alone may have met, where there are others: they wait for it, and say it as they end."""
    world = sys.modules.get("partita.runtime.distributed.world")
    if world is not None:
        world.failed(error)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the process's exit code. An expected error is one message on stderr, never a traceback."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        typer.main.get_command(app)(words, prog_name="partita")
    except PartitaError as error:
        if "--json" in words:
            problems = list(getattr(error, "problems", ()))
            print(json.dumps({"error": {"kind": type(error).__name__, "message": str(error), "problems": problems}}))
        if not getattr(error, "said_elsewhere", False):  # by another rank
            _tell_other_ranks(error)
            print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
