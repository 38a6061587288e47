"""The whole product of plans, models and ranks, each against the unsplit model: ``python -m tests.distributed.all``.

    parent    captures each model once, works out which cases are equal by construction
      forks   a child that trains the unsplit models, once each
      works out all that is a pure function of plan and model for the next cases (``remembered``)
      forks   2 ranks, 3 ranks, ...: a process group for those cases, a line a case into the results file

A case whose Program is that of an earlier one, and of whose parameters no two ranks hold the same part where the ZeRO
level differs, is equal by construction and is not run again: with one microbatch a replica on one stage all schedules
are one list of instructions, and ZeRO has nothing to shard where nothing is held twice.

Results are kept, a JSON line a case: a second call goes on where the first one ended. ``--again``: those that failed,
too.
"""

from __future__ import annotations

import argparse
import atexit
import faulthandler
import gc
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from partita.cluster import Cluster, Device
from partita.graph import Graph
from partita.runtime.distributed import join_world
from partita.runtime.distributed.boxes import boxes
from tests.distributed import remembered
from tests.distributed.cases import Case, outcome, plan_of, product_of, reference, run
from tests.distributed.models import FAMILIES
from tests.distributed.spawn import free_port

SIZES = (2, 3, 4, 6, 8)
ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(tempfile.gettempdir()) / "partita-matrix.jsonl"
SILENCE_SECONDS = 180.0
TOGETHER = 64  # cases that one set of processes runs


# -- equal by construction ---------------------------------------------------------------------------------------------


def apart(cases: Sequence[Case], graphs: dict[str, Graph]) -> tuple[list[Case], Counter[str]]:
    """The cases that differ from every earlier one, and how many others are equal to one, by the reason."""
    seen: dict[object, Case] = {}
    kept, equal = [], Counter[str]()
    made: dict[Case, tuple[int, bool]] = {}
    programs: dict[object, int] = {}
    for case in cases:
        alike = replace(case, zero=0)
        if alike not in made:
            graph = graphs[case.model]
            plan = plan_of(alike)
            found = remembered.laid_out(graph, batch_norm=plan.batch_norm)
            division = remembered.divided(graph, found, plan, batch=graph.batch)
            program = remembered.lowered(graph, found, plan, batch=graph.batch, division=division)
            held = boxes(program, [t.name for t in graph.of_role("parameter")], case.ranks, division)
            shared = any(len(ranks) > 1 for box in held.values() for ranks in box.sets)
            made[alike] = programs.setdefault((case.model, case.tp, program), len(programs)), shared
        number, shared = made[alike]
        key = number, case.zero if shared else 0
        if key not in seen:
            seen[key] = case
            kept.append(case)
        elif seen[key].schedule != case.schedule or seen[key].microbatches != case.microbatches:
            equal["the same instructions under another schedule or number of microbatches"] += 1
        else:
            equal["ZeRO where no two ranks hold the same part of a parameter"] += 1
    return kept, equal


def widest_first(cases: Sequence[Case], seed: int) -> list[Case]:
    """In an order drawn by ``seed``, but those first that show most of what none before shows: of each family, every
    kind of division under every schedule, ZeRO level and degree. What there is time for is then a wide sample, and
    after those first a fair one: each family, division, schedule and level is spread over the rest."""
    left, seen, found = list(cases), set[object](), list[Case]()
    random.Random(seed).shuffle(left)
    while left:
        best = max(left, key=lambda c: len(shows(c) - seen))
        if shows(best) <= seen:
            break
        seen |= shows(best)
        found.append(best)
        left.remove(best)
    return found + evenly(left)


def evenly(cases: Sequence[Case]) -> list[Case]:
    """Families, divisions, schedules and ZeRO levels each spread over the whole list; in each in the order given."""
    groups: dict[object, list[Case]] = {}
    for case in cases:
        groups.setdefault((case.model, case.pp, case.dp, case.tp), []).append(case)
    placed = []
    for number, group in enumerate(groups.values()):
        kinds = Counter[object]()
        turn = {c: (kinds.update([(c.schedule, c.zero)]), kinds[c.schedule, c.zero])[1] for c in group}
        phase = (number * 0.6180339887) % 1.0
        for i, case in enumerate(sorted(group, key=turn.__getitem__)):
            placed.append(((i + phase) / len(group), case))
    return [case for _, case in sorted(placed, key=lambda p: p[0])]


def shows(case: Case) -> set[object]:
    """What a case is the first example of, perhaps."""
    kind = tuple(n > 1 for n in (case.pp, case.dp, case.tp))
    degrees = {(case.model, name, getattr(case, name)) for name in ("pp", "dp", "tp", "zero", "schedule")}
    pairs = {(case.model, kind, case.schedule if case.pp > 1 else ""), (case.model, kind, case.zero)}
    return {*degrees, *pairs, (kind, case.zero, case.schedule)}


