"""The command that goes on from a fitted model. Arguments are checked before torch is imported."""

from typing import Any, Literal

from zoo import checkpoint, hub
from zoo.calibration import supported_rate
from zoo.data import FORMS, check_data
from zoo.errors import ZooError
from zoo.methods import list_methods
from zoo.options import add_run_options, add_view_options, check_tile, make_parser, parse, run_of
from zoo.run import LR_SCALE, SHARE, STEPS, check_share, plan_finetuning

OF_DATA = ("batch_size", "num_workers", "skip_broken", "hold_out", "intensity", "tile", "ignore")
OF_TRAINING = ("max_steps", "max_epochs", "lr_scale", "accumulate", "select")


def finetune(argv: list[str]) -> None:
    parser = make_parser("finetune", "Continue a model on normal images of your own; the model itself is kept.")
    _add_options(parser)
    options = parse(parser, argv)
    if not options.name or not (options.data or options.remove):
        needed = "--data, or --remove" if options.name else "--name"
        raise ZooError(f"zoo finetune needs {needed}: zoo finetune {options.parent} --data DATA --name NEW.")
    if not options.checkpoint_minutes >= 0:
        raise ZooError(f"--checkpoint-minutes is at least 0, not {options.checkpoint_minutes}.")
    folder = hub.find_model(options.parent)
    config, training = checkpoint.read_config(folder), {key: options[key] for key in OF_TRAINING}
    check_tile(options.tile)
    check_share(options.parent_share)
    hub.check_child(folder, options.name)
    if config["method"] in list_methods():
        plan_finetuning(config["method"], training)
    place = hub.model_place(options.name)
    verb = "Replaced" if place.exists() else "Saved"
    if place.exists():
        print(f"There is a model {options.name}, which the new one will replace in the end.", flush=True)
    if options.data:
        check_data(options.data)

    from zoo.finetune import finetune as run
    from zoo.parent import data_of

    model, record = run(
        options.parent,
        options.data,
        options.name,
        options.remove,
        {key: options[key] for key in OF_DATA},
        training,
        options.parent_share,
        run_of(options, config["precision"]),
        resume=options.resume,
        checkpoint_minutes=options.checkpoint_minutes,
    )
    parent = record["parent"]
    print(f"{verb} {options.name} in {place}, from {parent['name']} (SHA-256 {parent['weights_sha256'][:12]}...).")
    held, looked_at = record["train_data"].get("held_out", 0), record["configuration"].get("trainer", {})
    data, rate = "NORMALS", 0.01
    if options.data and held and looked_at.get("select") != "normal":
        data, rate = options.data, max(rate, supported_rate(held))
    if not options.data:
        print("It has no threshold, as that was of what it had learned before.")
        data = data_of(place, "")[0] or data  # of which the same images are held out
    elif model.calibration is None:
        print("It has no threshold, as no images were held out for one.")
    print(f"Next: zoo calibrate {options.name} --data {data} --false-alarm-rate {rate:g}")


def _add_options(parser: Any) -> None:
    parser.add_argument("parent", metavar="model", help="name or folder of a model, or a repository on the hub")
    parser.add_argument("--data", type=str | None, default=None, help=f"images: {FORMS}")
    parser.add_argument("--name", type=str | None, default=None, help="name of the new model in the local registry")
    parser.add_argument(
        "--remove",
        type=str,
        default=[],
        nargs="+",
        help="images to take out of what padim, patchcore or cfa has learned: names in its data, or files",
    )
    parser.add_argument(
        "--parent-share",
        type=float | None,
        default=SHARE,
        help="weight of what padim, patchcore and cfa have gathered before; null: as all images that they are of",
    )
    parser.add_argument("--max-steps", type=int | None, default=None, help=f"optimiser steps at most; null: {STEPS}")
    parser.add_argument("--max-epochs", type=int | None, default=None, help="passes over the images, instead of steps")
    parser.add_argument(
        "--lr-scale", type=float | None, default=None, help=f"share of the learning rates of the fit; null: {LR_SCALE}"
    )
    parser.add_argument("--accumulate", type=int | None, default=None, help="batches that make one step")
    parser.add_argument(
        "--select",
        type=str | None,
        default=None,
        help="normal (null): the step with the lowest mean map of held-out normals, and an early end; last: all steps",
    )
    parser.add_argument("--batch-size", type=int | None, default=None, help="images a batch; null: the preset's")
    parser.add_argument("--num-workers", type=int | None, default=None, help="decoding processes; null: as for fit")
    parser.add_argument("--skip-broken", action="store_true", help="leave out images that can't be read, and list them")
    parser.add_argument("--hold-out", type=int | None, default=None, help="normals to set aside; null: as for fit")
    parser.add_argument(
        "--intensity",
        type=Literal["keep", "full", "percentile"],
        default="keep",
        help="what black and white are: as before, the full scale, or percentiles of these images",
    )
    add_view_options(parser)
    add_run_options(parser, precision=None, devices=True)
    parser.add_argument(
        "--resume", action="store_true", help="go on where an interrupted fine-tuning of this name stopped"
    )
    parser.add_argument("--checkpoint-minutes", type=float, default=5.0, help="between checkpoints; 0: each batch")
