"""Evaluate a model: score the test split, and keep record, card and per-image scores."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities.exceptions import SIGTERMException

from zoo import checkpoint, record
from zoo.cards import render_card
from zoo.data import DataSpec, check_data, load_data, load_ignore
from zoo.data.datamodule import AnomalyDataModule
from zoo.data.halves import SEED, part_of_test
from zoo.data.terms import terms_of
from zoo.errors import ZooError
from zoo.metrics.bootstrap import intervals
from zoo.module import AnomalyModule
from zoo.run import DataOptions, RunOptions
from zoo.trainer import ending, first_speaks, make_trainer, quiet, say_broken


def evaluate(
    model: AnomalyModule,
    data: str,
    result: dict[str, Any] | None = None,
    data_options: dict[str, Any] | None = None,
    run: RunOptions | None = None,
    bootstrap: int = 0,
    part: str | None = None,
) -> dict[str, Any]:
    """Score the test split at the images' own size.

    Args:
        model: fitted.
        data: DATA specification.
        result: the fit's record, which the figures are added to.
        data_options: fields of `DataOptions`; `resize`, with `crop` or none, replaces those of the fit.
        bootstrap: how often the test images are drawn anew, for `intervals` of the metrics (`zoo.metrics.bootstrap`).
        part: of the test split: `val`, `held_out` (halves) or `full`; None takes what a selection has not seen.

    Returns:
        The record with `metrics`, `test_data`, `eval_size`; per-image scores are in `model.scored`.

    Raises:
        ZooError: no test images, or only one class among them.
    """
    run = first_speaks(run or RunOptions(precision=model.precision))
    spec, result = check_data(data), {k: v for k, v in (result or {}).items() if k not in ("protocol", "readings")}
    if not sum(spec.counts["test"]):
        raise ZooError(f"--data {data} has no test images; add test/good and test/<kind>, or bad beside good.")
    if not all(spec.counts["test"]):
        missing = "normal" if not spec.counts["test"][0] else "anomalous"
        raise ZooError(f"--data {data} has no {missing} test images; metrics need both classes.")
    options, given = DataOptions(**(data_options or {})), data_options or {}
    resized = given.get("resize") is not None
    chosen = model.selection is not None and model.selection["fingerprint"] == spec.origin
    if chosen and model.selection.get("test", spec.counts["test"]) != spec.counts["test"]:
        here, then = sum(spec.counts["test"]), sum(model.selection["test"])
        raise ZooError(
            f"--data {data} has {here} test images, where half of {then} chose this model's step: another half; "
            "evaluate it on the images that it was fitted on."
        )
    half = chosen and part in (None, "held_out")
    seed = model.selection["seed"] if chosen else SEED
    split = part_of_test(load_data(spec), part or ("held_out" if half else "full"), seed)
    seen = model.selection is not None and not chosen
    if half and part is None:
        run.say(
            f"{model.selection['metric']} on one half of these test images chose the step; scored is the other half."
        )
    elif seen:
        run.say("The step was chosen on test images of other data; where the two share images, figures are too good.")
    ignore = load_ignore(spec, options.ignore, run.say)
    start = time.perf_counter()
    with quiet(), ending("evaluation"), model.seen_in_tiles(0 if resized else options.tile):
        tile, view = model.view.tile, model.view
        if resized:
            view = replace(view, resize=given["resize"], crop=given.get("crop"))
        module = AnomalyDataModule(split, input_size=model.size, view=view, ignore=ignore, **options.loading())
        trainer = make_trainer(run)
        others = _by_other_scores(model, trainer, module)
        model.tables = [] if bootstrap else None
        (metrics,) = trainer.test(model, datamodule=module, verbose=False)
        if trainer.received_sigterm:  # in its last batch, after which Lightning doesn't look
            raise SIGTERMException
    anomalous = sum(label for _, label, _ in model.scored)
    say_broken(module, run)
    if unmarked := len(model.unmarked):
        run.say(f"{unmarked} of {anomalous} anomalous images have no defect pixel in their masks as they are scored.")
    ends = _intervals(model, metrics, bootstrap) if bootstrap else {}
    result = {key: value for key, value in result.items() if key not in ("intervals", "tile")}  # of one before
    return result | {
        "method": model.method,
        "metrics": {key: round(value, 6) for key, value in metrics.items()},
        **ends,
        **({"score": model.hparams.score, "other_scores": others} if others else {}),
        "test_data": described(spec)
        | {"normal": len(model.scored) - anomalous, "anomalous": anomalous, "broken": len(module.broken)}
        | ({"unmarked": unmarked} if unmarked else {})
        | ({"half": "the half that the selection did not see"} if half else {})
        | ({"part": part} if part else {})
        | ({"ignored": "what ignore masks cover"} if ignore else {})
        | ({"seen": "the weights were chosen on other data, which may share images"} if seen else {}),
        "eval_size": [side, side] if (side := view.crop or view.resize) else "native",
        **({"tile": tile} if tile else {}),
        "evaluation": {
            "seconds": round(time.perf_counter() - start, 2),
            "peak_memory_mb": record.peak_memory_mb(),
            "precision": run.precision,
            **record.environment(trainer.strategy.root_device),
        },
    }


def _intervals(model: AnomalyModule, metrics: dict[str, float], replicates: int) -> dict[str, Any]:
    """Of the last test, for the record."""
    tables, model.tables = model.tables, None
    _, labels, scores = zip(*model.scored, strict=True)
    found = intervals(labels, scores, tables if "pixel_auroc" in metrics else None, replicates)
    about = {"level": 0.95, "draws": replicates, "seed": 0, "drawn": "images, class by class, with replacement"}
    return {"intervals": about | {"metrics": {key: [round(end, 6) for end in found[key]] for key in metrics}}}


def _by_other_scores(
    model: AnomalyModule, trainer: L.Trainer, module: AnomalyDataModule
) -> dict[str, dict[str, float]]:
    """Image metrics by those scores of a method that its argument `score` has not chosen."""
    found = {}
    for form in model.score_forms:
        chosen = model.hparams.score
        if form == chosen:
            continue
        model.hparams.score = form
        try:
            (metrics,) = trainer.test(model, datamodule=module, verbose=False)
        finally:
            model.hparams.score = chosen
        found[form] = {key: round(value, 6) for key, value in metrics.items() if key.startswith("image")}
    return found


def write_scores(path: Path, model: AnomalyModule) -> None:
    """The per-image scores of the last evaluation: image, label (1 anomalous), score; a file .csv or .parquet.

    Raises:
        ZooError: it can't be written.
    """
    columns = ["image", "label", "score"]
    if path.suffix == ".csv":
        checkpoint.write_text(path, checkpoint.csv_text(columns, model.scored))
        return
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.table(dict(zip(columns, map(list, zip(*model.scored, strict=True)), strict=True)))
    temporary = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(table, temporary)
        temporary.replace(path)
    except OSError as error:
        raise ZooError(f"{path} could not be written ({error}).") from error


def store_evaluation(folder: Path, model: AnomalyModule, result: dict[str, Any]) -> None:
    """Put an evaluation's record, card and per-image scores into the model's folder."""
    model.record = result
    write_scores(folder / "private" / "scores.csv", model)
    checkpoint.write_text(folder / checkpoint.CARD, render_card(model.config(), result))
    checkpoint.write_text(folder / checkpoint.RECORD, checkpoint.dump(result))


def described(spec: DataSpec) -> dict[str, Any]:
    """What a record says of a data set; nothing of its place on this machine."""
    terms = terms_of(spec.name)
    return {
        "name": spec.name,
        "fingerprint": spec.fingerprint,
        **({"origin": spec.origin} if spec.origin != spec.fingerprint else {}),
        **({"hub": f"{spec.options['repo']}@{spec.options['revision']}"} if spec.kind == "hub" else {}),
        **({"terms": terms} if terms else {}),
    }
