"""A rank that hangs ends its whole job, by name; torchrun starts all of them again.

    doing("step 31: computing") ──> this rank's place ──a thread, BEATS times in the limit──> run/.ranks/2.json
    no report of ours for the limit ──> the places of all ranks: who is silent, or else behind ──> one line, exit 1

All ranks make the same reports in the same order, so the one with the fewest is the one that the others wait for. A
process that is stopped, or whose node is lost, does not write either. Places are files, which all nodes see: torch's
store may live in the process that hangs. Time is counted in beats, so that a job that was suspended as a whole does not
hang. Knows nothing of training and of torch.
"""

from __future__ import annotations

import os
import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from moltron.common.logging import get_logger
from moltron.common.manifest import read_json, write_json

BEATS = 20

log = get_logger(__name__)
_here = 0, "starting"  # reports of this rank so far, and the last one


def doing(what: str) -> None:
    """Report what this rank begins to do. Costs nothing, waits for nothing."""
    global _here
    _here = _here[0] + 1, what


def forget(folder: Path) -> None:
    """Drop what an earlier life of the job left. One rank calls it, before any of them is watched."""
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def watched(folder: Path, rank: int, world: int, minutes: float) -> Iterator[None]:
    """Watch this rank inside of the block. folder: of the job. minutes: without a report they are a hang."""
    over = threading.Event()
    thread = threading.Thread(target=_watch, args=(over, folder, rank, world, minutes), daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        with suppress(OSError):
            (folder / f"{rank}.json").unlink(missing_ok=True)
            folder.rmdir()  # the last one does


def _watch(over: threading.Event, folder: Path, rank: int, world: int, minutes: float) -> None:
    name, still, last = f"rank {rank} (process {os.getpid()} on {socket.gethostname()})", 0, -1
    while True:
        reports, what = _here
        still, last = still + 1 if reports == last else 0, reports
        with suppress(OSError):  # a full disk is no hang
            folder.mkdir(exist_ok=True)
            write_json(folder / f"{rank}.json", [reports, f"{name}, {what}"])
        if still == BEATS:
            break
        if over.wait(minutes * 60 / BEATS):
            return
    try:
        (folder / "said").touch(exist_ok=False)  # by whoever comes first
        log.error("%s", verdict(folder, world, minutes))
    finally:
        os._exit(1)


def verdict(folder: Path, world: int, minutes: float) -> str:
    """Which ranks are to blame, in a job that has stood still for so many minutes."""
    places = [_read(folder / f"{rank}.json", rank) for rank in range(world)]
    newest, fewest = max(time for time, *_ in places), min(reports for _, reports, _ in places)
    silent = [text for time, _, text in places if newest - time > minutes * 30]
    culprits = silent or [text for _, reports, text in places if reports == fewest]
    others = f" and {len(culprits) - 1} more" if culprits[1:] else ""
    why = "all ranks wait at the same place" if len(culprits) == world else "the other ranks wait for it"
    if silent:
        why = "without a sign of life, the process is stopped or its node lost"
    return (
        f"No progress for {minutes:g} minutes: {culprits[0]}{others}: {why}. Every rank ends, for torchrun to start "
        f"again (if nothing was wrong, raise train.hang_minutes={minutes:g})."
    )


def _read(path: Path, rank: int) -> tuple[float, int, str]:
    """When a rank last wrote, by the clock of the file system; its reports; who and where it is."""
    with suppress(OSError, ValueError):
        reports, text = read_json(path)
        return path.stat().st_mtime, reports, text
    return 0.0, 0, f"rank {rank}"
