"""What a fit does, whatever model it begins with: learn, set default thresholds, keep model and record."""

import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
from datasets import DatasetDict

from zoo import checkpoint, hub, record, seen
from zoo.calibrate import calibrate_on_heldout
from zoo.callbacks import NotFinite
from zoo.data import DataSpec, encoded, load_data, load_ignore, load_pairs, located, store
from zoo.data.datamodule import AnomalyDataModule
from zoo.data.halves import SEED, validation_half
from zoo.errors import ZooError
from zoo.estimate import Estimate, estimate
from zoo.evaluation import described
from zoo.methods import signature
from zoo.module import AnomalyModule
from zoo.pairs import apart_from
from zoo.parent import DATA, Parent
from zoo.ranks import launched
from zoo.resume import Unfinished, checkpoint_to_resume
from zoo.run import DataOptions, RunOptions, TrainerOptions, device_of
from zoo.trainer import ending, make_trainer, quiet, say_broken
from zoo.training import kept, trained, training
from zoo.view import View

HELD_OUT_RULES = ("last", "normal")  # of a selection that looks at no test image
LONG = 10  # batches: a longer fit is announced with the time and memory that it will take


@dataclass
class Keeping:
    """Where a model and the checkpoints of its fit are kept; whether an unfinished fit is gone on with (see `fit`)."""

    name: str | None = None
    home: Path | None = None
    resume: bool = False
    minutes: float = 5.0
    unfinished: Unfinished | None = None  # once the fit has begun

    @property
    def place(self) -> Path | None:
        return None if self.name is None else hub.model_place(self.name, self.home)

    def begin(self, run: RunOptions) -> Unfinished:
        self.unfinished = Unfinished(hub.unfinished_place(self.name, self.home), self.minutes, run.say)
        return self.unfinished


def learn(
    model: AnomalyModule,
    data: str,
    spec: DataSpec,
    options: DataOptions,
    plan: TrainerOptions | None,
    run: RunOptions,
    keeping: Keeping,
    memory_limit: float | None = None,
    parent: Parent | None = None,
) -> tuple[AnomalyModule, dict[str, Any]]:
    """Let a model learn from the normal training images of a data set, give it default thresholds, and keep it.

    Args:
        model: new, or that of `parent`.
        data, spec: DATA as it was given, and checked.
        plan: of a training by gradient.
        memory_limit: bytes; a fit that needs more, by the estimate, is refused.
        parent: what the model was before, if it is to go on from there.

    Returns, raises: as `fit`.
    """
    if not spec.counts["train"][0]:
        raise ZooError(f"--data {data} has no normal images to fit on; put some into train/good or good.")
    model.plan = (plan.kept() if plan else {}) | (parent.plan() if parent else {})
    if plan and plan.accumulate > 1 and not model.automatic_optimization:
        raise ZooError(f"{model.method} takes several steps of its own on a batch; leave --accumulate out.")
    module = _module_of(model, spec, options, plan, run, parent)
    wanted = _takes_pairs(model.method) and not model.hparams.inpainting_pairs
    own = wanted and _give_pairs(model, spec, module, run)
    needs = _announce(model, module, run, memory_limit)
    trainer, seconds, resumed = _run(model, module, plan, run, keeping)
    start = time.perf_counter()
    heldout = calibrate_on_heldout(model, module, trainer.strategy.root_device)
    spent = {"fit": round(sum(seconds), 2), "held_out": round(time.perf_counter() - start, 2)}
    result = {
        "method": model.method,
        "configuration": {"preset": model.preset, "model": model.kept_arguments(), "data": options.kept()},
        **({"parent": parent.described(), "ancestors": parent.ancestors()} if parent else {}),
        "seed": model.hparams.seed,
        "precision": run.precision,
        "train_data": _learned_from(model, module, spec, len(heldout)) | ({"pairs_of": spec.name} if own else {}),
        "seconds": spent,
        "peak_memory_mb": record.peak_memory_mb(),
        **record.peak_device_memory(trainer.strategy.root_device),
        "processes": trainer.world_size,
        **record.environment(trainer.strategy.root_device),
    }
    if needs is not None:
        result["estimate"] = {"seconds": round(needs.seconds, 1), "memory_mb": round(needs.bytes / 2**20, 1)}
    if resumed:
        result["resumed"] = True  # the seconds are those of all processes, up to the checkpoints that were gone on from
    private = {"heldout.csv": checkpoint.csv_text(["image", "score"], heldout)}
    if plan is not None:
        result["configuration"]["trainer"] = plan.kept()
        result["training"] = trained(trainer, module, seconds[0])
        if plan.select not in HELD_OUT_RULES:
            chosen = {"metric": plan.select, "fingerprint": spec.origin, "seed": SEED}
            model.selection = chosen | {"test": spec.counts["test"]}
            names = module.test_set.with_format(None)["path"]
            private["selection.csv"] = checkpoint.csv_text(["image"], [[name] for name in names])
    if module.broken:
        private["broken.csv"] = checkpoint.csv_text(["image", "reason"], module.broken)
    say_broken(module, run)
    model.record = result
    if keeping.place is not None:
        start = time.perf_counter()
        private |= _notes(model, module, data, plan, parent, run)
        spent["seen"] = round(time.perf_counter() - start, 2)
        if trainer.is_global_zero:
            model.folder = model.save_pretrained(keeping.place, private=private)
            keeping.unfinished.discard()
    return model, result


