"""Watch: a thread in every rank that notices when another rank has failed, ended or stands still, and says so once.

    rank 0   beat . . . . beat . reads: rank 1's beat is 15 s old ──▶ notice: "rank 1 (cpu:1) ...", read by all
    rank 1   beat . (stopped)
    rank 2   beat . . . . beat . . . . . . . . . . reads the notice; its main thread ends with that sentence

Beats and the notice are keys of the store through which the ranks found each other. A rank stands still when neither
its main thread moves on nor its processes use CPU or input and output for ``PARTITA_STALL`` seconds (default 15) while
another rank waits: slow work is never mistaken for it. A rank that is itself at fault, or that cannot be woken from a
wait in a library, is ended by its own watch.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType, TracebackType
from typing import Any

import psutil

from partita.errors import ExecutionError, PartitaError
from partita.torch_compat import tcp_store

BEAT_SECONDS = 1.0
GRACE_SECONDS = 6.0
STORE_SECONDS = 10.0  # how long a request to the store may take
FRESH_SECONDS = 3.5


class Elsewhere(ExecutionError):
    """The step ended here because another rank failed; that rank's own output has the traceback."""


@dataclass(frozen=True, slots=True)
class Notice:
    """What ended the run: the rank it began on, and a sentence. ``still``: that rank hangs, and must be ended."""

    rank: int
    text: str
    still: bool = False


def stall_seconds() -> float:
    return float(os.environ.get("PARTITA_STALL", "15"))


