"""Files that are either whole or not there: JSON, hashes, and folders that appear under their name when complete.

    staged_folder(DIR) ──> .DIR.partial-host-pid/ ──write──fsync──rename──> DIR
    staged_file(FILE)  ──> FILE.partial-pid ──write──fsync──rename──> FILE

Knows nothing of what is in them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def sha256_file(path: str | Path) -> str:
    """Hex SHA-256 of a file's content, in flat memory."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def fsync(path: str | Path) -> None:
    """Forces a file, or a folder's list of names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def staged_file(path: Path) -> Iterator[Path]:
    """Yields a name beside `path` to write to; it takes the name `path` when the block ends without error."""
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    yield partial
    fsync(partial)
    os.replace(partial, path)


def write_json(path: str | Path, content: Any) -> None:
    """Writes JSON so that a reader, or a crash, never sees half of it."""
    with staged_file(Path(path)) as partial:
        partial.write_text(json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: str | Path) -> Any:
    """Raises: ValueError naming the file where it is not JSON, FileNotFoundError where it is not there."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error}): it was damaged or is not ours") from error


@contextmanager
def staged_folder(target: str | Path, marker: str, overwrite: bool = False) -> Iterator[Path]:
    """Yields an empty sibling of `target` to write into; it takes the name `target` when the block ends without error.

    A kill -9 at any moment leaves `target` as it was (or, between the two renames of an overwrite, the old one as
    `.NAME.old-…`); what dead processes of this machine left behind is removed. `overwrite` replaces
    only a folder that has the file `marker`, so that no other folder is ever deleted by mistake.

    Raises: ValueError where `target` exists (and is not empty) and may not be replaced.
    """
    target = Path(os.path.abspath(target))
    occupied = target.exists() and not (target.is_dir() and not any(target.iterdir()))
    if occupied and not overwrite:
        raise ValueError(f"{target} exists: choose another output or set overwrite=true")
    if occupied and not (target / marker).is_file():
        raise ValueError(f"{target} exists and has no {marker}, so it is not ours to overwrite: choose another output")
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(target)
    suffix = f"{socket.gethostname()}-{os.getpid()}"
    stage = target.with_name(f".{target.name}.partial-{suffix}")
    stage.mkdir()
    try:
        yield stage
        for path in [*(p for p in stage.rglob("*") if p.is_file()), stage]:
            fsync(path)
        old = target.with_name(f".{target.name}.old-{suffix}") if occupied else None
        if old is not None:
            os.rename(target, old)
        os.rename(stage, target)
        fsync(target.parent)
        if old is not None:
            shutil.rmtree(old)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _remove_leftovers(target: Path) -> None:
    prefix = f".{target.name}.partial-{socket.gethostname()}-"
    for path in target.parent.iterdir():
        pid = path.name.removeprefix(prefix)
        if path.name.startswith(prefix) and pid.isdigit() and not _is_alive(int(pid)):
            shutil.rmtree(path, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return pid != os.getpid()  # our own number on a leftover: a recycled pid
