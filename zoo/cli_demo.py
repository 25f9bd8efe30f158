"""The command that starts the demo. Arguments are checked before torch and gradio are imported."""

import errno
import ipaddress
import os
import re
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from zoo import checkpoint, hub
from zoo.errors import ZooError
from zoo.options import make_parser, parse
from zoo.paths import absolute, user_path

FIRST_PORT, PORTS = 7860, 100  # of gradio, which a Space's proxy expects as well
PASSWORD = "ZOO_DEMO_PASSWORD"


def demo(argv: list[str]) -> None:
    """Start the demo and stay until it is stopped; what a Space can't say by options it says by its variables."""
    parser = make_parser("demo", "A page in the browser: upload an SEM image, see the defect.")
    _add_options(parser)
    options = parse(parser, argv)
    names, repositories = _models(options)
    user, password = _login(options.user)
    host, port = _place(options)
    is_open = not password and not _is_loopback(host)

    from zoo.demo.settings import Settings

    settings = Settings(
        names=names,
        hub=repositories,
        host=host,
        port=port,
        user=user,
        password=password,
        open_browser=options.open,
        show_training=not is_open,
        finetune=not is_open if options.finetune is None else options.finetune,
        device=options.device,
    )
    if is_open and os.environ.get("SYSTEM") != "spaces":  # who may see a Space, its owner has chosen
        print(
            f"Warning: whoever reaches this machine can use the page on port {port}, for it has no password; set "
            f"{PASSWORD} and give --user NAME.",
            file=sys.stderr,
        )
    from zoo.demo.app import serve

    with _stopped_as_by_ctrl_c():
        serve(settings)


def _add_options(parser: Any) -> None:
    parser.add_argument(
        "--name",
        type=str,
        nargs="+",
        action="extend",
        default=[],
        help="models of the local registry, or folders; all by default",
    )
    parser.add_argument(
        "--hub",
        type=str,
        nargs="+",
        action="extend",
        default=[],
        help="models on the hub: ORG/NAME, or a pattern such as 'ORG/*'; $ZOO_DEMO_HUB where no model is named",
    )
    parser.add_argument(
        "--host",
        type=str | None,
        default=None,
        help="address to listen on, 0.0.0.0 for all of this machine's; null: $GRADIO_SERVER_NAME, else 127.0.0.1",
    )
    parser.add_argument(
        "--port",
        type=int | None,
        default=None,
        help=f"null: $GRADIO_SERVER_PORT, else the first free one from {FIRST_PORT}",
    )
    parser.add_argument(
        "--user",
        type=str | None,
        default=None,
        help=f"who may see the page, with the password of ${PASSWORD}; null: $ZOO_DEMO_USER, else whoever reaches it",
    )
    parser.add_argument("--open", action="store_true", help="show the page in this machine's browser")
    parser.add_argument(
        "--finetune",
        type=bool | None,
        default=None,
        help="let visitors train models of their own; null: unless other machines reach the page without a password",
    )
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda or cuda:N")


# ---- models ----------------------------------------------------------------------------------------------------------


def _models(options: Any) -> tuple[list[str], list[str]]:
    """Names here and repositories on the hub; none of either stands for all of the local registry."""
    wanted = options.hub
    if not (options.name or wanted):
        wanted = os.environ.get("ZOO_DEMO_HUB", "").replace(",", " ").split()
    names, repositories = [], []
    for name in options.name:
        place = _named(name)
        (names if "/" not in place or os.path.isabs(place) else repositories).append(place)
    for name in wanted:
        repositories += _on_hub(name)
    return list(dict.fromkeys(names)), list(dict.fromkeys(repositories))


def _named(name: str) -> str:
    """The name of a model that is here, or its folder's absolute path; a bare name of `$ZOO_NAMESPACE`'s: ORG/NAME."""
    folder = user_path(name)
    is_folder = (folder / checkpoint.CONFIG).is_file() or ("/" in name and folder.is_dir())
    if not is_folder and hub.REPO.fullmatch(name.partition("@")[0]):
        raise ZooError(f"There is no folder {name}; if it is a repository on the hub, give --hub {name}.")
    if not is_folder and hub.namespace() and not hub.model_place(name.partition("@")[0]).is_dir():
        return _on_hub(name)[0]
    found = hub.find_model(name)
    if checkpoint.read_config(found)["preprocessing"].get("crop"):
        raise ZooError(f"{name} was fitted on cropped images, for parity runs; fit it with another preset.")
    return str(absolute(found)) if is_folder else found.name


