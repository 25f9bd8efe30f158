"""Fit a model on normal images, with default thresholds from those that are held out."""

from pathlib import Path
from typing import Any

from zoo import checkpoint, hub
from zoo.data import check_data
from zoo.errors import ZooError
from zoo.fitting import Keeping, learn
from zoo.methods import create_model, method_id, presets, signature
from zoo.module import AnomalyModule
from zoo.nn.features import weights_at_hand
from zoo.run import DataOptions, RunOptions, device_of, plan_training
from zoo.trainer import first_speaks
from zoo.view import LEAST_TILE


def choose_preset(method: str, preset: str | None, arguments: dict[str, Any]) -> str:
    """The preset to take: as named, else `paper224` if its weights can be had.

    Raises:
        ZooError: none was named and the weights can't be had; it never falls back silently.
    """
    if preset is not None:
        return preset
    model = {name: option.default for name, option in signature(method).items()}
    model |= presets(method, "paper224").get("model", {}) | arguments
    if "backbone" in model and not weights_at_hand(model["backbone"], model["backbone_weights"]):
        raise ZooError(
            f"The ImageNet weights of {model['backbone']} can't be had here; use the built-in small backbone: "
            f"zoo fit {method} --preset lite ..., or give --backbone-weights FILE.safetensors."
        )
    return "paper224"


def fit(
    method: str,
    data: str,
    name: str | None = None,
    preset: str | None = None,
    arguments: dict[str, Any] | None = None,
    data_options: dict[str, Any] | None = None,
    trainer_options: dict[str, Any] | None = None,
    run: RunOptions | None = None,
    resume: bool = False,
    checkpoint_minutes: float = 5.0,
    memory_limit: float | None = None,
    home: Path | None = None,
) -> tuple[AnomalyModule, dict[str, Any]]:
    """Fit a method on the normal training images of a data set.

    Args:
        method: its id.
        data: DATA specification (see `zoo.data`).
        name: keep the model under this name in the local registry.
        preset: section values to start from; None takes `paper224` where its weights can be had.
        arguments: of the method's signature, over the preset's.
        data_options: fields of `DataOptions`, over the preset's.
        trainer_options: fields of `TrainerOptions`, over the preset's; only of methods that learn by gradient.
        resume: go on where an interrupted fit of this name stopped, if there is one; the result is the same.
        checkpoint_minutes: between two checkpoints of a fit under way; 0 writes one after each batch.
        memory_limit: bytes; a fit that needs more, by the estimate, is refused before it starts.
        home: keep the model and the checkpoints in this folder instead of the local registry.

    Returns:
        The fitted model, in eval mode, with default thresholds from held-out normals, and its record.

    Raises:
        ZooError: any mistake in the arguments or the images, in one sentence.
    """
    run, arguments = first_speaks(run or RunOptions()), arguments or {}
    method = method_id(method)
    if name is not None:
        checkpoint.check_place(hub.model_place(name, home))
    preset = choose_preset(method, preset, arguments)
    device_of(run.device)
    spec = check_data(data)
    model = create_model(method, preset, **arguments)
    model.precision = run.precision
    options = DataOptions(**(presets(method, preset).get("data", {}) | (data_options or {})))
    plan = plan_training(method, preset, trainer_options or {})
    if options.tile == 0:
        raise ZooError(f"--tile is at least {LEAST_TILE} pixels, not 0; leave it out to fit on whole images.")
    return learn(model, data, spec, options, plan, run, Keeping(name, home, resume, checkpoint_minutes), memory_limit)