# -- one rank ----------------------------------------------------------------------------------------------------------


def serve(cases: Sequence[Case], references: Path, results: Path, until: float, stamp: str) -> None:
    """Run cases on this rank until they or the time are over; rank 0 writes the results."""
    torch.set_num_threads(1)
    gc.freeze()  # what the parent made is never looked through again
    world = join_world()
    devices = tuple(Device(f"cpu:{r}", "cpu", 1 << 34, 1e10, 1e10) for r in range(world.size))
    known: dict[str, Any] = {}
    with open(results, "a") as file:
        for case in cases:
            if world.from_first(time.time() > until, "whether there is time"):
                break
            remembered.about(case.model)
            if case.model not in known:
                known[case.model] = torch.load(references / case.model, weights_only=False)
            began, spent = time.monotonic(), time.process_time()
            if world.rank == 0:
                (references / "running").write_text(str(case))
            problems = outcome(case, lambda c: run(c, Cluster(devices), known[c.model]))
            gc.collect()  # a case's cycles hold what it shared with other ranks
            every = world.gather((problems, time.process_time() - spent), "the results of a case")
            problems = [f"rank {r}: {p}" for r, (found, _) in enumerate(every) for p in found]
            if world.rank == 0:
                write(file, case, problems, time.monotonic() - began, sum(cpu for _, cpu in every), stamp)


def write(file: Any, case: Case, problems: Sequence[str], seconds: float, processors: float, stamp: str) -> None:
    line = {"case": str(case), "ranks": case.ranks, "count": len(problems), "problems": list(problems[:4]),
            "seconds": round(seconds, 2), "processors": round(processors, 2), "code": stamp}  # fmt: skip
    file.write(json.dumps(line) + "\n")
    file.flush()
    verdict = "ok  " if not problems else "FAIL"
    print(f"{verdict} {case.ranks} ranks  {case}  {seconds:.1f} s, of processors {processors:.1f}", *problems[:2],
          sep="\n     ", flush=True)  # fmt: skip


# -- processes ---------------------------------------------------------------------------------------------------------


