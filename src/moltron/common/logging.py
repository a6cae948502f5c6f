"""What a person sees while a command runs: log lines and one live bar, both on standard error, from rank 0 only.

    get_logger(__name__).info(...)      on a terminal above the bar, else plain lines
    with Progress("train", total) as bar: bar.update(done, "loss 2.91")

Standard output stays free for results. Knows nothing of what is logged.
"""

from __future__ import annotations

import logging
import time
from functools import lru_cache
from types import TracebackType

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

ROOT = "moltron"


@lru_cache(maxsize=1)
def console() -> Console:
    return Console(stderr=True)


def get_logger(name: str) -> logging.Logger:
    """The logger of one module; `name` is its `__name__`."""
    return logging.getLogger(name)


def setup_logging(rank: int = 0) -> None:
    """Send the package's log lines to standard error; ranks other than 0 keep to warnings. Safe to call twice."""
    logger = logging.getLogger(ROOT)
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
    if console().is_terminal:
        handler = RichHandler(console=console(), show_path=False, log_time_format="%H:%M:%S", markup=False)
    else:
        handler = logging.StreamHandler()
        prefix = f"[rank {rank}] " if rank else ""
        handler.setFormatter(logging.Formatter(f"%(asctime)s {prefix}%(message)s", "%H:%M:%S"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    logger.propagate = False


class Progress:
    """A live bar on a terminal; elsewhere a log line now and then, at most one every `every` seconds."""

    def __init__(self, name: str, total: int | None, start: int = 0, enabled: bool = True, every: float = 10.0):
        self.name, self.total, self.every, self.enabled = name, total, every, enabled
        self.last_line, self.shown = 0.0, -1
        self.bar: RichProgress | None = None
        if enabled and console().is_terminal:
            name_column, text_column = TextColumn("[bold]{task.description}"), TextColumn("{task.fields[text]}")
            columns = name_column, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
            self.bar = RichProgress(*columns, text_column, console=console(), refresh_per_second=4)
            self.task = self.bar.add_task(name, total=total, completed=start, text="")

    def __enter__(self) -> Progress:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.stop()

    def update(self, completed: int, text: str = "") -> None:
        """completed: how much is done in all, not since the last call."""
        if not self.enabled:
            return
        if self.bar is not None:
            self.bar.update(self.task, completed=completed, text=text)
            return
        now = time.monotonic()
        if completed != self.shown and (completed == self.total or now - self.last_line >= self.every):
            self.last_line, self.shown = now, completed
            of = f"/{self.total}" if self.total is not None else ""
            get_logger(ROOT).info("%s %d%s  %s", self.name, completed, of, text)
