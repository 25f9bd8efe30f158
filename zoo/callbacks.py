"""What watches a fit by gradient: it ends in time, stays finite, tells its losses and keeps its best weights."""

import math
import time
from collections.abc import Callable, Iterable
from typing import Any

import lightning as L
import torch
from torch import Tensor

from zoo import ranks
from zoo.errors import ZooError
from zoo.learning import LOOK
from zoo.metrics import AnomalyMetrics
from zoo.module import AnomalyModule, Batch

PARTS = 10  # reports, and measurements for the selection, in a whole fit
PATIENCE = 60.0  # seconds after which a slower fit reports


class MaxSteps(L.Callback):
    """Ends a fit after so many optimiser steps, wherever in an epoch; Lightning's own limit can't resume at its end."""

    def __init__(self, steps: int):
        self.steps = steps

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        trainer.should_stop = module.steps_taken >= self.steps

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        trainer.should_stop = trainer.should_stop or module.steps_taken >= self.steps


class LowerRates(L.Callback):
    """Scales the learning rates of all optimisers, before the first step and before a checkpoint restores them."""

    def __init__(self, scale: float):
        self.scale = scale

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        for group in (group for optimizer in trainer.optimizers for group in optimizer.param_groups):
            for key in {"lr", "initial_lr"} & group.keys():
                group[key] *= self.scale
        for config in trainer.lr_scheduler_configs:
            config.scheduler.base_lrs = [rate * self.scale for rate in config.scheduler.base_lrs]


class NotFinite(ZooError):
    """A loss or gradient that is not a number; the module holds its last good state, that of `step`."""

    def __init__(self, text: str, step: int):
        super().__init__(text)
        self.step = step


