"""The plan of a benchmark: what is compared, how each method is trained, and the runs that this makes."""

import hashlib
import json
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zoo.data import DataSpec, check_data
from zoo.data.holdout import held_out
from zoo.errors import ZooError
from zoo.methods import method_id, presets, signature
from zoo.options import own_arguments
from zoo.paths import user_path
from zoo.ranks import launched
from zoo.run import BATCH, check_select, device_of, plan_training

FORMAT_VERSION = 1
DEFAULT_SELECT, DEFAULT_PRESET = "image_auroc", "paper224"
PATHS = ("backbone_weights", "inpainting_pairs")  # arguments that name files or folders
STEP_PRESETS = {"mvtec_steps": DEFAULT_PRESET}  # what methods without such a preset take


@dataclass
class Plan:
    """What a benchmark compares, and how.

    `budget` is a number of optimiser steps for each method that takes steps ("300"), or a share of what the preset has
    for it ("10%"). `arguments` are values of a method's own arguments by method. `batch_size` None takes the preset's.
    `figure_method` is whose Figure 1 is to be shown in the end. `bootstrap` is the number of draws for intervals of the
    metrics, which the key of a run does not know: a record without them is a record.
    """

    data: str
    methods: list[str]
    out: Path
    seeds: int = 3
    preset: str | None = None
    budget: str | None = None
    protocol: str = "house"
    select: str = DEFAULT_SELECT
    arguments: dict[str, dict[str, Any]] = field(default_factory=dict)
    batch_size: int | None = None
    num_workers: int | None = None
    skip_broken: bool = False
    device: str = "auto"
    devices: int = 1
    precision: str = "32-true"
    figure_method: str | None = None
    bootstrap: int = 0


def plan_of(options: Any, out: Path, **more: Any) -> Plan:
    """The plan that options of the command line describe (`zoo.options.add_plan_options`), with its folder."""
    plan = Plan(**{key: options[key] for key in Plan.__dataclass_fields__ if key in options} | {"out": out} | more)
    plan.budget = None if options.budget is None else str(options.budget)
    plan.precision = options.precision or "32-true"
    return plan


def trainer_options(method: str, preset: str, budget: str | None, select: str, steps_an_epoch: int) -> dict[str, Any]:
    """How a method is trained in a benchmark; {} for one that learns in a single pass.

    Args:
        steps_an_epoch: of this method on the data; what a share of a number of epochs is reckoned by.

    Raises:
        ZooError: a budget or selection of no use.
    """
    planned = presets(method, preset).get("trainer")
    share = re.fullmatch(r"(\d+(?:\.\d+)?)%", budget or "")
    if budget and not ((share or budget.isdecimal()) and float(budget.rstrip("%"))):
        raise ZooError(f"--budget is a number of steps such as 300, or a share of the preset's as 10%, not {budget}.")
    if planned is None:
        return {}
    given: dict[str, Any] = {"select": select}
    if share:
        steps = planned.get("max_steps") or planned["max_epochs"] * steps_an_epoch
        given["max_steps"] = max(1, round(steps * float(share[1]) / 100))
    elif budget:
        given["max_steps"] = int(budget)
    plan_training(method, preset, given)
    return given


def steps_an_epoch(method: str, preset: str, plan: Plan, normals: int, defects: int) -> int:
    """Optimiser steps that an epoch of this many images takes, less those that the fit holds out."""
    sections, world = presets(method, preset), launched()[1]
    of_data, model = sections.get("data", {}), sections.get("model", {}) | plan.arguments.get(method, {})
    normals = max(1, round(of_data.get("train_fraction", 1.0) * normals))
    images = normals - held_out(normals) + (defects if model.get("supervised") else 0)
    batch = (plan.batch_size or of_data.get("batch_size", BATCH)) * (world if world > 1 else plan.devices)
    return math.ceil(math.ceil(images / batch) / (sections.get("trainer", {}).get("accumulate") or 1))


def run_name(method: str, seed: int) -> str:
    """What a run's record, log and model are called."""
    return f"{method.replace('_', '-')}-seed{seed}"


