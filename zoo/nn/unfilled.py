"""Networks without first weights, where a checkpoint is about to bring them."""

from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode

RANDOM = ("normal_", "uniform_")  # how the names of what fills in place end, in `torch.nn.init` and of a tensor


class Unfilled(TorchFunctionMode):
    """Within it weights are not filled with random numbers: of a WideResNet-50-2 that is most of its construction."""

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if getattr(function, "__name__", "").endswith(RANDOM):
            filled = args[0] if args else kwargs["tensor"]
            if isinstance(filled, nn.Parameter):  # any other tensor may not be in the checkpoint
                return filled
        return function(*args, **kwargs)
