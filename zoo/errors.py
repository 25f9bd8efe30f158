"""The one error that stands for a user's mistake."""


class ZooError(ValueError):
    """What is wrong, where, and the next step, in one sentence; the command line prints it and exits with code 2."""
