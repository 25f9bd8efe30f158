"""Batches in an order that resumes in the middle of an epoch and never repeats an image across processes."""

import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from zoo.ranks import rank_and_world


def _ahead(batches: Iterable[Any]) -> Iterator[Any]:
    """The same batches, each made in a thread while the one before is in use: decoding lets others run meanwhile."""
    with ThreadPoolExecutor(1) as thread:  # one that is closed early waits for the batch under way
        coming = iter(batches)
        batch = thread.submit(next, coming, None)
        while (made := batch.result()) is not None:
            batch = thread.submit(next, coming, None)
            yield made


class EpochLoader:
    """Batches of this process, in an order that (seed, epoch) determines; iterates like a DataLoader.

    Over all processes every image comes exactly once, and each process gets the same number of batches, as equal in
    size as can be (where there are fewer images than processes, a batch may be empty). `state_dict` counts the batches
    that were handed out, so that a resumed run goes on with the next image.

    Args:
        dataset: rows -> items for `collate`; one that has `order(rng)` says how it is shuffled.
        batch_size: images a batch at most, in each process.
        collate: list of items -> batch.
        seed: shuffles; None keeps the order.
        num_workers: processes that decode; with none, a thread does.
    """

    batch_sampler = None  # Lightning asks a loader with a `sampler` for it

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        collate: Callable[[list[Any]], Any],
        seed: int | None = None,
        num_workers: int = 0,
    ):
        self.dataset, self.batch_size, self.collate = dataset, batch_size, collate
        self.seed, self.num_workers = seed, num_workers
        self.epoch = self.taken = self.start = 0  # batches taken so far, and where the next iteration starts

    @property
    def sampler(self) -> "EpochLoader":
        """Where Lightning looks for `set_epoch`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            self.epoch, self.taken, self.start = epoch, 0, 0

    def batches(self) -> list[np.ndarray]:
        """Indices of the images in each batch of this process's share of the epoch."""
        order = np.arange(len(self.dataset))
        if self.seed is not None:
            rng = np.random.default_rng([self.seed, self.epoch])
            order = self.dataset.order(rng) if hasattr(self.dataset, "order") else rng.permutation(len(order))
        rank, world = rank_and_world()
        return np.array_split(order[rank::world], len(self))

    def __len__(self) -> int:
        """Batches in an epoch, whatever was taken already."""
        return max(1, math.ceil(len(self.dataset) / (self.batch_size * rank_and_world()[1])))

    def __iter__(self) -> Iterator[Any]:
        self.taken, self.start = self.start, 0
        loader = DataLoader(
            self.dataset,
            batch_sampler=[batch.tolist() for batch in self.batches()[self.taken :]],
            num_workers=self.num_workers,
            collate_fn=self.collate,
            pin_memory=torch.cuda.is_available(),
        )
        for batch in loader if self.num_workers else _ahead(loader):
            self.taken += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "taken": self.taken}

    def load_state_dict(self, state: dict[str, int]) -> None:
        epochs, self.start = divmod(state["taken"], len(self))  # a whole epoch: the next one begins
        self.epoch, self.taken = state["epoch"] + epochs, self.start
