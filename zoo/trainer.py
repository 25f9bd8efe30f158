"""The Lightning Trainer of a run, and how a run ends and what it says."""

import contextlib
import logging
import math
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import SIGTERMException

from zoo import ranks
from zoo.data.datamodule import AnomalyDataModule
from zoo.errors import ZooError
from zoo.nn.fast import fast_mode
from zoo.ranks import launched
from zoo.resume import WholeFiles
from zoo.run import RunOptions, device_of


def first_speaks(run: RunOptions) -> RunOptions:
    """Of several processes only the first one tells and shows progress."""
    return replace(run, progress=False, say=RunOptions.say) if launched()[0] else run


class Bar(TQDMProgressBar):
    """Shows the losses of a step once a second: for each of them the host waits until the device has it."""

    def __init__(self) -> None:
        super().__init__(leave=True)
        self.read, self.shown = -math.inf, {}  # when, and what

    def get_metrics(self, trainer: L.Trainer, module: L.LightningModule) -> dict[str, Any]:
        if (now := time.monotonic()) >= self.read + 1:
            self.read, self.shown = now, {name: float(value) for name, value in module.told.items()}
        return super().get_metrics(trainer, module) | self.shown


class FastPrecision(Precision):
    """Steps of all kinds run in the fast mode."""

    precision = "fast"

    def __init__(self, device: torch.device):
        self.device = device

    def forward_context(self) -> contextlib.AbstractContextManager[None]:
        return fast_mode(self.device)


def make_trainer(run: RunOptions, callbacks: Sequence[L.Callback] = (), **options: Any) -> L.Trainer:
    device = device_of(run.device)
    _, world, local = launched()
    count = local if world > 1 else run.devices
    fast = [FastPrecision(device)] if run.precision == "fast" else []
    one_of_many = device.type == "cuda" and count == 1
    return L.Trainer(
        accelerator="gpu" if device.type == "cuda" else device.type,
        devices=[device.index or 0] if one_of_many else count,
        num_nodes=max(world // local, 1),
        strategy=DDPStrategy(timeout=ranks.PATIENCE) if max(world, count) > 1 else "auto",
        plugins=[WholeFiles(), *fast, *([SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else [])],
        precision=None if fast else run.precision,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=run.progress,
        callbacks=[*callbacks, *([Bar()] if run.progress else [])],
        num_sanity_val_steps=0,
        **options,
    )


@contextlib.contextmanager
def ending(what: str, hint: str = "") -> Iterator[None]:
    """What Lightning makes of signals -> an interrupt, or one sentence."""
    try:
        yield
    except SIGTERMException as error:
        raise ZooError(f"The {what} was asked to end{hint}.") from error
    except torch.OutOfMemoryError as error:
        raise ZooError("The device's memory is full; lower --batch-size.") from error
    except MemoryError as error:
        raise ZooError("Memory is full; lower --batch-size, or see large images in tiles.") from error
    except SystemExit as error:
        raise KeyboardInterrupt from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
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


def say_broken(module: AnomalyDataModule, run: RunOptions) -> None:
    for name, reason in module.broken:
        run.say(f"Left out {name}: {reason}")
