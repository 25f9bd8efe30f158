"""A path as a user writes it, `~` included; and a lock on one."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

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


@contextmanager
def locked(path: Path, seconds: float, otherwise: str) -> Iterator[None]:
    """Hold a lock file, which a process that is killed lets go of; for `seconds` another one is waited for.

    Raises:
        ZooError: with the words of `otherwise`, if that one holds it still.
    """
    lock = FileLock(path)
    try:
        lock.acquire(timeout=seconds)
    except Timeout:
        raise ZooError(otherwise) from None
    try:
        yield
    finally:
        lock.release()
