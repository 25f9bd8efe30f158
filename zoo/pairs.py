"""Pairs of an abnormal image and its clean version, told by their names."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from zoo.errors import ZooError
from zoo.image import EXTENSIONS

Pair = tuple[Any, Any]  # abnormal and clean, each of a kind that `zoo.image.read_image` reads


def abnormal_and_clean(folder: Path) -> list[tuple[Path, Path]]:
    """Images of a folder that have "abnormal" in their names, each with that of the same name with "normal" instead.

    Returns:
        (abnormal, clean), sorted by name; images without a partner and hidden files are left out.
    """
    paths = [path for path in sorted(folder.glob("*")) if not path.name.startswith(".") and path.is_file()]
    files = {path.name: path for path in paths if path.suffix.lower() in EXTENSIONS}
    clean = {name: name.replace("abnormal", "normal") for name in files if "abnormal" in name}
    return [(files[abnormal], files[normal]) for abnormal, normal in clean.items() if normal in files]


def apart_from(pairs: list[Pair], images: Iterable[Any]) -> list[Pair]:
    """The pairs whose clean image has the bytes of none of these.

    Args:
        images: paths, or dicts with "path" and "bytes"; such are those of the pairs, too.

    Raises:
        ZooError: a file that has gone.
    """
    known = {_content(image) for image in images} if pairs else set()
    return [pair for pair in pairs if _content(pair[1]) not in known]


def _content(image: Any) -> bytes:
    about = image if isinstance(image, dict) else {"path": image}
    try:
        data = about.get("bytes") or Path(about["path"]).read_bytes()
    except OSError as error:
        raise ZooError(f"{about['path']} cannot be read ({error.strerror}); restore it.") from None
    return hashlib.sha256(data).digest()
