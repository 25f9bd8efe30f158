"""The command group `zoo data`: prepare and export. Arguments are checked before torch is imported."""

import difflib
import os
import sys

from zoo.data import FORMS
from zoo.data.export import export_data
from zoo.data.prepare import prepare_data
from zoo.errors import ZooError
from zoo.options import add_info_bar_option, make_parser, parse

DATA_USAGE = """\
  zoo data prepare DATA                unpack, decode, verify, store at the working size
  zoo data export DATA --out FOLDER    parquet files, as a hub data set has them
"""


def data(argv: list[str]) -> None:
    commands = {"prepare": data_prepare, "export": data_export}
    if not argv or argv[0] in ("-h", "--help"):
        print(DATA_USAGE, end="")
        return
    if argv[0] not in commands:
        near = difflib.get_close_matches(argv[0], commands, n=1) or ["prepare"]
        raise ZooError(f"There is no command zoo data {argv[0]}; did you mean zoo data {near[0]}?")
    commands[argv[0]](argv[1:])


def data_prepare(argv: list[str]) -> None:
    parser = make_parser("data prepare", "Decode a data set once, check it and store it grey at the working size.")
    parser.add_argument("data", help=f"{FORMS}; MIIC's archives are unpacked")
    parser.add_argument(
        "--size", type=int | list[int], default=224, help="side of the stored images, or [height, width]"
    )
    parser.add_argument("--out", type=str | None, default=None, help="folder of the store; null: under $ZOO_HOME")
    add_info_bar_option(parser)
    parser.add_argument("--num-workers", type=int | None, default=None, help="threads; null: one a core")
    parser.add_argument("--skip-broken", action="store_true", help="leave out images that can't be read and list them")
    options = parse(parser, argv)
    size = (options.size, options.size) if isinstance(options.size, int) else tuple(options.size)
    if len(size) != 2 or min(size) < 32:
        raise ZooError(f"--size is one number or [height, width] of at least 32 pixels, not {options.size}.")
    workers = len(os.sched_getaffinity(0)) if options.num_workers is None else options.num_workers
    if workers < 0:
        raise ZooError("--num-workers is at least 0.")
    skip_broken, progress = options.skip_broken, sys.stderr.isatty()
    prepare_data(options.data, size, options.out, workers, skip_broken, progress, options.info_bar)


def data_export(argv: list[str]) -> None:
    parser = make_parser("data export", "Write a data set as parquet files with a card, as the hub has them.")
    parser.add_argument("data", help=FORMS)
    parser.add_argument("--out", type=str | None, default=None, help="folder to write, which is DATA as well")
    parser.add_argument("--push", type=str | None, default=None, help="upload it to the repository ORG/NAME too")
    parser.add_argument("--private", type=bool, default=True, help="whether that repository is private")
    parser.add_argument(
        "--i-have-the-right-to-share", action="store_true", help="needed by --push: the set's terms allow you to"
    )
    options = parse(parser, argv)
    if not options.out:
        raise ZooError(f"zoo data export needs --out: zoo data export {options.data} --out FOLDER.")
    allowed = options.i_have_the_right_to_share
    export_data(options.data, options.out, options.push, options.private, allowed, sys.stderr.isatty())
