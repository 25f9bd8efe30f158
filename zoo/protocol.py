"""Two ways to read a test set: the house protocol, on halves that are never the same, and the paper's, at 224 pixels.

The house protocol splits the test images once into stratified halves with a published seed (`zoo.data.halves`). One
half, `val`, may choose a training step and a threshold; the figures that count are those of the other, `held_out`.
Beside them stand the whole test set, which other papers report and half of which has had its say in the choice, and
the weights of the last step, which nothing has chosen. The paper's protocol (2505.07576, as far as it says) is one
reading: image and thresholded mask at 224 x 224, the mask by nearest, on the whole test set.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from zoo.callbacks import exchange
from zoo.checkpoint import read_last
from zoo.data import check_data
from zoo.data.halves import SEED
from zoo.errors import ZooError
from zoo.evaluation import evaluate
from zoo.metrics import AnomalyMetrics
from zoo.module import AnomalyModule
from zoo.run import RunOptions, device_of

PAPER_SIZE = 224
COUNTS = ("normal", "anomalous", "unmarked")


def evaluate_by(
    protocol: str,
    model: AnomalyModule,
    data: str,
    result: dict[str, Any] | None = None,
    data_options: dict[str, Any] | None = None,
    run: RunOptions | None = None,
    bootstrap: int = 0,
) -> dict[str, Any]:
    """Score the test split by a protocol.

    Args:
        protocol: `house` or `paper`.
        model: fitted; its `last_weights` are read too, in the house protocol.
        data: DATA specification.
        result: the fit's record, which the figures are added to.
        data_options: fields of `zoo.run.DataOptions`.
        bootstrap: draws of the test images of the part that counts, for intervals of its metrics; see `evaluate`.

    Returns:
        The record of `zoo.evaluation.evaluate` on the part that counts (`held_out`; `full` for the paper), with
        `protocol` and `readings`: by name `about` (what they are, in words), `normal`, `anomalous` and `metrics`, those
        that go by names of their own (`zoo.naming.FURTHER`) included.

    Raises:
        ZooError: as `evaluate`; test images too few for two halves.
    """
    run = run or RunOptions(precision=model.precision)
    score = partial(_score, model, data, dict(result or {}), run)
    if protocol == "paper":
        full = score(dict(data_options or {}) | {"resize": PAPER_SIZE, "crop": None}, "full", bootstrap)
        about = f"full test set at {PAPER_SIZE} x {PAPER_SIZE}"
        about += ", half of which chose the step: too good" if _chosen_here(model, data) else ""
        return full.record | {"protocol": {"name": "paper"}, "readings": {"full": _reading(about, full, {})}}
    return _house(model, data, partial(score, dict(data_options or {})), bootstrap)


def load_last_weights(model: AnomalyModule, folder: Path) -> None:
    """Give a model that was loaded from a folder the weights of the last step, where the folder keeps them.

    Raises:
        ZooError: they can't be read, or are those of another model.
    """
    last, own = read_last(folder), model.state_dict()
    if any(name not in own or own[name].shape != value.shape for name, value in last.items()):
        raise ZooError(f"The last weights in {folder} are not those of its model; fit the model anew.")
    model.last_weights = last


class _Scored(NamedTuple):
    """A part of the test split that was scored."""

    metrics: AnomalyMetrics
    record: dict[str, Any]
    counts: dict[str, int]  # normal, anomalous, unmarked: of these those without a defect pixel in their masks


def _score(
    model: AnomalyModule,
    data: str,
    result: dict[str, Any],
    run: RunOptions,
    options: dict[str, Any],
    part: str,
    bootstrap: int = 0,
) -> _Scored:
    model.metrics = AnomalyMetrics()
    record = evaluate(model, data, result, options, run, bootstrap, part)
    metrics = model.metrics.to(device_of(run.device))  # where processes can meet; a Trainer leaves it on the CPU
    return _Scored(metrics, record, {key: record["test_data"].get(key, 0) for key in COUNTS})


def _reading(about: str, part: _Scored, thresholds: dict[str, float]) -> dict[str, Any]:
    metrics = part.metrics.compute() | part.metrics.further(thresholds)
    return {"about": about, **part.counts, "metrics": {key: round(value, 6) for key, value in metrics.items()}}


def _house(model: AnomalyModule, data: str, score: Callable[..., _Scored], bootstrap: int) -> dict[str, Any]:
    """The record of the held-out half with all readings; the model's `scored` are those of that half."""
    val = score("val")
    thresholds = val.metrics.thresholds()
    last = None
    if model.last_weights:
        exchange(model, model.last_weights)
        try:
            last = score("held_out")
        finally:
            exchange(model, model.last_weights)
    held_out = score("held_out", bootstrap)
    val.metrics.merge_state(held_out.metrics)
    full = _Scored(val.metrics, held_out.record, {k: val.counts[k] + n for k, n in held_out.counts.items()})
    chosen = _chosen_here(model, data)
    readings = {
        "held_out": _reading("held-out half", held_out, thresholds),
        "full": _reading("full test set" + ", half of which chose the step: too good" * chosen, full, thresholds),
    }
    if last or _kept_is_last(held_out.record):
        # Thresholds of the kept step's scores mean nothing to these.
        readings["last"] = _reading("last step's weights, held-out half", last or held_out, {})
    protocol = {"name": "house", "halves_seed": SEED, "val_thresholds": thresholds, "val": val.counts}
    return held_out.record | {"protocol": protocol, "readings": readings}


def _chosen_here(model: AnomalyModule, data: str) -> bool:
    """Whether a metric on the validation half of this data has chosen the step that is kept."""
    return model.selection is not None and model.selection["fingerprint"] == check_data(data).origin


def _kept_is_last(record: dict[str, Any]) -> bool:
    """Whether a method that takes steps was left at its last one."""
    training = record.get("training")
    return bool(training) and training.get("selection", {}).get("step", training["steps"]) == training["steps"]
