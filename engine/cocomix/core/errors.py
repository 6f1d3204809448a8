"""The exceptions that mean "the user can fix this"."""


class CocomixError(ValueError):
    """Bad input, a bad config or a full disk: something the user can put right.

    The message names the thing that is wrong and what to do about it. The command line prints it
    without a traceback and leaves with exit code 2.
    """


class NotFiniteError(CocomixError):
    """Weights or moments are no numbers any more, and no training goes on from them."""
