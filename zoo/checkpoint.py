"""A saved model is a folder: weights as safetensors, configuration as JSON, card, record, and what is private."""

import contextlib
import csv
import hashlib
import io
import itertools
import json
import os
import re
import secrets
import shutil
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.errors import ZooError
from zoo.forms import NEEDS, Backbone, Precision, Preprocessing, Record, Selection, misfit, parse, quoted

if TYPE_CHECKING:  # torch is imported on use: the registry is listed without it
    import torch
    from torch import nn

FORMAT_VERSION = 1
WEIGHTS, CONFIG, CARD, RECORD = "model.safetensors", "config.json", "README.md", "results.json"
LARGEST = {CONFIG: 2**26, CARD: 2**23, RECORD: 2**22}  # bytes of the texts of a model: more is none of ours
LARGEST_HEADER = 2**22  # bytes; some 1,000 tensors take 100,000
MODULES = 8_000  # parts of a network: the largest backbones of timm have some 2,000
LAST = Path("private", "last.safetensors")  # what training changes, as of its last step, where another one was kept
KEYS = {
    "format_version": int,
    "zoo_version": str,
    "method": str,
    "preset": str | None,
    "arguments": dict,
    "preprocessing": dict,
    "precision": Precision,
    "selection": Selection | None,
    "stands_for": float | None,
    "calibration": dict | None,
    "learned": dict[str, list[int]],
    "backbone": Backbone | None,
    "weights_sha256": str,
}
SINCE = ("selection", "stands_for")  # keys that models of before don't have


class Damaged(ZooError):
    """Weights that are not as they were written."""


def save(
    folder: str | Path,
    module: "nn.Module",
    config: dict[str, Any],
    extra: dict[str, str],
    last: "dict[str, torch.Tensor] | None" = None,
) -> Path:
    """Write a model folder beside its place and rename it there, so that no half-written model is ever seen.

    Args:
        folder: its place; a model that is already there is replaced.
        config: the `KEYS` that are known outside this file; the rest is filled in here.
        extra: further text files by relative path (card, record, `private/...`).
        last: weights of the last step, where another one was kept.

    Raises:
        ZooError: something else than a model lies there, or the disk refuses.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    check_place(folder)
    state = {name: tensor.detach().contiguous() for name, tensor in module.state_dict().items()}
    with replacing(folder) as temporary:
        save_file(state, temporary / WEIGHTS, metadata={"format": "pt"})
        config = config | {
            "format_version": FORMAT_VERSION,
            "learned": {name: list(state[name].shape) for name in learned_buffers(module)},
            "weights_sha256": file_sha256(temporary / WEIGHTS),
        }
        for name, text in ({CONFIG: dump(config)} | extra).items():
            (temporary / name).parent.mkdir(exist_ok=True)
            (temporary / name).write_text(text, encoding="utf-8")
        if last:
            (temporary / LAST).parent.mkdir(exist_ok=True)
            save_file({name: tensor.contiguous() for name, tensor in last.items()}, temporary / LAST)
        (temporary / WEIGHTS).chmod((temporary / CONFIG).stat().st_mode)  # safetensors writes for its owner alone
    return folder


def check_place(folder: Path) -> None:
    """Whether a model may be written there, before the work is done.

    Raises:
        ZooError: something else than a model lies there, or its parent can't be written.
    """
    if folder.exists() and not (folder / CONFIG).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise ZooError(f"{folder} exists and is no model of the zoo; choose another name or move it away.")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ZooError(f"{folder.parent} can't be written ({error}); set ZOO_HOME to another place.") from error
    if not os.access(folder.parent, os.W_OK):
        raise ZooError(f"{folder.parent} can't be written; set ZOO_HOME to another place.")


def load(folder: str | Path, build: Callable[[dict[str, Any]], "nn.Module"]) -> "tuple[nn.Module, dict]":
    """Read a model folder: everything is checked before anything is allocated, then loaded strictly.

    Args:
        folder: as written by `save`.
        build: makes the untrained module of a configuration.

    Raises:
        ZooError: a file that is missing, damaged, foreign or newer, named.
    """
    import torch

    with torch.inference_mode(False), torch.enable_grad():  # whatever the caller is in: a module may try itself out
        return _load(Path(folder), build)


def _load(folder: Path, build: Callable[[dict[str, Any]], "nn.Module"]) -> "tuple[nn.Module, dict]":
    import torch
    from safetensors.torch import load_file

    from zoo.nn.unfilled import Unfilled

    config = read_config(folder)
    path = folder / WEIGHTS
    stored = read_header(path)
    with torch.device("meta"), _few_modules(), Unfilled():
        module = build(config)
    expected = {name: _described(tensor) for name, tensor in module.state_dict().items()}
    if other := config["learned"].keys() - set(learned_buffers(module)):
        what = f"no tensor of {config['method']} whose shape is learned is {quoted(min(other))}"
        raise ZooError(f"{folder / CONFIG} is not understood ({what}); fetch it anew, or install a newer zoo.")
    for name, shape in config["learned"].items():  # a size that is learned is 0 in an untrained module
        kind, sizes = expected.get(name, ("", []))
        if len(shape) == len(sizes):
            expected[name] = kind, [size or learned for size, learned in zip(sizes, shape, strict=True)]
    wrong = [name for name in expected.keys() | stored.keys() if expected.get(name) != stored.get(name)]
    if wrong:
        found, wanted = (_in_words(of.get(min(wrong))) for of in (stored, expected))
        raise ZooError(f"{path} doesn't fit {CONFIG}: {quoted(min(wrong))} is {found} where {wanted} is expected.")
    check_weights(folder, config)
    with Unfilled():
        module = build(config)
    module.load_state_dict(load_file(path))
    return module.eval(), config


def read_header(path: Path) -> dict[str, tuple[str, list[int]]]:
    """Type and shape of each tensor of a safetensors file; no tensor is read.

    Raises:
        ZooError: missing, truncated, or of another kind; a header that is too large for any model of the zoo.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise ZooError(f"{path.parent} has no {WEIGHTS}; only safetensors weights are loaded.")
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
        if length > LARGEST_HEADER:
            raise ZooError(f"{path} has a header of {length:,} bytes, more than any of ours; it is not loaded.")
        with safe_open(path, framework="np") as file:  # without torch
            slices = {name: file.get_slice(name) for name in file.keys()}
            return {name: (part.get_dtype(), part.get_shape()) for name, part in slices.items()}
    except (SafetensorError, struct.error, OSError) as error:
        raise Damaged(f"{path} is truncated or no safetensors file ({quoted(str(error))}); fetch it anew.") from error


