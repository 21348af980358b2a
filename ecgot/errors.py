"""The only exception that users of ecgot should have to read."""


class EcgotError(ValueError):
    """Bad input, described in one line: "NAME: expected X, got Y".

    The command line prints the line and exits with code 2; library users catch it as a ``ValueError``.
    """


def first_line(error: BaseException) -> str:
    """What an exception of another library says, cut to the one line that our errors have room for."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