class Watch:
    """``what``: what the main thread does now, in words. ``describe``: a rank's stage and modules, once planned."""

    def __init__(self, rank: int, size: int, kind: str) -> None:
        self.rank, self.size, self.kind = rank, size, kind
        self.notice: Notice | None = None
        self.describe: Callable[[int], str] = lambda rank: ""
        self.what = "before its first step"
        self.moves = 0
        self.inside = False
        self._waits, self._polls, self._since = "", False, 0.0
        self._alive = (0.0, (-1, 0.0, 0))
        self._seen: dict[int, tuple[str, float]] = {}
        self._store: Any = None
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._term: tuple[socket.socket, socket.socket] | None = None
        self._prefix = ""
        self._threads: tuple[threading.Thread, ...] = ()
        self._heard = 0.0

    # -- the main thread's side ----------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def waiting(self, what: str, *, polls: bool = False) -> Iterator[None]:
        """While open, the main thread waits for others, whose failure is raised here; ``polls``: looking is no life."""
        self.check()
        before = self._waits, self._polls
        self._waits, self._polls, self._since = what, polls, time.monotonic()
        try:
            yield
        except RuntimeError as error:  # a connection closed, a group's own timeout
            raise self.blame(what, error) from None
        finally:
            self._waits, self._polls = before
            self.moves += 1

    @contextlib.contextmanager
    def working(self, what: str) -> Iterator[None]:
        """While open, the main thread does work of its own, within a wait too: where it stands still, it is at
        fault."""
        before, waits = self.what, self._waits
        self.what, self._waits = what, ""
        self.moved()
        try:
            yield
        finally:
            self.what, self._waits, self._since = before, waits, time.monotonic()
            self.moved()

    def moved(self) -> None:
        """The main thread has come a step further."""
        self.moves += 1

    def reached(self, what: str, stage: int, microbatch: int) -> None:
        """The main thread has come to this point of its step."""
        which = "the whole batch" if microbatch < 0 else f"microbatch {microbatch}"
        self.what = f"the {what} of {which} in stage {stage}"
        self.moves += 1

    def check(self) -> None:
        """Raise what is known to have ended the run."""
        if self.notice is not None:
            raise self.raised(self.notice)

    def failed(self, error: BaseException) -> None:
        """Tell the others that this rank's step failed."""
        if isinstance(error, Elsewhere):
            return
        text = str(error) if isinstance(error, ExecutionError) else f"{type(error).__name__}: {error}"
        self._post(Notice(self.rank, text.split("\n")[0]))

    def blame(self, what: str, error: Exception) -> ExecutionError:
        """The error that explains a broken wait: what a rank has said, or which one has gone silent."""
        until = time.monotonic() + 2 * GRACE_SECONDS
        while time.monotonic() < until and self.notice is None:
            try:
                self._look(silent_after=FRESH_SECONDS)
            except RuntimeError:  # the store has gone as well
                self._lost()
            time.sleep(0.2)
        if self.notice is None:
            self._post(Notice(self.rank, f"waiting for {what}: {error}"))
        assert self.notice is not None
        return self.raised(self.notice)

    def raised(self, notice: Notice) -> ExecutionError:
        if notice.rank == self.rank:
            return ExecutionError(notice.text)
        return Elsewhere(self.sentence(notice))

    def sentence(self, notice: Notice) -> str:
        return f"{self.place(self.rank)} stops because {self.place(notice.rank)} failed: {notice.text}"

    def place(self, rank: int) -> str:
        """``rank 1 (cpu:1, stage 1: blocks.2 to head)``."""
        role = self.describe(rank)
        return f"rank {rank} ({self.kind}:{rank}{', ' + role if role else ''})"

    # -- the thread ----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to beat. All ranks call it once."""
        address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
        if not address or not port:
            return  # the user's own rendezvous: no store to share; waits end with the group's timeout
        self._prefix = "/".join(
            ("partita", os.environ.get("TORCHELASTIC_RUN_ID", "-"), os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        )
        self._store = tcp_store(
            address, int(port), is_master=False, wait_for_workers=False, timeout=timedelta(seconds=STORE_SECONDS)
        )
        self._listen_for_term()
        self._speak_plainly()
        self._beat()
        self._threads = (
            threading.Thread(target=self._serve, name="partita watch", daemon=True),
            threading.Thread(target=self._guard, name="partita guard", daemon=True),
        )
        self._heard = time.monotonic()
        for thread in self._threads:
            thread.start()
        atexit.register(self.leave)

    def leave(self) -> None:
        """This rank has come to the end of its script."""
        if self._ended.is_set() or not self._threads:
            return
        self._ended.set()
        if self._term is not None:
            self._term[1].send(b"\0")  # wake the thread
        until = time.monotonic() + STORE_SECONDS + GRACE_SECONDS
        for thread in self._threads:  # one that wakes in the store while the interpreter ends aborts the process
            thread.join(max(0.0, until - time.monotonic()))
        if self.notice is None:
            with contextlib.suppress(RuntimeError):
                self._set(f"beat/{self.rank}", json.dumps({"end": True}))

    def _serve(self) -> None:
        lost = 0
        while not self._ended.is_set():
            before = time.monotonic()
            if self._pause(BEAT_SECONDS):
                self._terminated()
            if time.monotonic() - before > stall_seconds() / 2:  # stopped itself: nobody's silence is known
                self._seen.clear()
                self._alive = time.monotonic(), self._alive[1]
            if self._ended.is_set():
                return
            try:
                self._beat()
                self._look(silent_after=stall_seconds())
                lost, self._heard = 0, time.monotonic()
            except RuntimeError:  # the store is gone, and with it the process that kept it
                lost += 1
                if lost >= 3 and not self._ended.is_set():
                    self._lost()
            self._act()

    def _guard(self) -> None:
        """A store that does not answer at all, because the process that keeps it is stopped, holds up ``_serve``."""
        before = time.monotonic()
        while not self._ended.wait(BEAT_SECONDS):
            now = time.monotonic()
            if now - before > stall_seconds() / 2:  # this process was stopped as well
                self._heard = now
            elif now - self._heard > stall_seconds():
                self._lost()
                self._act()
            before = now

    def _lost(self) -> None:
        """The store is gone: it was the launcher's, or rank 0's."""
        agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE", "False") == "True"
        text = (
            "the launcher (torchrun) has ended" if agent else "it has ended without a word (killed, or out of memory?)"
        )
        self.notice = self.notice or Notice(0, text)

    def _pause(self, seconds: float) -> bool:
        """Wait; True where the process was told to end meanwhile."""
        if self._term is None:
            self._ended.wait(seconds)
            return False
        readable, _, _ = select.select([self._term[0]], [], [], seconds)
        return bool(readable) and signal.SIGTERM in self._term[0].recv(64)

    def _beat(self) -> None:
        now = time.monotonic()
        use = (self.moves, time.process_time(), 0)
        since, before = self._alive
        works = not self._polls and use[1] - before[1] > 0.02 * max(now - since, BEAT_SECONDS)
        if use[0] != before[0] or works:
            self._alive = since, before = now, use
        elif now - since > stall_seconds() / 2:
            use = (*use[:2], _family_work())
            if before[2] == 0:
                self._alive = since, before = since, (*before[:2], use[2])
            elif use[2] != before[2]:
                self._alive = since, before = now, use
        waits = self._waits if now - self._since > BEAT_SECONDS else ""
        count = int(now * 1000)
        report = {"n": count, "idle": round(now - since, 1), "waits": waits, "what": self.what, "inside": self.inside}
        self._set(f"beat/{self.rank}", json.dumps(report))

    def _look(self, silent_after: float) -> None:
        """Read the notice; write it where a rank is found silent or standing still."""
        if self._store is None or self.notice is not None:
            return
        with self._lock:
            if self._store.check([f"{self._prefix}/notice"]):
                self.notice = Notice(**json.loads(self._store.get(f"{self._prefix}/notice")))
                return
        watched = range(self.size) if self.rank == 0 or silent_after < stall_seconds() else (0,)
        now, idle = time.monotonic(), {}
        for rank in watched:
            key = f"{self._prefix}/beat/{rank}"
            with self._lock:
                text = self._store.get(key).decode() if self._store.check([key]) else ""
            seen, since = self._seen.get(rank, ("", now))
            if text != seen:
                since = now
            self._seen[rank] = text, since
            report = json.loads(text) if text else {}
            if report.get("end"):
                if self._waits and now - self._since > FRESH_SECONDS:
                    self._post(Notice(rank, f"it has ended while {self.place(self.rank)} waits for {self._waits}"))
                    return
                continue
            if text and now - since > silent_after:
                self._post(Notice(rank, "it has ended without a word (killed, or out of memory?)"))
                return
            idle[rank] = report
        self._standing_still(idle)

    def _standing_still(self, reports: dict[int, dict[str, Any]]) -> None:
        limit = stall_seconds()
        if len(reports) < 2 or not any(r.get("waits") for r in reports.values()):
            return
        for rank, report in reports.items():
            if report and not report["waits"] and report["idle"] > limit:
                self._post(Notice(rank, f"it has stood still for {report['idle']:.0f} s in {report['what']}", True))
                return
        if all(r and r["waits"] and r["idle"] > 2 * limit for r in reports.values()):
            each = "; ".join(f"rank {rank} for {r['waits']}" for rank, r in reports.items())
            self._post(Notice(0, f"all ranks wait for one another: {each}. Do all ranks make the same calls?", True))

    def _act(self) -> None:
        """Where there is a notice: end this process if it is the one that hangs, or cannot be woken."""
        notice = self.notice
        if notice is None:
            return
        if notice.still and notice.rank == self.rank and not self._waits:
            if self.rank == 0:
                time.sleep(2 * BEAT_SECONDS)  # the store may end with this process, and the others are to read why
            self._end(f"{self.place(self.rank)} is ended: {notice.text}", 1)
        if self._waits:
            since = max(self._since, time.monotonic() - 1e9)
            deadline = time.monotonic() + GRACE_SECONDS
            while self._waits and self._since == since and time.monotonic() < deadline:
                time.sleep(0.1)
            if self._waits and self._since == since:
                self._end(self.sentence(notice), 1)

    def _terminated(self) -> None:
        """SIGTERM: the launcher ends the run because of another rank. Say why, where it can be found out."""
        until = time.monotonic() + GRACE_SECONDS
        while self.notice is None and time.monotonic() < until:
            with contextlib.suppress(RuntimeError):
                self._beat()
                self._look(silent_after=FRESH_SECONDS)
            time.sleep(0.2)
        text = self.sentence(self.notice) if self.notice else f"{self.place(self.rank)} was told to end"
        self._end(text, 128 + signal.SIGTERM)

    def _end(self, text: str, code: int) -> None:
        print(f"partita: {text}", file=sys.stderr, flush=True)
        os._exit(code)

    def _set(self, key: str, value: str) -> None:
        with self._lock:
            if self._store is not None:
                self._store.set(f"{self._prefix}/{key}", value)

    def _post(self, notice: Notice) -> None:
        """The first notice stands."""
        text = json.dumps({"rank": notice.rank, "text": notice.text, "still": notice.still})
        if self._store is None:
            self.notice = self.notice or notice
            return
        with self._lock, contextlib.suppress(RuntimeError):
            text = self._store.compare_set(f"{self._prefix}/notice", "", text).decode()
        self.notice = self.notice or Notice(**json.loads(text))

    def _speak_plainly(self) -> None:
        """At the end of a script that failed: the others hear of it; what another rank has said, or what is the user's
        to mend, is a line and not a traceback."""
        before = sys.excepthook

        def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
            if isinstance(error, Elsewhere):
                print(f"partita: {error}", file=sys.stderr, flush=True)
                return
            self.failed(error)
            if isinstance(error, PartitaError) and not isinstance(error, ExecutionError):
                if not getattr(error, "said_elsewhere", False):
                    print(f"error: {error}", file=sys.stderr, flush=True)
                return
            before(kind, error, trace)

        sys.excepthook = hook

    def _listen_for_term(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        if signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
            return  # the user's own handler
        ends = socket.socketpair()
        ends[1].setblocking(False)
        if signal.set_wakeup_fd(ends[1].fileno(), warn_on_full_buffer=False) != -1:
            return
        self._term = ends
        signal.signal(signal.SIGTERM, _nothing)


def _nothing(number: int, frame: FrameType | None) -> None:
    """The watch thread acts; this only keeps the process alive until it has."""


def _family_work() -> int:
    """A number that grows with the CPU time and the input and output of this process's children."""
    total = 1
    with contextlib.suppress(psutil.Error):
        me = psutil.Process()
        for process in (me, *me.children(recursive=True)):
            with contextlib.suppress(psutil.Error, AttributeError):
                moved = process.io_counters()
                total += (moved.read_bytes + moved.write_bytes) >> 12
                if process.pid != me.pid:
                    used = process.cpu_times()
                    total += int(20 * (used.user + used.system))
    return total
