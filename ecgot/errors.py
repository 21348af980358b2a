"""The one exception that a user of ecgot should ever have to read."""


class EcgotError(ValueError):
    """Bad input, described in one line that names what came and what is accepted.

    The command line prints the line and exits with code 2; library users catch it as a ``ValueError``.
    """
