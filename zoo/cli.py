"""The command line, a function a command. Arguments are checked before torch is imported."""

import difflib
import logging
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from zoo import checkpoint, hub
from zoo.calibration import check_rate, normals_needed, restored, supported_rate
from zoo.cli_data import DATA_USAGE, data
from zoo.cli_hub import export, import_, publish, release
from zoo.data import FORMS, check_data
from zoo.errors import ZooError
from zoo.inference import closing_lines, find_ignore, find_images, predict_files
from zoo.methods import list_methods, method_id, presets, signature, summary
from zoo.naming import METRICS
from zoo.options import (
    add_benchmark_options,
    add_data_options,
    add_info_bar_option,
    add_run_options,
    add_trainer_options,
    add_view_options,
    before_parsing,
    check_tile,
    data_values,
    make_parser,
    parse,
    run_of,
    to_bytes,
    with_dashes,
)
from zoo.paths import user_path
from zoo.ranks import launched
from zoo.run import plan_training

USAGE = f"""usage: zoo COMMAND [--help]

  zoo quickstart                       whole tour on built-in data, offline, about a minute
  zoo list [PATTERN]                   methods and models, with their numbers
  zoo fit METHOD --data DATA --name NAME
  zoo evaluate NAME --data DATA
  zoo predict NAME PATH... --out DIR   heatmaps, masks, CSV and JSON
  zoo calibrate NAME --data DATA --false-alarm-rate 0.01
  zoo publish NAME --to ORG/REPO       model, card and record, to the hub or a mirror of it
  zoo benchmark --data DATA            all methods, three seeds: Table 3, Figures 1 and 2, a page
  zoo release --data DATA --to ORG     the same, and a calibrated model of each; to the hub with --yes
  zoo import FOLDER                    models that came from elsewhere, into the local registry
  zoo export NAME --to FILE.onnx       the same scores and maps under onnxruntime
{DATA_USAGE}"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; a user's mistake is one sentence on stderr and exit code 2."""
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
        command([with_dashes(token) for token in argv[1:]])
        return 0
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


def fit(argv: list[str]) -> None:
    method, preset = before_parsing(argv)
    if method is None and not {"-h", "--help"} & set(argv):
        raise ZooError(f"zoo fit needs a method: {', '.join(list_methods())}.")
    parser = make_parser("fit", f"Learn from normal images. METHOD is one of: {', '.join(list_methods())}.")
    parser.add_argument(
        "method", nargs="?", default=method, help="id of the method; `zoo fit METHOD --help` shows its options"
    )
    parser.add_argument("--data", type=str | None, default=None, help=f"images: {FORMS}")
    parser.add_argument("--name", type=str | None, default=None, help="name of the model in the local registry")
    parser.add_argument(
        "--preset",
        type=str | None,
        default=preset,
        help="original, paper224, lite or, of methods that take steps, mvtec_steps; null: paper224",
    )
    sections = presets(method, preset or "paper224") if method else {}
    of_data = sections.get("data", {})
    add_data_options(parser, of_data)
    add_info_bar_option(parser)
    parser.add_argument(
        "--intensity",
        type=Literal["full", "percentile"],
        default="full",
        help="what black and white are: the full scale of 8 or 16 bits, or percentiles of the training images",
    )
    parser.add_argument(
        "--train-fraction", type=float, default=of_data.get("train_fraction", 1.0), help="share of the normals to use"
    )
    parser.add_argument(
        "--hold-out",
        type=int | None,
        default=None,
        help="normals to set aside for thresholds and `zoo calibrate`; null: a tenth, at least 20, at most a half",
    )
    add_trainer_options(parser, sections.get("trainer", {}))
    add_run_options(parser, devices=True)
    parser.add_argument(
        "--resume", action="store_true", help="go on where an interrupted fit of this name stopped, if there is one"
    )
    parser.add_argument(
        "--checkpoint-minutes", type=float, default=5.0, help="between checkpoints of a fit under way; 0: each batch"
    )
    parser.add_argument(
        "--memory-limit", type=str | None, default=None, help="such as 6GB; a fit that needs more is refused"
    )
    own = signature(method) if method else {}
    for name, option in own.items():
        default = sections.get("model", {}).get(name, option.default)
        parser.add_argument(f"--{name.replace('_', '-')}", type=option.type, default=default, help=option.help)
    options = parse(parser, argv)
    if method_id(options.method) != method:  # an option's value was taken for it
        raise ZooError(f"Put the method first: zoo fit {options.method} --data DATA --name NAME.")
    for needed in ("data", "name"):
        if not options[needed]:
            raise ZooError(f"zoo fit needs --{needed}: zoo fit {method} --data DATA --name NAME.")
    memory_limit = to_bytes(options.memory_limit) if options.memory_limit else None
    trainer_options = {key: options[key] for key in ("max_epochs", "max_steps", "accumulate", "select")}
    plan_training(method, options.preset or "paper224", trainer_options)
    if not options.checkpoint_minutes >= 0:
        raise ZooError(f"--checkpoint-minutes is at least 0, not {options.checkpoint_minutes}.")
    place = hub.model_place(options.name)
    tested = sum(check_data(options.data).counts["test"])
    verb = "Replaced" if place.exists() else "Saved"

    from zoo.fit import fit as run

    arguments = {name: options[name] for name in own}
    own_data = ("train_fraction", "hold_out", "info_bar", "intensity")
    data_options = {key: options[key] for key in own_data} | data_values(options)
    _, record = run(
        method,
        options.data,
        options.name,
        options.preset,
        arguments,
        data_options,
        trainer_options,
        run_of(options),
        resume=options.resume,
        checkpoint_minutes=options.checkpoint_minutes,
        memory_limit=memory_limit,
    )
    following, held = f"predict {options.name} PATH --out DIR", record["train_data"]["held_out"]
    if tested:
        following = f"evaluate {options.name} --data {options.data}"
    elif held and record["configuration"].get("trainer", {}).get("select") != "normal":  # that one looks at them
        rate = max(0.01, supported_rate(held))
        following = f"calibrate {options.name} --data {options.data} --false-alarm-rate {rate:g}"
        if rate > 0.01:
            following += f"   # 0.01 takes {normals_needed(0.01)} images: --hold-out, or another --data"
    print(
        f"{verb} {options.name} in {place} "
        f"(fit {record['seconds']['fit']:.1f} s, peak memory {record['peak_memory_mb']:.0f} MB).\nNext: zoo {following}"
    )


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


