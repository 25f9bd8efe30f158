"""Why a run failed, in words that may be published: what a log tells, without a place, user or host of this machine."""

import getpass
import os
import re
import signal
import socket
from collections.abc import Sequence
from pathlib import Path

SENTENCE, UNFORESEEN = "zoo: ", "zoo, unforeseen: "  # how a run's last words begin: a ZooError's text, or a class
GONE = "..."

_END = r"[^\s'\"(),;:<>|]"  # what a path without quotes is made of
_KIND = r"(?:\b[A-Za-z]\w*:)*"  # as in miic:/data/x or file:///data/x
_QUOTED = re.compile(rf"(['\"])({_KIND}(?:~|\.{{0,2}}/)[^'\"]*|[^'\"]*/\.\./[^'\"]*)\1")
_URL = re.compile(r"\b(?!file:)[A-Za-z][\w+.-]*://[^\s'\"<>]+")
_PATH = re.compile(
    rf"{_KIND}(?:(?<![\w./~])(?:~\w*|\.{{1,2}})?(?:/+{_END}+)+/?|(?<![\w./])~\w+|{_END}+/\.\.(?:/{_END}*)*)"
)
_ADDRESS = re.compile(
    r"\[[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*\](?::\d+)?"  # [fe80::1]:29500
    r"|(?<![\w:.])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}(?![\w:])"
    r"|\b\d{1,3}(?:\.\d{1,3}){3}(?::\d+)?\b"
    r"|\b(?!cuda:)[A-Za-z][\w.-]*:\d{2,5}\b"  # host:port
)


def reason(log: Path, code: int, places: Sequence[str]) -> str:
    """Why a run ended with a code other than 0, by its log; of an error that nobody foresaw only the class.

    Args:
        code: exit code; negative for a signal.
        places: paths and DATA that the run was given.
    """
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith(SENTENCE):
            return publishable(line.removeprefix(SENTENCE), places)
        if line.startswith(UNFORESEEN):
            return f"{line.removeprefix(UNFORESEEN)}; see logs/{log.name}"
    if code < 0:
        return f"ended by {signal.Signals(-code).name}" + ": out of memory?" * (code == -signal.SIGKILL)
    return f"ended with code {code}; see logs/{log.name}"


def publishable(text: str, places: Sequence[str] = ()) -> str:
    """A text without places: of a path the name of its file is left, of one of `places` its last part.

    Addresses go too, and so do the names of the user, the home folder and the host. A path with spaces is known as one
    where it is among `places` or in quotes.
    """
    spelled = {form for place in places for form in _spellings(place)}
    for form in sorted(spelled, key=len, reverse=True):
        text = re.sub(rf"{_KIND}(?<![\w./~-]){re.escape(form)}(?![\w-])", lambda _, form=form: _kept(form), text)
    text = _URL.sub(GONE, text)
    text = _QUOTED.sub(lambda found: f"{found[1]}{_file(found[2])}{found[1]}", text)
    text = _PATH.sub(lambda found: _file(found[0]), text)
    text = _ADDRESS.sub(GONE, text)
    for name in _names():
        text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", GONE, text, flags=re.IGNORECASE)
    return text


def _spellings(place: str) -> set[str]:
    """A place as it may stand in a text: as given, in full, with links followed, from the home folder."""
    bare = re.sub(r"^[A-Za-z]\w*:(?!\w+=)", "", place)
    if not bare or ("=" in bare and not os.path.exists(bare)):  # options of a generator
        return set()
    full = os.path.abspath(os.path.expanduser(bare))
    forms = {bare.rstrip("/"), full, os.path.realpath(full)}
    home = str(Path.home())
    forms |= {"~" + form.removeprefix(home) for form in forms if form.startswith(f"{home}/")}
    return {form for form in forms if "/" in form.strip("/") or form.startswith("/") and len(form) > 1}


def _kept(place: str) -> str:
    """The last part of a place, unless it is a home folder, or one that holds them."""
    place = os.path.abspath(os.path.expanduser(place))
    return GONE if f"{Path.home()}/".startswith(f"{place}/") or _is_home(place) else os.path.basename(place)


def _file(path: str) -> str:
    """The name of a file; a folder's is left out. A full stop after it stays."""
    stop = re.search(r"[.!?]*$", path)[0]
    bare = path.removesuffix(stop)
    name = bare.rsplit("/", 1)[-1]
    return (name if re.fullmatch(r"[^~/]*\w\.\w{1,12}", name) and not _is_home(bare) else GONE) + stop


def _is_home(path: str) -> bool:
    return bool(re.search(r"(?:^|[:/])(?:home|Users)/[^/]+/?$|^~[^/]*$", path))


def _names() -> list[str]:
    """Of the user, the home folder and the host."""
    found = {Path.home().name, socket.gethostname(), socket.gethostname().split(".")[0]}
    try:
        found.add(getpass.getuser())
    except (OSError, KeyError):  # a user without a name
        pass
    return sorted((name for name in found if len(name) > 1), key=len, reverse=True)
