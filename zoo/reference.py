"""What is kept of the images that a model was calibrated on, to hold later ones against: digests and looks.

`private/reference.safetensors` has the digests (n, 16) uint8 of all of them, by which they are known again, and of at
most `LARGEST`, drawn by a seed, the facts (m, 5) and features (m, D) float16 (`zoo.looks`). No image can be made of
these, but they are of the owner's images: like all of `private/` they are never published.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from zoo.calibration import Calibration
from zoo.checkpoint import write_bytes
from zoo.errors import ZooError
from zoo.looks import FACTS

FILE = "reference.safetensors"
LARGEST = 1000  # images whose looks are kept: 4 MB with the 1,792 channels of a WideResNet-50
HIGHEST = 65504  # of float16


class Reference(NamedTuple):
    """What is known of calibrated images.

    Attributes:
        digests: of all of them, as `zoo.seen.digest` gives them.
        facts: (m, 5) float32, in the order of `zoo.looks.FACTS`.
        features: (m, D) float16; D is 0 where the method has no frozen backbone.
    """

    digests: set[str]
    facts: np.ndarray
    features: np.ndarray


def as_kept(looks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Looks (n, 5 + D) -> facts (n, 5) float32, features (n, D) float16.

    Later images are rounded likewise before they are compared: of a channel that hardly varies rounding alone would
    else make a difference.
    """
    features = np.clip(looks[:, len(FACTS) :], -HIGHEST, HIGHEST)
    return looks[:, : len(FACTS)].astype(np.float32), features.astype(np.float16)


def drawn(count: int) -> np.ndarray:
    """Which of so many images are kept, ascending: all, or as many as may be, drawn by a seed."""
    return np.sort(np.random.default_rng(0).permutation(count)[:LARGEST])


def write_reference(folder: Path, calibration: Calibration, digests: Sequence[str], looks: np.ndarray) -> None:
    """Keep what the images of a calibration look like.

    Args:
        folder: of the model.
        digests: of each image.
        looks: (n, 5 + D), as `zoo.looks.Onlooker` gives them.
    """
    from safetensors.numpy import save

    known = np.frombuffer(bytes.fromhex("".join(digests)), np.uint8).reshape(-1, 16)
    images, features = as_kept(looks[drawn(len(looks))])
    kept = {"digests": known, "facts": images, "features": features}
    write_bytes(folder / "private" / FILE, save(kept, {"calibration": _identity(calibration)}))


def read_reference(folder: Path | None, calibration: Calibration) -> Reference | None:
    """The reference of a calibration; None where its model has none, or one of another calibration.

    Raises:
        ZooError: a file that is damaged.
    """
    from safetensors import SafetensorError, safe_open

    if folder is None or not (path := folder / "private" / FILE).is_file():
        return None
    try:
        with safe_open(path, framework="np") as file:
            if (file.metadata() or {}).get("calibration") != _identity(calibration):
                return None
            digests, facts, features = (file.get_tensor(name) for name in ("digests", "facts", "features"))
        if digests.shape[1:] != (16,) or facts.shape[1:] != (len(FACTS),) or len(facts) != len(features):
            raise ValueError("other shapes")
    except (SafetensorError, OSError, ValueError) as error:
        raise ZooError(f"{path} can't be read ({error}); calibrate the model anew, with --data.") from error
    return Reference({row.tobytes().hex() for row in digests}, facts, features)


def _identity(calibration: Calibration) -> str:
    """Of the images' scores, which another rate leaves as they are."""
    return hashlib.sha256(json.dumps(calibration.scores).encode()).hexdigest()
