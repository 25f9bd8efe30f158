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
from zoo.parent import BEFORE, DATA, EARLIER, data_of
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
        ZooError: a method without statistics; an image that can't be read, that is to be learned twice, or to be taken
            out and was never learned. Nothing is changed then.
    """
    images, remove = _listed(images), [str(name) for name in _listed(remove)]
    _check(model, remove)
    names = _listed(names) if names is not None else [str(i) if isinstance(i, str | Path) else "" for i in images]
    if len(names) != len(images):
        raise ZooError(f"names has {len(names)} names for {len(images)} images; give one for each.")
    if not images and not remove:
        return
    before, private, was_training = dict(model._buffers), model.private_state(), model.training
    model.eval()
    try:
        with torch.no_grad(), model.autocast():
            added, removed = _learn(model, images, names, remove, batch_size)
    except BaseException:
        model._buffers.update(before)
        model.load_private_state(private)
        model.forget()
        raise
    finally:
        model.train(was_training)
    _forget_results(model, len(added), len(removed))
    _note(model, added, removed)


def _check(model: AnomalyModule, remove: list[str]) -> None:
    if not model.learns_statistics:
        remedy = "fit it anew without them" if remove else "zoo finetune continues its training"
        raise ZooError(f"{model.method} learns by gradient alone and has no statistics to update; {remedy}.")
    if not model.is_fitted:
        raise ZooError(f"This {model.method} has learned nothing yet; fit it first.")
    if remove and hasattr(model, "exclude") and not model.origin:
        raise ZooError("This bank came without the names of its images, so that none can be taken out by name.")


def _learn(
    model: AnomalyModule, images: list[Any], names: list[str], remove: list[str], batch_size: int
) -> tuple[list[tuple[str, str]], list[str]]:
    """Name and digest of each new image, and the digest (or the name, of a bank's) of each that was taken out."""
    roles = {content: role for role, _, content in _noted(model)}
    if hasattr(model, "exclude"):
        removed, taken = list(dict.fromkeys(_name_in_bank(model, name) for name in remove)), {}
        for name in removed:
            model.exclude(name)
    else:
        taken = {
            _digest(brought): (name, brought) for name, brought in ((n, _learned(model, n, roles)) for n in remove)
        }
        removed = list(taken)
    model.num_train_images = len(images)
    model.recall()
    for batch, _ in _batches(model, taken.values(), batch_size):
        model.observe(batch, -1)
    added: list[tuple[str, str]] = []
    for batch, found in _batches(model, zip(names, map(model.bring, images), strict=True), batch_size):
        model.observe(batch)
        added += found
    known = [name for name, content in added if roles.get(content) in (LEARNED, BEFORE) and content not in taken]
    if known or len({content for _, content in added}) < len(added):
        raise ZooError(f"{known[0] if known else 'One of the images'} would be learned twice; give each image once.")
    if taken and model.count < 1:
        raise ZooError("Nothing would be left to have learned from; add other images first.")
    model.finish()
    return added, removed


def _listed(values: Any) -> list[Any]:
    """One or several images or names as a list."""
    several = isinstance(values, list | tuple) or getattr(values, "ndim", 0) == 4
    return list(values) if several else [values]


def _batches(
    model: AnomalyModule, images: Iterable[tuple[str, Brought]], batch_size: int
) -> Iterator[tuple[Batch, list[tuple[str, str]]]]:
    """Images as a fit sees them, whole or in tiles, those of one size together; and name and digest of each image.

    One without a name is called after its digest.
    """
    group: list[tuple[str, torch.Tensor]] = []
    found: list[tuple[str, str]] = []
    for name, brought in images:
        image, content = brought.image, _digest(brought)  # (C, H, W)
        name = name or f"image {content[:8]}"
        places = tiles_of(image.shape[-2:], model.view.tile, overlap=0) if model.view.tile else ()
        for part in [image[:, place.rows, place.columns] for place in places] or [image]:
            if group and (part.shape != group[0][1].shape or len(group) == batch_size):
                yield _stacked(model, group), found
                group, found = [], []
            group.append((name, part))
        found.append((name, content))
    if group:
        yield _stacked(model, group), found


def _stacked(model: AnomalyModule, group: list[tuple[str, torch.Tensor]]) -> Batch:
    return Batch(torch.stack([part for _, part in group]).to(model.device), [name for name, _ in group])


# ---- images by name --------------------------------------------------------------------------------------------------


def _name_in_bank(model: AnomalyModule, name: str) -> str:
    """The name of an image as the vectors of a bank know it: the same, the end of a path, or without its folder.

    Raises:
        ZooError: none is called so, or several; of one that was learned from, the bank may have kept no vector.
    """
    known = list(dict.fromkeys(image for image, *_ in model.origin if image))
    learned = [image for role, image, _ in _noted(model) if role == LEARNED and image and image not in known]
    text = Path(name).as_posix()
    for names in (known, learned):
        found = [image for image in names if image == text]
        found = found or [image for image in names if f"/{text}".endswith(f"/{image}")]
        found = found or [image for image in names if f"/{image}".endswith(f"/{text}")]
        if len(found) > 1:
            raise ZooError(f"{name} may be {' or '.join(found[:3])}; give the name in full.")
        if found:
            return found[0]
    near = difflib.get_close_matches(text, known, n=1) or known[:1]
    hint = f", only of others such as {near[0]}" if near else ""
    raise ZooError(f"The bank has no vector of an image {name}{hint}.")


def _learned(model: AnomalyModule, name: str, roles: dict[str, str]) -> Brought:
    """An image that statistics have learned from, to be taken out of them: a file, or a name in the fit's DATA.

    Raises:
        ZooError: it isn't at hand, or the model has not learned from it.
    """
    source: Any = name
    if not _is_file(name):
        data, known = data_of(model.folder, name) if model.folder else (None, name)
        if data is None:
            raise ZooError(
                f"{model.method} takes an image out by its pixels: there is no file {name}, and where the images of "
                "its fit are isn't known; give the path of the file."
            )
        source = image_of(data, known)
    brought = model.bring(source)
    role = roles.get(_digest(brought))
    if role == BEFORE:
        raise ZooError(
            f"{name} was learned by a model that this one goes on from, and weighs another amount here: take it out of "
            "that one, and fine-tune anew."
        )
    if roles and role != LEARNED:
        raise ZooError(f"{name} is no image that this model knows as learned from; private/{FILE} has their names.")
    return brought


def _is_file(name: str) -> bool:
    try:
        return Path(name).is_file()
    except (OSError, ValueError):  # too long, or no name of a file at all
        return False


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


def _note(model: AnomalyModule, added: list[tuple[str, str]], removed: list[str]) -> None:
    """Private notes of a model that has some: `calibrate` knows the new images (name, digest) too.

    Args:
        removed: digests, or the names of images of a bank.
    """
    gone = set(removed)
    lines = [[REMOVED if {name, content} & gone else role, name, content] for role, name, content in _noted(model)]
    if lines:
        lines += [[LEARNED, *image] for image in added]
        model.notes |= {FILE: csv_text(["role", "image", "digest"], lines)}
    places = [model.folder / "private" / file for file in (DATA, EARLIER)] if model.folder else []
    model.notes |= {place.name: place.read_text(encoding="utf-8") for place in places if place.is_file()}
