"""A polite end: a signal is noted, the loop looks at the note between steps. Knows nothing of training."""

from __future__ import annotations

import os
import signal
from typing import Any

from moltron.common.logging import get_logger

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)  # a scheduler's end, Slurm's warning, Ctrl-C

log = get_logger(__name__)


class StopSignal:
    """Notes that a signal asked for an end; the second one ends the process at once."""

    def __init__(self) -> None:
        self.received = False
        self.before: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        try:
            for number in SIGNALS:
                self.before[number] = signal.signal(number, self._note)
        except ValueError:
            log.info("Not in the main thread: signals are not handled")
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        if self.received:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.received = True
        log.warning("%s: finishing this step, then saving; once more ends at once", signal.Signals(number).name)
