"""The verbs ``plan`` and ``explain`` of the command line."""

from __future__ import annotations

from typing import Annotated

import typer

from partita.cli_options import BatchSize, Devices, Factory, Json, Memory, Out, print_json, writable
from partita.cluster import Cluster
from partita.plan import Plan


def plan(
    factory: Factory,
    devices: Devices = "auto",
    cluster_spec: Annotated[
        str, typer.Option("--cluster", help="A cluster you need not have: 128x8xH100, 8xA100 + 2x8xV100, or a file.")
    ] = "",
    memory: Memory = None,
    batch: BatchSize = None,
    seq: Annotated[int | None, typer.Option(help="Tokens a sample, for llama-405b and other named models.")] = None,
    optimizer: Annotated[str, typer.Option(help="Whose state to leave room for: adamw, sgd, none ...")] = "adamw",
    objective: Annotated[str, typer.Option(help="train or inference.")] = "train",
    constraint: Annotated[
        list[str] | None,
        typer.Option(help="NAME=VALUE: max_stages=2, tensor=8, 'place={blocks.0: cpu:1}', recompute=b*"),
    ] = None,
    constraints_file: Annotated[str, typer.Option("--constraints", help="A YAML file of constraints.")] = "",
    output: Out = None,
    as_json: Json = False,
) -> None:
    """Find the best plan for a model on these devices; nothing is run.

    With --cluster every degree is searched (stages, replicas, tensor, ZeRO, recomputation, interleaving) in closed
    form, in mixed precision where the devices have it. FACTORY may then be a name: llama-405b, gpt3-175b ...
    """
    from partita.plan_text import complete
    from partita.planners.constraints import Constraints

    cluster = Cluster.parse(cluster_spec or devices, memory=memory)
    limits = Constraints.parse(constraint or (), constraints_file)
    writable(output)
    from partita.factory import load

    model, args, kwargs = load(factory, None if cluster_spec else batch, seq)
    from partita import api

    if cluster_spec:
        found = api.plan_for_cluster(
            model, args, kwargs, cluster, batch or 0, optimizer=optimizer, objective=objective, constraints=limits
        )
    else:
        found = api.find_plan(
            model, args, kwargs, cluster=cluster, optimizer=optimizer, objective=objective, constraints=limits
        )
    if not as_json:
        found = complete(found)
    if output is not None:
        found.save(output)
    if as_json:
        print_json(found)
    else:
        print(found.explain())
        if output is not None:
            print(f"\nwritten to {output}")


def explain(
    plan_file: Annotated[str, typer.Argument(metavar="PLAN", help="A plan file.")], as_json: Json = False
) -> None:
    """Say in words what a plan file does, and why."""
    found = Plan.load(plan_file)
    if as_json:
        print_json(found)
    else:
        print(found.explain())
