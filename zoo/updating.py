"""Learn further normal images into a fitted model, or take images out of it, without a refit.

For methods that keep statistics: sums over images (PaDiM, CFA), from which an image can be taken again if it is at
hand, or a bank whose vectors know their images (PatchCore). What was learned is gathered again (`recall`), more is
observed, and the whole is learned anew (`finish`).
"""

import csv
import difflib
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from zoo.checkpoint import csv_text
from zoo.data import image_of
from zoo.errors import ZooError
from zoo.module import AnomalyModule, Batch, Brought
from zoo.parent import data_of
from zoo.seen import FILE, LEARNED, digest
from zoo.tiles import tiles_of

# Of a record: what was measured with the statistics of before.
FIGURES = ("metrics", "test_data", "readings", "other_scores", "protocol", "intervals", "seeds", "calibration", "cost")
FIGURES += ("evaluation", "benchmark", "eval_size", "tile")
REMOVED = "removed"  # role of an image that was taken out: it is no normal image to calibrate on either


def update(
    model: AnomalyModule, images: Any = (), remove: Any = (), names: Sequence[str] | None = None, batch_size: int = 8
) -> None:
    """Learn further normal images into the statistics of a fitted model, or take images out of them.

    PaDiM's moments and CFA's means become those of all images together, up to the rounding of float32. PatchCore's bank
    keeps its size: a coreset of its vectors and of those of the new images. CFA's descriptor, which training has made,
    stays as it is. Thresholds are dropped with the figures of the record, as they were those of other statistics:
    `zoo calibrate` sets new ones.

    Args:
        model: of a method that keeps statistics; on its device, in the precision of its fit.
        images: normal images, as `AnomalyModule.predict` takes them.
        remove: name of an image that it has learned from, or a list of them: as its DATA names it, or the path of its
            file. PatchCore drops the vectors of that image, of which it may have kept none; the others need the image
            itself, which is looked up in the fit's DATA.
        names: of `images`; by default their paths.
        batch_size: images of equal size that go through the network at once.

    Raises:
        ZooError: a method without statistics; an image that can't be read, or that the model hasn't learned from.
            Nothing is changed then.
    """
    if not model.learns_statistics:
        raise ZooError(f"{model.method} learns by gradient alone and has no statistics to update; use zoo finetune.")
    if not model.is_fitted:
        raise ZooError(f"This {model.method} has learned nothing yet; fit it first.")
    images, remove = _listed(images), _listed(remove)
    names = list(names) if names is not None else [_name(image, i) for i, image in enumerate(images)]
    if len(names) != len(images):
        raise ZooError(f"names has {len(names)} names for {len(images)} images; give one for each.")
    before, private, was_training = dict(model._buffers), model.private_state(), model.training
    model.eval()
    try:
        with torch.no_grad(), model.autocast():
            found, taken = _learn(model, images, names, remove, batch_size)
    except BaseException:
        model._buffers.update(before)
        model.load_private_state(private)
        model.forget()
        raise
    finally:
        model.train(was_training)
    _forget_results(model, len(images), len(remove))
    _note(model, zip(names, found, strict=True), taken)


def _learn(
    model: AnomalyModule, images: list[Any], names: list[str], remove: list[Any], batch_size: int
) -> tuple[list[str], list[Brought]]:
    """Returns the digests of the new images, and the images that were taken out by their pixels."""
    taken: list[Brought] = []
    for name in remove:
        if hasattr(model, "exclude"):
            model.exclude(_name_in_bank(model, str(name)))
        else:
            taken.append(_learned(model, str(name)))
    model.num_train_images = len(images)
    model.recall()
    for batch, _ in _batches(model, zip(map(str, remove), taken, strict=False), batch_size):
        model.observe(batch, -1)
    found = []
    for batch, digests in _batches(model, zip(names, map(model.bring, images), strict=True), batch_size):
        model.observe(batch)
        found += digests
    if taken and model.count < 1:
        raise ZooError("Nothing would be left to have learned from; add other images first.")
    model.finish()
    return found, taken


def _listed(values: Any) -> list[Any]:
    """One or several images or names as a list."""
    several = isinstance(values, list | tuple) or getattr(values, "ndim", 0) == 4
    return list(values) if several else [values]


def _name(image: Any, index: int) -> str:
    return str(image) if isinstance(image, str | Path) else f"image {index + 1}"


