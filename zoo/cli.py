"""The command line, a function a command. Arguments are checked before torch is imported."""

import difflib
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from zoo import checkpoint, hub
from zoo.cli_calibrate import calibrate
from zoo.cli_data import DATA_USAGE, data
from zoo.cli_demo import demo
from zoo.cli_drift import drift
from zoo.cli_finetune import finetune
from zoo.cli_fit import fit
from zoo.cli_hub import export, import_, publish, release
from zoo.cli_predict import predict
from zoo.cli_watch import watch
from zoo.data import FORMS, check_data
from zoo.errors import ZooError
from zoo.methods import list_methods, summary
from zoo.naming import METRICS
from zoo.options import (
    add_benchmark_options,
    add_data_options,
    add_run_options,
    data_values,
    make_parser,
    parse,
    run_of,
    with_dashes,
)
from zoo.paths import user_path
from zoo.ranks import launched

USAGE = f"""usage: zoo COMMAND [--help]

  zoo quickstart                       whole tour on built-in data, offline, about a minute
  zoo list [PATTERN]                   methods and models, with their numbers
  zoo fit METHOD --data DATA --name NAME
  zoo finetune NAME --data DATA --name NEW
  zoo evaluate NAME --data DATA
  zoo calibrate NAME --data DATA --false-alarm-rate 0.01
  zoo predict NAME PATH... --out DIR   heatmaps, masks, CSV and JSON; --report: a page, --klarf FILE
  zoo watch DIR --name NAME --out OUT  the same of new files, as they arrive
  zoo drift NAME --data DATA           whether the threshold can be trusted for recent normal images
  zoo publish NAME --to ORG/REPO       model, card and record, to the hub or a mirror of it
  zoo benchmark --data DATA            all methods, three seeds: Table 3, Figures 1 and 2, a page
  zoo release --data DATA --to ORG     the same, and a calibrated model of each; to the hub with --yes
  zoo demo [--name NAME]               a page in the browser: upload an image, see the defect
  zoo import FOLDER                    models that came from elsewhere, into the local registry
  zoo export NAME --to FILE.onnx       the same scores and maps under onnxruntime
{DATA_USAGE}"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit code, 2 for a user's mistake with one sentence on stderr."""
    argv = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(format="%(message)s")
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    try:
        if launched()[0]:  # of several processes the first one speaks
            sys.stdout = open(os.devnull, "w")
        command = COMMANDS.get(argv[0])
        if command is None:
            near = difflib.get_close_matches(argv[0], COMMANDS, n=1) or ["--help"]
            raise ZooError(f"There is no command {argv[0]!r}; did you mean zoo {near[0]}?")
        return command([with_dashes(token) for token in argv[1:]]) or 0
    except ZooError as error:
        text = str(error)
        print(f"zoo: {text}{'' if text.endswith(('.', '?')) else '.'}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("zoo: stopped.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception:  # a mistake of ours: told in full, and no 1, which is what --fail-on answers
        traceback.print_exc()
        return 2


# ---- commands --------------------------------------------------------------------------------------------------------


def quickstart(argv: list[str]) -> None:
    parser = make_parser("quickstart", "Fit, evaluate and show PatchCore on built-in synthetic SEM images, offline.")
    parser.add_argument("--out", type=str, default="zoo-quickstart", help="folder for the picture and sample images")
    add_run_options(parser)
    options = parse(parser, argv)
    out = Path(options.out)
    if out.exists() and not out.is_dir():
        raise ZooError(f"--out {out} is a file; name a folder.")
    from zoo.tour import quickstart as run

    run(out, run_of(options))


def list_(argv: list[str]) -> None:
    parser = make_parser("list", "Methods, and the models of the local registry with their numbers.", config=False)
    parser.add_argument("pattern", nargs="?", default="*", help="shell pattern of model names, such as 'miic-*'")
    parser.add_argument(
        "--remote", action="store_true", help="models on the hub, of $ZOO_NAMESPACE or of a pattern such as 'ORG/*'"
    )
    options = parse(parser, argv)
    pattern = options.pattern
    found = hub.list_models(pattern, options.remote)
    from rich.markup import escape
    from rich.table import Table

    from zoo.tables import console

    screen = console()
    if pattern == "*" and not options.remote:
        methods = Table("method", "what", title="methods", title_justify="left", box=None)
        for method in list_methods():
            methods.add_row(method.replace("_", "-"), summary(method))
        screen.print(methods)
    models = Table("model", "method", "test data", *METRICS.values(), title="models", title_justify="left", box=None)
    for model in found:
        figures = [f"{model.metrics[key]:.4f}" if key in model.metrics else "-" for key in METRICS]
        about = [escape(model.method or "-"), escape(model.data or "-"), *figures]  # from anywhere: it may be markup
        about = [f"[red]{escape(model.error)}[/red]"] if model.error else about
        models.add_row(model, *about)
    if models.row_count:
        screen.print(models)
    elif options.remote:
        print(f"No model on the hub matches {pattern!r}.")
    elif "/" in pattern:
        raise ZooError(f"Names of the local registry have no '/'; those of the hub: zoo list {pattern!r} --remote.")
    else:
        print(f"No model matches {pattern!r} in {hub.registry()}; train one: zoo fit METHOD --data DATA.")


def evaluate(argv: list[str]) -> None:
    parser = make_parser("evaluate", "Score the test split at the images' own size and keep the record with the model.")
    parser.add_argument("name", help="name or folder of a model")
    parser.add_argument("--data", type=str | None, default=None, help=f"images: {FORMS}")
    parser.add_argument(
        "--protocol",
        type=Literal["house", "paper"] | None,
        default=None,
        help="house: held-out half, full test set and last step, with F1 at a threshold of the other half; paper: all "
        "at 224 x 224; null: what a selection has not seen",
    )
    parser.add_argument("--scores", type=str | None, default=None, help="file of per-image scores, .csv or .parquet")
    parser.add_argument(
        "--bootstrap", type=int, default=1000, help="draws of test images for 95 %% intervals of the metrics; 0: none"
    )
    add_data_options(parser, {})
    add_run_options(parser, precision=None, devices=True)
    options = parse(parser, argv)
    if options.scores and Path(options.scores).suffix not in (".csv", ".parquet"):
        raise ZooError(f"--scores is a file that ends in .csv or .parquet, not {options.scores}.")
    if options.bootstrap < 0 or options.bootstrap == 1:
        raise ZooError(f"--bootstrap is 0 or at least 2 draws, not {options.bootstrap}.")
    folder = hub.find_model(options.name)
    checkpoint.read_config(folder)
    if not options.data:
        raise ZooError(f"zoo evaluate needs --data: zoo evaluate {options.name} --data DATA.")
    check_data(options.data)

    from zoo import evaluation, protocol
    from zoo.tables import console, metric_table

    model = hub.from_pretrained(folder)
    before = checkpoint.read_record(folder)
    arguments = (model, options.data, before, data_values(options), run_of(options, model.precision))
    if options.protocol == "house":
        protocol.load_last_weights(model, folder)
    if options.protocol:
        record = protocol.evaluate_by(options.protocol, *arguments, bootstrap=options.bootstrap)
    else:
        record = evaluation.evaluate(*arguments, options.bootstrap)
    kept = not hub.is_cached(folder)
    if not launched()[0]:
        if kept:
            evaluation.store_evaluation(folder, model, record)
        if options.scores:
            evaluation.write_scores(Path(options.scores), model)
    if not kept:
        print(f"These figures are not kept: {options.name} is the hub's; zoo import {options.name} makes it your own.")
    elif before.get("test_data", record["test_data"])["name"] != record["test_data"]["name"]:
        print(f"These figures replace those on {before['test_data']['name']}.")
    console().print(metric_table(record))


def benchmark(argv: list[str]) -> None:
    parser = make_parser("benchmark", "Fit and evaluate methods, by seeds, going on after a stop; render from records.")
    add_benchmark_options(parser)
    options = parse(parser, argv)
    if not (options.data or options.render):
        raise ZooError("zoo benchmark needs --data: zoo benchmark --data DATA --out DIR.")
    if options.data and options.render:
        raise ZooError("--render shows the records of a folder and runs nothing; leave out --data, or --render.")

    out, records = user_path(options.render or options.out), {}
    if not options.render:
        from zoo.benchmark import run_benchmark
        from zoo.plan import plan_of

        records = run_benchmark(plan_of(options, out), partial(print, flush=True))
    if launched()[0]:  # the first of several processes renders, and ends with the code that counts
        return
    from zoo.report import render

    written = [path.name for path in render(out, options.figure_method)]
    if options.figure_method and "figure1.png" not in written:
        print(f"There is no Figure 1: no run of {options.figure_method} has succeeded.")
    print(f"{', '.join(written)} are in {out}.")
    if failed := [name for name, record in records.items() if "failed" in record]:
        raise ZooError(
            f"{len(failed)} of {len(records)} runs failed: {', '.join(failed)}; the same command tries them again."
        )


COMMANDS = {
    "quickstart": quickstart,
    "list": list_,
    "fit": fit,
    "finetune": finetune,
    "evaluate": evaluate,
    "predict": predict,
    "watch": watch,
    "calibrate": calibrate,
    "drift": drift,
    "publish": publish,
    "benchmark": benchmark,
    "release": release,
    "import": import_,
    "data": data,
    "export": export,
    "demo": demo,
}


if __name__ == "__main__":
    sys.exit(main())
