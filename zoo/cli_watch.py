"""The command that scores images as they arrive. Arguments are checked before torch is imported."""

import math
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from zoo import checkpoint, hub
from zoo.arrivals import Arrivals, shown
from zoo.data.ignore import IgnoreMasks
from zoo.errors import ZooError
from zoo.inference import caveats, ignore_place
from zoo.ledger import Ledger, writing
from zoo.options import add_run_options, add_view_options, check_tile, make_parser, parse
from zoo.paths import absolute, locked
from zoo.run import device_of
from zoo.watch import Watch


def watch(argv: list[str]) -> None:
    parser = make_parser("watch", "Score new images of a folder as they arrive, each once; go on after a restart.")
    parser.add_argument("where", nargs="+", help="the folder that is watched; the model's name may stand before it")
    parser.add_argument("--name", type=str | None, default=None, help="name or folder of a model")
    parser.add_argument("--out", type=str | None, default=None, help="folder for the results")
    parser.add_argument("--interval", type=float, default=2.0, help="seconds between two looks at the folder")
    parser.add_argument(
        "--settle", type=float, default=2.0, help="seconds for which a file keeps its size and time before it is read"
    )
    parser.add_argument("--once", action="store_true", help="score what is there, and end")
    parser.add_argument("--batch-size", type=int, default=1, help="images of equal size scored at once, if they wait")
    add_view_options(parser)
    add_run_options(parser, precision=None)
    options = parse(parser, argv)
    name, folder, out = _checked(options)
    place = hub.find_model(name)
    config = checkpoint.read_config(place)
    if config["preprocessing"].get("crop"):
        raise ZooError("This model was fitted on cropped images, for parity runs; fit it with another preset.")
    tile = config["preprocessing"].get("tile") if options.tile is None else options.tile or None
    settings = {"weights_sha256": config["weights_sha256"], "tile": tile}
    settings["precision"] = options.precision or config["precision"]
    ignore = _ignore_of(folder, options.ignore)
    sys.stdout.reconfigure(errors="backslashreplace")  # a log of another encoding stops no service
    say = partial(print, flush=True)
    held = f"Another zoo watch writes into {shown(out)}; stop it, or name another folder by --out."
    with _stop_signals() as stops, ExitStack() as stack:
        with writing(out):
            out.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(out / ".lock", 0, held))
            ledger = Ledger(out, settings, say)
        _run(options, place, folder, ledger, ignore, say, stops)
    if stops[:1] == [signal.SIGINT]:
        raise KeyboardInterrupt


def _run(
    options: Any,
    place: Path,
    folder: Path,
    ledger: Ledger,
    ignore: IgnoreMasks | None,
    say: Callable[[str], None],
    stops: list[int],
) -> None:
    """Load the model of a folder and watch until a stop is asked for."""
    device = device_of(options.device)
    model = hub.from_pretrained(place).to(device)
    model.precision = ledger.settings["precision"]
    for line in caveats(model, options.tile):
        say(line)
    done = f"{len(ledger.known):,} file{'s' * (len(ledger.known) != 1)} of before"
    say(f"Watching {shown(folder)}; {done} in {shown(ledger.out)}.")
    with model.seen_in_tiles(options.tile):
        arrivals = Arrivals(folder, options.settle, ledger.knows, say)
        watch = Watch(model, arrivals, ledger, options.batch_size, ignore, say)
        watch.run(options.interval, options.once, lambda: bool(stops))
    say(f"Scored {watch.scored:,} image{'s' * (watch.scored != 1)}; results are in {shown(ledger.out)}.")


def _checked(options: Any) -> tuple[str, Path, Path]:
    """Model, folder and place of the results, as far as they can be right."""
    *names, folder = options.where
    names += [options.name] if options.name else []
    if len(names) != 1 or not options.out:
        raise ZooError("zoo watch takes one folder, one model and --out: zoo watch DIR --name NAME --out OUT.")
    folder, out = absolute(folder), absolute(options.out)
    if not folder.is_dir():
        raise ZooError(f"There is no folder {shown(folder)} to watch; check the path.")
    if out.exists() and not out.is_dir():
        raise ZooError(f"--out {shown(out)} is a file; name a folder.")
    if folder.resolve().is_relative_to(out.resolve()):
        raise ZooError(f"{shown(folder)} is --out or lies in it, among the results; name another folder by --out.")
    for option, value in (("--interval", options.interval), ("--settle", options.settle)):
        if not 0 <= value < math.inf:
            raise ZooError(f"{option} is a number of seconds, at least 0, not {value:g}.")
    if options.batch_size < 1:
        raise ZooError(f"--batch-size is at least 1, not {options.batch_size}.")
    check_tile(options.tile)
    return names[0], folder, out


def _ignore_of(folder: Path, place: str | None) -> IgnoreMasks | None:
    """The ignore masks that `zoo predict` takes for a folder; which images they fit isn't known beforehand."""
    if (found := ignore_place(place, folder)) is None:
        return None
    print(f"Ignore masks are those of {shown(found)}.")
    return IgnoreMasks(found)


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Within it SIGINT and SIGTERM are noted, for the image in work is finished; a second Ctrl-C stops at once."""
    stops: list[int] = []

    def note(number: int, frame: Any) -> None:
        if stops and number == signal.SIGINT:
            raise KeyboardInterrupt
        stops.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stops
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
