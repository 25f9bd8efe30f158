"""The plan of a fit by gradient: how many steps, which of them is kept, and what the record says of it."""

import math
from pathlib import Path
from typing import Any

import lightning as L

from zoo.callbacks import PARTS, Finite, KeepBest, Losses, LowerRates, MaxSteps, NotFinite
from zoo.data.datamodule import AnomalyDataModule
from zoo.errors import ZooError
from zoo.module import AnomalyModule
from zoo.ranks import launched
from zoo.run import RunOptions, TrainerOptions


def training(
    plan: TrainerOptions, module: AnomalyDataModule, run: RunOptions
) -> tuple[dict[str, Any], list[L.Callback]]:
    """Options of the Trainer, and what watches the fit."""
    rank, world, _ = launched()
    world = world if world > 1 else run.devices
    batches = math.ceil(module.num_train_images / (module.batch_size * world))
    in_epoch = math.ceil(batches / plan.accumulate)
    epochs = math.ceil(plan.max_steps / in_epoch) if plan.max_steps else plan.max_epochs
    steps = plan.max_steps or epochs * in_epoch
    callbacks = [MaxSteps(steps), Finite(steps), Losses(steps, RunOptions.say if run.progress or rank else run.say)]
    if plan.select != "last":
        if plan.select == "normal" and not len(module.holdout_set):
            raise ZooError("--select normal needs held-out normal images; give more normals, or take --select last.")
        seen = module.holdout_dataloader if plan.select == "normal" else module.test_dataloader
        callbacks.append(KeepBest(plan.select, seen, max(1, steps // PARTS), run.say, plan.patience))
    if plan.lr_scale != 1:
        callbacks.append(LowerRates(plan.lr_scale))
    return {"max_epochs": epochs, "accumulate_grad_batches": plan.accumulate}, callbacks


def trained(trainer: L.Trainer, module: AnomalyDataModule, seconds: float) -> dict[str, Any]:
    """What the record says of a training."""
    (losses,) = [callback for callback in trainer.callbacks if isinstance(callback, Losses)]
    best = [callback for callback in trainer.callbacks if isinstance(callback, KeepBest)]
    steps = trainer.lightning_module.steps_taken
    about = {
        "steps": steps,
        "epochs": round(steps / math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches), 2),
        "images_a_step": min(
            module.batch_size * trainer.accumulate_grad_batches * trainer.world_size, module.num_train_images
        ),
        "steps_per_second": round((steps - losses.resumed_at) / max(seconds, 1e-9), 3),
        "losses": losses.history,
    }
    for keeper in best:
        images = len(module.holdout_set if keeper.rule == "normal" else module.test_set)
        about["selection"] = {"rule": keeper.rule, "step": keeper.step, "value": keeper.value, "images": images}
        about["selection"] |= {"of": keeper.of} if keeper.rule == "normal" else {}
    return about


def kept(error: NotFinite, model: AnomalyModule, place: Path | None) -> ZooError:
    """The error, with where the last good state is kept."""
    if place is None:
        return error
    if not launched()[0]:
        model.cpu().save_pretrained(place)
    return ZooError(f"{error}; the model of step {error.step} is kept in {place}")
