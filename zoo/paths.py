"""A path as a user writes it, `~` included."""

import os
from pathlib import Path

from zoo.errors import ZooError


def user_path(text: str | os.PathLike) -> Path:
    """The path, with the home of `~` or `~user` in its place.

    Raises:
        ZooError: there is no such user.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError:
        user = Path(text).parts[0]
        raise ZooError(f"{text}: whose folder {user} is can't be told here; write the path in full.") from None


def absolute(text: str | os.PathLike) -> Path:
    """The same as an absolute path; links stay links.

    Raises:
        ZooError: as `user_path`.
    """
    return Path(os.path.abspath(user_path(text)))
