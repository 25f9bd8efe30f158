"""The fast mode: what only scores computes as a twin of itself, made for speed, and in bfloat16 where the device does.

A twin has its BatchNorm folded into the convolutions, its weights cast once instead of in each forward, and channels
last. Networks that learn compute in mixed precision meanwhile. Distances are finished in float32. What that gains is
in tests/bench/RESULTS.md; whether a method keeps its accuracy in tests/bench/fast.json.

A twin is made at first use and again where weights have changed: torch counts changes in place. Those that it doesn't
count (fused optimisers, broadcasts, changes within inference mode) need `forget_twins`, which a module of the zoo calls
whenever it begins to learn or loads.
"""

import copy
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.weak import WeakIdKeyDictionary

TILE = 2048  # vectors of the bank in one product
CANDIDATES = 4  # of which float32 decides, or one more than are asked for: each costs a pass over the rows

CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)

_on = ContextVar("fast", default=False)
_kept = WeakIdKeyDictionary()  # network or bank -> {kind: (state, what was made of it)}


def is_fast() -> bool:
    return _on.get()


def has_bfloat16(device: torch.device) -> bool:
    """Whether it computes in bfloat16, instead of emulating it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


@contextmanager
def fast_mode(device: torch.device) -> Iterator[None]:
    token = _on.set(True)
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=has_bfloat16(device)):
            yield
    finally:
        _on.reset(token)


def infer(network: nn.Module, *inputs: Any, call: Callable[..., Any] = nn.Module.__call__) -> Any:
    """What a network gives; in the fast mode, unless it learns, what its twin gives.

    Args:
        inputs: of the network, those with a batch first.
        call: how it is called with them, if not as usual.
    """
    if not _on.get() or network.training or torch.is_grad_enabled():
        return call(network, *inputs)
    device = next(network.parameters()).device.type
    half = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32
    tensors = [*network.parameters(), *network.buffers()]
    plain = lambda net: call(net, *_laid(inputs, torch.float32))  # noqa: E731
    twin = _made_of(network, half, tensors, lambda: _twin(network, half, plain))
    return call(twin, *_laid(inputs, half))


def forget_twins(network: nn.Module) -> None:
    """Make those of a network and of its parts anew at their next use."""
    for part in network.modules():
        _kept.pop(part, None)


def _made_of(thing: Any, kind: Hashable, tensors: Sequence[Tensor], make: Callable[[], Any]) -> Any:
    """What `make` made of it, for as long as its tensors are the same ones with the same values."""
    state = [(x.data_ptr(), 0 if x.is_inference() else x._version) for x in tensors]
    known = _kept.setdefault(thing, {})
    if known.get(kind, ([], None))[0] != state:
        with torch.inference_mode(False), torch.no_grad():
            known[kind] = state, make()
    return known[kind][1]


def _twin(network: nn.Module, half: torch.dtype, run: Callable[[nn.Module], Any]) -> nn.Module:
    twin = copy.deepcopy(network).requires_grad_(False)
    if _fold(twin):
        device = next(twin.parameters()).device.type
        with torch.autocast(device, enabled=False):  # folding takes a BatchNorm to see what is listed before it
            if not _alike(run(network), run(twin)):
                twin = copy.deepcopy(network).requires_grad_(False)
    return twin.to(half, memory_format=torch.channels_last)


def _fold(network: nn.Module) -> bool:
    """Fold each BatchNorm into the convolution that stands before it; whether there was one."""
    found = False
    for (name, conv), (follower, norm) in pairwise(list(network.named_children())):
        if isinstance(conv, CONVOLUTIONS) and isinstance(norm, nn.BatchNorm2d):
            if conv.out_channels == norm.num_features:
                transposed = isinstance(conv, nn.ConvTranspose2d)
                setattr(network, name, fuse_conv_bn_eval(conv, norm, transposed))
                setattr(network, follower, getattr(norm, "act", nn.Identity()))  # timm's have their activation in them
                found = True
    return any([_fold(child) for child in network.children()]) or found


def _laid(inputs: Any, half: torch.dtype) -> Any:
    """Tensors as a twin takes them."""
    if isinstance(inputs, Tensor) and inputs.is_floating_point():
        layout = torch.channels_last if inputs.ndim == 4 else torch.preserve_format
        return inputs.to(half, memory_format=layout)
    if type(inputs) in (list, tuple):
        return type(inputs)(_laid(x, half) for x in inputs)
    return inputs


def _alike(some: Any, others: Any) -> bool:
    """Whether outputs are finite, and equal up to rounding."""
    if isinstance(some, Tensor):
        return bool(some.isfinite().all()) and torch.allclose(
            some, others, rtol=1e-3, atol=1e-3 * float(some.abs().max())
        )
    return all(_alike(a, b) for a, b in zip(some, others, strict=True))


def candidates(rows: Tensor, bank: Tensor, centre: Tensor, k: int) -> Tensor:
    """Indices (q, c) of some vectors of the bank (M, D), the k nearest to centred rows (q, D) among them.

    By bfloat16 products, which keep 0.4 % of a vector's squared norm: a vector may be missing for others that are as
    near up to that.
    """
    half = torch.get_autocast_dtype(rows.device.type)
    vectors, norms = _made_of(bank, half, [bank], lambda: _half_bank(bank, centre, half))
    rows, value, index = rows.to(half), [], []
    count = min(max(CANDIDATES, k + 1), len(bank))
    for first in range(0, len(bank), TILE):
        tile = vectors[first : first + TILE]
        square = torch.addmm(norms[first : first + TILE], rows, tile.T, alpha=-2)  # (q, T), without |row|^2
        near, where = square.topk(min(count, len(tile)), largest=False)
        value.append(near)
        index.append(where + first)
    best = torch.cat(value, 1).topk(count, largest=False).indices
    return torch.cat(index, 1).gather(1, best)


def _half_bank(bank: Tensor, centre: Tensor, half: torch.dtype) -> tuple[Tensor, Tensor]:
    centred = bank.float() - centre
    return centred.to(half), centred.square().sum(1).to(half)