@contextlib.contextmanager
def _few_modules() -> Iterator[None]:
    """Within it a network of endless parts is refused, as a configuration from anywhere may ask for it."""
    from torch.nn.modules.module import register_module_module_registration_hook

    count = itertools.count(1)

    def counted(*_: Any) -> None:
        if next(count) > MODULES:
            raise ZooError(f"it asks for a network of more than {MODULES:,} parts")

    hook = register_module_module_registration_hook(counted)
    try:
        yield
    finally:
        hook.remove()


def check_weights(folder: Path, config: dict[str, Any]) -> None:
    """Raises ZooError where the weights are not those that a configuration names."""
    if file_sha256(folder / WEIGHTS) != config["weights_sha256"]:
        raise Damaged(
            f"{folder / WEIGHTS} is damaged or not the file that {CONFIG} names (SHA-256 differs); fetch it anew."
        )


def _described(tensor: "torch.Tensor") -> tuple[str, list[int]]:
    """Type, as safetensors calls it, and shape."""
    kind = str(tensor.dtype).removeprefix("torch.")
    for long, short in (("bfloat", "BF"), ("float", "F"), ("uint", "U"), ("int", "I"), ("bool", "BOOL")):
        kind = kind.replace(long, short) if kind.startswith(long) else kind
    return kind, list(tensor.shape)


def _in_words(tensor: tuple[str, list[int]] | None) -> str:
    return "no tensor" if tensor is None else f"{tensor[0]} of shape {tensor[1]}"


