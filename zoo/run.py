"""Where and how a run computes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from zoo.errors import ZooError
from zoo.ranks import launched

if TYPE_CHECKING:  # imported on use
    import torch


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
