"""One command at a time in a folder that it fills: who comes second is told who is there.

    with locked(run / ".lock", rank, agree):    rank 0 locks the file, `agree` tells the others what came of it

The kernel keeps the lock (POSIX, fcntl.lockf): it ends with the process, kill -9 included, and unlike flock's it is not
handed on to forked data workers, which may live seconds longer. It keeps processes apart, not threads of one. Knows
nothing of what is in the folder.
"""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from moltron.common.logging import get_logger

log = get_logger(__name__)


@contextmanager
def locked(path: Path, rank: int, agree: Callable[[str | None], str | None]) -> Iterator[None]:
    """Hold `path`, made if need be with its folder. agree: rank 0's value on every rank.

    Raises: ValueError on every rank where another process holds it.
    """
    file = None
    if rank == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115
    try:
        if problem := agree(_lock(file) if file else None):
            raise ValueError(f"{path.parent} is in use by {problem}: wait for its end, or choose another folder")
        yield
    finally:
        if file is not None:
            file.close()


def _lock(file: TextIO) -> str | None:
    """Who has the file; None: now we do."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        return file.read().strip() or "another process"
    except OSError as error:
        log.warning("%s: this file system has no locks (%s): see to it that only one command uses it", file.name, error)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return None
