"""Take models into the local registry: from a folder that came over an air gap, or from the hub's cache.

What comes from elsewhere is not trusted. Only the files that a published model has are taken, as regular files; each
model is copied, and the copy is loaded whole, as `from_pretrained` does it, and scores an image, before any of them
gets its place.
"""

import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from zoo import checkpoint, hub
from zoo.checkpoint import CARD, CONFIG, LARGEST, RECORD, WEIGHTS
from zoo.errors import ZooError
from zoo.paths import user_path

NEEDED, FURTHER = (CONFIG, WEIGHTS), (CARD, RECORD)
EVALUATIONS = ".eval_results"  # a folder of YAML files


def import_models(what: str, replace: bool, say: Callable[[str], None]) -> list[str]:
    """Copy models into the local registry; none of them, where one is refused.

    Args:
        what: folder of a model, or of several; or a repository on the hub, `ORG/NAME`, or a bare name in the namespace.
        replace: take the place of models of the same names and other weights.
        say: told a line at a time.

    Returns:
        The names of those that were copied.

    Raises:
        ZooError: no model there; one that is damaged, or links to what lies elsewhere; a name that is taken.
    """
    taken: dict[str, Path] = {}
    with ExitStack() as stack:
        copies = []
        for name, folder, root in _models(what):
            place = hub.model_place(name)
            if place.name in taken:
                raise ZooError(f"{taken[place.name]} and {folder} have the same name {place.name}; rename one of them.")
            taken[place.name] = folder
            files = _public_files(folder, root)
            if _is_wanted(place, folder, replace, say):
                checkpoint.check_place(place)
                copies.append((folder, files, stack.enter_context(checkpoint.replacing(place)), place))
        for folder, files, copy, _ in copies:
            for name, path in files.items():
                (copy / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(path, copy / name)
            _check(copy, folder)
    return [place.name for *_, place in copies]


def _models(what: str) -> list[tuple[str, Path, Path]]:
    """Name and folder of each model, and the folder that its files may not lie outside of."""
    folder = user_path(what)
    if not folder.is_dir():
        folder = hub.find_model(what)
    root = folder = folder.resolve()
    if hub.is_cached(folder):  # of links to what the repository's cache has
        root = folder.parents[1]
        return [(hub.name_of(folder), folder, root)]
    if _is_model(folder):
        return [(folder.name, folder, root)]
    found = _subfolders(folder) or _subfolders(folder / "models")  # the latter of a release
    if not found:
        raise ZooError(f"{what} is no model of the zoo, and no folder of models: it has no {CONFIG}.")
    return [(each.name, each, root) for each in found]


def _subfolders(folder: Path) -> list[Path]:
    """The models in a folder."""
    if not folder.is_dir():
        return []
    return sorted(each for each in folder.iterdir() if not each.name.startswith(".") and _is_model(each))


def _is_model(folder: Path) -> bool:
    """Whether a folder is one or what is left of one."""
    return folder.is_dir() and any((folder / name).is_file() for name in NEEDED)


def _public_files(folder: Path, root: Path) -> dict[str, Path]:
    """The files of a model that may be public, by their relative names.

    Raises:
        ZooError: one is a link to what lies outside, or is no file; one that is needed is missing.
    """
    further = [f"{EVALUATIONS}/{path.name}" for path in sorted((folder / EVALUATIONS).glob("*.yaml"))]
    files = {}
    for name in (*NEEDED, *FURTHER, *further):
        path = folder / name
        if not (path.exists() or path.is_symlink()):
            if name in NEEDED:
                raise ZooError(f"{folder} is no whole model of the zoo: it has no {name}; copy or fetch it anew.")
            continue
        real = path.resolve()
        if not real.is_relative_to(root):
            raise ZooError(
                f"{path} is a link to another place, which is not followed; copy the files themselves: from the hub by "
                "hf download ORG/NAME --local-dir FOLDER, from a disk by cp -rL."
            )
        if not real.is_file():
            raise ZooError(f"{path} is no file; copy or fetch the model anew.")
        if name != WEIGHTS and real.stat().st_size > (most := LARGEST.get(name, LARGEST[CARD])):
            raise ZooError(
                f"{path} is larger than {most:,} bytes, and none of the zoo's; copy or fetch the model anew."
            )
        files[name] = real
    return files


def _is_wanted(place: Path, folder: Path, replace: bool, say: Callable[[str], None]) -> bool:
    """Whether a model is to be copied, by what the registry has under its name.

    Raises:
        ZooError: other weights, which may not be replaced.
    """
    if not place.exists():
        return True
    new = checkpoint.read_config(folder)
    try:
        old = checkpoint.read_config(place)
    except ZooError:
        old = {"weights_sha256": None}
    if new["weights_sha256"] == old["weights_sha256"] and (new == old or not replace):
        differs = "" if new == old else ", with another configuration or calibration, which --replace would take"
        say(f"{place.name} is there already, of the same weights{differs}; it is left alone.")
        return False
    if not replace:
        raise ZooError(f"{place} is another model, of other weights; --replace puts this one in its place.")
    return True


def _check(copy: Path, folder: Path) -> None:
    """Load a copy and let it score an image, and speak of it as of the folder that it was made from."""
    try:
        model = hub.from_pretrained(copy)
        if model.is_fitted:
            _try(model, copy)
    except ZooError as error:
        raise ZooError(str(error).replace(str(copy), str(folder))) from error


def _try(model: Any, copy: Path) -> None:
    """Raises ZooError where arguments and weights don't go together though each is right by itself."""
    import torch

    try:
        with torch.inference_mode():
            model(torch.zeros(1, 1, *model.size))
    except Exception as error:
        reason = " ".join(str(error).split())[:200].rstrip(".")
        text = f"{copy} can't score an image ({reason})"
        raise ZooError(f"{text}; its configuration and weights are not of one model: fetch it anew.") from error
