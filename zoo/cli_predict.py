"""The command that scores images. Arguments are checked before torch is imported."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from zoo import checkpoint, hub
from zoo.calibration import stored
from zoo.errors import ZooError
from zoo.inference import Found, check_out, closing_lines, find_ignore, find_images, predict_files
from zoo.klarf import Labels, check_place, write_klarf
from zoo.options import add_run_options, add_view_options, check_tile, make_parser, parse, run_of
from zoo.paths import user_path
from zoo.ranks import launched

if TYPE_CHECKING:  # imported on use: arguments are checked before torch is loaded
    from zoo.module import AnomalyModule


def predict(argv: list[str]) -> int:
    """Score images; the exit code that `--fail-on` asks for."""
    parser = make_parser("predict", "Score images: heatmap overlays, masks, predictions.csv and predictions.json.")
    parser.add_argument("name", help="name or folder of a model")
    parser.add_argument("paths", nargs="+", help="images, or folders of images")
    parser.add_argument("--out", type=str | None, default=None, help="folder for the results")
    parser.add_argument("--batch-size", type=int, default=8, help="images of equal size scored at once")
    parser.add_argument("--skip-broken", action="store_true", help="go on after images that can't be read")
    _add_output_options(parser)
    add_view_options(parser)
    add_run_options(parser, precision=None)
    options = parse(parser, argv)
    folder = hub.find_model(options.name)
    config = checkpoint.read_config(folder)
    if not options.out:
        raise ZooError(f"zoo predict needs --out: zoo predict {options.name} PATH --out DIR.")
    if options.batch_size < 1:
        raise ZooError(f"--batch-size is at least 1, not {options.batch_size}.")
    labels = _check_output_options(options, config)
    check_out(Path(options.out))
    images = find_images(options.paths, Path(options.out))
    check_tile(options.tile)
    ignore = find_ignore(options.ignore, options.paths, images)
    if options.klarf and options.pixel_nm is None:
        _check_pixel_size(next(iter(images.values())))
    model = hub.from_pretrained(folder)
    run = run_of(options, model.precision)
    out, size = Path(options.out), options.batch_size
    more = {"ignore": ignore, "tile": options.tile, "pixel_nm": options.pixel_nm}
    found = predict_files(model, images, out, size, options.skip_broken, run, **more)
    rows = list(found.rows.values())
    lines = list(closing_lines(model, rows, out, options.tile))
    stated = any(row["is_anomalous"] is not None for row in rows)
    if stated and ignore is None and _calibrated_with_masks(folder):
        lines.append("The rate was stated with ignore masks, and may not hold without them; give --ignore.")
    for line in lines:
        print(line)
    if launched()[0]:  # of several processes the first one writes, and ends with the code that counts
        return 0
    if not options.report and (out / "report.html").exists():
        print(f"{out / 'report.html'} is of an earlier run; --report writes a new one.")
    if options.report:
        notes = [*found.lines(model, with_broken=False), *lines[1:]]
        _write_report(options, model, hub.name_of(folder), found, notes, ignore is not None)
    if options.klarf:
        station = (model.method.replace("_", "-"), config["weights_sha256"][:12])
        write_klarf(user_path(options.klarf), rows, labels, hub.name_of(folder), station)
        print(f"The KLARF file is {options.klarf}.")
    known = config["calibration"]
    return _exit_code(options.fail_on, found, bool(known and known["calibrated"]))


def _write_report(
    options: Any, model: "AnomalyModule", name: str, found: Found, notes: list[str], ignore_masks: bool
) -> None:
    from zoo.inspection import write_report

    page, about = Path(options.out) / "report.html", {"broken": found.broken, "ignore_masks": ignore_masks}
    with model.seen_in_tiles(options.tile):
        write_report(page, list(found.rows.values()), model, name, notes=notes, **about)
    print(f"The report is {page}.")


def _add_output_options(parser: Any) -> None:
    parser.add_argument("--report", action="store_true", help="write report.html too: one page with all that was found")
    parser.add_argument("--klarf", type=str | None, default=None, help="write regions to this KLARF 1.2 file too")
    parser.add_argument(
        "--pixel-nm", type=float | None, default=None, help="side of a pixel in nm, of files that don't tell theirs"
    )
    parser.add_argument(
        "--fail-on",
        type=Literal["anomalies", "regions"] | None,
        default=None,
        help="exit code 1 if an image is called anomalous, or has a region; 2 if none does but some are not judged",
    )
    parser.add_argument("--lot", type=str, default="unknown", help="lot, for the KLARF file")
    parser.add_argument("--wafer", type=str, default="unknown", help="wafer, for the KLARF file")
    parser.add_argument("--device-id", type=str, default="unknown", help="product, for the KLARF file")
    parser.add_argument("--step", type=str, default="unknown", help="process step, for the KLARF file")


def _check_output_options(options: Any, config: dict[str, Any]) -> Labels:
    """Raises ZooError for what can be told before an image is read."""
    labels = Labels(options.lot, options.wafer, options.device_id, options.step)
    if not options.klarf and labels != Labels():
        raise ZooError("--lot, --wafer, --device-id and --step stand in a KLARF file; give --klarf FILE with them.")
    if options.klarf:
        check_place(user_path(options.klarf))
    if options.pixel_nm is not None and not 0 < options.pixel_nm < math.inf:
        raise ZooError(f"--pixel-nm is the side of a pixel in nm, above 0, not {options.pixel_nm:g}.")
    asked = "--klarf" if options.klarf else "--fail-on regions" if options.fail_on == "regions" else None
    if asked:
        _check_regions(asked, options, config)
    elif options.fail_on and config["calibration"] is None:
        raise ZooError(
            f"--fail-on needs verdicts, and {options.name} has no threshold; state one: "
            f"zoo calibrate {options.name} --data DATA --false-alarm-rate 0.01."
        )
    return labels


def _check_regions(asked: str, options: Any, config: dict[str, Any]) -> None:
    """Raises ZooError unless the model will show regions."""
    known = config["calibration"] and stored(config["calibration"])
    if not (known and known.calibrated):
        raise ZooError(
            f"{asked} needs regions, and {options.name} shows none before it is calibrated: "
            f"zoo calibrate {options.name} --data DATA --false-alarm-rate 0.01."
        )
    if (options.precision or config["precision"]) != known.precision:
        raise ZooError(f"{asked} needs regions, and the rate was stated in {known.precision}; leave out --precision.")
    if options.tile is not None and (options.tile or None) != config["preprocessing"].get("tile"):
        raise ZooError(f"{asked} needs regions, and the rate was stated for other tiles; leave out --tile.")


def _check_pixel_size(image: Path) -> None:
    """Raises ZooError if a first image doesn't tell the size of its pixels; a broken one is told of later."""
    from zoo.sem import read_sem

    try:
        known = read_sem(image).pixel_nm
    except ZooError:
        return
    if known is None:
        raise ZooError(f"--klarf needs the size of a pixel, and {image} doesn't tell it; give --pixel-nm.")


def _exit_code(fail_on: str | None, found: Found, is_stated: bool) -> int:
    """1 for what was found, else 0.

    Args:
        is_stated: whether the model has a rate, which may not hold for each image.

    Raises:
        ZooError: nothing was found, but not all images could be judged.
    """
    if fail_on is None:
        return 0
    rows = found.rows.values()
    if fail_on == "anomalies":
        failed, what = sum(row["verdict"].startswith("anomalous") for row in rows), "called anomalous"
        unjudged = [row["image"] for row in rows if is_stated and row["is_anomalous"] is None]
    else:
        failed, what = sum(bool(row["num_regions"]) for row in rows), "with regions"
        unjudged = [row["image"] for row in rows if row["num_regions"] is None]
    if failed:
        print(f"Exit code 1, as --fail-on {fail_on} asks for: {failed} image{'s' * (failed != 1)} {what}.")
        return 1
    if left := [*(path for path, _ in found.broken), *unjudged]:
        raise ZooError(
            f"No image that was judged fails, but {len(left)} could not be judged, such as {left[0]}; mend or leave "
            "out what is named above, and score again."
        )
    return 0


def _calibrated_with_masks(folder: Path) -> bool:
    return "ignored" in checkpoint.read_record(folder).get("calibration", {})
