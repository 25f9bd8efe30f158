"""Data sets that are folders of images: MVTec-style, plain (good, bad, masks) or one flat folder of normal images.

`scan` lists and checks a folder without opening a single image, and imports neither torch nor datasets, so that a
mistake in the layout is answered at once.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import unicodedata
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from zoo.data.ignore import FOLDER as IGNORED
from zoo.data.rows import features
from zoo.errors import ZooError
from zoo.image import EXTENSIONS

if TYPE_CHECKING:
    import datasets

TEST_FRACTION = 0.2  # of the normals of a plain folder with bad/: they are tested on, not trained on

_LAYOUTS = (
    "a data folder is MVTec-style (train/good, test/good, test/<kind>, ground_truth/<kind>), "
    "plain (good, bad, masks) or flat (normal images only)"
)


class Item(NamedTuple):
    """One image of a data set."""

    path: str  # absolute
    name: str  # relative to the root, with slashes; unique
    label: int  # 0 normal, 1 anomalous
    mask: str | None  # absolute; None for normals and where nothing is annotated


def scan(root: str | os.PathLike) -> dict[str, list[Item]]:
    """List a folder of images and pair defects with their masks.

    - MVTec-style: `train/good`, `test/good`, `test/<kind>`, `ground_truth/<kind>/<stem>[_mask].<ext>`; and, for methods
      that learn from labelled defects too, `train/<kind>` with masks in `train_masks/<kind>` where there are some.
    - Plain: `good`, optional `bad`, optional `masks/<stem>[_mask].<ext>`. With `bad`, a fifth of the normals is tested
      on and not trained on; which ones depends on each file's name only, so adding files moves no other.
    - Flat: images directly in the folder, all of them normal.

    A folder `ignore` beside these holds masks of what is not looked at, see `zoo.data.ignore`.

    Subfolders are followed; hidden files and files that are no images by their suffix are skipped. No file is opened.

    Returns:
        {"train": [...], "test": [...]}, each sorted by name; "test" is empty where there is nothing to test on.

    Raises:
        ZooError: no such folder, an unknown or ambiguous layout, no normal image to train on, another class than good
            among the training images, a mask that fits no image, or a defect without mask among annotated ones.
    """
    root = Path(os.path.abspath(root))
    _check_folder(root)
    if (root / "train").is_dir():
        splits = _scan_mvtec(root)
    elif (root / "good").is_dir():
        splits = _scan_plain(root)
    else:
        splits = _scan_flat(root)
    return {split: sorted(items, key=lambda item: item.name) for split, items in splits.items()}


def load_folder(root: str | os.PathLike) -> datasets.DatasetDict:
    """A folder as a data set: splits train and test, columns image, mask, label, path.

    Images and masks stay paths (`datasets.Image(decode=False)`): decode them with `zoo.image.read_image` and
    `read_mask`, which keep 16 bits. Nothing is copied or cached on disk; a split without images has no rows.

    Raises:
        ZooError: as `scan`.
    """
    splits = scan(root)
    import datasets

    return datasets.DatasetDict(
        {
            split: datasets.Dataset.from_dict(
                {
                    "image": [item.path for item in items],
                    "mask": [item.mask for item in items],
                    "label": [item.label for item in items],
                    "path": [item.name for item in items],
                },
                features=features(),
            )
            for split, items in splits.items()
        }
    )


def paths_of(items: dict[str, list[Item]]) -> list[str]:
    """Images and masks of what `scan` found."""
    return [path for item in chain.from_iterable(items.values()) for path in (item.path, item.mask) if path]


def fingerprint(items: dict[str, list[Item]]) -> str:
    """SHA-256 (hex) of what `scan` found: splits, names, labels, masks and file sizes in bytes.

    The same on each machine and at each place; independent of modification times and of the order of the files.

    Raises:
        ZooError: a file has gone since the scan.
    """
    lines = []
    for split, members in items.items():
        for item in members:
            line = (split, _portable(item.name), item.label, _status(item.path).st_size)
            if item.mask:
                root = item.path[: -len(item.name)]
                line += (_portable(item.mask.removeprefix(root).replace(os.sep, "/")), _status(item.mask).st_size)
            lines.append(line)
    return hashlib.sha256("\n".join(map(repr, sorted(lines))).encode()).hexdigest()


def times_digest(root: Path, paths: Iterable[str]) -> str:
    """SHA-256 (hex) of names, sizes in bytes and modification times in ns of files below a folder; links are followed.

    It tells whether files were written since, on this machine: a copy of them has another one.

    Raises:
        ZooError: a file has gone since the scan.
    """
    lines = []
    for path in paths:
        status = _status(path)
        lines.append((path.removeprefix(f"{root}{os.sep}"), status.st_size, status.st_mtime_ns))
    return hashlib.sha256("\n".join(map(repr, sorted(lines))).encode()).hexdigest()


# Below, a file or folder is its name relative to the root, with slashes: pathlib is slow for that many files.


def _scan_mvtec(root: Path) -> dict[str, list[Item]]:
    if _first_image(root, "good"):
        raise ZooError(f"{root} holds images in train and in good, which is ambiguous; move one of them elsewhere")
    _refuse_loose(root, "train", "train/good")
    normals = [_normal(root, name) for name in _images(root, "train/good")]
    if not normals:
        raise ZooError(f"{root / 'train/good'} holds no images; put the normal images there ({_suffixes()})")

    _refuse_loose(root, "test", "test/<kind>")
    tested = [_normal(root, name) for name in _images(root, "test/good")]
    return {
        "train": normals + _kinds(root, "train", "train_masks"),
        "test": tested + _kinds(root, "test", "ground_truth"),
    }


def _kinds(root: Path, split: str, truth: str) -> list[Item]:
    """The defects of a split: each folder but good is a kind."""
    kinds = [folder.removeprefix(f"{split}/") for folder in _folders(root, split) if folder != f"{split}/good"]
    for folder in sorted(_folders(root, truth)):
        kind = folder.removeprefix(f"{truth}/")
        if kind not in [*kinds, "good"] and (found := _first_image(root, folder)):
            raise ZooError(
                f"{root / found} is a mask without an image, for {root / split / kind} does not exist; rename its "
                "folder to the kind of defect it belongs to or remove it"
            )
    return [item for kind in kinds for item in _defects(root, f"{split}/{kind}", f"{truth}/{kind}")]


def _scan_plain(root: Path) -> dict[str, list[Item]]:
    for folder in _folders(root):
        if folder not in ("good", "bad", "masks", IGNORED) and (found := _first_image(root, folder)):
            raise ZooError(
                f"{root / found} is in a folder that is none of good, bad and masks; move {folder} into "
                f"{root / 'bad'} if it holds defects, or elsewhere"
            )
    normals = [_normal(root, name) for name in _images(root, "good")]
    if not normals:
        raise ZooError(f"{root / 'good'} holds no images; put the normal images there ({_suffixes()})")
    defects = _defects(root, "bad", "masks")
    if not defects:
        return {"train": normals, "test": []}
    if len(normals) == 1:
        raise ZooError(f"{root / 'good'} holds one image, but with bad another is needed to test on; add normal images")
    normals.sort(key=lambda item: _draw(item.name))
    count = sum(_draw(item.name) < TEST_FRACTION for item in normals)
    count = min(max(count, 1), len(normals) - 1)
    return {"train": normals[count:], "test": normals[:count] + defects}


def _scan_flat(root: Path) -> dict[str, list[Item]]:
    miic = root.parent if root.name == "Anomaly_train" else root
    if (miic / "Anomaly_train").is_dir():
        raise ZooError(f"{root} is of the MIIC data set, where normals and defects share a folder; use miic:{miic}")
    if (root / "Anomaly_train.rar").is_file():
        raise ZooError(f"{root} holds the archives of MIIC; unpack them: zoo data prepare miic:{root}")
    normals = [_normal(root, name) for name in _images(root, deep=False)]
    folders = [folder for folder in _folders(root) if folder != IGNORED]
    found = next(filter(None, (_first_image(root, folder) for folder in folders)), None)
    if found and normals:
        raise ZooError(
            f"{root} holds images beside a folder of images, {found.split('/')[0]}; move the normal images into "
            f"{root / 'good'} and the defects into {root / 'bad'}"
        )
    if found:
        inner = next((f for f in folders if (root / f / "good").is_dir() or (root / f / "train").is_dir()), None)
        hint = f"did you mean {root / inner}?" if inner else f"put the normal images into {root / 'good'}"
        raise ZooError(f"{root} has no known layout (it holds {found}): {_LAYOUTS}; {hint}")
    if not normals:
        raise ZooError(f"{root} holds no images ({_suffixes()}): {_LAYOUTS}")
    return {"train": normals, "test": []}


def _defects(root: Path, folder: str, truth: str) -> list[Item]:
    """The images of one kind of defect, each with its mask where there are masks."""
    images = list(_images(root, folder))
    masks = _pair(root, folder, images, truth)
    if masks and (missing := next((name for name in images if name not in masks), None)):
        wanted = root / truth / f"{_stem(missing, folder)}_mask.png"
        raise ZooError(f"{root / missing} has no mask though others of its kind do; add {wanted} or remove the image")
    return [
        Item(os.path.join(root, name), name, 1, os.path.join(root, masks[name]) if name in masks else None)
        for name in images
    ]


def _pair(root: Path, folder: str, images: list[str], truth: str) -> dict[str, str]:
    """Image -> mask, by the stem with its subfolders, or by the bare stem where one of the two has no subfolder."""
    by_stem: dict[str, list[str]] = {}
    by_bare_stem: dict[str, list[str]] = {}
    for image in images:
        stem = _stem(image, folder)
        by_stem.setdefault(stem, []).append(image)
        by_bare_stem.setdefault(stem.split("/")[-1], []).append(image)

    pairs: dict[str, str] = {}
    for mask in _images(root, truth):
        stem = _stem(mask, truth)
        bare = stem.split("/")[-1]
        matches = by_stem.get(stem) or by_stem.get(stem.removesuffix("_mask"))
        if not matches:
            matches = by_bare_stem.get(bare) or by_bare_stem.get(bare.removesuffix("_mask"), [])
            matches = [image for image in matches if stem == bare or "/" not in _stem(image, folder)]
        if not matches:
            close = difflib.get_close_matches(bare.removesuffix("_mask"), by_bare_stem, n=1)
            hint = f"rename it after {by_bare_stem[close[0]][0]}" if close else "rename it after its image"
            raise ZooError(f"{root / mask} is a mask without an image in {root / folder}; {hint} or remove it")
        if len(matches) > 1:
            raise ZooError(f"{root / mask} fits both {matches[0]} and {matches[1]}; rename one of them and its mask")
        if matches[0] in pairs:
            raise ZooError(f"{root / matches[0]} has two masks, {pairs[matches[0]]} and {mask}; remove one of them")
        pairs[matches[0]] = mask
    return pairs


def _normal(root: Path, name: str) -> Item:
    return Item(os.path.join(root, name), name, 0, None)


def _stem(name: str, folder: str) -> str:
    """ "bad/a/x.png" in "bad" -> "a/x"."""
    return os.path.splitext(name[len(folder) + 1 :])[0]


def _images(root: Path, folder: str = "", deep: bool = True) -> Iterator[str]:
    """The image files below a folder, in an order that is the same on each machine; none if there is no such folder."""
    for name, is_folder in _entries(root, folder):
        if is_folder and deep:
            yield from _images(root, name)
        elif not is_folder and os.path.splitext(name)[1].lower() in EXTENSIONS:
            yield name


def _first_image(root: Path, folder: str) -> str | None:
    return next(_images(root, folder), None)


def _folders(root: Path, folder: str = "") -> list[str]:
    return [name for name, is_folder in _entries(root, folder) if is_folder]


def _entries(root: Path, folder: str) -> list[tuple[str, bool]]:
    """(name, is a folder) of all that is not hidden, sorted."""
    here = os.path.join(root, folder) if folder else os.fspath(root)
    try:
        with os.scandir(here) as listing:
            entries = [entry for entry in listing if not entry.name.startswith((".", "__MACOSX"))]
            entries = [(entry.name, entry.is_dir() and not _leads_back(entry, here)) for entry in entries]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise ZooError(f"{here} cannot be listed ({error.strerror}); check its permissions") from None
    try:
        "".join(name for name, _ in entries).encode()
    except UnicodeEncodeError:
        raise ZooError(f"{here!a} holds a file whose name is not valid Unicode; rename it") from None
    return sorted((f"{folder}/{name}" if folder else name, is_folder) for name, is_folder in entries)


def _leads_back(entry: os.DirEntry, here: str) -> bool:
    """A link to a folder that it is in: following it would never end."""
    return entry.is_symlink() and Path(os.path.realpath(here)).is_relative_to(os.path.realpath(entry.path))


def _refuse_loose(root: Path, folder: str, wanted: str) -> None:
    if found := next(_images(root, folder, deep=False), None):
        raise ZooError(f"{root / found} is in no class; move the images of {root / folder} into {root / wanted}")


def _check_folder(root: Path) -> None:
    if root.is_dir():
        return
    if root.exists():
        raise ZooError(f"{root} is a file, not a folder; {_LAYOUTS}")
    existing = next(parent for parent in root.parents if parent.is_dir())
    missing = root.relative_to(existing).parts[0]
    try:
        siblings = [name for name in os.listdir(existing) if (existing / name).is_dir()]
    except OSError:
        siblings = []
    close = difflib.get_close_matches(missing, siblings, n=1)
    hint = f"did you mean {existing / close[0]}?" if close else f"check the path, of which only {existing} exists"
    raise ZooError(f"{root} does not exist; {hint}")


def _suffixes() -> str:
    return ", ".join(sorted(EXTENSIONS))


def _draw(name: str) -> float:
    """A number in [0, 1) that depends on the name alone."""
    return int.from_bytes(hashlib.sha256(_portable(name).encode()).digest()[:6], "big") / 2**48


def _portable(name: str) -> str:
    """One spelling of accented letters, whatever the file system made of them."""
    return unicodedata.normalize("NFC", name)


def _status(path: str) -> os.stat_result:
    try:
        return os.stat(path)
    except OSError as error:
        raise ZooError(f"{path} cannot be read ({error.strerror}); restore it or scan the folder again") from None