def predict(argv: list[str]) -> None:
    parser = make_parser("predict", "Score images: heatmap overlays, masks, predictions.csv and predictions.json.")
    parser.add_argument("name", help="name or folder of a model")
    parser.add_argument("paths", nargs="+", help="images, or folders of images")
    parser.add_argument("--out", type=str | None, default=None, help="folder for the results")
    parser.add_argument("--batch-size", type=int, default=8, help="images of equal size scored at once")
    parser.add_argument("--skip-broken", action="store_true", help="go on after images that can't be read")
    add_view_options(parser)
    add_run_options(parser, precision=None)
    options = parse(parser, argv)
    folder = hub.find_model(options.name)
    checkpoint.read_config(folder)
    if not options.out:
        raise ZooError(f"zoo predict needs --out: zoo predict {options.name} PATH --out DIR.")
    if options.batch_size < 1:
        raise ZooError(f"--batch-size is at least 1, not {options.batch_size}.")
    images = find_images(options.paths, Path(options.out))
    check_tile(options.tile)
    ignore = find_ignore(options.ignore, options.paths, images)
    model = hub.from_pretrained(folder)
    run = run_of(options, model.precision)
    out, size = Path(options.out), options.batch_size
    rows = predict_files(model, images, out, size, options.skip_broken, run, ignore, options.tile)
    for line in closing_lines(model, rows, out, options.tile):
        print(line)
    stated = any(row["is_anomalous"] is not None for row in rows)
    if stated and ignore is None and _calibrated_with_masks(folder):
        print("The rate was stated with ignore masks, and may not hold without them; give --ignore.")


def _calibrated_with_masks(folder: Path) -> bool:
    return "ignored" in checkpoint.read_record(folder).get("calibration", {})


def calibrate(argv: list[str]) -> None:
    parser = make_parser(
        "calibrate", "State a false-alarm rate: thresholds from normal images that a model hasn't seen."
    )
    parser.add_argument("name", help="name or folder of a model")
    parser.add_argument("--data", type=str | None, default=None, help=f"{FORMS}; null: scores of the last calibration")
    parser.add_argument(
        "--false-alarm-rate", type=float | None, default=None, help="highest share of normal images that is anomalous"
    )
    parser.add_argument(
        "--min-area",
        type=int | None,
        default=None,
        help="pixels that a region has at least; null: 1, or what it was, without --data",
    )
    add_data_options(parser, {})
    add_run_options(parser, precision=None)
    options = parse(parser, argv)
    folder, rate = hub.find_model(options.name), options.false_alarm_rate
    config = checkpoint.read_config(folder)
    if rate is None:
        raise ZooError(f"zoo calibrate needs a rate: zoo calibrate {options.name} --data DATA --false-alarm-rate 0.01.")
    check_rate(rate)
    if hub.is_cached(folder):
        raise ZooError(f"{options.name} is the hub's; zoo import {options.name} makes a copy of your own to calibrate.")
    if options.min_area is not None and options.min_area < 1:
        raise ZooError(f"--min-area is at least 1 pixel, not {options.min_area}.")
    if not options.data:
        if given := [key for key in ("tile", "ignore", "precision") if options[key] is not None]:
            raise ZooError(f"--{given[0]} needs the images anew: give --data with it.")
        known = restored(config["calibration"]).at_rate(rate)
        if options.min_area not in (None, known.min_area):
            raise ZooError("Regions of another area need the images anew: give --data with --min-area.")
    else:
        check_data(options.data)

    from zoo import calibrate as calibration

    if options.data:
        model, values = hub.from_pretrained(folder), data_values(options)
        run = run_of(options, model.precision)
        about, rows = calibration.calibrate(model, options.data, rate, options.min_area or 1, folder, values, run)
        if not launched()[0]:
            calibration.store_calibration(folder, model.calibration, about, rows, model.view)
        known = model.calibration
    else:
        known = calibration.change_rate(folder, rate)
    print(
        f"Calibrated {options.name}: {known.promise()}.\nAn image is anomalous from a score of "
        f"{known.image_threshold:.6g}. A region is {known.min_area} or more connected pixels of at least "
        f"{known.pixel_threshold:.6g} in its map; that any is shown has the same rate, by itself.\n"
        f"Next: zoo predict {options.name} PATH --out DIR"
    )


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
    "evaluate": evaluate,
    "predict": predict,
    "calibrate": calibrate,
    "publish": publish,
    "benchmark": benchmark,
    "release": release,
    "import": import_,
    "data": data,
    "export": export,
}


if __name__ == "__main__":
    sys.exit(main())
