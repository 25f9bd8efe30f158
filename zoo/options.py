"""Options of the command line: their groups, how they are read, and one sentence where they are wrong."""

import difflib
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

from zoo.data import FORMS
from zoo.errors import ZooError
from zoo.forms import Precision
from zoo.methods import METHODS, list_methods, method_id, presets, signature
from zoo.run import RunOptions
from zoo.view import View


def make_parser(command: str, about: str, config: bool = True) -> Any:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog=f"zoo {command}", description=about, exit_on_error=False, allow_abbrev=False)
    if config:
        parser.add_argument("--config", action="config", help="YAML file of options")
    return parser


def add_data_options(parser: Any, preset: dict[str, Any]) -> None:
    add_loading_options(parser, preset)
    add_view_options(parser)


def add_loading_options(parser: Any, preset: dict[str, Any]) -> None:
    batch = preset.get("batch_size", 32)
    parser.add_argument("--batch-size", type=int, default=batch, help="images a batch")
    parser.add_argument(
        "--num-workers", type=int | None, default=None, help="decoding processes; null: none without a GPU"
    )
    parser.add_argument("--skip-broken", action="store_true", help="leave out images that can't be read and list them")


def add_view_options(parser: Any) -> None:
    """How a model looks at images when it scores them."""
    parser.add_argument(
        "--tile", type=int | None, default=None, help="side of the tiles of larger images; null: as fitted, 0: none"
    )
    add_ignore_option(parser)


def add_ignore_option(parser: Any) -> None:
    parser.add_argument(
        "--ignore",
        type=str | None,
        default=None,
        help="mask of what is not looked at, white, or a folder of masks named as the images are; null: the folder "
        "ignore beside them, if there is one",
    )


def check_tile(tile: int | None) -> None:
    """Raises ZooError for tiles of no use, before torch is loaded."""
    if tile:
        View(tile=tile)


def add_info_bar_option(parser: Any) -> None:
    parser.add_argument(
        "--info-bar",
        type=Literal["auto", "none"],
        default="auto",
        help="auto leaves out the info bar at the bottom, by the vendor's tags or as it looks",
    )


def data_values(options: Any) -> dict[str, Any]:
    check_tile(options.tile)
    return {key: options[key] for key in ("batch_size", "num_workers", "skip_broken", "tile", "ignore")}


def add_benchmark_options(parser: Any) -> None:
    parser.add_argument("--out", type=str, default="zoo-benchmark", help="folder of records, models, tables and page")
    add_plan_options(parser)
    parser.add_argument(
        "--protocol", type=Literal["house", "paper"], default="house", help="halves, or all at 224 x 224; see evaluate"
    )
    parser.add_argument("--select", type=str, default="image_auroc", help="which step is kept; see fit")
    parser.add_argument(
        "--figure-method", type=str | None, default=None, help="of Figure 1; null: the best by image ROC"
    )
    parser.add_argument(
        "--render", type=str | None, default=None, help="only render this folder of an earlier benchmark"
    )


def add_plan_options(parser: Any) -> None:
    """What is run on which data, where: of a benchmark and of a release."""
    parser.add_argument("--data", type=str | None, default=None, help=f"images: {FORMS}")
    parser.add_argument("--methods", type=str, nargs="+", default=list_methods(), help="ids; all of them by default")
    parser.add_argument("--seeds", type=int, default=3, help="runs a method, with the seeds 0, 1, ...")
    parser.add_argument(
        "--preset",
        type=str | None,
        default=None,
        help="as for fit; methods that have no mvtec_steps take paper224 instead",
    )
    parser.add_argument(
        "--budget",
        type=int | str | None,
        default=None,
        help="optimiser steps of each method that takes steps, such as 300, or a share of its preset's, such as 10%",
    )
    parser.add_argument(
        "--arguments",
        type=dict[str, dict[str, Any]],
        default={},
        help='own arguments of methods, such as \'{"padim": {"dims": 100}}\'',
    )
    parser.add_argument("--batch-size", type=int | None, default=None, help="images a batch; null: the preset's")
    parser.add_argument("--num-workers", type=int | None, default=None, help="decoding processes; null: as for fit")
    parser.add_argument("--skip-broken", action="store_true", help="leave out images that can't be read")
    add_run_options(parser, devices=True)


def add_trainer_options(parser: Any, preset: dict[str, Any]) -> None:
    """Of methods that learn by gradient; null takes the preset's."""
    steps, epochs = preset.get("max_steps"), preset.get("max_epochs")
    usual = f"the preset has {steps} steps" if steps else f"the preset has {epochs} epochs" if epochs else "no training"
    parser.add_argument("--max-steps", type=int | None, default=None, help=f"optimiser steps; {usual}")
    parser.add_argument("--max-epochs", type=int | None, default=None, help=f"passes over the images; {usual}")
    parser.add_argument("--accumulate", type=int | None, default=None, help="batches that make one step")
    parser.add_argument(
        "--select",
        type=str | None,
        default=None,
        help="which step is kept: last, normal (lowest mean map of held-out normals) or a metric on half of the test "
        "images, which evaluate then leaves out",
    )


