"""A model as an ONNX file: traced, compared with `forward` under onnxruntime, and written only where both are equal."""

import contextlib
import copy
import importlib.util
import io
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from zoo import checkpoint, hub
from zoo.errors import ZooError
from zoo.paths import user_path

if TYPE_CHECKING:  # the place of the file is checked before torch is imported
    from torch import Tensor

    from zoo.module import AnomalyModule

FORMAT = 1  # of the metadata
OPSET = 18
PACKAGES = ("onnx", "onnxruntime", "onnxscript")
TOLERANCE = 1e-4
LARGEST = 2_000_000_000  # bytes of weights that one file takes: a protobuf ends at 2 GiB


class Parity(NamedTuple):
    """How far onnxruntime's scores and maps are from those of `forward`.

    Attributes:
        images: so many were compared.
        score_difference, map_difference: the largest absolute ones.
        largest_score, largest_map: the largest absolute values that `forward` gave.
        error: the largest difference, in units of the value where that is beyond 1: |a - b| / max(1, |b|).
    """

    images: int
    score_difference: float
    map_difference: float
    largest_score: float
    largest_map: float
    error: float


def check_target(path: str | Path) -> Path:
    """The place of an ONNX file, if one may be written there; its folder is made.

    Raises:
        ZooError: another ending, a folder, no right to write, or packages that aren't installed.
    """
    path = user_path(path)
    if path.suffix != ".onnx":
        raise ZooError(f"--to is a file that ends in .onnx, not {path}.")
    if path.is_dir():
        raise ZooError(f"--to {path} is a folder; name a file that ends in .onnx.")
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ZooError(f"An export takes packages that aren't installed: pip install {' '.join(missing)}.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ZooError(f"{path.parent} can't be written ({error}); choose another place by --to.") from error
    if not os.access(path.parent, os.W_OK):
        raise ZooError(f"{path.parent} can't be written; choose another place by --to.")
    return path


def export_onnx(model: "AnomalyModule", path: str | Path, facts: dict[str, str] | None = None) -> Parity:
    """Write a model as an ONNX file that gives what `forward` gives, of any number of images of any size.

    Input `images` (N, 1 or 3, H, W), float32 in [0, 1]; outputs `score` (N,) and `map` (N, 1, H, W). What comes before
    `forward` is not in the graph (`preprocessing` lists it), nor is a region of interest. Scores and maps of seeded
    noise and synthetic SEM images, grey and colour, of four sizes and of the first calibrated one, are compared under
    onnxruntime: each value differs by at most 1e-4, where it is beyond 1 by at most 1e-4 of itself. (Squared distances
    reach thousands, of which float32 itself knows no more than 1e-4.) The file's metadata says how far, and what else
    there is to know: method, preprocessing, thresholds, versions.

    Args:
        model: a fitted one; it is left as it was.
        path: ends in .onnx; a file that is there is replaced. Weights of more than 2 GB stand in `PATH.data` beside it.
        facts: further metadata.

    Raises:
        ZooError: packages that lack, no place to write, a model that has learned nothing or knows cropped images only,
            one that can't be traced, or whose graph isn't equal; nothing is written then.
    """
    import torch

    path = check_target(path)
    if not model.is_fitted:
        raise ZooError(f"This {model.method} has learned nothing yet; fit it first.")
    if model.view.crop:
        raise ZooError("This model was fitted on cropped images, for parity runs; export one of another preset.")
    was_training, original = model.training, model
    model = (model if model.device.type == "cpu" else copy.deepcopy(model).cpu()).eval()
    try:
        with torch.inference_mode(False), torch.no_grad(), _replacing(path) as temporary:
            _write_graph(model, temporary)
            parity = compare(model, temporary, check_images(model))
            if not parity.error <= TOLERANCE:  # nor where it is no number
                raise ZooError(
                    f"The graph of this {model.method} isn't equal to forward under onnxruntime: scores differ by "
                    f"{parity.score_difference:.2g} of {parity.largest_score:.3g}, maps by "
                    f"{parity.map_difference:.2g} of {parity.largest_map:.3g}; nothing was written."
                )
            _write_metadata(temporary, describe(model) | {"parity": _parity_text(parity)} | (facts or {}))
    finally:
        original.train(was_training)
    return parity


# ---- the graph -------------------------------------------------------------------------------------------------------


def _write_graph(model: "AnomalyModule", path: Path) -> None:
    """Trace a model in eval mode and write it without what torch notes of the places of its code."""
    import onnx
    import torch

    from zoo.graph import Graph, traceable

    any_size = {axis: torch.export.Dim(name) for axis, name in enumerate("NCHW")}
    try:
        with traceable(), _quiet():
            program = torch.onnx.export(
                Graph(model).eval(),
                (torch.rand(2, 3, model.size[0] + 5, model.size[1] + 9),),
                input_names=["images"],
                output_names=["score", "map"],
                opset_version=OPSET,
                dynamic_shapes=(any_size,),
                dynamo=True,
                verbose=False,
            )
    except Exception as error:  # of many kinds, with pages of advice
        cause = error.__cause__ or error
        reason = (str(cause).strip().splitlines() or [""])[0].rstrip(".")
        raise ZooError(
            f"torch can't trace this {model.method} into a graph ({type(cause).__name__}: {reason}); "
            "zoo predict and from_pretrained use it as it is."
        ) from error
    weights = sum(value.const_value.nbytes for value in program.model.graph.initializers.values())
    program.save(path, external_data=weights > LARGEST)
    found = onnx.load(path, load_external_data=False)
    _strip(found.graph)
    found.ClearField("metadata_props")
    path.write_bytes(found.SerializeToString())


def _strip(graph: Any) -> None:
    """Take away shapes of inner values, and what torch notes of its own: the places of code on this machine, too."""
    graph.ClearField("value_info")
    graph.ClearField("metadata_props")
    for part in (*graph.node, *graph.initializer, *graph.input, *graph.output):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    for inner in (attribute.g for node in graph.node for attribute in node.attribute if attribute.HasField("g")):
        _strip(inner)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch says much while it traces: that is of no use to who exports."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            with contextlib.redirect_stderr(io.StringIO()):
                warnings.simplefilter("ignore")
                yield
    finally:
        logging.disable(level)


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary place, in a folder of its own, for a file and its `.data`; both move when the block succeeds."""
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            temporary = Path(folder) / path.name
            yield temporary
            old, new = (place.with_name(f"{path.name}.data") for place in (path, temporary))
            if new.exists():
                new.replace(old)
            elif path.exists():  # an earlier, larger one's
                old.unlink(missing_ok=True)
            temporary.replace(path)
    except OSError as error:
        raise ZooError(f"{path} could not be written ({error}).") from error


# ---- parity ----------------------------------------------------------------------------------------------------------


def check_images(model: "AnomalyModule") -> "list[Tensor]":
    """Batches (n, 1 or 3, h, w) in [0, 1] on which a graph is held against its model."""
    import torch

    from zoo.data.synthetic import KINDS, render

    height, width = model.size
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 1, height, width), (1, 3, 2 * height + 37, width + 11), (3, 1, height * 5 // 8, width * 7 // 8)]
    if model.calibration and model.calibration.sizes:
        shapes.append((1, 1, *model.calibration.sizes[0]))
    batches = [torch.rand(shape, generator=generator) for shape in shapes]
    drawn = [render(i, seed=10, size=2 * max(model.size), kind=kind)[0] for i, kind in enumerate((None, *KINDS[:2]))]
    return [*batches, torch.stack([torch.from_numpy(image)[None] / 255 for image in drawn])]


def compare(model: "AnomalyModule", path: Path, batches: "Sequence[Tensor]") -> Parity:
    """Hold an ONNX file, run by onnxruntime on the CPU, against `forward` of a model in eval mode.

    Args:
        batches: images (n, 1 or 3, h, w) in [0, 1].

    Raises:
        ZooError: onnxruntime refuses the file or the images.
    """
    import numpy as np
    import onnxruntime
    import torch

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        found = [session.run(["score", "map"], {"images": images.numpy()}) for images in batches]
    except Exception as error:  # onnxruntime's have no common base
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ZooError(f"onnxruntime can't run this graph ({reason}).") from error
    with torch.no_grad():
        expected = [[part.numpy() for part in model(images)] for images in batches]
    differences, largest, errors = [], [], []
    for ours, theirs in zip(zip(*expected, strict=True), zip(*found, strict=True), strict=True):  # scores, then maps
        a, b = (np.concatenate([part.ravel() for part in parts]).astype(np.float64) for parts in (theirs, ours))
        differences.append(float(np.abs(a - b).max()))  # NaN, if any is
        largest.append(float(np.abs(b).max()))
        errors.append(float((np.abs(a - b) / np.maximum(1, np.abs(b))).max()))
    return Parity(sum(map(len, batches)), *differences, *largest, float(np.max(errors)))


# ---- metadata --------------------------------------------------------------------------------------------------------


def describe(model: "AnomalyModule") -> dict[str, str]:
    """What the file says of its model; whatever is more than a word or number is JSON."""
    known = model.calibration
    found: dict[str, Any] = {
        "method": model.method,
        "format": FORMAT,
        "zoo_version": metadata.version("zoo"),
        "input_size": list(model.size),
        "channels": model.channels,
        "input": "images (N, 1 or 3, H, W), float32 in [0, 1]",
        "output": "score (N,) and map (N, 1, H, W), higher is more anomalous; at or above its threshold is anomalous",
        "preprocessing": " ".join(preprocessing(model)),
        "view": {key: value for key, value in asdict(model.view).items() if key not in ("resize", "crop")},
        "opset": OPSET,
        "versions": {name: metadata.version(name) for name in ("torch", *PACKAGES)},
    }
    if known:
        found["calibration"] = {
            "image_threshold": known.image_threshold,
            "pixel_threshold": known.pixel_threshold,
            "min_area": known.min_area,
            "calibrated": known.calibrated and known.precision == "32-true",  # as the graph is
            "false_alarm_rate": known.false_alarm_rate,
            "confidence": known.confidence,
            "sizes": known.sizes,  # (height, width) of the images that the rate holds for
        }
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in found.items()}


def preprocessing(model: "AnomalyModule") -> list[str]:
    """What is to be done to an image before the graph sees it, in sentences."""
    view, said = model.view, []
    if view.info_bar != "none":
        bars = [f"{rows} of {height} x {width}" for height, width, rows in view.bars if rows]
        known = f" ({', '.join(bars)})" if bars else ""
        said.append(f"Cut off the rows of an info bar at the bottom, if there is one{known}.")
    if view.floats:
        said.append("Take float images by their values.")
    else:
        said.append("Divide 8 bit images by 255, 16 bit ones by 65535.")
    if view.low is not None:
        said.append(f"Then (x - {view.low:.9g}) / ({view.high:.9g} - {view.low:.9g}), limited to [0, 1].")
    if view.tile:
        said.append(
            f"The model sees images larger than {view.tile} pixels in overlapping tiles of that side; the graph scores "
            "what it is given as a whole, so give it tiles."
        )
    return said


def _parity_text(parity: Parity) -> str:
    return json.dumps(parity._asdict() | {"tolerance": TOLERANCE, "error_is": "|a - b| / max(1, |b|)"})


def _write_metadata(path: Path, properties: dict[str, str]) -> None:
    """Add properties to a file; weights beside it stay untouched."""
    import onnx

    found = onnx.load(path, load_external_data=False)
    found.producer_name, found.producer_version = "zoo", properties["zoo_version"]
    onnx.helper.set_model_props(found, properties)
    path.write_bytes(found.SerializeToString())


def facts_of(folder: Path) -> dict[str, str]:
    """Metadata of a saved model: its name, and the digest of its weights."""
    return {"name": hub.name_of(folder), "weights_sha256": checkpoint.read_config(folder)["weights_sha256"]}