class Finite(L.Callback):
    """Stops a fit after a loss or gradient that is not finite, and gives the module its last good state.

    It looks in every tenth step, at the end of each tenth of the fit, and before weights are measured or kept. What was
    learned since the last look is lost then, as before: the weights may have been ruined already. Good are those that
    `KeepBest` likes best, if there are any; else those at the end of the tenth of the fit with the lowest loss (of the
    last one, where several optimisers play a game), once they have given finite losses; else the first ones.

    Args:
        steps: optimiser steps of the whole fit.
    """

    def __init__(self, steps: int):
        self.every = max(1, steps // PARTS)
        self.lowest, self.losses = math.inf, []  # mean of the best tenth, and the losses of this one
        self.good: tuple[int, dict[str, Tensor]] | None = None  # step and state
        self.next, self.end = self.good, 0  # the one to be proven by a finite loss, and the step that ends this tenth
        self.told: list[tuple[int, str, Tensor]] = []  # since the last look: step, "loss" or "gradient", and its value
        self.looked = 0  # step of the last look

    def on_train_batch_start(self, trainer: L.Trainer, module: AnomalyModule, *_: Any) -> None:
        if self.good is None:
            self.good = self.next = (module.steps_taken, _learned_state(module))
            self.end, self.looked = module.steps_taken + self.every, module.steps_taken

    def on_before_backward(self, trainer: L.Trainer, module: AnomalyModule, loss: Tensor) -> None:
        self.told.append((module.steps_taken, "loss", loss.detach().float()))

    def on_before_optimizer_step(self, trainer: L.Trainer, module: AnomalyModule, optimizer: Any) -> None:
        if trainer.precision == "16-mixed":  # its scaler looks for itself, and skips such steps
            return
        squares = [p.grad.float().square().sum() for p in module.learned_parameters() if p.grad is not None]
        self.told.append((module.steps_taken, "gradient", torch.stack(squares).sum()))

    def on_train_batch_end(self, trainer: L.Trainer, module: AnomalyModule, *_: Any) -> None:
        if module.steps_taken < min(self.end, self.looked + LOOK):
            return
        self.look(trainer, module)
        if module.steps_taken < self.end:
            return
        mean = sum(self.losses) / len(self.losses)
        if mean <= self.lowest or not module.automatic_optimization:
            self.lowest, self.next = mean, (module.steps_taken, _learned_state(module))
        self.losses, self.end = [], module.steps_taken + self.every

    def on_train_end(self, trainer: L.Trainer, module: AnomalyModule) -> None:
        self.look(trainer, module)

    def on_save_checkpoint(self, trainer: L.Trainer, module: AnomalyModule, checkpoint: dict[str, Any]) -> None:
        self.look(trainer, module)

    def look(self, trainer: L.Trainer, module: AnomalyModule) -> None:
        """Stop the fit unless all that was told since the last look is finite."""
        told, self.told, self.looked = self.told, [], module.steps_taken
        if not told:
            return
        values = torch.stack([value for *_, value in told]).tolist()
        own = next((i for i, value in enumerate(values) if not math.isfinite(value)), len(told))
        first = min(ranks.gather(own))  # one answer for all processes, which have told the same in the same order
        # One finite loss proves the state before it; where there are several in a step, all of one step do.
        if first == len(told) or first and (module.automatic_optimization or told[first][0] > told[0][0]):
            self.good = self.next
        if first < len(told):
            step, what, _ = told[first]
            where = " in another process" * (own > first)
            self._stop(trainer, module, f"The {what} is not finite{where} at step {step + 1}")
        self.losses += [value for (_, what, _), value in zip(told, values, strict=True) if what == "loss"]

    def _stop(self, trainer: L.Trainer, module: AnomalyModule, what: str) -> None:
        best = [(keeper.step, keeper.state) for keeper in trainer.callbacks if isinstance(keeper, KeepBest)]
        step, state = best[0] if best and best[0][1] else self.good
        module.load_state_dict(state, strict=False)
        rates = [f"--{name.replace('_', '-')}" for name in module.hparams if name.split("_")[-1] == "lr"]
        cure = f"lower {' or '.join(rates) or 'the learning rate'}"
        if trainer.precision != "32-true":
            cure += ", or fit with --precision 32-true"
        raise NotFinite(f"{what}; {cure}", step)


def _learned_state(module: AnomalyModule) -> dict[str, Tensor]:
    """What training changes, copied to main memory."""
    learned = {k: v for k, v in module.state_dict().items() if not k.startswith("features.")}
    return {name: tensor.to("cpu", copy=True) for name, tensor in learned.items()}


@torch.no_grad()
def exchange(module: AnomalyModule, state: dict[str, Tensor]) -> None:
    """Give a module these weights and the dict the module's, one by one: no second copy of all is ever held."""
    own = module.state_dict()
    for name, tensor in state.items():
        state[name] = own[name].to("cpu", copy=True)
        own[name].copy_(tensor)


class Losses(L.Callback):
    """Tells the mean loss of this tenth of the fit, its parts and the speed, ten times a fit and each minute.

    Args:
        steps: optimiser steps of the whole fit.
        say: told a line.

    Attributes:
        history: for the record, a tenth of the fit each: {"step": ..., "loss": ..., "loss_<part>": ...}, and
            what else the method tells, each as the mean over the steps that told it.
        resumed_at: step at which this process began.
    """

    def __init__(self, steps: int, say: Callable[[str], None]):
        self.steps, self.say = steps, say
        self.history: list[dict[str, float]] = []
        self.sums: dict[str, Tensor] = {}  # over the batches of this tenth, so far
        self.counts: dict[str, int] = {}
        self.tenth = 0

    def on_train_start(self, trainer: L.Trainer, module: AnomalyModule) -> None:
        self.resumed_at = module.steps_taken
        self._start(module)

    def _start(self, module: AnomalyModule) -> None:
        self.first, self.begin = module.steps_taken, time.monotonic()

    def on_train_batch_end(self, trainer: L.Trainer, module: AnomalyModule, *_: Any) -> None:
        for name, value in module.told.items():
            self.sums[name] = self.sums.get(name, 0) + value  # on the device: the host waits when it reports
            self.counts[name] = self.counts.get(name, 0) + 1
        step, seconds = module.steps_taken, time.monotonic() - self.begin
        tenth = step * PARTS // self.steps
        if not (tenth > self.tenth or seconds > PATIENCE) or not self.sums:
            return
        means = {name: float(value) / self.counts[name] for name, value in self.sums.items()}
        if tenth > self.tenth:
            self.history.append({"step": step, **{name: float(f"{mean:.6g}") for name, mean in means.items()}})
            self.sums, self.counts, self.tenth = {}, {}, tenth
        parts = ", ".join(f"{name.removeprefix('loss_')} {mean:.4g}" for name, mean in means.items() if name != "loss")
        speed = (step - self.first) / seconds
        left = f", {_duration((self.steps - step) / speed)} left" if step < self.steps and speed else ""
        phase = f"{module.phases[int(module.phase)]} " if module.phases else ""
        loss = f"{phase}loss {means['loss']:.4g}" + (f" ({parts})" if parts else "")
        self.say(f"Step {step} of {self.steps}: {loss}, {speed:.3g} steps/s{left}.")
        self._start(module)

    def state_dict(self) -> dict[str, Any]:
        return {key: getattr(self, key) for key in ("history", "sums", "counts", "tenth")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


class KeepBest(L.Callback):
    """Keeps the weights of the step that a rule likes best, and gives them to the model when the fit ends.

    The model then holds those of its last step as `last_weights`, in main memory, if that is another one.
    Of a method with phases, only steps of the last one are looked at.

    Args:
        rule: "normal": the lowest mean of the map over held-out normal images (the rule of STFPM's original); or the
            highest of a metric of `AnomalyMetrics` on labelled images.
        batches: gives these images, each process its share.
        every: steps between two measurements.
        say: told a line.
        patience: measurements in a row that are no better than the best, after which the fit ends; None: it goes on.
            A fit that may end early is one of a fitted model, whose weights are measured too, as those of step 0.

    Attributes:
        step, value: of the best, so far.
    """

    def __init__(
        self,
        rule: str,
        batches: Callable[[], Iterable[list[Batch]]],
        every: int,
        say: Callable[[str], None],
        patience: int | None = None,
    ):
        self.rule, self.batches, self.every, self.say, self.patience = rule, batches, every, say, patience
        self.step, self.value, self.last, self.worse, self.of = 0, math.nan, 0, 0, ""
        self.state: dict[str, Tensor] = {}

    def on_train_batch_start(self, trainer: L.Trainer, module: AnomalyModule, *_: Any) -> None:
        if self.patience and not module.steps_taken and not self.state:
            self._measure(trainer, module)

    def on_train_batch_end(self, trainer: L.Trainer, module: AnomalyModule, *_: Any) -> None:
        if module.steps_taken >= self.last + self.every:
            self._measure(trainer, module)
            if self.patience and self.worse >= self.patience:
                trainer.should_stop = True

    def on_train_end(self, trainer: L.Trainer, module: AnomalyModule) -> None:
        if module.steps_taken > self.last:
            self._measure(trainer, module)

    def on_fit_end(self, trainer: L.Trainer, module: AnomalyModule) -> None:  # also where a resume had nothing left
        if not self.state:  # the last phase was never reached
            return
        if self.step < module.steps_taken:
            exchange(module, self.state)
            module.last_weights = self.state
        self.state = {}
        early = f" The fit ended at step {module.steps_taken}." if self.patience and self.worse >= self.patience else ""
        before = " (the weights that it began with)" if self.patience and not self.step else ""
        self.say(f"Kept step {self.step}{before}: {self._name()} {self.value:.4g}.{early}")

    def _name(self) -> str:
        return f"{self.of} of held-out normals" if self.rule == "normal" else self.rule

    @torch.no_grad()
    def _measure(self, trainer: L.Trainer, module: AnomalyModule) -> None:
        for watch in trainer.callbacks:
            if isinstance(watch, Finite):
                watch.look(trainer, module)
        self.last, self.of = module.steps_taken, module.surprises_by
        if module.phases and int(module.phase) < len(module.phases) - 1:
            return
        module.eval()
        module.share_statistics()
        with trainer.precision_plugin.forward_context():
            value = (_surprise if self.rule == "normal" else self._metric)(module, self.batches())
        module.train()
        if not self.state or (value < self.value if self.rule == "normal" else value > self.value):
            self.step, self.value, self.worse = module.steps_taken, value, 0
            self.state = _learned_state(module)
        else:
            self.worse += 1

    def _metric(self, module: AnomalyModule, batches: Iterable[list[Batch]]) -> float:
        metrics = AnomalyMetrics().to(module.device)
        for part in (part for parts in batches for part in parts):
            part = part.to(module.device)
            scores = module.score_images(part.image, part.roi)
            metrics.update(scores.image, scores.map, part.label, part.mask, part.roi)
        found = metrics.compute()
        if self.rule not in found:
            raise ZooError(f"--select {self.rule} can't be measured on this data, only {', '.join(found)}; add masks.")
        return found[self.rule]

    def state_dict(self) -> dict[str, Any]:
        return {key: getattr(self, key) for key in ("step", "value", "last", "worse", "of", "state")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


def _surprise(module: AnomalyModule, batches: Iterable[list[Batch]]) -> float:
    sums = torch.zeros(2, dtype=torch.float64, device=module.device)  # of the pixels, and their number
    for part in (part for parts in batches for part in parts):
        total, number = module.surprise(part.to(module.device))
        sums[0] += total
        sums[1] += number
    total, count = torch.stack(ranks.gather(sums.cpu())).sum(0).tolist()
    return total / count


def _duration(seconds: float) -> str:
    if seconds > 5400:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.0f} min" if seconds > 90 else f"{seconds:.0f} s"
