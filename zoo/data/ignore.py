"""Ignore masks: what of the images is not looked at, white in a mask for all of them or in one for each."""

from collections.abc import Callable
from pathlib import Path, PurePosixPath

import numpy as np

from zoo.errors import ZooError
from zoo.image import EXTENSIONS, read_mask
from zoo.paths import user_path

FOLDER = "ignore"  # in a folder of images, taken without being named


class IgnoreMasks:
    """The masks of a file or folder.

    Args:
        place: an image file is the mask of all images; a folder holds masks that are named as the images are, relative
            to theirs, with any image suffix: `ignore/good/0001.png` for `good/0001.tif`. Images without one are looked
            at as a whole.

    Raises:
        ZooError: no such place, no mask in it, a mask that can't be read, two of one name.
    """

    def __init__(self, place: str | Path):
        self.place = user_path(place)
        self.common: np.ndarray | None = None
        self.files: dict[str, Path] = {}
        if self.place.is_dir():
            for file in sorted(self.place.rglob("*")):
                relative = file.relative_to(self.place)
                if file.suffix.lower() not in EXTENSIONS or any(part.startswith(".") for part in relative.parts):
                    continue
                stem = _stem(relative.as_posix())
                if other := self.files.get(stem):
                    raise ZooError(f"--ignore: {other} and {file} are masks of one image; remove one of them.")
                self.files[stem] = file
            if not self.files:
                raise ZooError(f"--ignore {place} holds no masks ({', '.join(sorted(EXTENSIONS))}).")
        elif self.place.is_file():
            self.common = read_mask(self.place)
        else:
            raise ZooError(f"--ignore {place}: there is no such file or folder; check the path.")

    def of(self, name: str) -> np.ndarray | None:
        """The mask (H, W) bool of an image by its name, True where it is ignored; None looks at all of it."""
        if self.common is not None:
            return self.common
        file = self.files.get(_stem(name))
        return None if file is None else read_mask(file)

    def check(self, names: list[str], say: Callable[[str], None]) -> None:
        """Tell how many of these images have a mask; ZooError if none has."""
        found = sum(self.common is not None or _stem(name) in self.files for name in names)
        if found:
            say(f"Ignore masks: {found:,} of {len(names):,} images have one ({self.place}).")
        else:
            mask = next(iter(self.files.values())).relative_to(self.place)
            raise ZooError(
                f"--ignore {self.place}: no mask there fits an image ({mask} against {names[0]}, say); name masks as "
                "their images are."
            )


def _stem(name: str) -> str:
    """`good/0001_mask.png` -> `good/0001`."""
    path = PurePosixPath(name)
    return str(path.with_suffix("") if path.suffix.lower() in EXTENSIONS else path).removesuffix("_mask")
