"""A rank that hangs ends its whole job, by name; torchrun starts all of them again.

    doing("computing", 31) ──> this rank's place ──a thread, BEATS times in the limit──> run/.ranks/00002.json
    no report of ours for the limit ──> all ranks' places, read twice ──> who is silent, or behind ──> one line, exit 1

All ranks make the same reports in the same order, so the one with the fewest is the one that the others wait for. A
process that is stopped, or whose node is lost, has no beat either. Places are files, which all nodes see: torch's store
may live in the process that hangs. Time is counted in beats: a job that was suspended as a whole does not hang. Knows
nothing of training and of torch.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from moltron.common.logging import get_logger

BEATS = 20
SHOWN = 4  # ranks that a line names

log = get_logger(__name__)


class Place(NamedTuple):
    """Where a rank is. beats: of its thread so far. reports: of its main thread. line: of ours that runs there."""

    host: str = "an unknown host"
    pid: int = 0
    beats: int = 0
    reports: int = 0
    step: int = 0
    what: str = "starting"
    line: str = ""


_here = Place(socket.gethostname())


def doing(what: str, step: int | None = None) -> None:
    """Report what this rank begins to do; step: None: the one before. Costs nothing, waits for nothing."""
    global _here
    _here = _here._replace(what=what, step=_here.step if step is None else step, reports=_here.reports + 1)


class Watchdog:
    """Watches this rank while it is entered. folder: of the job, emptied. minutes: without a report, a hang."""

    def __init__(self, folder: Path, rank: int, world: int, minutes: float):
        self.files = [folder / f"{r:05d}.json" for r in range(world)]
        self.folder, self.rank, self.minutes = folder, rank, minutes
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        if self.rank == 0:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.over.set()
        self.thread.join()
        with suppress(OSError):
            self.files[self.rank].unlink(missing_ok=True)
            self.folder.rmdir()  # the last one does

    def _watch(self) -> None:
        beats = still = last = 0
        before: list[Place] = []
        while not self.over.wait(self.minutes * 60 / BEATS):
            beats, here = beats + 1, _here
            still, last = still + 1 if here.reports == last else 0, here.reports
            with suppress(OSError):  # a full disk is no hang
                self.folder.mkdir(exist_ok=True)
                partial = self.files[self.rank].with_suffix(".partial")
                partial.write_text(json.dumps(here._replace(pid=os.getpid(), beats=beats, line=_line())))
                os.replace(partial, self.files[self.rank])
            if still == BEATS // 2:
                before = self._places()
            if still >= BEATS:
                self._end(verdict(before, self._places(), self.minutes))

    def _places(self) -> list[Place]:
        places = [Place()] * len(self.files)
        for rank, file in enumerate(self.files):
            with suppress(OSError, ValueError):
                places[rank] = Place(*json.loads(file.read_text()))
        return places

    def _end(self, line: str) -> None:
        """Whoever comes first says it."""
        try:
            (self.folder / "said").touch(exist_ok=False)
            log.error("%s", line)
        finally:
            os._exit(1)


def verdict(before: list[Place], now: list[Place], minutes: float) -> str:
    """Which of the ranks are to blame; before: half of `minutes` earlier, when all of them stood still, too."""
    fewest = min(place.reports for place in now)
    silent = [r for r, place in enumerate(now) if place == before[r]]
    culprits = silent or [r for r, place in enumerate(now) if place.reports == fewest]
    named = [
        f"rank {r} (process {p.pid} on {p.host}) at step {p.step}, {p.what}{p.line and f', {p.line}'}"
        for r, p in ((r, now[r]) for r in culprits[:SHOWN])
    ]
    if len(culprits) > SHOWN:
        named.append(f"{len(culprits) - SHOWN} more")
    if silent:
        found = f"{'; '.join(named)}: without a sign of life, the process is stopped or its node lost"
    elif len(culprits) == len(now):
        found = f"all ranks wait at the same place: {'; '.join(named)}"
    else:
        found = f"{'; '.join(named)}: the other {len(now) - len(culprits)} ranks wait for it"
    fix = f"if nothing was wrong, raise train.hang_minutes={minutes:g}"
    return f"No progress for {minutes:g} minutes: {found}. Every rank ends, for torchrun to start again ({fix})."


def _line() -> str:
    """The innermost line of this package that the main thread is at."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None and not frame.f_globals.get("__name__", "").startswith("moltron"):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}" if frame is not None else ""
