"""Signals that end a run: note them, finish the step, save, and only then leave."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable
from typing import Any

# SLURM warns with USR1 or USR2, as --signal says; a terminal that is closed sends HUP; and systems send TERM.
STOPS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
STOPS_AND_CTRL_C = (*STOPS, signal.SIGINT)


class Interrupted(SystemExit):
    """A signal ended the run, and all is saved; the exit code is 128 + the signal, as a shell expects."""


def handle(numbers: Iterable[signal.Signals], handler: Callable[[int, Any], None]) -> dict[signal.Signals, Any]:
    """Call `handler` on these signals, except a HUP that nohup switched off; returns those before, for restore()."""
    before = {}
    for number in numbers:
        if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
            continue
        try:
            before[number] = signal.signal(number, handler)
        except ValueError:  # not the main thread: whoever is, decides
            break
    return before


def restore(before: dict[signal.Signals, Any]) -> None:
    """Put handlers back."""
    for number, handler in before.items():
        signal.signal(number, handler)


def ignore_signals() -> None:
    """Ignore further signals: a second one must not change the exit code of a process that has saved."""
    for number in STOPS_AND_CTRL_C:
        signal.signal(number, signal.SIG_IGN)


class StopSignal:
    """Notes a signal until the step is over."""

    late: int | None = None  # what the last run received, perhaps after it had looked for the last time

    def __init__(self) -> None:
        self.received: int | None = None
        self.before = handle(STOPS_AND_CTRL_C, self.receive)

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
        restore(self.before)
