"""Fit a model on normal images and evaluate it: the two runs that write records."""

import contextlib
import logging
import math
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from datasets import DatasetDict
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import SIGTERMException

from zoo import checkpoint, hub, ranks, record
from zoo.calibration import default_calibration
from zoo.callbacks import NotFinite
from zoo.cards import render_card
from zoo.data import DataSpec, check_data, encoded, load_data, load_pairs
from zoo.data.datamodule import AnomalyDataModule
from zoo.data.halves import SEED, part_of_test, validation_half
from zoo.data.terms import terms_of
from zoo.errors import ZooError
from zoo.estimate import Estimate, estimate
from zoo.methods import create_model, method_id, presets, signature
from zoo.metrics import ranking
from zoo.metrics.bootstrap import intervals
from zoo.module import AnomalyModule
from zoo.nn.features import weights_at_hand
from zoo.pairs import apart_from
from zoo.ranks import launched
from zoo.resume import Unfinished, WholeFiles, checkpoint_to_resume
from zoo.run import BATCH, RunOptions, device_of, plan_training
from zoo.training import kept, trained, training

LONG = 10  # batches: a longer fit is announced with the time and memory that it will take
PIXEL_QUANTILE = 0.999
PIXEL_SHIFT = 7  # bits of a pixel's score that its quantiles do without: exact to 2^-16 of the value, in a small table


@dataclass
class DataOptions:
    """Options of the data module that a preset, the command line or a caller may set."""

    batch_size: int = BATCH
    num_workers: int | None = None
    train_fraction: float = 1.0
    resize: int | None = None
    crop: int | None = None
    skip_broken: bool = False


def choose_preset(method: str, preset: str | None, arguments: dict[str, Any]) -> str:
    """The preset to take: as named, else `paper224` if its weights can be had.

    Raises:
        ZooError: none was named and the weights can't be had; it never falls back silently.
    """
    if preset is not None:
        return preset
    model = {name: option.default for name, option in signature(method).items()}
    model |= presets(method, "paper224").get("model", {}) | arguments
    if "backbone" in model and not weights_at_hand(model["backbone"], model["backbone_weights"]):
        raise ZooError(
            f"The ImageNet weights of {model['backbone']} can't be had here; use the built-in small backbone: "
            f"zoo fit {method} --preset lite ..., or give --backbone-weights FILE.safetensors."
        )
    return "paper224"


