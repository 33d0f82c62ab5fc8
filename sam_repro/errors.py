"""The exceptions whose message is meant for the person who typed the command: one sentence, and an exit code."""

import os

LOST = os.EX_TEMPFAIL  # 75, the exit code of a rank whose peers are gone: the same command may well work again


class UserError(ValueError):
    """Bad input. The front doors print its single sentence and exit with code 2, without a traceback."""

    code = 2


class RankLost(Exception):
    """Another rank died, hangs or gave up; the message says which and why."""

    def __init__(self, sentence: str, code: int = LOST):
        super().__init__(sentence)
        self.code = code  # for this rank to exit with