def add_run_options(parser: Any, precision: str | None = "32-true", devices: bool = False) -> None:
    if devices:
        parser.add_argument("--devices", type=int, default=1, help="processes, one a device; torchrun and srun set it")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--precision", type=Precision | None, default=precision, help="null: as the model was fitted")


def run_of(options: Any, precision: str = "32-true") -> RunOptions:
    progress = sys.stderr.isatty()
    devices = options.get("devices", 1)
    return RunOptions(options.device, devices, options.precision or precision, progress, partial(print, flush=True))


def parse(parser: Any, argv: list[str]) -> Any:
    from argparse import ArgumentError

    try:
        options = parser.parse_args(argv)
    except (ArgumentError, TypeError) as error:
        raise ZooError(_one_sentence(str(error), parser)) from error
    device = options.get("device", "auto")
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise ZooError(f"--device is auto, cpu, cuda or cuda:N, not {device}.")
    devices = options.get("devices", 1)
    if devices < 1 or (devices > 1 and ":" in device):
        raise ZooError(f"--devices is at least 1, and 1 with --device {device}; not {devices}.")
    return options


def own_arguments(method: str, values: dict[str, Any]) -> dict[str, Any]:
    """Values of a method's own arguments, as its options take them.

    Raises:
        ZooError: an argument that it lacks, or a value of another type.
    """
    from argparse import ArgumentError

    parser, known = make_parser(f"fit {method}", "", config=False), signature(method)
    if unknown := values.keys() - (known.keys() - {"seed"}):
        raise ZooError(f"{method} has no argument {min(unknown)!r} to benchmark with; see zoo fit {method} --help.")
    for name in values:
        parser.add_argument(f"--{name}", type=known[name].type)
    for name, value in values.items():
        if value is None and type(None) not in get_args(known[name].type):
            raise ZooError(f"--arguments of {method}: --{name.replace('_', '-')} can't be null; leave it out.")
    try:
        return parser.parse_object(values).as_dict()
    except (ArgumentError, TypeError) as error:
        raise ZooError(f"--arguments of {method}: {_one_sentence(str(error), parser)}") from error


def to_bytes(text: str) -> float:
    """6GB, 500MB or 2GiB -> bytes."""
    match = re.fullmatch(r"(?i)([0-9]*\.?[0-9]+)\s*([kmgt])(i?)b", text.strip())
    if not match or not float(match[1]):
        raise ZooError(f"--memory-limit is a size such as 6GB or 500MB, not {text}.")
    return float(match[1]) * (1024 if match[3] else 1000) ** ("kmgt".index(match[2].lower()) + 1)


def _one_sentence(message: str, parser: Any) -> str:
    """jsonargparse's message without line breaks, with the nearest option for an unknown one."""
    unknown = re.search(r"(?i)unrecognized arguments: (\S+)", message)
    if unknown:
        options = [o for action in parser._actions for o in action.option_strings if o.startswith("--")]
        near = difflib.get_close_matches(unknown[1].split("=")[0], options, n=1)
        hint = f"did you mean {near[0]}?" if near else f"see {parser.prog} --help."
        return f"{parser.prog} has no option {unknown[1]}; {hint}"
    message = re.sub(r"Does not validate.*", "Not a value that it takes", message, flags=re.DOTALL)
    message = re.sub(r'Parser key "(\w+)":', lambda match: f"--{match[1].replace('_', '-')}:", message)
    message = re.sub(r"a typing\.Literal\[([^]]*)\]", r"one of \1", message)
    message = re.sub(r"<class '(\w+)'>", r"\1", " ".join(message.split()))
    return f"{message.rstrip('.')}; see {parser.prog} --help."


def before_parsing(argv: list[str]) -> tuple[str | None, str | None]:
    """Method and preset, which decide on the options: from the arguments, else from the --config file."""
    found: dict[str, Any] = {}
    config = _value_of("--config", argv)
    if config is not None:
        import yaml

        if not Path(config).is_file():
            raise ZooError(f"--config {config}: there is no such file.")
        try:
            found = yaml.safe_load(Path(config).read_text(encoding="utf-8")) or {}
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ZooError(f"--config {config} is not readable as YAML.") from error
        if not isinstance(found, dict):
            raise ZooError(f"--config {config} holds no options.")
    named = argv[0] if argv and not argv[0].startswith("-") else next((t for t in argv if _is_method(t)), None)
    method = named or found.get("method")
    preset = _value_of("--preset", argv) or found.get("preset")
    method = method_id(method) if method else None
    if method and preset:
        presets(method, preset)
    return method, preset


def _is_method(token: str) -> bool:
    return token.lower().replace("-", "_") in METHODS


def _value_of(option: str, argv: list[str]) -> str | None:
    for token, following in zip(argv, [*argv[1:], None], strict=False):
        if token == option:
            return following
        if token.startswith(f"{option}="):
            return token.split("=", 1)[1]
    return None


def with_dashes(token: str) -> str:
    """--bank_size -> --bank-size; values stay as they are."""
    if not token.startswith("--") or token.startswith("--print"):
        return token.replace("--print-config", "--print_config", 1) if token.startswith("--print") else token
    name, equals, value = token.partition("=")
    return name.replace("_", "-") + equals + value
