"""The command that states a false-alarm rate. Arguments are checked before torch is imported."""

from zoo import checkpoint, hub
from zoo.calibration import check_rate, restored
from zoo.data import FORMS, check_data
from zoo.errors import ZooError
from zoo.options import add_data_options, add_run_options, data_values, make_parser, parse, run_of
from zoo.ranks import launched


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
        about, normals = calibration.calibrate(model, options.data, rate, options.min_area or 1, folder, values, run)
        if not launched()[0]:
            calibration.store_calibration(folder, model.calibration, about, normals, model.view)
        known = model.calibration
    else:
        known = calibration.change_rate(folder, rate)
    print(
        f"Calibrated {options.name}: {known.promise()}.\nAn image is anomalous from a score of "
        f"{known.image_threshold:.6g}. A region is {known.min_area} or more connected pixels of at least "
        f"{known.pixel_threshold:.6g} in its map; that any is shown has the same rate, by itself.\n"
        f"Next: zoo predict {options.name} PATH --out DIR"
    )
