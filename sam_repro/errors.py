"""Exceptions whose message is meant for the person who typed the command: one sentence, and an exit code.

With `plural`, which sentences need.
"""

import os
import re

DIVERGED = 3  # exit code of a run whose loss is not finite: a result
LOST = os.EX_TEMPFAIL  # 75, the exit code of a rank whose peers are gone: the same command may well work again


class UserError(ValueError):
    """Bad input. The commands print its single sentence and exit with code 2, without a traceback."""

    code = 2


class OutOfMemory(UserError):
    """There was not enough memory. The same command would fail again, so nobody should repeat it unchanged."""

    code = 4


class RankLost(Exception):
    """Another rank died, hangs or gave up; the message says which and why."""

    def __init__(self, sentence: str, code: int = LOST):
        super().__init__(sentence)
        self.code = code  # for this rank to exit with


def plural(number: int | float, noun: str, spec: str = "") -> str:
    """A number and its noun, as "1 run", "2 runs", "1,950 steps"; `spec` formats the number."""
    ending = "es" if noun.endswith("s") else "s"
    return f"{number:{spec}} {noun}{'' if number == 1 else ending}"


# What torch, CUDA's libraries and the system say of memory that lacks, in exceptions of no class of its own.
MEMORY_WORDS = ("out of memory", "can't allocate memory", "ALLOC_FAILED", "Cannot allocate memory")


def out_of_memory(error: BaseException) -> OutOfMemory | None:
    """One sentence for an exception that says that memory lacked, on a GPU or outside it; None for any other."""
    if isinstance(error, OutOfMemory):
        return error
    text = str(error)
    by_class = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"  # torch's
    by_words = isinstance(error, (RuntimeError, OSError)) and any(words in text for words in MEMORY_WORDS)
    if not by_class and not by_words:
        return None
    gpu = any(name in text for name in ("CUDA", "CUBLAS", "CUDNN"))
    wanted = re.search(r"allocate ([\d.]+ \w+)", text)
    return OutOfMemory(
        f"{'the GPU' if gpu else 'this machine'} has no memory left{f' for another {wanted[1]}' if wanted else ''}: "
        "take fewer images at once, with train.chunk=N, or with data.eval_batch_size=N in evaluations; "
        "what was saved is intact"
    )