def _batches(
    model: AnomalyModule, images: Iterable[tuple[str, Brought]], batch_size: int
) -> Iterator[tuple[Batch, list[str]]]:
    """Images as a fit sees them, whole or in tiles, those of one size together; and the digests of what they are of."""
    group: list[tuple[str, torch.Tensor]] = []
    digests: list[str] = []
    for name, brought in images:
        image = brought.image  # (C, H, W)
        places = tiles_of(image.shape[-2:], model.view.tile, overlap=0) if model.view.tile else ()
        for part in [image[:, place.rows, place.columns] for place in places] or [image]:
            if group and (part.shape != group[0][1].shape or len(group) == batch_size):
                yield _stacked(model, group), digests
                group, digests = [], []
            group.append((name, part))
        digests.append(_digest(brought))
    if group:
        yield _stacked(model, group), digests


def _stacked(model: AnomalyModule, group: list[tuple[str, torch.Tensor]]) -> Batch:
    return Batch(torch.stack([part for _, part in group]).to(model.device), [name for name, _ in group])


# ---- images by name --------------------------------------------------------------------------------------------------


def _name_in_bank(model: AnomalyModule, name: str) -> str:
    """The name of an image as the vectors of a bank know it: the same, the end of a path, or without its folder.

    Raises:
        ZooError: none is called so, or several; of one that was learned from, the bank may have kept no vector.
    """
    known = list(dict.fromkeys(image for image, *_ in model.origin))
    text = Path(name).as_posix()
    found = [image for image in known if image == text]
    found = found or [image for image in known if image and f"/{text}".endswith(f"/{image}")]
    found = found or [image for image in known if f"/{image}".endswith(f"/{text}")]
    if len(found) > 1:
        raise ZooError(f"{name} may be {' or '.join(found[:3])}; give the name in full.")
    if not found and not any(text == image for _, image, _ in _noted(model)):
        near = difflib.get_close_matches(text, known, n=1) or known[:1]
        hint = f", only of others such as {near[0]}" if near else ""
        raise ZooError(f"The bank has no vector of an image {name}{hint}; private/{FILE} has the names.")
    return found[0] if found else text


def _learned(model: AnomalyModule, name: str) -> Brought:
    """An image that statistics have learned from, to be taken out of them: a file, or a name in the fit's DATA.

    Raises:
        ZooError: it isn't at hand, or the model has not learned from it.
    """
    source: Any = name
    if not Path(name).is_file():
        data, known = data_of(model.folder, name) if model.folder else (None, name)
        if data is None:
            raise ZooError(
                f"{model.method} takes an image out by its pixels: there is no file {name}, and where the images of "
                "its fit are isn't known; give the path of the file."
            )
        source = image_of(data, known)
    brought = model.bring(source)
    roles, own = {content: role for role, _, content in _noted(model)}, _digest(brought)
    if roles and roles.get(own) != LEARNED:
        raise ZooError(f"{name} is no image that this model knows as learned from; private/{FILE} has their names.")
    return brought


def _digest(brought: Brought) -> str:
    return digest(brought.array[: brought.image.shape[1]])


def _noted(model: AnomalyModule) -> list[list[str]]:
    """Role, name and digest of each image that its fit and updates have noted; none where there are no notes."""
    path = model.folder / "private" / FILE if model.folder else None
    text = model.notes.get(FILE) or (path.read_text(encoding="utf-8") if path and path.is_file() else "")
    return list(csv.reader(io.StringIO(text)))[1:]


# ---- what an update leaves behind ------------------------------------------------------------------------------------


def _forget_results(model: AnomalyModule, added: int, removed: int) -> None:
    """Drop what was measured with other statistics, and let the record tell of the update."""
    model.calibration = None
    if model.record:
        kept = {key: value for key, value in model.record.items() if key not in FIGURES}
        model.record = kept | {"updates": [*kept.get("updates", []), {"added": added, "removed": removed}]}


def _note(model: AnomalyModule, added: Iterable[tuple[str, str]], removed: list[Brought]) -> None:
    """Private notes of a model that has some: `calibrate` knows the new images (name, digest) too."""
    gone = set(map(_digest, removed))
    lines = [[REMOVED if content in gone else role, name, content] for role, name, content in _noted(model)]
    if lines:
        lines += [[LEARNED, *image] for image in added]
        model.notes |= {FILE: csv_text(["role", "image", "digest"], lines)}
