"""What a fit will need, told before it starts: measured on a few batches, and reckoned from there."""

import math
import statistics
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import NamedTuple

import torch

from zoo import record
from zoo.data.datamodule import AnomalyDataModule
from zoo.module import AnomalyModule, Batch

PROBED = 4  # batches
MARGIN = 1.05  # of memory: the allocator's waste


class Estimate(NamedTuple):
    """Seconds until the model is kept, held-out images included, and bytes at the peak."""

    seconds: float
    bytes: float

    def __str__(self) -> str:
        s = self.seconds
        duration = f"{s / 3600:.1f} hours" if s > 5400 else f"{s / 60:.0f} min" if s > 120 else f"{max(s, 1):.0f} s"
        return f"about {duration} and {self.bytes / 1e9:.1f} GB of memory"


@torch.no_grad()
def estimate(model: AnomalyModule, module: AnomalyDataModule, device: torch.device, world: int) -> Estimate:
    """Time and peak memory of a fit by statistics; memory is the device's, of the process where that is the CPU.

    Args:
        model: not fitted; it stays so.
        world: processes that share the images.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    model.to(device).num_train_images = module.num_train_images
    each = []  # seconds an image
    for batch, seconds in _timed(module.train_dataloader()):
        begin = time.perf_counter()
        with model.autocast():
            model.probe(batch._replace(image=batch.image.to(device)))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        each.append((seconds + time.perf_counter() - begin) / len(batch.name))
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else record.peak_memory_mb() * 2**20
    tiles = module.num_train_images / max(module.num_images, 1)  # of an image, or 1
    images, scored = module.num_train_images / world, tiles * len(module.holdout_set) / world
    usual = statistics.median(each[1:] or each)  # the first one warms up
    seconds = usual * (images + scored) + model.estimate_seconds(math.ceil(images), math.ceil(scored))
    return Estimate(seconds, MARGIN * (peak + model.estimate_memory(math.ceil(images), world)))


def _timed(loader: Iterable[Batch]) -> Iterator[tuple[Batch, float]]:
    """The first batches, and the seconds that each took to come."""
    begin = time.perf_counter()
    for batch in islice(loader, PROBED):
        yield batch, time.perf_counter() - begin
        begin = time.perf_counter()
