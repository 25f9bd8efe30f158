"""The plan of a benchmark: what is compared, how each method is trained, and the runs that this makes."""

import hashlib
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zoo.data import DataSpec, check_data
from zoo.errors import ZooError
from zoo.methods import method_id, presets, signature
from zoo.ranks import launched
from zoo.run import plan_training

FORMAT_VERSION = 1
DEFAULT_SELECT = "image_auroc"
ONE_PASS_PRESETS = {"mvtec_steps": "paper224"}  # what methods without steps take where a preset is about steps


@dataclass
class Plan:
    """What a benchmark compares, and how.

    `budget` is a number of optimiser steps for each method that takes steps ("300"), or a share of what the preset has
    for it ("10%"). `arguments` are values of a method's own arguments by method. `batch_size` None takes the preset's.
    `figure_method` is whose Figure 1 is to be shown in the end.
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


def trainer_options(method: str, preset: str, budget: str | None, select: str) -> dict[str, Any]:
    """How a method is trained in a benchmark; {} for one that learns in a single pass.

    Raises:
        ZooError: a budget or selection of no use.
    """
    planned = presets(method, preset).get("trainer")
    share = re.fullmatch(r"(\d+(?:\.\d+)?)%", budget or "")
    if budget and not (share or re.fullmatch(r"\d+", budget)) or (share and not float(share[1])):
        raise ZooError(f"--budget is a number of steps such as 300, or a share of the preset's as 10%, not {budget}.")
    if planned is None:
        return {}
    given: dict[str, Any] = {"select": select}
    if share:
        key = "max_steps" if planned.get("max_steps") else "max_epochs"
        given[key] = max(1, round(planned[key] * float(share[1]) / 100))
    elif budget:
        given["max_steps"] = int(budget)
    plan_training(method, preset, given)
    return given


def jobs_of(plan: Plan) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The index of a benchmark and its runs, seed by seed, checked as far as that goes without an image.

    Raises:
        ZooError: a mistake in the plan.
    """
    if plan.seeds < 1:
        raise ZooError(f"--seeds is at least 1, not {plan.seeds}.")
    world = launched()[1]
    if world > 1 and plan.devices > 1:
        raise ZooError("--devices is for one machine without a launcher; torchrun and srun say how many there are.")
    spec = check_data(plan.data)
    _check_counts(plan, spec)
    common = {
        "data": {"name": spec.name, "fingerprint": spec.fingerprint},
        **{key: getattr(plan, key) for key in ("preset", "budget", "protocol", "select", "precision")},
        "devices": plan.devices if world == 1 else world,
        **{key: getattr(plan, key) for key in ("batch_size", "skip_broken")},
    }
    methods: dict[str, dict[str, Any]] = {}
    arguments = {method_id(name): values for name, values in plan.arguments.items()}
    for method in dict.fromkeys(method_id(name) for name in plan.methods):
        preset = _preset(method, plan.preset, arguments.get(method, {}))
        unknown = arguments.get(method, {}).keys() - (signature(method).keys() - {"seed"})
        if unknown:
            raise ZooError(f"{method} has no argument {min(unknown)!r} to benchmark with; see zoo fit {method} --help.")
        trainer = trainer_options(method, preset, plan.budget, plan.select)
        methods[method] = {"preset": preset, "arguments": _placeless(arguments.get(method, {})), "trainer": trainer}
    if others := arguments.keys() - methods.keys():
        raise ZooError(f"--arguments speaks of {min(others)}, which --methods leaves out.")
    jobs = [
        _job(plan, common, method, how, seed) | {"arguments": arguments.get(method, {})}
        for seed in range(plan.seeds)
        for method, how in methods.items()
    ]
    return {"format_version": FORMAT_VERSION, "common": common, "methods": methods}, jobs


def _placeless(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments as a record may tell them: of a file its name, not its place."""
    return {
        name: os.path.basename(value) if isinstance(value, str) and os.path.isabs(value) else value
        for name, value in arguments.items()
    }


def _check_counts(plan: Plan, spec: DataSpec) -> None:
    if not spec.counts["train"][0]:
        raise ZooError(f"--data {plan.data} has no normal images to fit on; put some into train/good or good.")
    if min(spec.counts["test"]) < 2:
        raise ZooError(f"--data {plan.data} needs two normal and two anomalous test images, for two halves.")


def _preset(method: str, preset: str | None, arguments: dict[str, Any]) -> str:
    """The preset that a method takes, whose weights can be had where none is named."""
    if preset is None:
        from zoo.fit import choose_preset

        try:
            return choose_preset(method, None, arguments)
        except ZooError as error:
            reason = str(error).split(";")[0]
            raise ZooError(f"{reason}; take zoo benchmark --preset lite, or --methods without {method}.") from None
    other = ONE_PASS_PRESETS.get(preset)
    if other and "trainer" not in presets(method, other):
        return other
    presets(method, preset)
    return preset


def _job(plan: Plan, common: dict[str, Any], method: str, how: dict[str, Any], seed: int) -> dict[str, Any]:
    options = {"num_workers": plan.num_workers, "skip_broken": plan.skip_broken}
    options |= {"batch_size": plan.batch_size} if plan.batch_size else {}
    return how | {
        "method": method,
        "seed": seed,
        "name": f"{method.replace('_', '-')}-seed{seed}",
        "key": run_key(common, method, how, seed),
        "data": plan.data,
        "data_options": options,
        "protocol": plan.protocol,
        "device": plan.device,
        "precision": plan.precision,
        "out": str(plan.out),
    }


def run_key(common: dict[str, Any], method: str, how: dict[str, Any], seed: int) -> str:
    """What a record and the configuration that it belongs to have in common."""
    return hashlib.sha256(json.dumps([common, method, how, seed], sort_keys=True).encode()).hexdigest()[:16]
