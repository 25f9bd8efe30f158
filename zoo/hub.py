"""Names of models -> folders: a path, a name in the local registry, or a repository on the hub."""

import difflib
import fnmatch
import os
import re
from pathlib import Path
from typing import Any

from zoo import checkpoint
from zoo.errors import ZooError
from zoo.methods import METHODS
from zoo.paths import user_path

NAMESPACE = ""  # on the hub, of bare names; empty until there is one, as a stranger could take an invented one
REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def registry() -> Path:
    """The folder of the local registry: `$ZOO_HOME/models`, by default under the user's cache folder."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return user_path(os.environ.get("ZOO_HOME") or cache / "zoo") / "models"


def namespace() -> str:
    """Whose models on the hub go by bare names: `$ZOO_NAMESPACE`, a user or an organisation; empty for nobody's."""
    return os.environ.get("ZOO_NAMESPACE") or NAMESPACE


def model_place(name: str, home: Path | None = None) -> Path:
    """Where a model of this name is kept: in the local registry, or under `home/models`.

    Raises:
        ZooError: a name that is a path or otherwise no plain name.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}", name):
        raise ZooError(f"{name!r} is no name for a model: letters, digits, '.', '_' and '-', no folders.")
    return (home / "models" if home else registry()) / name.replace("_", "-")


def check_child(parent: Path, name: str, home: Path | None = None) -> None:
    """Raises ZooError where a model of this name can't be kept, or would take the place of its parent."""
    place = model_place(name, home)
    if place.resolve() == parent.resolve():
        raise ZooError(f"--name {name} is the model itself; give the new one another name, and the old one is kept.")
    checkpoint.check_place(place)


def unfinished_place(name: str, home: Path | None = None) -> Path:
    """Where the checkpoint of a fit under way is kept, until its model is."""
    place = model_place(name, home)
    return place.parents[1] / "unfinished" / place.name / "last.ckpt"


def store_place(name: str, fingerprint: str, size: tuple[int, int]) -> Path:
    """Where a prepared data set is kept by default."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[:60]
    return registry().parent / "stores" / f"{plain}-{size[0]}x{size[1]}-{fingerprint[:8]}"


class Model(str):
    """A model's name, with what its record or its card says of it.

    Attributes:
        method: its id; None where the card doesn't tell.
        data: name of the data that it was evaluated on, or None.
        metrics: by the names of a record (`image_auroc`, ...); empty until it is evaluated.
        error: why its folder can't be read, or None.
    """

    def __init__(self, name: str):
        self.method: str | None = None
        self.data: str | None = None
        self.metrics: dict[str, float] = {}
        self.error: str | None = None


def list_models(pattern: str = "*", remote: bool = False) -> list[Model]:
    """Models whose names match a shell pattern such as `miic-*`, each a string with its figures (see `Model`).

    Args:
        remote: those of the hub's namespace (`$ZOO_NAMESPACE`) instead, by their cards; of another one by a pattern
            `ORG/*`.

    Raises:
        ZooError: no namespace is known, or the hub can't be asked.
    """
    if remote:
        return _remote_models(pattern)
    if not registry().is_dir():
        return []
    names = [folder.name for folder in registry().iterdir() if (folder / checkpoint.CONFIG).is_file()]
    found = sorted(n for n in names if not n.startswith(".") and fnmatch.fnmatch(n, pattern.replace("_", "-")))
    return [_local_model(name) for name in found]


def _local_model(name: str) -> Model:
    model, folder = Model(name), model_place(name)
    try:
        model.method = checkpoint.read_config(folder)["method"]
        record = checkpoint.read_record(folder)
        model.metrics, model.data = record.get("metrics", {}), record.get("test_data", {}).get("name")
    except ZooError as error:
        model.error = str(error)
    return model


def _remote_models(pattern: str) -> list[Model]:
    from zoo import remote

    owner, slash, names = pattern.rpartition("/")
    owner = owner or namespace()
    if not owner:
        raise ZooError("Whose models on the hub? Set ZOO_NAMESPACE=ORG, or give a pattern with it: 'ORG/*'.")
    found = []
    for card in remote.cards_of(owner):
        name = card.repo.partition("/")[2]
        if fnmatch.fnmatch(name.replace("_", "-"), names.replace("_", "-")):
            model = Model(card.repo if slash else name)
            model.method = next((tag.replace("-", "_") for tag in card.tags if tag.replace("-", "_") in METHODS), None)
            model.data, model.metrics = card.data, card.figures
            found.append(model)
    return found


def find_model(name: str | Path, revision: str | None = None, **how: Any) -> Path:
    """The folder of a model: a path, else a name in the local registry, else a repository on the hub.

    Args:
        name: `NAME`, `ORG/NAME`, either with `@REVISION`, or a folder.
        revision: branch, tag or commit of a repository.
        how: further arguments of `zoo.remote.fetch`.

    Raises:
        ZooError: found nowhere, with the nearest names and the command that trains one; a revision of what has none.
    """
    folder, text = user_path(name), str(name)
    if (folder / checkpoint.CONFIG).is_file() or (folder.is_dir() and ("/" in text or os.sep in text)):
        return _unpinned(folder, revision, f"{text} is a folder")
    text, _, pinned = text.partition("@")
    revision = revision or pinned or None
    if isinstance(name, str) and REPO.fullmatch(text):
        try:
            return _fetched(text, revision, **how)
        except ZooError as error:
            if folder.parent.is_dir():  # it may have been meant
                raise ZooError(f"There is no folder {text}, and as a repository: {error}") from error
            raise
    if isinstance(name, Path) or "/" in text or os.sep in text:
        raise ZooError(f"There is no model folder {name}; a repository on the hub is named as ORG/NAME.")
    place = model_place(text)
    if place.is_dir():
        return _unpinned(place, revision, f"{text} is a model of the local registry")
    if namespace():
        return _in_namespace(text, place.name, revision, **how)
    raise ZooError(_nowhere(place.name))


def _unpinned(folder: Path, revision: str | None, what: str) -> Path:
    if revision:
        raise ZooError(f"{what} and has no revision {revision!r}; leave it out, or name a repository: ORG/NAME.")
    return folder


def _fetched(repo: str, revision: str | None, **how: Any) -> Path:
    from zoo import remote

    return remote.fetch(repo, revision, **how)


def _in_namespace(text: str, name: str, revision: str | None, **how: Any) -> Path:
    """By the name with dashes, as models have them; else as it was written."""
    from zoo import remote

    try:
        return remote.fetch(f"{namespace()}/{name}", revision, **how)
    except remote.NotThere:
        if text == name:
            raise
        return remote.fetch(f"{namespace()}/{text}", revision, **how)


def _nowhere(name: str) -> str:
    known = list_models()
    near = difflib.get_close_matches(name, known, n=3) or known[:5]
    more = f" and {len(known) - len(near)} more" if len(known) > len(near) else ""
    hint = f"there are {', '.join(near)}{more}" if near else "the local registry is empty"
    data, _, method = name.partition("-")
    ours = data == "miic" and method.replace("-", "_") in METHODS
    command = f"zoo fit {method if ours else 'METHOD'} --data {'miic:DIR' if ours else 'DATA'} --name {name}"
    return (
        f"No model {name!r} ({hint}); train it: {command} (--preset lite without the hub's ImageNet weights), or name "
        f"a repository on the hub: ORG/{name}, or {name} with ZOO_NAMESPACE=ORG set."
    )


def is_cached(folder: Path) -> bool:
    """Whether a model's folder is the hub's cache, where nothing is written."""
    return folder.parent.name == "snapshots" and folder.parents[1].name.startswith("models--")


def _fetched_anew(folder: Path, token: str | bool | None) -> Path:
    """A commit in the hub's cache, downloaded once more."""
    from zoo import remote

    repo = folder.parents[1].name.removeprefix("models--").replace("--", "/")
    return remote.fetch(repo, folder.name, token=token, cache_dir=folder.parents[2], force_download=True)


