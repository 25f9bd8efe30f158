"""What makes the host wait for a GPU, found without one: reads, and copies from memory that is not pinned."""

import sys
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import zoo

ROOTS = (f"{Path(zoo.__file__).parent}/", "/lightning/")
READS = ("item", "tolist", "numpy", "cpu", "nonzero", "masked_select", "unique", "unique_consecutive", "equal")
READS += ("__bool__", "__int__", "__float__", "__index__", "__array__", "__contains__", "argwhere", "allclose")
MADE = ("rand", "randn", "randint", "randperm", "arange", "tensor", "zeros", "ones", "empty", "full", "linspace", "eye")
MADE += ("from_numpy", "scalar_tensor", "as_tensor")


def site():
    """The innermost line of the zoo, or of Lightning, that is running."""
    frame = sys._getframe(2)
    while frame and not any(root in frame.f_code.co_filename for root in ROOTS):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}" if frame else "?"


class Reads(TorchFunctionMode):
    """Notes where values are read that would be on a GPU: all but those that descend from tensors made on the host.

    Such are the ones made without a device, or on that named "cpu", and what is made of them alone, up to a `to`. It
    runs on a CPU, where `to` changes nothing.
    """

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, getattr(function, "__name__", "")
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        on_host = all(getattr(x, "of_host", False) for x in tensors)
        if tensors and not on_host and (name in READS or masked(name, args)):
            self.found.append(f"{name} in {site()}")
        out = function(*args, **kwargs)
        if name == "cpu" and out is args[0]:
            out = out.detach()
        made = name in MADE and kwargs.get("device") in (None, "cpu")
        host = (name == "cpu" or (on_host if tensors else made)) and name not in ("to", "__get__", "__set__")
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and (host or name == "to"):
                x.of_host = host
        return out


def masked(name, args):
    """Whether a function indexes by a mask, of which somebody has to know the count."""
    if name == "where":
        return len(args) == 1
    index = args[1] if name in ("__getitem__", "__setitem__") else ()
    return any(isinstance(x, torch.Tensor) and x.dtype == torch.bool for x in tree_leaves(index))


class Pretended(TorchDispatchMode):
    """Notes reads of tensors on a GPU, and copies to it that are waited for, of fake tensors; within `pretended_gpu`.

    Reads are answered somehow: 1, no place, nothing.
    """

    def __init__(self):
        super().__init__()
        self.reads, self.copies = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, kwargs = function.name(), kwargs or {}
        on_gpu = any(isinstance(x, torch.Tensor) and x.is_cuda for x in tree_leaves((args, kwargs)))
        if name in ("aten::_local_scalar_dense", "aten::nonzero"):
            if on_gpu:
                self.reads.append(f"{name} in {site()}")
            number = name == "aten::_local_scalar_dense"
            return 1 if number else args[0].new_empty(0, args[0].ndim, dtype=torch.int64)
        if name in ("aten::is_pinned", "aten::_pin_memory"):
            out = name == "aten::_pin_memory" and args[0].clone()
            if out is not False:
                out.pinned = True
            return out
        out = function(*args, **kwargs)
        if name in ("aten::_to_copy", "aten::copy_"):
            source, target = (args[0], out) if name == "aten::_to_copy" else (args[1], args[0])
            if source.is_cuda and not target.is_cuda:
                self.reads.append(f"{name} in {site()}")
            on_its_way = getattr(source, "pinned", False) and kwargs.get("non_blocking")
            if target.is_cuda and not source.is_cuda and not on_its_way:
                self.copies.append(f"{name} in {site()}")
        return out


def pretended_gpu(model):
    """The mode of fake tensors in which the model lies on a GPU that need not exist."""
    mode = FakeTensorMode()
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, x in tensors.items():
                if x is None:
                    continue
                fake = mode.from_tensor(x.detach())
                with mode:
                    fake = torch.empty_like(fake, device="cuda")
                is_parameter = isinstance(x, torch.nn.Parameter)
                tensors[name] = torch.nn.Parameter(fake, requires_grad=x.requires_grad) if is_parameter else fake
    return mode
