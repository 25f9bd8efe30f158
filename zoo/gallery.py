"""Pictures of a run: the paper's Figure 1, and what a method found best, missed worst and called wrongly."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import DatasetDict
from PIL import Image

from zoo import checkpoint, plots
from zoo.data import check_data, load_data, load_ignore
from zoo.data.datamodule import AnomalyDataModule
from zoo.data.halves import kind_of
from zoo.module import AnomalyModule
from zoo.view import View

EACH, EACH_OF_ONE = 3, 12  # hits and misses of a kind of defect, at most; the same where there is one kind alone
ONE_KIND = "defect"  # what it is called then
FIGURE_ROWS = 8  # defects in Figure 1, at most
SIDE = 192  # pixels of a picture in a gallery, at most
INDEX, FIGURE1 = "pictures.json", "figure1.png"


class Shown(NamedTuple):
    """A test image as it was scored: image and map (H, W), the mask of its defect where there is one."""

    image: np.ndarray
    truth: np.ndarray | None
    map: np.ndarray

    def known(self) -> np.ndarray:
        """The mask, empty where there is none."""
        return np.zeros(self.map.shape, dtype=bool) if self.truth is None else self.truth


def draw(folder: Path, model: AnomalyModule, data: str, view: View, threshold: float | None = None) -> None:
    """Write `figure1.png`, the galleries' pictures and their list, `pictures.json`, into a folder.

    Figure 1 shows of each kind of defect the image of median score, or of a single kind some over the quantiles of
    their scores, beside the normal images of median score. A picture of a gallery is the image, its defect outlined,
    beside the heatmap.

    Args:
        model: calibrated, on the device to use; `scored` are the images to choose from.
        data: DATA specification.
        view: as the images were scored.
        threshold: image score from which on an image is called anomalous; None says nothing of it.
    """
    normals = sorted((score, name) for name, label, score in model.scored if not label)
    kinds = _kinds(model)
    picks = _picks(normals, kinds)
    defects = _of_figure(kinds)
    middle = max(len(normals) // 2 - len(defects) // 2, 0)
    beside = [name for _, name in normals[middle:][: len(defects)]]
    names = {name for *_, (_, name) in picks} | {*defects, *beside}
    kept: dict[str, Shown] = {}  # of all images that are shown, only those of Figure 1 are held at once
    for name, shown in _scored_again(model, data, view, names):
        for number, (*_, (_, picked)) in enumerate(picks):
            if picked == name:
                plots.save_png(folder / _file(number), _tile(shown, model))
        if name in {*defects, *beside}:
            kept[name] = shown
    figure_rows = [
        {"normal": kept[beside[i % len(beside)]].image, "defective": of.image, "truth": of.known(), "map": of.map}
        | {"label": kind_of(name) if len(kinds) > 1 else ""}
        for i, (name, of) in enumerate((name, kept[name]) for name in defects)
    ]
    plots.figure1(figure_rows, model.calibration, folder / FIGURE1)
    index = [
        {"group": group, "kind": kind, "name": name, "score": score, "file": _file(number)}
        | {"called": None if threshold is None else score >= threshold}
        for number, (group, kind, (score, name)) in enumerate(picks)
    ]
    checkpoint.write_text(folder / INDEX, checkpoint.dump(index))


def _kinds(model: AnomalyModule) -> dict[str, list[tuple[float, str]]]:
    """Scores and names of the defects by kind, lowest score first."""
    kinds = defaultdict(list)
    for name, label, score in model.scored:
        if label:
            kinds[kind_of(name)].append((score, name))
    names = sorted(kinds)
    return {kind if len(names) > 1 else ONE_KIND: sorted(kinds[kind]) for kind in names}


def _picks(
    normals: list[tuple[float, str]], kinds: dict[str, list[tuple[float, str]]]
) -> list[tuple[str, str, tuple[float, str]]]:
    """What the galleries show: group, kind, and score and name."""
    most = EACH if len(kinds) > 1 else EACH_OF_ONE
    picks = [("false alarms", "", pick) for pick in normals[::-1][:most]]
    for kind, found in kinds.items():
        hits, misses = -(-len(found) // 2), len(found) // 2  # no image is both
        picks += [("hits", kind, pick) for pick in found[::-1][: min(most, hits)]]
        picks += [("misses", kind, pick) for pick in found[: min(most, misses)]]
    return picks


def _of_figure(kinds: dict[str, list[tuple[float, str]]]) -> list[str]:
    """Names of the defects in Figure 1."""
    if len(kinds) > 1:
        return [found[len(found) // 2][1] for found in kinds.values()][:FIGURE_ROWS]
    return [
        found[int((row + 0.5) * len(found) / count)][1]
        for found in kinds.values()
        for count in [min(FIGURE_ROWS, len(found))]
        for row in range(count)
    ]


def _file(number: int) -> str:
    return f"{number:03d}.png"


@torch.inference_mode()
def _scored_again(model: AnomalyModule, data: str, view: View, names: set[str]) -> Iterator[tuple[str, Shown]]:
    """The named test images with their maps."""
    test = load_data(data)["test"]
    rows = [row for row, name in enumerate(test.with_format(None)["path"]) if name in names]
    ignore = load_ignore(check_data(data), None)
    module = AnomalyDataModule(DatasetDict(train=test.select([]), test=test), view=view, ignore=ignore)
    for row in rows:
        part = module.test_image(row).to(model.device)
        with model.autocast():
            found = model.score_images(part.image, part.roi).map
        image = part.image[0].movedim(0, -1).cpu().numpy()  # (H, W, C)
        truth = None if part.mask is None else part.mask[0, 0].cpu().numpy()
        image = image[..., 0] if image.shape[2] == 1 else image
        yield part.name[0], Shown(image, truth, found[0, 0].float().cpu().numpy())


def _tile(shown: Shown, model: AnomalyModule) -> np.ndarray:
    """Image and heatmap side by side, uint8 (h, w, 3)."""
    image = plots.outline(shown.image, shown.known())
    return _small([image, plots.overlay(shown.image, shown.map, model.calibration)])


def _small(views: Sequence[np.ndarray]) -> np.ndarray:
    height, width = views[0].shape[:2]
    scale = min(1.0, SIDE / max(height, width))
    size: Any = (max(round(width * scale), 1), max(round(height * scale), 1))
    return np.concatenate([np.asarray(Image.fromarray(view).resize(size)) for view in views], axis=1)
