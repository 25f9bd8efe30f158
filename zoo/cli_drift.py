"""The command that says whether a threshold can still be trusted. Arguments are checked before torch is imported."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from zoo import checkpoint, hub
from zoo.calibration import check_stated, stored
from zoo.data import FORMS, check_data
from zoo.data.ignore import IgnoreMasks
from zoo.errors import ZooError
from zoo.options import add_ignore_option, add_loading_options, add_run_options, make_parser, parse, run_of
from zoo.ranks import launched

if TYPE_CHECKING:  # imported on use
    from rich.table import Table

    from zoo.drift import Drift


def drift(argv: list[str]) -> int:
    """Returns 0, or with `--fail-on drift` 1, unless the threshold can be trusted."""
    parser = make_parser(
        "drift", "Compare recent normal images with those of the calibration: can the threshold still be trusted?"
    )
    parser.add_argument("name", help="name or folder of a model")
    parser.add_argument("--data", type=str | None, default=None, help=f"images, defects are not looked at: {FORMS}")
    parser.add_argument("--out", type=str | None, default=None, help="file of what was found, .json")
    parser.add_argument(
        "--fail-on",
        type=Literal["drift"] | None,
        default=None,
        help="drift: exit code 1 unless the threshold can be trusted, so with too few images too",
    )
    add_loading_options(parser, {})
    add_ignore_option(parser)
    add_run_options(parser, precision=None)
    options = parse(parser, argv)
    folder, name = hub.find_model(options.name), options.name
    config = checkpoint.read_config(folder)
    if not options.data:
        raise ZooError(f"zoo drift needs --data: zoo drift {name} --data DATA.")
    if options.out and (Path(options.out).suffix != ".json" or Path(options.out).is_dir()):
        raise ZooError(f"--out is a file that ends in .json, not {options.out}.")
    if options.batch_size < 1 or (options.num_workers or 0) < 0:
        raise ZooError("--batch-size is at least 1 and --num-workers at least 0.")
    known = stored(config["calibration"]) if config["calibration"] else None
    check_stated(known, options.precision or config["precision"], name)
    check_data(options.data)
    if options.ignore:
        IgnoreMasks(options.ignore)

    from zoo.drift import drift as check
    from zoo.tables import console

    values = {key: options[key] for key in ("batch_size", "num_workers", "skip_broken", "ignore")}
    model, run = hub.from_pretrained(folder), run_of(options, config["precision"])
    found = check(model, options.data, folder, values, run, shlex.quote(name))
    if found.images:
        console().print(_table(found))
    for line in (*found.notes, found.sentence):
        print(line)
    if options.out and not launched()[0]:
        checkpoint.write_text(Path(options.out), checkpoint.dump(found.to_dict()))
    return int(options.fail_on == "drift" and found.verdict != "trusted")


def _table(found: "Drift") -> "Table":
    """A row for each threshold, and for each quantity that was compared."""
    from rich.table import Table

    table = Table(box=None)
    for title in ("", "calibrated", "recent", "p", ""):
        table.add_column(title, justify="right" if title else "left")
    table.add_row("normal images", f"{found.calibrated:,}", f"{found.images:,}", "", "")
    for one in found.exceedances:
        allowed = f"at most {100 * found.false_alarm_rate:.4g} %"
        table.add_row(one.what, allowed, f"{one.count:,}", f"{one.p_value:.2g}", _mark(one.found, "too many"))
    for one in found.shifts:
        medians = ("", "") if one.before is None else (f"{one.before:.4g}", f"{one.now:.4g}")
        what = one.what if one.before is None else f"{one.what}, median"
        table.add_row(what, *medians, f"{one.p_value:.2g}", _mark(one.found, "shifted"))
    return table


def _mark(found: bool, word: str) -> str:
    return f"[red]{word}[/red]" if found else ""
