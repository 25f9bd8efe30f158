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
from zoo.run import SHARE, DataOptions, RunOptions, check_share, device_of, plan_finetuning
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
        data_options: fields of `DataOptions`; `intensity` and `tile` are the parent's where they are None,
            `info_bar` always.
        trainer_options: fields of `TrainerOptions`, of methods that learn by gradient; None where they are as usual.
        parent_share: weight of the parent's statistics (PaDiM's moments, CFA's means) among the child's, in (0, 1), and
            the highest share of PatchCore's bank that it keeps; None: as all images that they are of, and PatchCore's
            bank is a coreset of all.
        resume, checkpoint_minutes, home: as for `zoo.fit.fit`.

    Returns:
        The model, in eval mode, with default thresholds from held-out images of the data, and its record, which names
        the parent by the SHA-256 of its weights.

    Raises:
        ZooError: any mistake in the arguments or the images, in one sentence.
    """
    folder = hub.find_model(parent)
    if name is not None:
        hub.check_child(folder, name, home)
    check_share(parent_share)
    spec = check_data(data) if data else None
    model = hub.from_pretrained(folder)
    if model.view.crop:
        raise ZooError(f"{parent} was fitted on cropped images, for parity runs; fine-tune one of another preset.")
    run = first_speaks(run or RunOptions(precision=model.precision))
    device, plan = device_of(run.device), plan_finetuning(model.method, trainer_options or {})
    if remove:
        model.to(device).update(remove=list(remove))
        count = len(set(remove))
        run.say(f"{count} image{'s' * (count != 1)} taken out of a copy of {hub.name_of(folder)}.")
    config, kept = checkpoint.read_config(folder), model.record or {"method": model.method}
    ours = Parent(folder, config, kept, parent_share, tuple(remove), model.notes.get(seen.FILE))
    keeping = Keeping(name, home, resume, checkpoint_minutes)
    if spec is None:
        return _kept(model, ours, keeping)
    options = _data_options(model, ours, data_options or {})
    model.precision, model.calibration, model.selection, model.last_weights = run.precision, None, None, {}
    model.continues, model.parent_share = True, parent_share
    if model.uses_defects and not spec.counts["train"][1]:
        model.hparams.supervised = False
        run.say("The data has no labelled defects: what is learned from is normal images alone.")
    if hasattr(model, "origin"):
        model.origin = [(ours.named(image), *place) for image, *place in model.origin]
    return learn(model, data, spec, options, plan, run, keeping, parent=ours)


def _data_options(model: AnomalyModule, parent: Parent, given: dict[str, Any]) -> DataOptions:
    """The parent's batch size and view where nothing else is asked for, which the model takes up."""
    usual = {"batch_size": DataOptions().batch_size}
    if model.preset:
        usual |= {k: v for k, v in presets(model.method, model.preset).get("data", {}).items() if k == "batch_size"}
    usual |= {"intensity": "keep", "tile": model.view.tile}
    options = DataOptions(**(usual | {key: value for key, value in given.items() if value is not None}))
    options.tile, options.info_bar = options.tile or None, model.view.info_bar  # by which images are known again
    model.view = replace(model.view, resize=None, tile=options.tile, bars=())
    return options


def _kept(model: AnomalyModule, parent: Parent, keeping: Keeping) -> tuple[AnomalyModule, dict[str, Any]]:
    """A model that has lost images and learned from no others; it has no threshold."""
    model.record = parent.record | {"parent": parent.described()}
    model.record.pop("updates", None)  # they are its parent's
    if earlier := parent.ancestors():
        model.record["ancestors"] = earlier
    if keeping.place is not None:
        notes = (parent.folder / "private" / file for file in (seen.FILE, DATA, EARLIER))
        private = {path.name: path.read_text(encoding="utf-8") for path in notes if path.is_file()}
        model.folder = model.save_pretrained(keeping.place, private=private | model.notes)
    return model, model.record