def read_last(folder: Path) -> "dict[str, torch.Tensor]":
    """The weights of the last step that a model folder keeps beside the chosen ones; {} where it keeps none."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(folder / LAST) if (folder / LAST).is_file() else {}
    except (SafetensorError, OSError) as error:
        raise ZooError(f"{folder / LAST} can't be read ({error}); remove it, or fit the model anew.") from error


def read_config(folder: Path) -> dict[str, Any]:
    """The checked `config.json` of a model folder.

    Raises:
        ZooError: missing, unreadable, of a newer format, or with keys or values that this version doesn't know.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise ZooError(f"{folder} is no model of the zoo: it has no {CONFIG}.")
    config = _read_object(path)
    version = config.get("format_version")
    if type(version) is int and version > FORMAT_VERSION:
        found = quoted(version)
        raise ZooError(f"{path} has format version {found}, newer than {FORMAT_VERSION}; install a newer zoo.")
    if type(version) is not int or version < 1:
        found = f"{quoted(version)} is no format version" if "format_version" in config else "no format version"
        raise ZooError(f"{path} is damaged or no configuration of the zoo ({found}); fetch or save the model anew.")
    wrong = [key for key in config.keys() | KEYS if not _is_understood(key, config)]
    if wrong:
        raise ZooError(f"{path} is not understood: {quoted(min(wrong))} is missing, unknown or of the wrong kind.")
    if not re.fullmatch("[0-9a-f]{64}", config["weights_sha256"]):
        raise ZooError(f"{path} is not understood: weights_sha256 is no SHA-256 in 64 hexadecimal digits.")
    _check_parts(config, path)
    return config | {key: config.get(key) for key in SINCE}


def _check_parts(config: dict[str, Any], path: Path) -> None:
    """Raises ZooError for what no view or calibration is made of; the method's own part is checked when it is built."""
    from zoo.calibration import stored
    from zoo.view import View

    try:
        if wrong := misfit(config["preprocessing"], Preprocessing):
            raise ValueError(f"preprocessing {quoted(wrong)} is missing or of the wrong kind")
        View.stored(config["preprocessing"])
        if config["calibration"] is not None:
            stored(config["calibration"])
    except ValueError as error:
        raise ZooError(f"{path} is not understood ({str(error).rstrip('.')}); fetch or save the model anew.") from error


def _is_understood(key: str, config: dict[str, Any]) -> bool:
    if key not in config:
        return key in SINCE
    return key in KEYS and misfit(config[key], KEYS[key]) is None


def read_record(folder: Path) -> dict[str, Any]:
    """The checked `results.json` of a model folder, {} where there is none.

    Raises:
        ZooError: damaged, too large, or of another form than a record's.
    """
    path = folder / RECORD
    record = _read_object(path) if path.is_file() else {}
    check_record(record, str(path))
    return record


def check_record(record: dict[str, Any], what: str = "The record") -> None:
    """Raises ZooError for a record that a card can't be made of."""
    wrong = misfit(record, Record)
    if wrong is None:
        wrong = next((need for key, needs in NEEDS.items() if record.get(key) for need in needs - record.keys()), None)
    if wrong is not None:
        text = f"{what} is no record of the zoo: {quoted(wrong)} is missing or of the wrong kind"
        raise ZooError(f"{text}; fetch or save the model anew.")


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON file that may have come from anywhere."""
    try:
        if path.stat().st_size > LARGEST[path.name]:
            raise ValueError(f"larger than {LARGEST[path.name]:,} bytes")
        value = parse(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError("no JSON object")
        return value
    except (ValueError, OSError) as error:
        what = "configuration" if path.name == CONFIG else "record"
        raise ZooError(f"{path} is damaged or no {what} of the zoo ({error}); fetch or save the model anew.") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file of our own, {} where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if not isinstance(value, dict):
            raise ValueError("no JSON object")
        return value
    except (ValueError, RecursionError) as error:
        raise ZooError(f"{path} is damaged; fetch or save the model anew.") from error


def learned_buffers(module: "nn.Module") -> list[str]:
    """Names of the module's own buffers: their shapes may depend on what was learned."""
    return [name for name, _ in module.named_buffers(recurse=False) if name in module.state_dict()]


def dump(value: Any) -> str:
    """JSON as it is written everywhere: sorted, indented, no NaN."""
    return json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n"


@contextlib.contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A temporary folder that takes the place of `folder` when the block succeeds, and vanishes when it fails."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}-{secrets.token_hex(4)}")
    old = temporary.with_name(f"{temporary.name}.old")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if folder.exists():
            folder.rename(old)
        try:
            temporary.rename(folder)
        except OSError:
            old.rename(folder)
            raise
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise ZooError(f"{folder} could not be written ({error}); nothing was changed.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a file under a temporary name and rename it."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"))  # names of files may be of no encoding


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file under a temporary name and rename it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ZooError(f"{path} could not be written ({error}); nothing was changed.") from error


def csv_text(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A CSV file's text."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    return text.getvalue()


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
