"""Distances are finished in float32 under any mixed precision: bfloat16 would lose their order."""

import torch
from torch import Tensor


def full_precision(x: Tensor) -> torch.autocast:
    """A context without autocast on the device of `x`."""
    return torch.autocast(x.device.type, enabled=False)