def _on_hub(name: str) -> list[str]:
    """The repositories that a name or a pattern stands for; the hub is asked for a pattern only."""
    owner, _, rest = name.rpartition("/")
    owner = owner or hub.namespace()
    if not owner:
        raise ZooError(f"--hub {name}: whose on the hub? Name it as ORG/{rest}, or set ZOO_NAMESPACE=ORG")
    if not set("*?[") & set(rest):
        repository, _, revision = f"{owner}/{rest}".partition("@")
        if not hub.REPO.fullmatch(repository) or ("@" in rest and not revision):
            raise ZooError(f"--hub {name} is no name of a repository on the hub; it is ORG/NAME or ORG/NAME@REVISION.")
        return [f"{owner}/{rest}"]
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", owner):
        raise ZooError(f"--hub {name}: a pattern stands for names of one user or organisation, such as 'ORG/*'.")
    found = [str(model) for model in hub.list_models(f"{owner}/{rest}", remote=True)]
    if not found:
        raise ZooError(f"No model of the zoo on the hub matches {owner}/{rest}; see zoo list '{owner}/*' --remote.")
    return found


# ---- who and where ---------------------------------------------------------------------------------------------------


def _login(user: str | None) -> tuple[str | None, str | None]:
    """Name and password. The password never stands on the command line, where every user of the machine can read it."""
    password = os.environ.get(PASSWORD)
    if user is None and not (user := os.environ.get("ZOO_DEMO_USER")):
        if password:  # it was meant to protect the page
            raise ZooError(f"{PASSWORD} is set, but nobody's name; give --user NAME, or unset it.")
        return None, None
    if not user.strip():
        raise ZooError("--user is the name to log in with, not empty; leave it out for a page without a password.")
    if not password and sys.stdin is not None and sys.stdin.isatty():
        import getpass

        password = getpass.getpass(f"Password for {user}: ")
    if not password:
        raise ZooError(f"--user {user} needs a password; set it in the environment variable {PASSWORD}.")
    return user, password


def _place(options: Any) -> tuple[str, int]:
    """Host and a port of it that is free now."""
    host = os.environ.get("GRADIO_SERVER_NAME") or "127.0.0.1" if options.host is None else options.host
    origin, port = "--port", options.port
    if port is None and (text := os.environ.get("GRADIO_SERVER_PORT")):
        if not text.isdecimal():
            raise ZooError(f"GRADIO_SERVER_PORT is a port number, not {text!r}; set it right, or give --port.")
        origin, port = "GRADIO_SERVER_PORT", int(text)
    if port is None:
        last = FIRST_PORT + PORTS - 1
        if (port := next((p for p in range(FIRST_PORT, last + 1) if not _why_not(host, p)), None)) is None:
            raise ZooError(f"No port from {FIRST_PORT} to {last} is free on {host}; end a program, or give --port.")
        return host, port
    if not 0 < port < 65536:
        raise ZooError(f"{origin} is 1 to 65535, not {port}.")
    if reason := _why_not(host, port):
        raise ZooError(
            f"{origin} {port} can't be had on {host} ({reason}); take another, or leave it out for the first free one."
        )
    return host, port


def _why_not(host: str, port: int) -> str | None:
    """Why a server can't listen there, or None if it can.

    Raises:
        ZooError: the host is no address of this machine.
    """
    for place in (host, "127.0.0.1"):  # where gradio looks for itself
        try:
            _listen(place, port)
        except (socket.gaierror, UnicodeError) as error:
            raise ZooError(f"--host {host} can't be found ({_words(error)}); take 127.0.0.1, or 0.0.0.0.") from None
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                remedy = "take 127.0.0.1, or 0.0.0.0 for all that it has."
                raise ZooError(f"--host {host} is no address of this machine; {remedy}") from None
            return _words(error)
    return None


def _listen(host: str, port: int) -> None:
    """Listen and stop, as a server would."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, protocol) as trial:
        if os.name == "posix":  # a server that has just ended leaves its port behind for a while
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        trial.bind(address)
        trial.listen()


def _words(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _is_loopback(host: str) -> bool:
    """Whether only this machine reaches the host, which was found before."""
    found = {info[4][0].partition("%")[0] for info in socket.getaddrinfo(host, None)}
    return all(ipaddress.ip_address(address).is_loopback for address in found)


@contextmanager
def _stopped_as_by_ctrl_c() -> Iterator[None]:
    """Within it SIGTERM, which a service manager sends, lets the server close and delete what was uploaded."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
