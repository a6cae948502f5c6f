"""One command at a time for an output: who comes second is told who is there.

    with locked(run / ".lock", rank, agree):    rank 0 locks the file, `agree` tells the others what came of it

The kernel keeps the lock (POSIX, fcntl.lockf): it ends with the process, kill -9 included, and unlike flock's it is not
handed on to forked data workers, which may live seconds longer. It keeps processes apart, not threads of one. Knows
nothing of outputs.
"""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from moltron.common.logging import get_logger

log = get_logger(__name__)


@contextmanager
def locked(path: Path, rank: int, agree: Callable[[str | None], str | None]) -> Iterator[None]:
    """Hold `path`, made with its folder and removed at the end, the folder too if nothing has come into it.

    agree: rank 0's value on every rank. Raises: ValueError on every rank where another process holds it.
    """
    file, is_new, problem = None, not path.parent.exists(), None
    if rank == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115
        problem = _lock(file, path)
    try:
        if said := agree(problem):
            raise ValueError(f"{path} is held by {said}: wait for its end, or choose another place for the output")
        yield
    finally:
        if file is not None:
            if problem is None:
                path.unlink(missing_ok=True)
            file.close()  # before the folder goes: NFS keeps open files in it
            if is_new:
                with suppress(OSError):
                    path.parent.rmdir()


def _lock(file: TextIO, path: Path) -> str | None:
    """Who has the file; None: now we do."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        return file.read().strip() or "another process"
    except OSError as error:
        log.warning("%s: this file system has no locks (%s): see to it that only one command uses it", file.name, error)
    if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
        return "a process that is just ending"  # it has removed what we opened
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return None