def name_of(folder: Path) -> str:
    """What a model's folder is called; in the hub's cache, what its repository is."""
    return folder.parents[1].name.split("--")[-1] if is_cached(folder) else folder.name


def from_pretrained(
    name: str | Path,
    revision: str | None = None,
    *,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> Any:
    """Load a model, in eval mode on the CPU; its scores equal those of the model that was saved, bit for bit.

    Args:
        name: a folder; a name in the local registry (`$ZOO_HOME`); a repository on the hub, `ORG/NAME`, or a bare name
            in the namespace `$ZOO_NAMESPACE`. `NAME@REVISION` pins one, too.
        revision: branch, tag or commit of a repository.
        token, cache_dir, local_files_only, force_download: as for the hub's client (`huggingface_hub`), which reads
            `HF_ENDPOINT`, `HF_TOKEN` and `HF_HUB_OFFLINE` as well.

    Returns:
        The `AnomalyModule`.

    Raises:
        ZooError: not found, not to be had, damaged, foreign or of a newer format.
    """
    how = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    folder = find_model(name, revision, force_download=force_download, **how)
    checkpoint.read_config(folder)  # before torch is imported
    record = checkpoint.read_record(folder)

    from zoo.methods import check_arguments, create_model
    from zoo.nn.features import architecture_only

    def build(config: dict[str, Any]) -> Any:
        try:
            check_arguments(config["method"], config["arguments"])
            with architecture_only():
                module = create_model(config["method"], **config["arguments"])
            module.take_config(config)
            return module
        except Exception as error:  # whatever a configuration from anywhere may cause
            text = f"{folder / checkpoint.CONFIG} is not understood ({' '.join(str(error).split()).rstrip('.')})"
            raise ZooError(f"{text}; fetch it anew, or install a newer zoo.") from error

    try:
        module, _ = checkpoint.load(folder, build)
    except checkpoint.Damaged:
        if not is_cached(folder):
            raise
        module, _ = checkpoint.load(_fetched_anew(folder, token), build)
    module.folder = folder
    module.record = record or None
    if private := checkpoint.read_json(folder / "private" / "state.json"):
        try:
            module.load_private_state(private)
        except (TypeError, KeyError, ValueError) as error:
            raise ZooError(f"{folder} has a private state of the wrong kind ({error}).") from error
    return module
