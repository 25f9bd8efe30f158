"""The command that scores images. Arguments are checked before torch is imported."""

from pathlib import Path

from zoo import checkpoint, hub
from zoo.errors import ZooError
from zoo.inference import closing_lines, find_ignore, find_images, predict_files
from zoo.options import add_run_options, add_view_options, check_tile, make_parser, parse, run_of


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
