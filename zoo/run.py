"""Where and how a run computes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from zoo.errors import ZooError

if TYPE_CHECKING:  # imported on use
    import torch


@dataclass
class RunOptions:
    """Device (`auto`, `cpu`, `cuda`, `cuda:N`), Lightning's precision, a progress bar or not, who is told."""

    device: str = "auto"
    precision: str = "32-true"
    progress: bool = False
    say: Callable[[str], None] = lambda line: None


def device_of(name: str) -> "torch.device":
    """The device that a name stands for; `auto` is the accelerator where there is one.

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
    return torch.device(name)
