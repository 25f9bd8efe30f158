"""MIIC, the data set of the paper, through `datasets`: from the folder as its owner ships it, or its archives.

Huang et al., ICIP 2021; DR-NTU (Data), DOI 10.21979/N9/WBLTFI. `MIIC(data_dir=...)` is a builder as that library knows
them; `load_miic` gives the same rows without a copy on disk. Nothing of MIIC comes with the zoo.
"""

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets

from zoo.data import archives
from zoo.data.miic_layout import FOLDERS, PAIRS, TEST_PAIRS, Layout, files_hash, scan
from zoo.data.miic_truth import png, read_boxes, read_masks
from zoo.data.terms import show_terms, terms_of
from zoo.errors import ZooError
from zoo.pairs import abnormal_and_clean
from zoo.ranks import launched

LABELS = ["normal", "anomalous"]
_log = logging.getLogger(__name__)


class MIIC(datasets.GeneratorBasedBuilder):
    """`MIIC(data_dir=FOLDER).download_and_prepare()`, then `.as_dataset()`; nothing is downloaded.

    Configuration `default`: splits train and test with columns image, mask (lossless, 0 and 255; None of normal
    images), label (0 normal, 1 anomalous), path (relative, unique) and boxes (column, row, width, height in pixels,
    counted from 0). `inpainting` (`config_name="inpainting"`): columns abnormal, normal and path, in the same splits.

    Args:
        data_dir: the folder that holds Anomaly_train and Anomaly_test; archives in it are unpacked there.

    Raises:
        ZooError: as `zoo.data.archives.unpack` and `zoo.data.miic_layout.scan`.
    """

    BUILDER_CONFIGS = [
        datasets.BuilderConfig(name="default", version="1.0.0", description="images, masks and boxes"),
        datasets.BuilderConfig(name="inpainting", version="1.0.0", description="pairs of abnormal and normal images"),
    ]
    DEFAULT_CONFIG_NAME = "default"

    def __init__(self, *args: Any, data_dir: str | os.PathLike, **options: Any):
        root = Path(os.path.abspath(Path(data_dir).expanduser()))
        archives.unpack(root, FOLDERS, lambda line: _log.warning("%s", line))
        # The library's own cache key is the name of the folder alone: what changed in it would not be noticed.
        super().__init__(*args, data_dir=str(root), hash=files_hash(root)[:16], **options)

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(
            description="SEM images of integrated circuits, with defects to be found by learning from normal ones.",
            features=_pair_features(True) if self.config.name == "inpainting" else features(decode=True),
            homepage="https://doi.org/10.21979/N9/WBLTFI",
            license=terms_of("miic"),
        )

    def _split_generators(self, manager: Any) -> list[datasets.SplitGenerator]:
        layout = scan(self.config.data_dir)
        show_terms(layout.name)
        rows = _pairs(layout.root) if self.config.name == "inpainting" else rows_of(layout, boxes=True)
        if not rows:
            raise ZooError(f"{layout.root} has no pairs such as {PAIRS}/x_abnormal_1.jpg and x_normal_1.jpg.")
        return [datasets.SplitGenerator(name, gen_kwargs={"rows": found}) for name, found in rows.items()]

    def _generate_examples(self, rows: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
        for row in rows:
            yield row["path"], row


def load_miic(root: str | os.PathLike, boxes: bool = False) -> datasets.DatasetDict:
    """MIIC's folder as a data set: splits train and test, columns image, mask, label, path; images stay paths.

    What is not as it should be is told by the log.

    Args:
        root: the folder, unpacked.
        boxes: whether there is a column of them too.

    Raises:
        ZooError: as `scan` and `read_masks`.
    """
    layout = scan(root)
    show_terms(layout.name)
    return datasets.DatasetDict(
        {
            split: datasets.Dataset.from_list(rows, features=features(boxes=boxes))
            for split, rows in rows_of(layout, boxes).items()
        }
    )


def load_pairs(root: str | os.PathLike) -> datasets.DatasetDict:
    """The pairs for inpainting: columns abnormal, normal and path; splits train and test, as far as they are there."""
    rows = _pairs(Path(os.path.abspath(Path(root).expanduser())))
    return datasets.DatasetDict(
        {split: datasets.Dataset.from_list(found, features=_pair_features()) for split, found in rows.items()}
    )


def features(decode: bool = False, boxes: bool = True) -> datasets.Features:
    """Columns of the set; `decode` for images as PIL's, else as paths or bytes."""
    columns = {"image": datasets.Image(decode=decode), "mask": datasets.Image(decode=decode)}
    columns |= {"label": datasets.ClassLabel(names=LABELS), "path": datasets.Value("string")}
    if boxes:
        columns["boxes"] = datasets.List(datasets.List(datasets.Value("int32"), length=4))
    return datasets.Features(columns)


def rows_of(layout: Layout, boxes: bool) -> dict[str, list[dict[str, Any]]]:
    """Rows by split; what is odd about them goes to the log, from the first of several processes."""
    masks, notes = read_masks(layout)
    found: dict[str, Any] = {}
    if boxes:
        found, source = read_boxes(layout, masks)
        notes.append(source)
    if not launched()[0]:
        for note in (*layout.notes, *notes):
            _log.warning("%s", note)
    rows: dict[str, list[dict[str, Any]]] = {}
    for split, items in layout.splits.items():
        rows[split] = []
        for item in items:
            # A mask that can't be read stays a file, so that reading its row names it.
            mask = {"bytes": png(masks[item.name])} if item.name in masks else item.mask
            row = {"image": item.path, "mask": mask, "label": item.label, "path": item.name}
            rows[split].append(row | ({"boxes": found.get(item.name, [])} if boxes else {}))
    return rows


def _pairs(root: Path) -> dict[str, list[dict[str, Any]]]:
    rows = {}
    for split, folder in (("train", PAIRS), ("test", TEST_PAIRS)):
        if pairs := abnormal_and_clean(root / folder):
            rows[split] = [{"abnormal": str(a), "normal": str(n), "path": f"{folder}/{a.name}"} for a, n in pairs]
    return rows


def _pair_features(decode: bool = False) -> datasets.Features:
    image = datasets.Image(decode=decode)
    return datasets.Features(abnormal=image, normal=image, path=datasets.Value("string"))
