"""MIIC's folder as its owner ships it: what is trained on, what is tested, and what is odd about it.

    Anomaly_train/*.jpg                   train_normal_*, and copies of all test images, anomalies included
    Anomaly_test/normal_img/*.jpg
    Anomaly_test/abnormal_img/*.jpg
    Anomaly_test/abnormal_mask/*_mask.jpg
    Anomaly_test/abnormal_bbox/*_bbox.jpg, anomalyPosition.mat
    Inpainting_train/*.jpg, Inpainting_test/*.jpg    pairs of abnormal and normal images

Names are `<split>_<class>_<number>`. No image is decoded here, and neither torch nor datasets is imported.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import defaultdict
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from zoo.data import archives
from zoo.data.folder import Item, paths_of, times_digest
from zoo.errors import ZooError
from zoo.image import EXTENSIONS
from zoo.pairs import Pair, abnormal_and_clean
from zoo.paths import absolute

TRAIN, TEST, PAIRS, TEST_PAIRS = FOLDERS = ("Anomaly_train", "Anomaly_test", "Inpainting_train", "Inpainting_test")
NORMAL, ABNORMAL = f"{TEST}/normal_img", f"{TEST}/abnormal_img"
MASKS, BOXES, POSITIONS = f"{TEST}/abnormal_mask", f"{TEST}/abnormal_bbox", f"{TEST}/anomalyPosition.mat"
COUNTS = {"training": 23_888, "normal test": 1_272, "abnormal test": 116}  # the paper prints 1,274 normals
REPLICA = "REPLICA"  # a file of this name at the root: an imitation, whose figures are not MIIC's
MARK = b"An imitation of MIIC's layout"  # in the head of its images, so that a copy without that file is known, too
_NAME = re.compile(r"(train|test)_(normal|abnormal)_\d+")
_CLASS = re.compile(r"(ab)?normal", re.IGNORECASE)


class Layout(NamedTuple):
    """What a folder holds.

    Attributes:
        root: absolute.
        name: "miic" where the numbers of images are MIIC's, "miic-partial" where they are others, "miic-replica" for
            an imitation that says so.
        splits: images of train and test, sorted by name.
        pairs: for inpainting, by split, as far as their names are understood; those of train have no test image.
        notes: sentences about what is not as it should be.
    """

    root: Path
    name: str
    splits: dict[str, list[Item]]
    pairs: dict[str, list[Pair]]
    notes: list[str]


class _File(NamedTuple):
    name: str  # relative to the root, with slashes
    path: str
    size: int
    mtime_ns: int

    @property
    def stem(self) -> str:
        return self.name.rsplit("/", 1)[-1].rsplit(".", 1)[0]


def scan(root: str | os.PathLike) -> Layout:
    """List MIIC's images and prove that none is both trained on and tested.

    Trained on is what is called `train_normal_*`, less each name that the test folders have too and each file whose
    bytes are those of a test image: such a copy is taken out of training, never out of the test set, so that figures
    stay comparable and honest. It is named in the notes. A copy that was encoded anew is not found. The same holds of
    the pairs to train on: one that has such an image, on either side, is left out.

    Raises:
        ZooError: a folder is missing, packed or empty, an image lies in the folder of another class, a mask is
            missing, fits no image or is the second one of an image.
    """
    root = absolute(root)
    _check_folders(root)
    normals, defects = _images(root, NORMAL), _images(root, ABNORMAL)
    _check_classes(root, normals, "normal")
    _check_classes(root, defects, "abnormal")
    masks = _by_stem(root, MASKS, "_mask", {file.stem for file in defects})
    if masks and (missing := next((file for file in defects if file.stem not in masks), None)):
        raise ZooError(f"{missing.path} has no mask in {root / MASKS}; unpack {TEST} again or add it")
    train, called, notes = _training(root, [*normals, *defects])
    if defects and not masks:
        notes.append(f"{MASKS} holds no masks: nothing can be said about pixels.")
    notes += _miscounted({"training": train, "normal test": normals, "abnormal test": defects})
    pairs = {"train": _pairs(root, [*normals, *defects], notes), "test": abnormal_and_clean(root / TEST_PAIRS)}
    splits = {
        "train": [Item(file.path, file.name, 0, None) for file in train],
        "test": [Item(file.path, file.name, 1, masks.get(file.stem)) for file in defects]
        + [Item(file.path, file.name, 0, None) for file in normals],
    }
    splits = {split: sorted(items, key=lambda item: item.name) for split, items in splits.items()}
    counts = dict(zip(COUNTS, (called, len(normals), len(defects)), strict=True))
    name = "miic" if counts == COUNTS else "miic-partial"
    if (root / REPLICA).is_file() or any(_is_marked(files[0].path) for files in (train, normals, defects)):
        name = "miic-replica"
    return Layout(root, name, splits, pairs, notes)


def box_images(layout: Layout) -> dict[str, str]:
    """Stem of an abnormal image -> path of the picture of its boxes.

    Raises:
        ZooError: a picture that belongs to no image.
    """
    stems = {Path(item.name).stem for item in layout.splits["test"] if item.label}
    return _by_stem(layout.root, BOXES, "_bbox", stems)


def files_digest(layout: Layout) -> str:
    """As `zoo.data.folder.times_digest`, of all that is read of a folder: images, masks, boxes and pairs."""
    paths = paths_of(layout.splits) + [file.path for file in _images(layout.root, BOXES)]
    paths += [str(path) for pairs in layout.pairs.values() for pair in pairs for path in pair]
    if (positions := layout.root / POSITIONS).is_file():
        paths.append(str(positions))
    return times_digest(layout.root, paths)


def _check_folders(root: Path) -> None:
    if not root.is_dir():
        raise ZooError(f"miic:{root} is not a folder; give the one that holds {TRAIN} and {TEST}, or MIIC's archives")
    missing = [name for name in (TRAIN, NORMAL, ABNORMAL) if not (root / name).is_dir()]
    if not missing:
        return
    if packed := archives.packed(root, (TRAIN, TEST)):
        names = " and ".join(path.name for path in packed.values())
        raise ZooError(f"{root} holds {names}, not unpacked; unpack: zoo data prepare miic:{root}")
    near = [root.parent, *(path for path in sorted(root.glob("*")) if path.is_dir())]
    found = next((path for path in near if (path / TRAIN).is_dir() and (path / TEST).is_dir()), None)
    hint = f"did you mean miic:{found}?" if found else f"MIIC's folder holds {TRAIN} and {TEST}, or their archives"
    raise ZooError(f"{root / missing[0]} does not exist; {hint}")


def _images(root: Path, folder: str) -> list[_File]:
    """The images of one folder, sorted by name; none if there is no such folder."""
    try:
        with os.scandir(root / folder) as listing:
            entries = [e for e in listing if not e.name.startswith(".") and e.is_file()]
            statuses = [entry.stat() for entry in entries]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ZooError(f"{root / folder} cannot be listed ({error.strerror}); check its permissions") from None
    return sorted(
        _File(f"{folder}/{entry.name}", entry.path, status.st_size, status.st_mtime_ns)
        for entry, status in zip(entries, statuses, strict=True)
        if os.path.splitext(entry.name)[1].lower() in EXTENSIONS
    )


def _check_classes(root: Path, files: list[_File], wanted: str) -> None:
    """By the class in the name, whatever else is in it; abnormal is told from normal."""
    if not files:
        folder = root / (NORMAL if wanted == "normal" else ABNORMAL)
        raise ZooError(f"{folder} holds no images; unpack {TEST} again")
    for file in files:
        if (match := _CLASS.search(file.stem)) and (called := match[0].lower()) != wanted:
            raise ZooError(f"{file.path} is called {called} among {wanted} images; move it to where it belongs")


def _by_stem(root: Path, folder: str, ending: str, stems: set[str]) -> dict[str, str]:
    """Stem of an image -> path of what is called `<stem><ending>`, never by two sorted lists."""
    found: dict[str, str] = {}
    for file in _images(root, folder):
        stem = file.stem.removesuffix(ending)
        if stem not in stems or not file.stem.endswith(ending):
            example = f"{min(stems)}{ending}" if stems else f"<image>{ending}"
            raise ZooError(
                f"{file.path} belongs to no image in {root / ABNORMAL}; remove it, or rename it as in {example}.jpg"
            )
        if stem in found:
            raise ZooError(f"{found[stem]} and {file.path} belong to one image; remove one of them")
        found[stem] = file.path
    return found


def _training(root: Path, tested: list[_File]) -> tuple[list[_File], int, list[str]]:
    """The images to train on, how many are called so, and what is to be said about the others."""
    names, notes = {file.stem for file in tested}, []
    files = _images(root, TRAIN)
    parsed = {file: match and match.groups() for file in files for match in [_NAME.fullmatch(file.stem)]}
    called = [file for file in files if parsed[file] == ("train", "normal")]
    train = [file for file in called if file.stem not in names]
    odd = [file for file in files if parsed[file] is None or parsed[file] == ("train", "abnormal")]
    if odd:
        verb = "files are" if len(odd) > 1 else "file is"
        listed = _few([file.name for file in odd])
        notes.append(f"{len(odd):,} {verb} left out of training, not called train_normal_<number>: {listed}.")
    copies = _copies(train, tested)
    if copies:
        pairs = [f"{file.name} of {other.name}" for file, other in copies.items()]
        more = f" and {len(pairs) - 5:,} more" if len(pairs) > 5 else ""
        notes.append(f"Left out of training, being copies of test images: {', '.join(pairs[:5])}{more}.")
    train = [file for file in train if file not in copies]
    if not train:
        hint = f"the first of its {len(files):,} images is {files[0].name}" if files else "it holds no images"
        raise ZooError(f"{root / TRAIN} has no train_normal_<number> that is no test image; {hint}")
    return train, len(called), notes


def _is_marked(path: str) -> bool:
    """Whether an image says that it is an imitation's; what can't be read says nothing."""
    try:
        with open(path, "rb") as file:
            return MARK in file.read(1024)
    except OSError:
        return False


def _copies(files: list[_File], tested: list[_File]) -> dict[_File, _File]:
    """Files with the bytes of a test image; only those of equal size are read."""
    by_size = defaultdict(list)
    for file in tested:
        by_size[file.size].append(file)
    copies = {}
    for file in files:
        same = [other for other in by_size.get(file.size, ()) if _content(*other[1:]) == _content(*file[1:])]
        if same:
            copies[file] = same[0]
    return copies


@lru_cache(maxsize=1 << 16)
def _content(path: str, size: int, mtime_ns: int) -> bytes:
    """SHA-256 of a file as it was at that time, read once a process."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError as error:
        raise ZooError(f"{path} cannot be read ({error.strerror}); restore it") from None