def forked(work: Callable[[], None], log: Path, environment: dict[str, str] | None = None) -> int:
    """The process that does ``work``; what it says on stderr goes into ``log``."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.environ.update(environment or {})
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        faulthandler.enable()
        work()
        code = 0
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        os._exit(code)


def started(size: int, work: Callable[[], None], folder: Path) -> dict[int, int]:
    """So many ranks that do ``work``: process -> rank."""
    port = free_port()
    children = {}
    for rank in range(size):
        environment = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_PORT": str(port),
                       "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "PARTITA_STALL": "90"}  # fmt: skip
        children[forked(work, folder / f"{rank}.err", environment)] = rank
    return children


def ended(children: dict[int, int], results: Path) -> bool:
    """Wait for the ranks; whether all ended well. Ranks that are silent for long are killed."""
    codes: dict[int, int] = {}
    written, silent = -1, 0.0
    while len(codes) < len(children):
        for child in set(children) - set(codes):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                codes[child] = os.waitstatus_to_exitcode(status)
        now = results.stat().st_size if results.exists() else 0
        if now != written:
            written, silent = now, 0.0
        silent += 0.1  # counted, not read from a clock: all of them may be suspended for minutes
        if silent > SILENCE_SECONDS:
            for child in set(children) - set(codes):
                os.kill(child, signal.SIGKILL)
        time.sleep(0.1)
    return not any(codes.values())


def last_words(folder: Path, size: int) -> list[str]:
    found = []
    for rank in range(size):
        path = folder / f"{rank}.err"
        lines = path.read_text().strip().splitlines() if path.exists() else []
        if lines:
            found.append(f"rank {rank} ended: {lines[-1][:400]}")
    return found or ["the ranks stood still"]


def fingerprint() -> str:
    """Of the code that the results are of."""
    found = hashlib.sha256()
    for path in sorted((ROOT / "src").rglob("*.py")):
        found.update(path.read_bytes())
    return found.hexdigest()[:10]


def known(results: Path) -> dict[str, dict[str, Any]]:
    """The last result of each case."""
    if not results.exists():
        return {}
    lines = (json.loads(line) for line in results.read_text().splitlines())
    return {found["case"]: found for found in lines}


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.distributed.all", description=__doc__.split("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--ranks", default=",".join(map(str, SIZES)))
    parser.add_argument("--models", default=",".join(FAMILIES))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--seconds", type=float, default=1e9, help="end after so long; the next call goes on")
    parser.add_argument("--most", type=int, help="of each number of ranks no more than so many cases, the widest first")
    parser.add_argument("--again", action="store_true", help="run those that failed again")
    parser.add_argument("--only", default="", help="cases that begin with this, whether they have results or not")
    parser.add_argument("--summary", action="store_true", help="run nothing")
    given = parser.parse_args(words)
    began = time.time()
    torch.set_num_threads(1)
    models = given.models.split(",")
    remembered.remember()
    graphs = {model: remembered.calls_of(model)[0][0].graph for model in models}
    wanted: dict[int, list[Case]] = {}
    equal: Counter[str] = Counter()
    for size in map(int, given.ranks.split(",")):
        cases = [c for c in product_of(size) if c.model in models]
        if given.most:
            cases = widest_first(cases, seed=size)[: 2 * given.most]  # some of them are equal by construction
        wanted[size], others = apart(cases, graphs)
        equal += others
        wanted[size] = widest_first(wanted[size], seed=size)[: given.most]
    if not given.summary:
        folder = Path(tempfile.mkdtemp())  # not a TemporaryDirectory: each child would remove it at its end
        try:
            _run(wanted, given, folder, began + given.seconds, models)
        finally:
            shutil.rmtree(folder)
    return summary(wanted, known(given.results), equal)


def _run(
    wanted: dict[int, list[Case]], given: argparse.Namespace, folder: Path, until: float, models: list[str]
) -> None:
    def refer() -> None:
        for model in models:
            torch.save(reference(FAMILIES[model], Case(model, 1, 1).rows), folder / model)

    os.waitpid(forked(refer, folder / "reference.err"), 0)
    stamp, running = fingerprint(), folder / "running"
    for size, cases in wanted.items():
        done = known(given.results)
        left = neighbours([c for c in cases if wants(c, done, given)])
        remembered.forget()
        remembered.prepare(left[:TOGETHER])
        while left and time.time() < until:
            now, then = left[:TOGETHER], left[TOGETHER:]
            running.write_text("")
            ranks = started(size, lambda now=now: serve(now, folder, given.results, until, stamp), folder)  # type: ignore[misc]
            remembered.forget()  # the ranks have it
            remembered.prepare(then[:TOGETHER])
            if ended(ranks, given.results):
                left = then
                continue
            if not running.read_text():
                print("\n".join(last_words(folder, size)))
                break
            died = Case.read(running.read_text())
            left = left[left.index(died) + 1 :]
            with open(given.results, "a") as file:
                write(file, died, last_words(folder, size), 0.0, 0.0, stamp)
            remembered.prepare(left[:TOGETHER])


def neighbours(cases: Sequence[Case]) -> list[Case]:
    """Those that differ in their ZeRO level only one after the other."""
    groups: dict[Case, list[Case]] = {}
    for case in cases:
        groups.setdefault(replace(case, zero=0), []).append(case)
    return [case for group in groups.values() for case in group]


def wants(case: Case, done: dict[str, dict[str, Any]], given: argparse.Namespace) -> bool:
    if given.only:
        return str(case).startswith(given.only)
    return str(case) not in done or (given.again and bool(done[str(case)]["count"]))


def summary(wanted: dict[int, list[Case]], done: dict[str, dict[str, Any]], equal: Counter[str]) -> int:
    """Print what was found, by ranks and by reason; 1 where something differs or was not run."""
    wrong, missing = Counter[str](), 0
    print("\nranks  cases  equal  different  not run  seconds  of processors")
    for size, cases in wanted.items():
        found = [done[str(c)] for c in cases if str(c) in done]
        bad = [f for f in found if f["count"]]
        missing += len(cases) - len(found)
        for each in bad:
            wrong[each["problems"][0].split(": ", 1)[-1].split(" off by")[0]] += 1
        print(f"{size:5}  {len(cases):5}  {len(found) - len(bad):5}  {len(bad):9}  {len(cases) - len(found):7}  "
              f"{sum(f['seconds'] for f in found):7.0f}  "
              f"{sum(f.get('processors', 0.0) for f in found):13.0f}")  # fmt: skip
    for reason, count in equal.most_common():
        print(f"not run, equal by construction: {count} ({reason})")
    for reason, count in wrong.most_common(20):
        print(f"different: {count} ({reason})")
    codes = Counter(done[str(c)]["code"] for cases in wanted.values() for c in cases if str(c) in done)
    print("code " + ", ".join(f"{code}: {count}" for code, count in codes.most_common()))
    return int(bool(wrong) or missing > 0)
