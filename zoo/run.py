"""Where and how a run computes, and how long it trains."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from zoo.errors import ZooError
from zoo.methods import presets
from zoo.naming import METRICS
from zoo.ranks import launched

if TYPE_CHECKING:  # imported on use
    import torch

BATCH = 32  # images a batch, where no preset says otherwise
# Of fine-tuning: steps, share of the learning rates, tenths of the steps without progress after which it ends, and
# weight of what the parent has gathered.
STEPS, LR_SCALE, PATIENCE, SHARE = 200, 0.3, 3, 0.5


@dataclass
class RunOptions:
    """Device (`auto`, `cpu`, `cuda`, `cuda:N`), how many of them, Lightning's precision, a progress bar, who is told.

    Under torchrun or srun the launcher says how many devices there are.
    """

    device: str = "auto"
    devices: int = 1
    precision: str = "32-true"
    progress: bool = False
    say: Callable[[str], None] = lambda line: None


@dataclass
class DataOptions:
    """Options of the data module that a preset, the command line or a caller may set.

    `resize`, `crop`, `info_bar`, `intensity` and `tile` make the `View` of a fit. A fitted model has its own, of which
    an evaluation may set another `resize` and `crop` ("paper" protocol) or `tile` (0: whole images). `ignore` is a
    mask, or a folder of masks, of what is not looked at.
    """

    batch_size: int = BATCH
    num_workers: int | None = None
    train_fraction: float = 1.0
    hold_out: int | None = None
    resize: int | None = None
    crop: int | None = None
    skip_broken: bool = False
    info_bar: str = "auto"
    intensity: str = "full"
    tile: int | None = None
    ignore: str | None = None

    def kept(self) -> dict[str, Any]:
        """As a record keeps them, without a place of this machine."""
        return asdict(self) | {"ignore": None if self.ignore is None else "masks"}

    def loading(self) -> dict[str, Any]:
        """Those that the data module takes as they are."""
        names = ("batch_size", "num_workers", "train_fraction", "hold_out", "skip_broken")
        return {key: getattr(self, key) for key in names}


def device_of(name: str) -> "torch.device":
    """The device that a name stands for; `auto` is the accelerator where there is one, for each process its own.

    Raises:
        ZooError: a device that this machine doesn't have.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"  # no float64 on mps, which distances need
    kind, _, index = name.partition(":")
    count = torch.cuda.device_count() if kind == "cuda" else 1
    if int(index or 0) >= count:
        raise ZooError(f"--device {name}: this machine has {count} of {kind}; take --device auto or cpu.")
    rank, world, local = launched()
    if name == "cuda" and world > 1:
        name = f"cuda:{rank % local % count}"
    return torch.device(name)


@dataclass
class TrainerOptions:
    """How long a method that learns by gradient is trained, and which of its steps is kept.

    `max_steps` counts optimiser steps, of `accumulate` batches each, and decides where it is set beside `max_epochs`.
    `select` is "last", "normal" (lowest `AnomalyModule.surprise` of held-out normals) or a metric on the validation
    half of the test split, which `evaluate` then leaves out. A model that is fine-tuned learns at `lr_scale` times its
    rates, and stops after `patience` tenths of the steps in a row that were no better than the best before.
    """

    max_epochs: int | None = None
    max_steps: int | None = None
    accumulate: int = 1
    select: str = "last"
    lr_scale: float = 1.0
    patience: int | None = None

    def kept(self) -> dict[str, Any]:
        """As records and checkpoints keep them; what is of fine-tuning alone is left out elsewhere."""
        usual = {"lr_scale": 1.0, "patience": None}
        return {key: value for key, value in asdict(self).items() if key not in usual or value != usual[key]}


def check_select(rule: str) -> None:
    """Raises ZooError if there is no such rule by which a step is kept."""
    known = ("last", "normal", *METRICS)
    if rule not in known:
        raise ZooError(f"--select is one of {', '.join(known)}, not {rule}.")


def plan_training(method: str, preset: str, given: dict[str, Any]) -> TrainerOptions | None:
    """How a method is to be trained; None for one that learns in a single pass.

    Raises:
        ZooError: a value of no use, or options of training for a method that has none.
    """
    planned = presets(method, preset).get("trainer")
    given = {key: value for key, value in given.items() if value is not None}
    if planned is None:
        if given:
            option = f"--{min(given).replace('_', '-')}"
            raise ZooError(f"{method} learns in one pass without training steps; leave {option} out.")
        return None
    if given.keys() & {"max_steps", "max_epochs"}:  # what is asked for decides, not what the preset says
        planned = {key: value for key, value in planned.items() if key not in ("max_steps", "max_epochs")}
    return checked(TrainerOptions(**(planned | given)))


def checked(plan: TrainerOptions) -> TrainerOptions:
    """The plan, if it is one.

    Raises:
        ZooError: a value of no use.
    """
    check_select(plan.select)
    if min(n for n in (plan.accumulate, plan.max_epochs, plan.max_steps) if n is not None) < 1:
        raise ZooError("--max-steps, --max-epochs and --accumulate are at least 1.")
    return plan


def plan_finetuning(method: str, given: dict[str, Any]) -> TrainerOptions | None:
    """How a fitted model is to be trained further; None for a method that has no training steps.

    Raises:
        ZooError: a value of no use, or options of training for a method that has none.
    """
    given = {key: value for key, value in given.items() if value is not None}
    if plan_training(method, "lite", {}) is None:
        return plan_training(method, "lite", given)
    steps = {} if given.keys() & {"max_steps", "max_epochs"} else {"max_steps": STEPS}
    plan = checked(TrainerOptions(**({"select": "normal", "lr_scale": LR_SCALE} | steps | given)))
    if plan.select not in ("last", "normal"):
        raise ZooError(f"--select is normal or last, not {plan.select}: a model is fine-tuned on normal images alone.")
    if not 0 < plan.lr_scale < float("inf"):
        raise ZooError(f"--lr-scale is above 0, not {plan.lr_scale}.")
    return replace(plan, patience=PATIENCE if plan.select == "normal" else None)


def check_share(share: float | None) -> None:
    """Raises ZooError for what can't be the weight of a parent's statistics."""
    if share is not None and not 0 < share < 1:
        raise ZooError(f"--parent-share lies between 0 and 1, not {share:g}.")