def fit(
    method: str,
    data: str,
    name: str | None = None,
    preset: str | None = None,
    arguments: dict[str, Any] | None = None,
    data_options: dict[str, Any] | None = None,
    trainer_options: dict[str, Any] | None = None,
    run: RunOptions | None = None,
    resume: bool = False,
    checkpoint_minutes: float = 5.0,
    memory_limit: float | None = None,
    home: Path | None = None,
) -> tuple[AnomalyModule, dict[str, Any]]:
    """Fit a method on the normal training images of a data set.

    Args:
        method: its id.
        data: DATA specification (see `zoo.data`).
        name: keep the model under this name in the local registry.
        preset: section values to start from; None takes `paper224` where its weights can be had.
        arguments: of the method's signature, over the preset's.
        data_options: fields of `DataOptions`, over the preset's.
        trainer_options: fields of `TrainerOptions`, over the preset's; only of methods that learn by gradient.
        resume: go on where an interrupted fit of this name stopped, if there is one; the result is the same.
        checkpoint_minutes: between two checkpoints of a fit under way; 0 writes one after each batch.
        memory_limit: bytes; a fit that needs more, by the estimate, is refused before it starts.
        home: keep the model and the checkpoints in this folder instead of the local registry.

    Returns:
        The fitted model, in eval mode, with default thresholds from held-out normals, and its record.

    Raises:
        ZooError: any mistake in the arguments or the images, in one sentence.
    """
    run, arguments = _first_speaks(run or RunOptions()), arguments or {}
    method = method_id(method)
    place = hub.model_place(name, home) if name is not None else None
    if place is not None:
        checkpoint.check_place(place)
    preset = choose_preset(method, preset, arguments)
    device_of(run.device)
    spec = check_data(data)
    if not spec.counts["train"][0]:
        raise ZooError(f"--data {data} has no normal images to fit on; put some into train/good or good.")
    model = create_model(method, preset, **arguments)
    model.precision = run.precision
    options = DataOptions(**(presets(method, preset).get("data", {}) | (data_options or {})))
    plan = plan_training(method, preset, trainer_options or {})
    model.plan = asdict(plan) if plan else {}
    if plan and plan.accumulate > 1 and not model.automatic_optimization:
        raise ZooError(f"{method} takes several steps of its own on a batch; leave --accumulate out.")
    model.view = {"resize": options.resize, "crop": options.crop}
    by_metric = plan is not None and plan.select not in ("last", "normal")
    module = AnomalyDataModule(
        validation_half(load_data(spec), plan.select) if by_metric else _train_only(spec),
        input_size=model.size,
        seed=model.hparams.seed,
        fingerprint=spec.fingerprint,
        use_defects=model.uses_defects,
        **asdict(options),
    )
    wanted = _takes_pairs(method) and not arguments.get("inpainting_pairs")
    own = wanted and _give_pairs(model, spec, module, run)
    needs = _announce(model, module, run, memory_limit)
    callbacks: list[L.Callback] = []
    limits = {"max_epochs": 1}
    if plan is not None:
        limits, callbacks = training(plan, module, run)
    path = unfinished = None
    if name is not None:
        unfinished = Unfinished(hub.unfinished_place(name, home), checkpoint_minutes, run.say)
        path = checkpoint_to_resume(unfinished.path, resume, run)
        callbacks.append(unfinished)
    start = time.perf_counter()
    with _quiet(), _ended("fit", "; the same command with --resume goes on" if name else ""):
        trainer = _trainer(run, callbacks, **limits)
        try:
            trainer.fit(model, datamodule=module, ckpt_path=path, weights_only=True)
        except NotFinite as error:
            raise kept(error, model, place and unfinished.path.with_name("last-good")) from None
    model.eval()
    own_seconds = time.perf_counter() - start
    seconds = {"fit": round(own_seconds + (unfinished.spent if unfinished else 0.0), 2)}
    start = time.perf_counter()
    heldout = calibrate_on_heldout(model, module, trainer.strategy.root_device)
    seconds["held_out"] = round(time.perf_counter() - start, 2)
    defects = module.num_defects if model.uses_defects else 0
    result = {
        "method": method,
        "configuration": {"preset": preset, "model": model.kept_arguments(), "data": asdict(options)},
        "seed": model.hparams.seed,
        "precision": run.precision,
        "train_data": _described(spec)
        | {"images": module.num_train_images - defects, "defects": defects}
        | {"held_out": len(heldout), "broken": len(module.broken)}
        | model.further_sources()
        | ({"pairs_of": spec.name} if own else {}),
        "seconds": seconds,
        "peak_memory_mb": record.peak_memory_mb(),
        **record.peak_device_memory(trainer.strategy.root_device),
        "processes": trainer.world_size,
        **record.environment(trainer.strategy.root_device),
    }
    if needs is not None:
        result["estimate"] = {"seconds": round(needs.seconds, 1), "memory_mb": round(needs.bytes / 2**20, 1)}
    if path is not None:
        result["resumed"] = True  # the seconds are those of all processes, up to the checkpoints that were gone on from
    private = {"heldout.csv": checkpoint.csv_text(["image", "score"], heldout)}
    if plan is not None:
        result["configuration"]["trainer"] = asdict(plan)
        result["training"] = trained(trainer, module, own_seconds)
        if by_metric:
            model.selection = {
                "metric": plan.select,
                "fingerprint": spec.origin,
                "seed": SEED,
                "test": spec.counts["test"],
            }
            names = module.test_set.with_format(None)["path"]
            private["selection.csv"] = checkpoint.csv_text(["image"], [[name] for name in names])
    if module.broken:
        private["broken.csv"] = checkpoint.csv_text(["image", "reason"], module.broken)
    _say_broken(module, run)
    if place is not None and trainer.is_global_zero:
        model.save_pretrained(place, result, private)
        unfinished.discard()
    return model, result


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
        data_options: fields of `DataOptions`.
        bootstrap: how often the test images are drawn anew, for `intervals` of the metrics (`zoo.metrics.bootstrap`).
        part: of the test split: `val`, `held_out` (halves) or `full`; None takes what a selection has not seen.

    Returns:
        The record with `metrics`, `test_data`, `eval_size`; per-image scores are in `model.scored`.

    Raises:
        ZooError: no test images, or only one class among them.
    """
    run = _first_speaks(run or RunOptions(precision=model.precision))
    spec, result = check_data(data), {k: v for k, v in (result or {}).items() if k not in ("protocol", "readings")}
    if not sum(spec.counts["test"]):
        raise ZooError(f"--data {data} has no test images; add test/good and test/<kind>, or bad beside good.")
    if not all(spec.counts["test"]):
        missing = "normal" if not spec.counts["test"][0] else "anomalous"
        raise ZooError(f"--data {data} has no {missing} test images; metrics need both classes.")
    options = DataOptions(**(model.view | (data_options or {})))
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
    module = AnomalyDataModule(split, input_size=model.size, **asdict(options))
    start = time.perf_counter()
    with _quiet(), _ended("evaluation"):
        trainer = _trainer(run)
        others = _by_other_scores(model, trainer, module)
        model.tables = [] if bootstrap else None
        (metrics,) = trainer.test(model, datamodule=module, verbose=False)
        if trainer.received_sigterm:  # in its last batch, after which Lightning doesn't look
            raise SIGTERMException
    anomalous = sum(label for _, label, _ in model.scored)
    _say_broken(module, run)
    ends = _intervals(model, metrics, bootstrap) if bootstrap else {}
    result = {key: value for key, value in result.items() if key != "intervals"}  # of an evaluation before
    return result | {
        "method": model.method,
        "metrics": {key: round(value, 6) for key, value in metrics.items()},
        **ends,
        **({"score": model.hparams.score, "other_scores": others} if others else {}),
        "test_data": _described(spec)
        | {"normal": len(model.scored) - anomalous, "anomalous": anomalous, "broken": len(module.broken)}
        | ({"half": "the half that the selection did not see"} if half else {})
        | ({"part": part} if part else {})
        | ({"seen": "the weights were chosen on other data, which may share images"} if seen else {}),
        "eval_size": [side, side] if (side := options.crop or options.resize) else "native",
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
    write_scores(folder / "private" / "scores.csv", model)
    checkpoint.write_text(folder / checkpoint.CARD, render_card(model.config(), result))
    checkpoint.write_text(folder / checkpoint.RECORD, checkpoint.dump(result))


@torch.inference_mode()
def calibrate_on_heldout(
    model: AnomalyModule, module: AnomalyDataModule, device: torch.device
) -> list[tuple[str, float]]:
    """Give a model the default thresholds of held-out normals; returns their names and scores (none: no threshold)."""
    model.to(device)
    heldout: list[tuple[str, float]] = []
    tables, shift = [torch.zeros(0, 4, dtype=torch.int64, device=device)], PIXEL_SHIFT
    for groups in module.holdout_dataloader():
        for part in groups:
            with model.autocast():
                scores = model(part.image.to(device))
            heldout += zip(part.name, scores.image.tolist(), strict=True)
            tables, shift = ranking.add(tables, shift, scores.map, torch.zeros_like(scores.map, dtype=torch.bool))
    heldout = ranks.gather_list(heldout)
    if heldout:
        parts = ranks.gather((torch.cat(tables).cpu(), shift))
        table, _ = ranking.merge(torch.cat([rows for rows, _ in parts]), max(shift for _, shift in parts))
        median, high = _quantiles(table, (0.5, PIXEL_QUANTILE))
        model.calibration = default_calibration([score for _, score in heldout], high, median)
    return heldout


def _quantiles(table: torch.Tensor, shares: Sequence[float]) -> list[float]:
    """Smallest scores that at least these shares of a rank table's negatives don't exceed."""
    below = table[:, 1].cumsum(0)  # (n,)
    ranks = torch.tensor([math.ceil(share * int(below[-1])) for share in shares], device=table.device)
    return [ranking.key_score(key) for key in table[torch.searchsorted(below, ranks), 0].tolist()]


def _train_only(spec: DataSpec) -> DatasetDict:
    """The data set with the test split empty: it is neither opened nor checked."""
    data = load_data(spec)
    return DatasetDict(train=data["train"], test=data["test"].select([]))


def _say_broken(module: AnomalyDataModule, run: RunOptions) -> None:
    for name, reason in module.broken:
        run.say(f"Left out {name}: {reason}")


def _takes_pairs(method: str) -> bool:
    return "inpainting_pairs" in signature(method)


def _give_pairs(model: AnomalyModule, spec: DataSpec, module: AnomalyDataModule, run: RunOptions) -> bool:
    """Let a model learn from the pairs of its data set, those left out whose clean image is held out."""
    found = load_pairs(spec)
    model.pairs = apart_from(found, encoded(spec, module.holdout_set)) if found else []
    if model.pairs:
        apart = len(found) - len(model.pairs)
        more = f"; {apart:,} more are left out, whose clean images are held out" if apart else ""
        run.say(f"What to paint over is learned from {len(model.pairs):,} pairs of {spec.name}{more}.")
    elif found or spec.kind in ("store", "parquet", "hub"):
        run.say(f"This copy of {spec.name} has no pairs to learn from at hand: corruptions are made instead.")
    return bool(model.pairs)


def _described(spec: DataSpec) -> dict[str, Any]:
    terms = terms_of(spec.name)
    return {"name": spec.name, "fingerprint": spec.fingerprint} | ({"terms": terms} if terms else {})


def _announce(
    model: AnomalyModule, module: AnomalyDataModule, run: RunOptions, memory_limit: float | None
) -> Estimate | None:
    """Say what is about to be done, and what it will need where that is worth asking.

    Raises:
        ZooError: more memory than the limit.
    """
    rank, world, _ = launched()
    world = world if world > 1 else run.devices
    images, held = module.num_train_images, len(module.holdout_set) or "none"
    defects = module.num_defects if model.uses_defects else 0
    images -= defects
    about = f"Fitting {model.method} on {images} normal image{'s' * (images != 1)} ({held} held out)"
    if model.uses_defects and not defects:
        raise ZooError(
            "--supervised true needs labelled defects in train/<kind>, with masks in train_masks/<kind> or none."
        )
    if defects:
        about += f" and {defects} labelled defects"
    elif module.num_defects and not rank:
        cure = "; --supervised true learns from them" if "supervised" in model.hparams else ""
        run.say(f"Only normal images are learned from: {module.num_defects} labelled defects are left out{cure}.")
    long = images >= LONG * module.batch_size
    if memory_limit and model.learns_by_gradient:
        raise ZooError("--memory-limit can't be reckoned for a method that learns by gradient; leave it out.")
    if rank or model.learns_by_gradient or not (long or memory_limit):
        run.say(f"{about}.")
        return None
    least = model.estimate_memory(math.ceil(images / world), world)  # known without a look at a batch
    needs = estimate(model, module, device_of(run.device), world) if least <= (memory_limit or math.inf) else None
    if memory_limit and (needs is None or needs.bytes > memory_limit):
        need = f"at least {least / 1e9:.1f} GB"
        if needs:
            need = f"about {needs.bytes / 1e9:.1f} GB ({(needs.bytes - least) / 1e9:.1f} for libraries and a batch)"
        limit = f"--memory-limit {memory_limit / 1e9:.3g}GB"
        raise ZooError(f"This fit needs {need}, more than {limit}; lower --batch-size{model.memory_options}.")
    run.say(f"{about}: {needs}.")
    return needs


def _first_speaks(run: RunOptions) -> RunOptions:
    """Of several processes only the first one tells and shows progress."""
    return replace(run, progress=False, say=RunOptions.say) if launched()[0] else run


def _trainer(run: RunOptions, callbacks: Sequence[L.Callback] = (), **options: Any) -> L.Trainer:
    device = device_of(run.device)
    _, world, local = launched()
    count = local if world > 1 else run.devices
    one_of_many = device.type == "cuda" and count == 1
    return L.Trainer(
        accelerator="gpu" if device.type == "cuda" else device.type,
        devices=[device.index or 0] if one_of_many else count,
        num_nodes=max(world // local, 1),
        strategy=DDPStrategy(timeout=ranks.PATIENCE) if max(world, count) > 1 else "auto",
        plugins=[WholeFiles(), *([SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else [])],
        precision=run.precision,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=run.progress,
        callbacks=[*callbacks, *([TQDMProgressBar(leave=True)] if run.progress else [])],
        num_sanity_val_steps=0,
        **options,
    )


@contextlib.contextmanager
def _ended(what: str, hint: str = "") -> Iterator[None]:
    """What Lightning makes of signals -> an interrupt, or one sentence."""
    try:
        yield
    except SIGTERMException as error:
        raise ZooError(f"The {what} was asked to end{hint}.") from error
    except torch.OutOfMemoryError as error:
        raise ZooError("The device's memory is full; lower --batch-size.") from error
    except SystemExit as error:
        raise KeyboardInterrupt from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without Lightning's advice, which is meant for its developers."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
