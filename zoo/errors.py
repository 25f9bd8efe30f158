"""The one error that stands for a user's mistake."""


class ZooError(ValueError):
    """What is wrong, where, and the next step, in one sentence; the command line prints it and exits with code 2."""

    def __init__(self, message: str):
        # A DataLoader worker's error comes back with the worker's traceback around it: keep the sentence.
        super().__init__(message.rsplit("zoo.errors.ZooError: ", 1)[-1].strip())