def _module_of(
    model: AnomalyModule,
    spec: DataSpec,
    options: DataOptions,
    plan: TrainerOptions | None,
    run: RunOptions,
    parent: Parent | None,
) -> AnomalyDataModule:
    """The images that a model learns from, as it sees them, which it takes up."""
    by_metric = plan is not None and plan.select not in HELD_OUT_RULES
    found = validation_half(load_data(spec), plan.select) if by_metric else _train_only(spec)
    module = AnomalyDataModule(
        parent.unseen(found, run) if parent else found,
        input_size=model.size,
        seed=model.hparams.seed,
        fingerprint=spec.fingerprint,
        use_defects=model.uses_defects,
        view=model.view if parent else View(options.resize, options.crop, tile=options.tile),
        ignore=load_ignore(spec, options.ignore, run.say),
        **options.loading(),
    )
    model.view = _of_originals(module.look(options.info_bar, options.intensity), spec)
    _say_view(model.view, run)
    return module


def _run(
    model: AnomalyModule, module: AnomalyDataModule, plan: TrainerOptions | None, run: RunOptions, keeping: Keeping
) -> tuple[L.Trainer, tuple[float, float], bool]:
    """Learn; the Trainer, the seconds that this process and earlier ones took, and whether it went on from those."""
    callbacks: list[L.Callback] = []
    limits, path, unfinished = {"max_epochs": 1}, None, None
    if plan is not None:
        limits, callbacks = training(plan, module, run)
    if keeping.name is not None:
        unfinished = keeping.begin(run)
        path = checkpoint_to_resume(unfinished.path, keeping.resume, run)
        callbacks.append(unfinished)
    start = time.perf_counter()
    with quiet(), ending("fit", "; the same command with --resume goes on" if unfinished else ""):
        trainer = make_trainer(run, callbacks, **limits)
        try:
            trainer.fit(model, datamodule=module, ckpt_path=path, weights_only=True)
        except NotFinite as error:
            if unfinished is not None and trainer.is_global_zero:
                unfinished.path.unlink(missing_ok=True)  # going on from there would end here again
            raise kept(error, model, unfinished and unfinished.path.with_name("last-good")) from None
    model.eval()
    return trainer, (time.perf_counter() - start, unfinished.spent if unfinished else 0.0), path is not None


def _learned_from(model: AnomalyModule, module: AnomalyDataModule, spec: DataSpec, held_out: int) -> dict[str, Any]:
    defects = module.num_defects if model.uses_defects else 0
    about = described(spec) | {"images": module.num_images - defects, "defects": defects}
    about |= {"tiles": module.num_train_images} if module.view.tile else {}
    return about | {"held_out": held_out, "broken": len(module.broken)} | model.further_sources()


def _notes(
    model: AnomalyModule,
    module: AnomalyDataModule,
    data: str,
    plan: TrainerOptions | None,
    parent: Parent | None,
    run: RunOptions,
) -> dict[str, str]:
    """Private files: where the images are, and which of them have been seen."""
    images = seen.note(module, plan.select if plan else None, getattr(model, "pairs", []), run.progress)
    return {DATA: f"{located(data)}\n", seen.FILE: images} | (parent.private(images) if parent else {})


def _of_originals(view: View, spec: DataSpec) -> View:
    """The view for images as they are predicted: of a prepared set, for those that it was made from."""
    if spec.kind != "store" or view.info_bar == "none":
        return view
    source = store.read_index(spec.path)["source"]
    kept = source.get("info_bar") == "none"  # the store has the bars in it
    return replace(view, info_bar="none", bars=()) if kept else view.with_bars(source.get("bars", ()))


def _say_view(view: View, run: RunOptions) -> None:
    view.say_bars(run.say)
    if view.low is not None:
        unit = "" if view.floats else " of the full scale"
        run.say(f"Black is {view.low:.4g} and white {view.high:.4g}{unit}, from percentiles of the training images.")
        if not view.floats and view.low <= 0 and view.high >= 1:
            run.say("That is the full scale: text of an info bar, or clipped pixels, may be among them.")


def _train_only(spec: DataSpec) -> DatasetDict:
    """The data set with the test split empty: it is neither opened nor checked."""
    data = load_data(spec)
    return DatasetDict(train=data["train"], test=data["test"].select([]))


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


def _announce(
    model: AnomalyModule, module: AnomalyDataModule, run: RunOptions, memory_limit: float | None
) -> Estimate | None:
    """Say what is about to be done, and what it will need where that is worth asking.

    Raises:
        ZooError: more memory than the limit.
    """
    rank, world, _ = launched()
    world = world if world > 1 else run.devices
    images, held = module.num_images, len(module.holdout_set) or "none"
    defects = module.num_defects if model.uses_defects else 0
    images -= defects
    verb = "Continuing" if model.continues else "Fitting"
    about = f"{verb} {model.method} on {images} normal image{'s' * (images != 1)} ({held} held out)"
    if module.view.tile:
        about += f" in {module.num_train_images:,} tiles"
    if model.uses_defects and not defects:
        raise ZooError(
            "--supervised true needs labelled defects in train/<kind>, with masks in train_masks/<kind> or none."
        )
    if defects:
        about += f" and {defects} labelled defects"
    elif module.num_defects and not rank:
        cure = "; --supervised true learns from them" if "supervised" in model.hparams else ""
        run.say(f"Only normal images are learned from: {module.num_defects} labelled defects are left out{cure}.")
    long = module.num_train_images >= LONG * module.batch_size
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
