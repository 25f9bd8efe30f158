"""Learning under Lightning: by gradient as Lightning knows it, and by one pass that gathers statistics.

What Lightning lacks lives here: modules without gradients on several processes, merging what these have gathered,
passes that resume in the middle, and randomness that is a function of (seed, epoch, step, process).
"""

import copy
import math
from importlib import metadata
from typing import Any, ClassVar, NamedTuple

import lightning as L
import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from zoo import checkpoint, ranks
from zoo.errors import ZooError
from zoo.nn.fast import forget_twins

LOOK = 10  # steps from one look at what may go wrong to the next: the host waits for a GPU to tell


class Batch(NamedTuple):
    """Images (B, 1 or 3, H, W) float in [0, 1], their names and, where known, labels (B,), masks and regions of
    interest (B, 1, H, W) bool."""

    image: Tensor
    name: list[str]
    label: Tensor | None = None
    mask: Tensor | None = None
    roi: Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        return Batch(*move_data_to_device(tuple(self), device))


class LearningModule(L.LightningModule):
    """A LightningModule that may learn from `observe(batch)` for each batch of a pass, and `finish()` at its end.

    Attributes:
        num_train_images: set before the first `observe`.
        precision: Lightning's, as the fit was asked for.
        continues: whether a fit goes on from what was learned before, statistics included.
        parent_share: weight of these statistics among those of the fit, in (0, 1); None: one of an image for each.
        stands_for: images (or tiles) that the statistics stand for, of methods that add them up.
    """

    memory_options: ClassVar[str] = ""  # options that lower the memory of a fit, as they end a sentence
    uses_defects: bool = False  # whether a fit is given labelled defects beside the normal images
    phases: ClassVar[tuple[str, ...]] = ()  # names, of a method that learns in several, one after the other

    def __init__(self) -> None:
        super().__init__()
        if self.phases:
            self.register_buffer("phase", torch.zeros((), dtype=torch.long))  # index, of the last step taken
        self.phase_now = 0  # the same during a fit, where nobody has to wait for the device to tell it
        self.num_train_images = 0
        self.observed, self.pass_length = 0, 0  # batches of an unfinished pass, and of a whole one
        self.plan: dict[str, Any] = {}  # of a training that `fit` runs; a resume must have the same one
        self.precision = "32-true"
        self.told: dict[str, Tensor] = {}  # what the present step has logged
        self.last_weights: dict[str, Tensor] = {}  # those of the last step, where another one was kept
        self.continues, self.parent_share = False, None
        self.stands_for: float | None = None

    def train(self, mode: bool = True) -> "LearningModule":
        if mode:
            forget_twins(self)  # a fused optimiser changes weights without torch counting it
        return super().train(mode)

    @property
    def learns_statistics(self) -> bool:
        """Whether it gathers statistics that may be gone on with."""
        return hasattr(self, "observe")

    @property
    def learns_by_gradient(self) -> bool:
        return any(parameter.requires_grad for parameter in self.parameters())

    def training_step(self, batch: Batch, index: int) -> Tensor | None:
        with torch.no_grad():
            if batch.name:  # more processes than images
                self.observe(batch)
        self.observed += 1
        if self.observed == self.pass_length:  # before Lightning validates
            self._finish_pass()
        # One process may return nothing; Lightning refuses that of several, and then gets a loss of no parameter.
        return None if self.trainer.world_size == 1 else torch.zeros((), device=self.device, requires_grad=True)

    def learned_parameters(self) -> list[torch.nn.Parameter]:
        """What an optimiser gets: frozen parts are left out."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    @property
    def steps_taken(self) -> int:
        """Steps of the fit so far: of its optimiser, or batches, for each of which several optimisers take theirs."""
        if self.automatic_optimization:
            return self.trainer.global_step
        return self.trainer.fit_loop.epoch_loop.batch_progress.total.processed

    @property
    def steps_planned(self) -> int:
        """Steps of the whole fit; known once it has begun, for Lightning would load the images to tell."""
        steps = self.plan.get("max_steps") or self.trainer.estimated_stepping_batches
        if steps == math.inf:
            raise ZooError("A method with phases needs to know its end; give the Trainer max_epochs or max_steps.")
        return int(steps)

    def with_milestones(self, optimizer: torch.optim.Optimizer, shares: list[float], factor: float) -> dict[str, Any]:
        """An optimiser whose rates fall by a factor after shares of the fit.

        They fall after whole epochs, or after steps where these are what is planned.
        """
        interval, planned = "step", self.plan.get("max_steps")
        if not planned and (self.trainer.max_epochs or 0) > 0:
            interval, planned = "epoch", self.trainer.max_epochs
        planned = planned or self.trainer.max_steps
        milestones = [round(share * planned) for share in shares]
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": interval}}

    def phase_at(self, step: int) -> int:
        """Index of the phase that a step of the fit belongs to; a method with phases says it."""
        return 0

    def descend(self, optimizer: Any, loss: Tensor) -> None:
        """A step of one of several optimisers; its loss was made within `optimizer.toggle_model()`."""
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()

    def total_loss(self, **parts: Tensor) -> Tensor:
        """Sum of the parts of a loss (scalars), which are logged beside it; what a `training_step` returns."""
        loss = torch.stack(list(parts.values())).sum()
        named = {f"loss_{name}": part for name, part in parts.items()} if len(parts) > 1 else {}
        self.tell(loss=loss, **named)
        return loss

    def tell(self, **values: Tensor) -> None:
        """Log scalars of a training step: `fit` reports and records them."""
        self.told |= {name: value.detach() for name, value in values.items()}
        if self._trainer is not None:  # not for Lightning's bar, for which each value is waited for at once
            self.log_dict({name: self.told[name] for name in values})

    def configure_optimizers(self) -> Any:
        return None

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        if self.learns_by_gradient:
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        else:
            optimizer_closure()

    def setup(self, stage: str) -> None:
        if stage != "fit":
            return
        self.forget()
        self.observed = 0
        strategy = self.trainer.strategy
        vars(strategy).pop("configure_ddp", None)
        if isinstance(strategy, DDPStrategy) and not self.learns_by_gradient:
            strategy.configure_ddp = lambda: None  # there is nothing to reduce, and torch's wrapper refuses
        if isinstance(strategy, DDPStrategy) and not self.automatic_optimization:
            strategy._ddp_kwargs["find_unused_parameters"] = True  # a backward pass reaches one optimiser's alone

    def on_fit_start(self) -> None:
        if len(set(ranks.gather(self.observed))) > 1:
            raise ZooError("Not all processes found the checkpoint; give them one $ZOO_HOME on a shared disk.")
        if self.observed:  # resumed: a checkpoint is read into main memory
            self.load_fit_state(move_data_to_device(self.fit_state(), self.device))

    def on_train_start(self) -> None:
        self.num_train_images = len(self.trainer.train_dataloader.dataset)
        self.pass_length = self.trainer.num_training_batches
        self.phase_now = int(self.phase) if self.phases else 0
        if self.phases and self.phase_at(self.steps_planned - 1) < len(self.phases) - 1:
            raise ZooError(
                f"{self.steps_planned} steps leave none for the phase {self.phases[-1]}; "
                "take more of them, or give the others a smaller share."
            )
        if self.learns_by_gradient:
            if self.num_train_images // self.trainer.world_size < self.pass_length:  # a batch would be empty
                raise ZooError("There are too few images for so many processes; take fewer of them, or larger batches.")
            self._recall()
            learned = all(b.numel() for b in self.buffers(recurse=False))
            if hasattr(self, "observe") and (not learned or (self.continues and not self.steps_taken)):
                self._first_pass()
            self.train()
        elif not self.observed:
            self._recall()

    def _recall(self) -> None:
        """Begin a fit that goes on from another one with the statistics of that; one process has them."""
        if self.continues and self.learns_statistics and not self.steps_taken and not ranks.rank_and_world()[0]:
            with torch.no_grad():
                self.recall(self.parent_share)

    def _first_pass(self) -> None:
        """Gather statistics with the untrained network, before the first step of its training."""
        self.eval()
        loader = copy.copy(self.trainer.train_dataloader)  # its own count of what was handed out
        with torch.no_grad(), self.trainer.precision_plugin.forward_context():
            for batch in loader:
                self.observe(batch.to(self.device))
        self._finish_pass()

    def on_train_batch_start(self, batch: Batch, index: int) -> None:
        """Whatever a step draws from torch's generators is a function of (seed, epoch, step, process)."""
        key = np.random.SeedSequence([self.hparams.seed, self.current_epoch, index, self.global_rank])
        torch.manual_seed(int(key.generate_state(1, np.uint64)[0] >> 1))
        self.told = {}
        if self.phases and (phase := self.phase_at(self.steps_taken)) != self.phase_now:
            self.share_statistics()  # what is frozen from here on is the same everywhere
            self.phase_now = phase
            self.phase.fill_(phase)
            self.train()  # each phase has its own frozen parts

    def on_train_epoch_end(self) -> None:
        if self.observed:  # the pass was cut short, by max_steps or a callback
            self._finish_pass()

        self.share_statistics()

    def on_fit_end(self) -> None:
        if self.observed:  # resumed where nothing was left to do
            self._finish_pass()

    def share_statistics(self) -> None:
        """Give all processes the first one's BatchNorm statistics; their weights are equal anyway."""
        if self.learns_by_gradient and ranks.rank_and_world()[1] > 1:
            for buffer in self.buffers():
                if buffer.numel():
                    torch.distributed.broadcast(buffer, 0)

    def _finish_pass(self) -> None:
        """Merge what all processes have gathered, learn from it in the first one, and give the result to all."""
        rank, world = ranks.rank_and_world()
        with torch.no_grad():
            if rank == 0:
                for source in range(1, world):
                    self.merge_fit_state(ranks.receive(source, self.device))
                self.finish()
                learned = {name: getattr(self, name) for name in checkpoint.learned_buffers(self)}
                for other in range(1, world):
                    ranks.send((learned, self.private_state()), other)
            else:
                ranks.send(self.fit_state(), 0)
                self.forget()
                learned, private = ranks.receive(0, self.device)
                for name, buffer in learned.items():
                    setattr(self, name, buffer)
                self.load_private_state(private)
        self.observed = 0

    def fit_state(self) -> dict[str, Any]:
        """What `observe` has gathered so far: tensors and plain values for a Lightning checkpoint, not for a model."""
        return {}

    def load_fit_state(self, state: dict[str, Any]) -> None:
        """Take up what `fit_state` gave."""

    def merge_fit_state(self, state: dict[str, Any]) -> None:
        """Add what `fit_state` gave in another process, which saw other images; the last step before `finish`."""

    def forget(self) -> None:
        """Drop what `observe` has gathered; what was learned before stays."""

    def recall(self, share: float | None = None) -> None:
        """Gather what was learned before, as if `observe` had just seen it; the reverse of `finish`.

        Args:
            share: its weight among all that will be observed, `num_train_images` more; None: as many images as it was.

        Raises:
            ZooError: a method that has `observe` and not this.
        """
        raise ZooError(f"{self.method} can't go on from what it has learned: its class has no `recall`; fit it anew.")

    def images_before(self, share: float | None) -> float:
        """Images that statistics of before count as, for `recall`.

        Raises:
            ZooError: it is not known how many they are of.
        """
        if share is not None:
            return self.num_train_images * share / (1 - share)
        if self.stands_for is None:
            text = f"It isn't recorded how many images this {self.method} learned from"
            raise ZooError(f"{text}; fine-tune it with --parent-share 0.5.")
        return self.stands_for

    def on_save_checkpoint(self, ckpt: dict[str, Any]) -> None:
        rank, world = ranks.rank_and_world()
        state = self.fit_state()
        if rank:
            ranks.send(state, 0)
        others = (ranks.receive(source, self.device) for source in range(1, world) if not rank)
        ckpt["fit_state"] = [state, *(move_data_to_device(other, "cpu") for other in others)]
        ckpt["observed"], ckpt["precision"], ckpt["private"] = self.observed, self.precision, self.private_state()
        ckpt["plan"], ckpt["zoo_version"], ckpt["stands_for"] = self.plan, metadata.version("zoo"), self.stands_for

    def on_load_checkpoint(self, ckpt: dict[str, Any]) -> None:
        self.load_private_state(ckpt["private"])
        self.stands_for = ckpt.get("stands_for")
        if self._trainer is None or self.trainer.state.fn != "fit":
            return
        progress = ckpt["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        now = progress["current"]
        accumulating = now["processed"] % self.trainer.accumulate_grad_batches and not progress["is_last_batch"]
        if now["started"] != now["processed"] or (accumulating and self.learns_by_gradient):
            raise ZooError("This checkpoint was taken in the middle of a step; resume from the one before it.")
        if progress["is_last_batch"] and self.trainer.max_steps != -1:  # there Lightning 2.6 takes one batch too many
            raise ZooError("This checkpoint ends an epoch, where a fit by max_steps doesn't resume; give max_epochs.")
        before = ckpt["hyper_parameters"] | {"precision": ckpt["precision"]} | ckpt["plan"]
        now = self.hparams | {"precision": self.precision} | self.plan
        changed = [key for key, value in before.items() if now.get(key) != value]
        if changed:
            raise ZooError(f"This checkpoint belongs to another configuration ({changed[0]} differs); start anew.")
        rank, world = ranks.rank_and_world()
        if len(ckpt["fit_state"]) != world:
            before = len(ckpt["fit_state"])
            raise ZooError(f"This checkpoint was taken by {before} processes and goes on with as many, not {world}.")
        self.load_fit_state(ckpt["fit_state"][rank])
        self.observed = ckpt["observed"]

    # ---- what stays with the owner, and what a fit will need ---------------------------------------------------------

    def private_state(self) -> dict[str, Any]:
        """JSON values that stay with the owner (image names): saved under `private/`, never published."""
        return {}

    def load_private_state(self, state: dict[str, Any]) -> None:
        """Take up what `private_state` gave."""

    def probe(self, batch: Batch) -> None:
        """The part of `observe` that costs the same for each batch: it is timed before a fit."""
        self.observe(batch)

    def estimate_memory(self, num_images: int, world: int = 1) -> int:
        """Bytes that a fit on so many images, in each of so many processes, holds beside the network and one batch.

        The peak of the first process, which merges.
        """
        return 0

    def estimate_seconds(self, num_images: int, scored: int) -> float:
        """Seconds that a fit on so many images, and scoring others, takes beside the network, on this device."""
        return 0.0
