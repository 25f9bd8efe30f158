"""Names of models -> folders: a path or a name in the local registry."""

import difflib
import fnmatch
import os
import re
from pathlib import Path
from typing import Any

from zoo import checkpoint
from zoo.errors import ZooError
from zoo.paths import user_path


def registry() -> Path:
    """The folder of the local registry: `$ZOO_HOME/models`, by default under the user's cache folder."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return user_path(os.environ.get("ZOO_HOME") or cache / "zoo") / "models"


def model_place(name: str, home: Path | None = None) -> Path:
    """Where a model of this name is kept: in the local registry, or under `home/models`.

    Raises:
        ZooError: a name that is a path or otherwise no plain name.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}", name):
        raise ZooError(f"{name!r} is no name for a model: letters, digits, '.', '_' and '-', no folders.")
    return (home / "models" if home else registry()) / name.replace("_", "-")


def unfinished_place(name: str, home: Path | None = None) -> Path:
    """Where the checkpoint of a fit under way is kept, until its model is."""
    place = model_place(name, home)
    return place.parents[1] / "unfinished" / place.name / "last.ckpt"


def store_place(name: str, fingerprint: str, size: tuple[int, int]) -> Path:
    """Where a prepared data set is kept by default."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[:60]
    return registry().parent / "stores" / f"{plain}-{size[0]}x{size[1]}-{fingerprint[:8]}"


def list_models(pattern: str = "*") -> list[str]:
    """Names in the local registry that match a shell pattern such as `miic-*`."""
    if not registry().is_dir():
        return []
    names = [folder.name for folder in registry().iterdir() if (folder / checkpoint.CONFIG).is_file()]
    return sorted(n for n in names if not n.startswith(".") and fnmatch.fnmatch(n, pattern.replace("_", "-")))


def find_model(name: str | Path) -> Path:
    """The folder of a model: a path, else a name in the local registry.

    Raises:
        ZooError: found nowhere, with the nearest names and the command that trains one.
    """
    folder = user_path(name)
    if (folder / checkpoint.CONFIG).is_file() or (folder.is_dir() and ("/" in str(name) or os.sep in str(name))):
        return folder
    if isinstance(name, Path) or "/" in name or os.sep in name:
        raise ZooError(f"There is no model folder {name}.")
    place = model_place(name)
    if place.is_dir():
        return place
    known = list_models()
    near = difflib.get_close_matches(place.name, known, n=3) or known[:5]
    more = f" and {len(known) - len(near)} more" if len(known) > len(near) else ""
    hint = f"there are {', '.join(near)}{more}" if near else "the local registry is empty"
    raise ZooError(f"No model {name!r} ({hint}); train it: zoo fit METHOD --data DATA --name {name}.")


def from_pretrained(name: str | Path) -> Any:
    """Load a model, in eval mode on the CPU; its scores equal those of the model that was saved, bit for bit.

    Args:
        name: a folder, or a name in the local registry (`$ZOO_HOME`).

    Returns:
        The `AnomalyModule`.

    Raises:
        ZooError: not found, damaged, foreign or of a newer format.
    """
    from zoo.methods import create_model, signature
    from zoo.nn.features import architecture_only

    folder = find_model(name)

    def build(config: dict[str, Any]) -> Any:
        unknown = config["arguments"].keys() ^ signature(config["method"]).keys()
        if unknown:
            raise ZooError(f"{folder / checkpoint.CONFIG}: {min(unknown)!r} is missing or no argument of its method.")
        try:
            with architecture_only():
                return create_model(config["method"], **config["arguments"])
        except (TypeError, RuntimeError) as error:
            raise ZooError(f"{folder / checkpoint.CONFIG} has arguments of the wrong kind ({error}).") from error

    module, config = checkpoint.load(folder, build)
    private = checkpoint.read_json(folder / "private" / "state.json")
    try:
        module.take_config(config)
        if private:
            module.load_private_state(private)
    except (TypeError, KeyError, ValueError) as error:
        raise ZooError(f"{folder} has a calibration or private state of the wrong kind ({error}).") from error
    return module
