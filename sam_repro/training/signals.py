"""Told to stop: remember it, finish the step, save, and only then leave."""

from __future__ import annotations

import os
import signal
from typing import Any

# From SLURM (its warning is USR1 or USR2, as --signal says), a closed terminal, a person.
STOPS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGINT)


class Interrupted(SystemExit):
    """The run was told to stop, and saved; the exit code is 128 + the signal, as a shell expects."""


def ignore_signals() -> None:
    """Nothing is left to stop: a second signal must not change the exit code of a process that has saved."""
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)


class StopSignal:
    """Remembers one of STOPS until the step is over. A SIGHUP that nohup has switched off stays so."""

    late: int | None = None  # what the last run heard, perhaps after it had looked for the last time

    def __init__(self) -> None:
        self.received: int | None = None
        self.before = {}
        for number in STOPS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
            try:
                self.before[number] = signal.signal(number, self.receive)
            except ValueError:  # not the main thread: whoever is, decides
                break

    def receive(self, number: int, frame: Any) -> None:
        """Note the signal; a second Ctrl-C ends the process at once."""
        if self.received == signal.SIGINT == number:
            raise KeyboardInterrupt
        if number == signal.SIGINT and os.environ.get("RANK", "0") == "0":
            os.write(2, b"\nsaves once this is done; Ctrl-C again ends at once\n")  # print is not reentrant
        self.received = number

    def restore(self) -> None:
        """Put the handlers back that were there before."""
        StopSignal.late = self.received
        for number, handler in self.before.items():
            signal.signal(number, handler)
