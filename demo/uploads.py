"""What visitors send: looked at before it is decoded, kept where nobody else reads it, and deleted.

Nothing that a visitor is told names a folder of the server.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import signal
import stat
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

from filelock import FileLock, Timeout

from zoo.errors import ZooError
from zoo.image import image_size

MAX_PIXELS = 4096 * 4096
MAX_SIDE = 16384  # pixels; what browsers show
MAX_BYTES = 64 << 20
MAX_TOTAL = 8 << 30  # bytes of all visitors' files together
MINUTES = 15  # that a file is kept at most
MAX_SIDE_WORDS = f"at most {MAX_PIXELS / 1e6:.1f} megapixels and {MAX_BYTES >> 20} MB"
SORRY = "Something went wrong in the server; it was noted there. Try again, or another image."

_PREFIX = "zoo-demo-"
_LEFT = 24 * 3600  # seconds after which what a server that was killed left behind is removed
_QUOTED = re.compile(r"""(?P<quote>['"`])(?:file:/*|~\w*|[A-Za-z]:)?[\\/][^'"`\n]*(?P=quote)""")
_POSIX = re.compile(r"""(?:file:/*|(?<![\w./:~\\])~\w*|(?<![\w./:~\\)\]}%]))/[^\s/'"`][^\s'"`]*""")
_WINDOWS = re.compile(r"""(?<!\w)[A-Za-z]:[\\/][^\s'"`]*""")
_log = logging.getLogger("zoo.demo")


def check(path: str | os.PathLike) -> tuple[int, int]:
    """Height and width of an uploaded file, by its head alone.

    Raises:
        ZooError: it is no image that can be taken: too large, empty, of another format, of several pages, damaged. The
            sentence names the file, not its folder.
    """
    path = Path(path)
    try:
        if not path.exists():
            raise ZooError(f"{path} is no longer here, as files are kept for {MINUTES} minutes; upload it again")
        if path.stat().st_size > MAX_BYTES:
            raise ZooError(f"{path} is larger than {MAX_BYTES >> 20} MB; cut it into smaller images")
        height, width = image_size(path)
    except ZooError as error:
        raise ZooError(str(error).replace(str(path), path.name)) from None
    if height * width > MAX_PIXELS or max(height, width) > MAX_SIDE:
        most = f"{MAX_PIXELS:,} pixels" if height * width > MAX_PIXELS else f"{MAX_SIDE} on a side"
        raise ZooError(f"{path.name} is {width} x {height} pixels, more than {most}; cut it into smaller images")
    return height, width


def sentence(error: BaseException, *folders: str | os.PathLike) -> str:
    """What a visitor is told of an error: of a ZooError its sentence without the server's folders, else an excuse.

    Any other error than a ZooError goes to the server's log with its traceback.

    Args:
        folders: of this server, which may have blanks in their names; that of Python, the home, the temporary and the
            working folder are known.
    """
    if not isinstance(error, ZooError):
        _log.error("The demo failed on a request.", exc_info=error)
        return SORRY
    text = " ".join(str(error).split())
    known = {*map(os.fspath, folders), os.path.expanduser("~"), os.getcwd(), tempfile.gettempdir(), sys.prefix}
    known |= {os.path.realpath(folder) for folder in known}
    for folder in sorted((folder.rstrip("/\\") for folder in known), key=len, reverse=True):
        if folder:  # of what is below, the last part stays: it may have blanks too
            text = re.sub(rf"""{re.escape(folder)}(?:[\\/][^\\/\s'"`]*)*[\\/](?=[^\s'"`])""", "", text)
            text = re.sub(rf"{re.escape(folder)}[\\/]?(?![\w-]|\.\w)", os.path.basename(folder), text)
    text = _QUOTED.sub(lambda found: found["quote"] + _last(found[0][1:-1]) + found["quote"], text)
    return _WINDOWS.sub(lambda found: _last(found[0]), _POSIX.sub(lambda found: _last(found[0]), text))


def _last(path: str) -> str:
    return re.split(r"[\\/]", path.rstrip("\\/"))[-1]


class Uploads:
    """A private folder for what visitors send, while a server runs; a context manager.

    It ends with the server, by a signal too. What servers that were killed left behind is removed a day later, at the
    start of another one.

    Attributes:
        folder: for files; only this user can read it.
        work: for what is made of them, where the page's server reads nothing but what an answer names.
    """

    folder: Path
    work: Path

    def __enter__(self) -> Uploads:
        """Make the folder."""
        _remove_leftovers()
        self._top = Path(tempfile.mkdtemp(prefix=_PREFIX)).resolve()  # 0700
        self._lock = FileLock(self._top / "lock")  # outside of what the page's server may read
        self._lock.acquire()
        self.folder = self._top / "files"
        self.folder.mkdir(mode=0o700)
        self.work = self._top / "work"
        self.work.mkdir(mode=0o700)
        self._signals = {}
        if threading.current_thread() is threading.main_thread():
            for name in ("SIGTERM", "SIGHUP"):  # which would end the process before __exit__
                number = getattr(signal, name, None)
                if number is not None and signal.getsignal(number) is signal.SIG_DFL:
                    self._signals[number] = signal.signal(number, _end)
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the folder."""
        shutil.rmtree(self._top, ignore_errors=True)
        self._lock.release()
        for number, handler in self._signals.items():
            signal.signal(number, handler)

    def sweep(self, seconds: float = 60 * MINUTES) -> None:
        """Delete files that were last used so long ago, and folders that are empty by then."""
        limit = time.time() - seconds
        for path in sorted(self.folder.rglob("*"), key=lambda path: -len(path.parts)):  # what is inside first
            with contextlib.suppress(OSError):
                about = path.lstat()
                if max(about.st_mtime, about.st_ctime) < limit:
                    path.rmdir() if stat.S_ISDIR(about.st_mode) else path.unlink()

    def is_full(self) -> bool:
        """Whether the visitors' files take so much of the disk that no further ones are taken."""
        total = 0
        for path in self.folder.rglob("*"):
            with contextlib.suppress(OSError):
                total += path.lstat().st_size
        return total > MAX_TOTAL or shutil.disk_usage(self.folder).free < MAX_BYTES

    def forget(self, paths: Iterable[str | os.PathLike]) -> None:
        """Delete files at once, links as such; what lies elsewhere, is a folder or is gone already stays as it is."""
        for path in paths:
            path = Path(os.path.abspath(path))
            folder = Path(os.path.realpath(path.parent))
            if folder.is_relative_to(self.folder):
                with contextlib.suppress(OSError):
                    (folder / path.name).unlink()
                if folder != self.folder:
                    with contextlib.suppress(OSError):
                        folder.rmdir()  # gradio makes one for each file


def _end(number: int, _: object) -> NoReturn:
    sys.exit(128 + number)


def _remove_leftovers() -> None:
    """Remove the folders of this user's servers that were killed a day ago or more."""
    mine = getattr(os, "getuid", lambda: 0)()
    for top in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError, Timeout):
            about = top.lstat()
            if stat.S_ISDIR(about.st_mode) and about.st_uid == mine and time.time() - about.st_mtime > _LEFT:
                with FileLock(top / "lock", timeout=0):  # a server that lives holds it
                    shutil.rmtree(top, ignore_errors=True)
