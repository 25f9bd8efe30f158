"""Go on from a fitted model, local or from the hub, with normal images of another process, tool or lot.

Methods that learn by gradient continue from their weights: at lower rates, for few steps, and end early where held-out
normal images are no longer seen as more normal. Those that keep statistics add the new images to them.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from zoo import checkpoint, hub, seen
from zoo.data import check_data
from zoo.errors import ZooError
from zoo.fitting import Keeping, learn
from zoo.methods import presets
from zoo.module import AnomalyModule
from zoo.parent import DATA, EARLIER, Parent
from zoo.run import LR_SCALE, PATIENCE, SHARE, STEPS, DataOptions, RunOptions, TrainerOptions, checked, device_of
from zoo.trainer import first_speaks


def finetune(
    parent: str | Path,
    data: str | None,
    name: str | None = None,
    remove: Sequence[str] = (),
    data_options: dict[str, Any] | None = None,
    trainer_options: dict[str, Any] | None = None,
    parent_share: float | None = SHARE,
    run: RunOptions | None = None,
    resume: bool = False,
    checkpoint_minutes: float = 5.0,
    home: Path | None = None,
) -> tuple[AnomalyModule, dict[str, Any]]:
    """Continue a model on the normal training images of a data set; its parent is left as it is.

    Images that the parent has learned from are left out; what it learned from stays known to `calibrate`.

    Args:
        parent: name, folder or repository of a fitted model.
        data: DATA specification; None where images are only to be removed.
        name: keep the model under this name in the local registry.
        remove: names of images that the parent has learned from and should not have, see `zoo.updating.update`.
        data_options: fields of `DataOptions`; `info_bar`, `intensity` and `tile` are the parent's where they are None.
        trainer_options: fields of `TrainerOptions`, of methods that learn by gradient; None where they are as usual.
        parent_share: weight of the parent's statistics (PaDiM's moments, CFA's means) among the child's, in (0, 1), and
            the highest share of PatchCore's bank that it keeps; None: each image counts once, and PatchCore's bank is a
            coreset of all.
        resume, checkpoint_minutes, home: as for `zoo.fit.fit`.

    Returns:
        The model, in eval mode, with default thresholds from held-out images of the data, and its record, which names
        the parent by the SHA-256 of its weights.

    Raises:
        ZooError: any mistake in the arguments or the images, in one sentence.
    """
    folder = hub.find_model(parent)
    if name is not None:
        check_names(folder, name, home)
    if parent_share is not None and not 0 < parent_share < 1:
        raise ZooError(f"--parent-share lies between 0 and 1, not {parent_share}.")
    spec = check_data(data) if data else None
    model = hub.from_pretrained(folder)
    if model.view.crop:
        raise ZooError(f"{parent} was fitted on cropped images, for parity runs; fine-tune one of another preset.")
    run = first_speaks(run or RunOptions(precision=model.precision))
    device = device_of(run.device)
    ours = Parent(folder, checkpoint.read_config(folder), checkpoint.read_record(folder), parent_share)
    plan = plan_finetuning(model, trainer_options or {})
    if remove:
        model.to(device).update(remove=list(remove))
        run.say(f"{len(remove)} image{'s' * (len(remove) != 1)} taken out of {ours.name}.")
    keeping = Keeping(name, home, resume, checkpoint_minutes)
    if spec is None:
        return _kept(model, ours, keeping)
    options = _data_options(model, ours, data_options or {})
    model.precision, model.calibration, model.selection, model.last_weights = run.precision, None, None, {}
    model.continues, model.parent_share = True, parent_share
    if hasattr(model, "origin"):
        model.origin = [(ours.named(image), *place) for image, *place in model.origin]
    return learn(model, data, spec, options, plan, run, keeping, parent=ours)


def check_names(folder: Path, name: str, home: Path | None = None) -> None:
    """Raises ZooError where a model of this name can't be kept, or would take the place of its parent."""
    place = hub.model_place(name, home)
    if place.resolve() == folder.resolve():
        raise ZooError(f"--name {name} is the model itself; give the new one another name, and the old one is kept.")
    checkpoint.check_place(place)


def plan_finetuning(model: AnomalyModule, given: dict[str, Any]) -> TrainerOptions | None:
    """How a model is to be trained further; None for a method that has no training steps.

    Raises:
        ZooError: a value of no use, or options of training for a method that has none.
    """
    given = {key: value for key, value in given.items() if value is not None}
    if not model.learns_by_gradient:
        if given:
            option = f"--{min(given).replace('_', '-')}"
            raise ZooError(f"{model.method} learns in one pass without training steps; leave {option} out.")
        return None
    steps = {} if given.keys() & {"max_steps", "max_epochs"} else {"max_steps": STEPS}
    plan = checked(TrainerOptions(**({"select": "normal", "lr_scale": LR_SCALE} | steps | given)))
    if plan.select not in ("last", "normal"):
        raise ZooError(
            f"--select is normal or last: a model is fine-tuned on normal images alone, not by {plan.select}."
        )
    if not 0 < plan.lr_scale < float("inf"):
        raise ZooError(f"--lr-scale is above 0, not {plan.lr_scale}.")
    return replace(plan, patience=PATIENCE if plan.select == "normal" else None)


def _data_options(model: AnomalyModule, parent: Parent, given: dict[str, Any]) -> DataOptions:
    """The parent's batch size and view where nothing else is asked for, which the model takes up."""
    usual = {"batch_size": DataOptions().batch_size}
    if model.preset:
        usual |= {k: v for k, v in presets(model.method, model.preset).get("data", {}).items() if k == "batch_size"}
    usual |= {"info_bar": model.view.info_bar, "intensity": "keep", "tile": model.view.tile}
    options = DataOptions(**(usual | {key: value for key, value in given.items() if value is not None}))
    options.tile = options.tile or None
    model.view = replace(model.view, resize=None, tile=options.tile, info_bar=options.info_bar, bars=())
    return options


def _kept(model: AnomalyModule, parent: Parent, keeping: Keeping) -> tuple[AnomalyModule, dict[str, Any]]:
    """A model that has lost images and learned from no others; it has no threshold."""
    model.record = (model.record or {"method": model.method}) | {"parent": parent.described()}
    if earlier := parent.ancestors():
        model.record["ancestors"] = earlier
    if keeping.place is not None:
        notes = (parent.folder / "private" / file for file in (seen.FILE, DATA, EARLIER))
        private = {path.name: path.read_text(encoding="utf-8") for path in notes if path.is_file()}
        model.folder = model.save_pretrained(keeping.place, private=private | model.notes)
    return model, model.record
