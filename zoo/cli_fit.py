"""Commands that make a model of images. Arguments are checked before torch is imported."""

from typing import Literal

from zoo import hub
from zoo.calibration import normals_needed, supported_rate
from zoo.data import FORMS, check_data
from zoo.errors import ZooError
from zoo.methods import list_methods, method_id, presets, signature
from zoo.options import (
    add_data_options,
    add_info_bar_option,
    add_run_options,
    add_trainer_options,
    before_parsing,
    data_values,
    make_parser,
    parse,
    run_of,
    to_bytes,
)
from zoo.run import plan_training


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
    if place.exists():
        print(f"There is a model {options.name}, which the new one will replace in the end.", flush=True)

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
