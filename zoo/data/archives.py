"""The archives that MIIC comes in, unpacked beside themselves with whatever of unrar, 7z or bsdtar is there."""

import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from zoo.errors import ZooError
from zoo.paths import locked

# 7z and bsdtar tell the format by content; Debian's 7z and unrar-free can't read RAR 5, and the next one is tried.
TOOLS = {
    "unrar": lambda archive, place: ["x", "-idq", "-y", "-p-", archive, f"{place}{os.sep}"],
    "7zz": lambda archive, place: ["x", "-y", "-p", "-bd", f"-o{place}", archive],
    "7z": lambda archive, place: ["x", "-y", "-p", "-bd", f"-o{place}", archive],
    "bsdtar": lambda archive, place: ["-x", "-f", archive, "-C", place],
}
MARGIN = 1.25  # images hardly shrink in an archive


def packed(root: Path, folders: Sequence[str]) -> dict[str, Path]:
    """Folders that are missing while their archives, `<folder>.rar`, are there."""
    found = {path.stem: path for path in sorted(root.glob("*")) if path.suffix.lower() == ".rar" and path.is_file()}
    return {name: found[name] for name in folders if name in found and not (root / name).exists()}


def unpack(root: Path, folders: Sequence[str], say: Callable[[str], None]) -> None:
    """Unpack what `packed` finds; a folder appears when it is whole, so that a run that was killed goes on.

    Args:
        root: folder of the archives, and of what becomes of them.
        folders: names of the folders that are wanted.
        say: told what is done.

    Raises:
        ZooError: no tool, too little room, an archive that no tool can read, another process that does the same.
    """
    if not (archives := packed(root, folders)):
        return
    lock = root / ".unpack.lock"
    try:
        with locked(lock, 0, f"Another process unpacks the archives in {root}; wait for it."):
            archives = packed(root, folders)  # another process may have done it meanwhile
            try:
                tools = _tools(archives)
                _check_room(root, archives)
                for name, archive in archives.items():
                    say(f"Unpacking {archive.name} ({archive.stat().st_size / 1e6:,.0f} MB).")
                    _unpack(archive, root / name, tools)
            finally:
                lock.unlink(missing_ok=True)  # while it is held: nobody else's
    except OSError as error:
        raise ZooError(f"{root} could not be written ({error}); folders that are whole are kept.") from error


def _tools(archives: dict[str, Path]) -> dict[str, str]:
    tools = {name: path for name in TOOLS if (path := shutil.which(name))}
    if archives and not tools:
        names = ", ".join(path.name for path in archives.values())
        raise ZooError(
            f"Nothing here unpacks {names}: install unrar, 7-Zip (7zz) or libarchive's bsdtar "
            "(apt-get install libarchive-tools), or unpack them by hand into folders of their names."
        )
    return tools


def _check_room(root: Path, archives: dict[str, Path]) -> None:
    needed, free = MARGIN * sum(path.stat().st_size for path in archives.values()), shutil.disk_usage(root).free
    if free < needed:
        raise ZooError(f"{root} has {free / 1e6:,.0f} MB free, and its archives need {needed / 1e6:,.0f}; make room.")


def _unpack(archive: Path, place: Path, tools: dict[str, str]) -> None:
    temporary = place.with_name(f".{place.name}.partial")  # one process at a time
    reasons = []
    for name, path in tools.items():
        shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed, or of the tool before
        temporary.mkdir()
        command = [path, *TOOLS[name](str(archive), str(temporary))]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
        if done.returncode == 0 and any(temporary.iterdir()):
            inner = temporary / place.name  # as archives of a folder hold it, a readme beside it or not
            (inner if inner.is_dir() else temporary).rename(place)  # else they hold what is in it
            shutil.rmtree(temporary, ignore_errors=True)
            return
        said = " ".join((done.stderr or done.stdout).split())
        reasons.append(f"{name}: {said[-120:] or f'exit code {done.returncode}'}")
    shutil.rmtree(temporary, ignore_errors=True)
    raise ZooError(
        f"{archive} can't be unpacked ({'; '.join(reasons)}); it is damaged, or install unrar, 7-Zip (7zz) or bsdtar."
    )
