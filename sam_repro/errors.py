"""The one exception whose message is meant for the person who typed the command."""


class UserError(ValueError):
    """Bad input. The front doors print its single sentence and exit with code 2, without a traceback."""

    code = 2