def jobs_of(plan: Plan) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The index of a benchmark and its runs, seed by seed, checked as far as that goes without an image.

    Raises:
        ZooError: a mistake in the plan.
    """
    for option, value in (("--seeds", plan.seeds), ("--batch-size", plan.batch_size)):
        if value is not None and value < 1:
            raise ZooError(f"{option} is at least 1, not {value}.")
    check_select(plan.select)
    world = launched()[1]
    if world > 1 and plan.devices > 1:
        raise ZooError("--devices is for one machine without a launcher; torchrun and srun say how many there are.")
    spec = check_data(plan.data)
    _check_counts(plan, spec)
    common = {
        "data": {"name": spec.name, "fingerprint": spec.fingerprint},
        "preset": plan.preset or DEFAULT_PRESET,
        **{key: getattr(plan, key) for key in ("budget", "protocol", "select", "precision")},
        "devices": plan.devices if world == 1 else world,
        **{key: getattr(plan, key) for key in ("batch_size", "skip_broken")},
    }
    methods: dict[str, dict[str, Any]] = {}
    arguments = plan.arguments = {method_id(name): values for name, values in plan.arguments.items()}
    for method in dict.fromkeys(method_id(name) for name in plan.methods):
        preset = preset_of(method, plan.preset)
        arguments[method] = own_arguments(method, arguments.get(method, {}))
        epoch = steps_an_epoch(method, preset, plan, *spec.counts["train"])
        trainer = trainer_options(method, preset, plan.budget, plan.select, epoch)
        methods[method] = {"preset": preset, "trainer": trainer, **_placeless(arguments[method])}
    if others := arguments.keys() - methods.keys():
        raise ZooError(f"--arguments speaks of {min(others)}, which --methods leaves out.")
    _check_weights(methods, arguments)
    common["device"] = device_of(plan.device).type  # times on different ones have no mean
    jobs = [
        _job(plan, common, method, how, seed) | {"arguments": arguments[method]}
        for seed in range(plan.seeds)
        for method, how in methods.items()
    ]
    seeds = dict.fromkeys(methods, plan.seeds)
    return {"format_version": FORMAT_VERSION, "common": common, "methods": methods, "seeds": seeds}, jobs


def _placeless(arguments: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """`arguments` as a record may tell them, of a path its last part; and by name the `contents` of what lies there."""
    paths = {name: user_path(arguments[name]) for name in PATHS if _is_path(arguments.get(name))}
    named = {"arguments": arguments | {name: path.name for name, path in paths.items()}}
    return named | ({"contents": {name: _digest(path) for name, path in paths.items()}} if paths else {})


def _is_path(value: Any) -> bool:
    """Whether a value names a file or folder, be it there or not; hf-hub:ORG/NAME names none."""
    return isinstance(value, str) and (value.startswith("~") or "/" in value.split(":")[0] or os.path.exists(value))


def _digest(path: Path) -> str | None:
    """SHA-256 of a file, or of a folder's names and files; None where there is nothing."""
    if path.is_dir():
        files = [file for file in sorted(path.rglob("*")) if file.is_file()]
        listed = [f"{file.relative_to(path)} {_digest(file)}" for file in files]
        return hashlib.sha256("\n".join(listed).encode(errors="surrogateescape")).hexdigest()
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:  # the run will say so
        return None


def _check_counts(plan: Plan, spec: DataSpec) -> None:
    if not spec.counts["train"][0]:
        raise ZooError(f"--data {plan.data} has no normal images to fit on; put some into train/good or good.")
    if min(spec.counts["test"]) < 2:
        raise ZooError(f"--data {plan.data} needs two normal and two anomalous test images, for two halves.")


def preset_of(method: str, preset: str | None) -> str:
    """The preset that a method takes: `paper224` where none is named, or where it lacks one that is about steps."""
    if preset is None:
        return DEFAULT_PRESET
    try:
        presets(method, preset)
    except ZooError:
        if preset not in STEP_PRESETS:
            raise
        return STEP_PRESETS[preset]
    return preset


def _check_weights(methods: dict[str, dict[str, Any]], arguments: dict[str, dict[str, Any]]) -> None:
    """All ImageNet weights can be had, so that no run fails for want of them days later."""
    from zoo.nn.features import weights_at_hand

    lacking: dict[str, str] = {}
    for method, how in methods.items():
        model = {name: option.default for name, option in signature(method).items()}
        model |= presets(method, how["preset"]).get("model", {}) | arguments.get(method, {})
        if "backbone" in model and not weights_at_hand(model["backbone"], model["backbone_weights"]):
            lacking[method] = model["backbone"]
    if lacking:
        backbones, first = ", ".join(sorted(set(lacking.values()))), next(iter(lacking))
        raise ZooError(
            f"The ImageNet weights of {backbones} can't be had here, which {', '.join(lacking)} need; take --preset "
            f"lite, --methods without them, or local files: --arguments "
            f'\'{{"{first}": {{"backbone_weights": "FILE.safetensors"}}}}\'.'
        )


def _job(plan: Plan, common: dict[str, Any], method: str, how: dict[str, Any], seed: int) -> dict[str, Any]:
    options = {"num_workers": plan.num_workers, "skip_broken": plan.skip_broken}
    options |= {"batch_size": plan.batch_size} if plan.batch_size else {}
    return how | {
        "method": method,
        "seed": seed,
        "name": run_name(method, seed),
        "key": run_key(common, method, how, seed),
        "data": plan.data,
        "data_options": options,
        "protocol": plan.protocol,
        "device": plan.device,
        "precision": plan.precision,
        "bootstrap": plan.bootstrap,
        "out": str(plan.out),
    }


def run_key(common: dict[str, Any], method: str, how: dict[str, Any], seed: int) -> str:
    """What a record and the configuration that it belongs to have in common."""
    return hashlib.sha256(json.dumps([common, method, how, seed], sort_keys=True).encode()).hexdigest()[:16]