def _miscounted(found: dict[str, list[_File]]) -> list[str]:
    notes = []
    for kind, files in found.items():
        if difference := len(files) - COUNTS[kind]:
            more = f"{abs(difference):,} {'more' if difference > 0 else 'fewer'}"
            notes.append(f"There are {len(files):,} {kind} images, {more} than MIIC's {COUNTS[kind]:,}.")
    return notes


def _pairs(root: Path, tested: list[_File], notes: list[str]) -> list[Pair]:
    """The pairs to train on, none of whose images is a test image by name or by content."""
    if archives.packed(root, [PAIRS]):
        notes.append(f"{PAIRS} is not unpacked; zoo data prepare miic:{root} does it.")
    files, names = _images(root, PAIRS), {file.stem for file in tested}
    tests = {file.name for file in [*_copies(files, tested), *(file for file in files if file.stem in names)]}
    pairs = abnormal_and_clean(root / PAIRS)
    usable = [pair for pair in pairs if not tests & {f"{PAIRS}/{side.name}" for side in pair}]
    if dropped := len(pairs) - len(usable):
        verb = "pairs are" if dropped > 1 else "pair is"
        notes.append(f"{dropped:,} {verb} left out of {PAIRS}, with test images: {_few(sorted(tests))}.")
    if files and not pairs:
        names = [file.name for file in files]
        notes.append(f"{PAIRS} has no pairs by name, abnormal and normal, and is left aside: {_few(names)}.")
    return usable


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")
