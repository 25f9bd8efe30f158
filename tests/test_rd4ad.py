"""RD4AD's parts against direct computations."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter
from sklearn.metrics import roc_auc_score
from torch import nn

from zoo.errors import ZooError
from zoo.methods import create_model, presets, signature
from zoo.methods.rd4ad import RD4AD, Bottleneck, Decoder, _cut
from zoo.module import Batch
from zoo.nn.features import architecture_only

SIZE = (64, 96)


def images(n, seed=0, size=SIZE):
    return torch.rand(n, 1, *size, generator=torch.Generator().manual_seed(seed))


def train(model, images, steps, batch_size=8):
    """Steps on random batches; the model is in eval mode afterwards."""
    model.train()
    optimizer, generator = model.configure_optimizers(), torch.Generator().manual_seed(0)
    for step in range(steps):
        chosen = torch.randperm(len(images), generator=generator)[:batch_size]
        optimizer.zero_grad()
        model.training_step(Batch(images[chosen], []), step).backward()
        optimizer.step()
    return model.eval()


def loss_parts(model, images):
    """The parts of the loss of a batch, by name, in the model's mode."""
    model.total_loss = lambda **parts: {name: float(part) for name, part in parts.items()}
    with torch.no_grad():
        parts = model.training_step(Batch(images, []), 0)
    del model.total_loss
    return parts


@pytest.fixture(scope="module")
def model():
    """A few steps old, so that the running statistics of its BatchNorms are not the initial ones."""
    return train(create_model("rd4ad", "lite", input_size=list(SIZE)), images(8, seed=1), 3)


@pytest.fixture(scope="module")
def wide():
    with architecture_only():
        return RD4AD().eval()


# ---- architecture ----------------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_shapes_of_the_original(wide):
    encoded = wide.features(wide.prepare(images(1, size=(224, 224))))
    x = wide.bottleneck(encoded)
    assert x.shape == (1, 2048, 7, 7)
    for stage, level, shape in zip(
        wide.decoder.stages, reversed(encoded), [(1024, 14, 14), (512, 28, 28), (256, 56, 56)], strict=True
    ):
        x = stage(x)  # nothing is cut
        assert x.shape == level.shape == (1, *shape)
    assert [len(stage) for stage in wide.decoder.stages] == [3, 4, 6] and len(wide.bottleneck.blocks) == 3


def test_parameter_counts_of_the_original(wide):
    """Kernels and two parameters a channel for each BatchNorm, summed by hand from METHODS 4.5."""
    down = 9 * (256 * 512 + 512 * 1024 + 512 * 1024) + 2 * (512 + 1024 + 1024)
    first = 3072 * 1024 + 9 * 1024**2 + 1024 * 2048 + 3072 * 2048 + 2 * (1024 + 1024 + 2048 + 2048)
    other = 2048 * 1024 + 9 * 1024**2 + 1024 * 2048 + 2 * (1024 + 1024 + 2048)
    bottleneck = down + first + 2 * other
    decoder = 0
    for inputs, width, outputs, depth in [(2048, 512, 1024, 3), (1024, 256, 512, 4), (512, 128, 256, 6)]:
        decoder += inputs * width + 4 * width**2 + width * outputs + 4 * inputs * outputs  # with its shortcut
        decoder += 2 * (2 * width + 2 * outputs)
        decoder += (depth - 1) * (outputs * width + 9 * width**2 + width * outputs + 2 * (2 * width + outputs))
    assert sum(p.numel() for p in wide.bottleneck.parameters()) == bottleneck == 58_885_120
    assert sum(p.numel() for p in wide.decoder.parameters()) == decoder == 24_917_504
    assert sum(p.numel() for p in wide.parameters()) / 1e6 == pytest.approx(108.7, abs=0.05)


def reference_norm(x, norm):
    mean, scale = (v.view(-1, 1, 1) for v in (norm.running_mean, norm.weight / (norm.running_var + 1e-5).sqrt()))
    return (x - mean) * scale + norm.bias.view(-1, 1, 1)


def reference_conv(x, weight, stride=1):
    """A sum over the kernel's places of shifted images."""
    size, (h, w) = weight.shape[-1], x.shape[-2:]
    x = np.pad(x, ((0, 0), (0, 0), (size // 2,) * 2, (size // 2,) * 2))
    terms = [
        np.einsum("bchw,oc->bohw", x[..., i : i + h : stride, j : j + w : stride], weight[..., i, j])
        for i in range(size)
        for j in range(size)
    ]
    return torch.from_numpy(sum(terms))


def reference_up(x, weight):
    """Each position becomes a square of 2x2."""
    y = torch.einsum("bchw,cokl->bohkwl", x, weight)
    return y.reshape(len(x), -1, 2 * x.shape[2], 2 * x.shape[3])


def reference_block(x, block, step):
    kernels = [p for p in block.parameters() if p.ndim == 4]
    norms = [m for m in block.modules() if isinstance(m, nn.BatchNorm2d)]
    change = {"same": reference_conv, "down": lambda x, w: reference_conv(x, w, 2), "up": reference_up}[step]
    y = reference_norm(reference_conv(x, kernels[0]), norms[0]).clamp(min=0)
    y = reference_norm(change(y, kernels[1]), norms[1]).clamp(min=0)
    y = reference_norm(reference_conv(y, kernels[2]), norms[2])
    if step != "same":
        x = reference_norm(change(x, kernels[3]), norms[3])
    return (x + y).clamp(min=0)


def reference_stage(x, blocks, first):
    for i, block in enumerate(blocks):
        x = reference_block(x, block, "same" if i else first)
    return x


@torch.no_grad()
def test_bottleneck_and_decoder_by_hand(model):
    restored = model.restore(images(2))[1]
    model = copy.deepcopy(model).double()  # where rounding is no excuse
    encoded = model.features(model.prepare(images(2)).double())
    joined = []
    for x, layers in zip(encoded, (model.bottleneck.layer1, model.bottleneck.layer2), strict=False):
        kernels, norms = ([m for m in layers if isinstance(m, kind)] for kind in (nn.Conv2d, nn.BatchNorm2d))
        for kernel, norm in zip(kernels, norms, strict=True):
            x = reference_norm(reference_conv(x, kernel.weight, 2), norm).clamp(min=0)
        joined.append(x)
    x = code = reference_stage(torch.cat([*joined, encoded[2]], 1), model.bottleneck.blocks, "down")
    torch.testing.assert_close(model.bottleneck(encoded), code)
    decoded = []
    for stage in model.decoder.stages:
        x = reference_stage(x, stage, "up")
        decoded.insert(0, x)
    torch.testing.assert_close(model.decoder(code, [m.shape[-2:] for m in encoded]), decoded)
    for ours, theirs in zip(restored, decoded, strict=True):
        assert (ours - theirs).abs().max() < 0.01 * theirs.abs().max()


def test_initial_weights_follow_their_laws_and_the_seed():
    with architecture_only():
        first, same, other = (RD4AD(backbone="resnet18", seed=seed) for seed in (1, 1, 2))
    for part in ("bottleneck", "decoder"):
        for a, b, c in zip(*(getattr(m, part).modules() for m in (first, same, other)), strict=True):
            if isinstance(a, nn.BatchNorm2d):
                assert (a.weight == 1).all() and (a.bias == 0).all()
            elif isinstance(a, nn.Conv2d | nn.ConvTranspose2d):
                assert torch.equal(a.weight, b.weight) and not torch.equal(a.weight, c.weight) and a.bias is None
                w = a.weight.detach()
                if isinstance(a, nn.Conv2d):  # normal, of variance 2 / (outputs * kernel)
                    spread = (2 / (w.shape[0] * w[0, 0].numel())) ** 0.5
                    assert w.std().item() == pytest.approx(spread, rel=0.06) and w.abs().max() > 3 * spread
                else:  # uniform, of torch's bound, which counts the second axis
                    bound = w[0].numel() ** -0.5
                    assert 0.99 * bound < w.abs().max() <= bound


# ---- any size and backbone -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [100, 112, [96, 160], [33, 161]])  # layer3: 7x7 (twice), 6x10, 3x11
def test_odd_and_unequal_sizes(size):
    model = create_model("rd4ad", "lite", input_size=size)
    encoded, decoded = model.eval().restore(images(1))
    assert [m.shape for m in decoded] == [m.shape for m in encoded]
    assert encoded[2].shape[-2:] == tuple(-(-s // 16) for s in model.size)
    assert model(images(1)).map.shape == (1, 1, *SIZE)
    model.train()
    model.training_step(Batch(images(1), []), 0).backward()  # even of one image


def test_other_backbones():
    with architecture_only():
        model = RD4AD(backbone="resnet18", layers=[2, 3, 4], input_size=100).eval()  # of stride 8, 16 and 32
    encoded, decoded = model.restore(images(1))
    assert [tuple(m.shape) for m in decoded] == [(1, 128, 13, 13), (1, 256, 7, 7), (1, 512, 4, 4)]
    assert [m.shape for m in decoded] == [m.shape for m in encoded]


@torch.no_grad()
def test_grids_that_round_down():
    """As Inception's do: its grids are 22, 10 and 5 wide at 100."""
    shapes = [(2, 6, 22, 22), (2, 7, 10, 10), (2, 9, 5, 5)]
    code = Bottleneck([6, 7, 9])([torch.rand(shape) for shape in shapes])
    assert code.shape == (2, 18, 3, 3)
    restored = Decoder([6, 7, 9])(code, [shape[2:] for shape in shapes])
    assert [tuple(m.shape) for m in restored] == shapes


def test_maps_are_cut_or_their_edge_repeated():
    x = torch.arange(24.0).view(1, 2, 3, 4)
    assert _cut(x, x.shape[-2:]) is x
    assert torch.equal(_cut(x, (2, 3)), x[..., :2, :3])
    assert np.array_equal(_cut(x, (4, 3)), np.pad(x, ((0, 0), (0, 0), (0, 1), (0, 0)), mode="edge")[..., :3])


# ---- learning --------------------------------------------------------------------------------------------------------


def cosine(a, b):
    a, b = a.astype(np.float64), b.astype(np.float64)
    return (a * b).sum() / np.sqrt((a**2).sum() * (b**2).sum())


def test_loss_is_the_cosine_of_whole_flattened_maps(model):
    """Mean over images of 1 - cosine of vectors of C h w values, for each level; not of C values by position."""
    batch = images(3) * (torch.arange(96) < 48)  # lengths differ by position
    with torch.no_grad():
        encoded, decoded = ([m.numpy() for m in maps] for maps in model.restore(batch))
        total = float(model.training_step(Batch(batch, []), 0))
    parts = loss_parts(model, batch)
    assert list(parts) == ["layer1", "layer2", "layer3"]
    for part, e, d in zip(parts.values(), encoded, decoded, strict=True):
        assert part == pytest.approx(np.mean([1 - cosine(e[i].ravel(), d[i].ravel()) for i in range(3)]), abs=1e-5)
        places = [(i, y, x) for i in range(3) for y in range(e.shape[2]) for x in range(e.shape[3])]
        by_position = np.mean([1 - cosine(e[i, :, y, x], d[i, :, y, x]) for i, y, x in places])
        assert abs(part - by_position) > 1e-3  # the test can tell
    assert total == pytest.approx(sum(parts.values()), abs=1e-5)


def test_optimiser_is_the_originals_and_holds_what_is_learned():
    model = RD4AD(backbone="tf_efficientnet_lite0")
    optimizer = model.configure_optimizers()
    (group,) = optimizer.param_groups
    assert isinstance(optimizer, torch.optim.Adam) and not group["amsgrad"]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.005, (0.5, 0.999), 0)
    learned = [*model.bottleneck.parameters(), *model.decoder.parameters()]
    assert {id(p) for p in group["params"]} == {id(p) for p in learned} and len(group["params"]) == len(learned)
    other = RD4AD(backbone="tf_efficientnet_lite0", lr=0.1, beta1=0.8, beta2=0.9).configure_optimizers()
    assert (other.defaults["lr"], other.defaults["betas"]) == (0.1, (0.8, 0.9))


def test_encoder_is_frozen_while_all_else_learns():
    model = create_model("rd4ad", "lite", input_size=list(SIZE))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    norms = [m for part in (model.bottleneck, model.decoder) for m in part.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 3 + 10 + 3 * 13 + 3 and all(norm.training for norm in norms)
    assert not any(m.training for m in model.features.modules())
    model.training_step(Batch(images(4), []), 0).backward()
    assert all(p.grad is None for p in model.features.parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.learned_parameters())
    train(model, images(4), 1)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith("features."), name
    assert not any(m.training for m in model.modules())


def test_training_lowers_each_part_and_finds_squares(mvtec):
    def load(folder):
        return [np.array(Image.open(path)) for path in sorted((mvtec / folder).glob("*.png"))]

    def as_batch(arrays):
        return torch.from_numpy(np.stack(arrays))[:, None] / 255

    def judge(model):
        """AUROC of images and of pixels, and the loss by parts of normal images that were not trained on."""
        with torch.inference_mode():
            scores = model(torch.cat([good, bad]))
        pixels = np.concatenate([np.zeros_like(masks), masks]) > 0
        image = roc_auc_score([0] * len(good) + [1] * len(bad), scores.image)
        return image, roc_auc_score(pixels.ravel(), scores.map.flatten()), loss_parts(model, good)

    good, bad = as_batch(load("test/good")), as_batch(load("test/square"))
    masks = np.stack(load("ground_truth/square"))
    model = create_model("rd4ad", "lite", input_size=64).eval()
    image, pixel, parts = judge(model)
    trained_image, trained_pixel, trained_parts = judge(train(model, as_batch(load("train/good")), 40))
    assert trained_image > 0.95 and trained_pixel > 0.95
    assert trained_image > image + 0.1 and trained_pixel > pixel + 0.1
    assert all(trained_parts[name] < 0.8 * parts[name] for name in parts)


# ---- scoring ---------------------------------------------------------------------------------------------------------


def bilinear(x, size, aligned):
    """Corners on corners, or pixels as squares."""

    def weights(old, new):
        at = np.arange(new) * (old - 1) / (new - 1) if aligned else (np.arange(new) + 0.5) * old / new - 0.5
        return np.maximum(0, 1 - np.abs(np.clip(at, 0, old - 1)[:, None] - np.arange(old)))  # (new, old)

    return weights(x.shape[0], size[0]) @ x @ weights(x.shape[1], size[1]).T


def reference_maps(model, images, aligned=True):
    """Smoothed maps (B, H, W) at the input size."""
    with torch.no_grad():
        levels = [(e.numpy(), d.numpy()) for e, d in zip(*model.restore(images), strict=True)]
    maps = np.zeros((len(images), *model.size))
    for e, d in levels:
        for b in range(len(images)):
            grid = [[1 - cosine(e[b, :, y, x], d[b, :, y, x]) for x in range(e.shape[3])] for y in range(e.shape[2])]
            maps[b] += bilinear(np.array(grid), model.size, aligned)
    return np.stack([gaussian_filter(m, 4) for m in maps])


def test_scores_by_hand(model):
    batch = images(2, seed=5, size=(80, 70))
    expected = reference_maps(model, batch)
    with torch.inference_mode():
        scores = model(batch)
    np.testing.assert_allclose(scores.image, expected.max((1, 2)), rtol=1e-4)
    for ours, theirs in zip(scores.map[:, 0].numpy(), expected, strict=True):
        np.testing.assert_allclose(ours, bilinear(theirs, (80, 70), aligned=False), rtol=1e-4)
    unaligned = reference_maps(model, batch, aligned=False)
    assert np.abs(expected - unaligned).max() > 1e-2  # the test can tell


def test_region_of_interest(model):
    batch = images(2, seed=6)
    expected = reference_maps(model, batch)
    roi = torch.zeros(2, 1, *SIZE, dtype=torch.bool)
    roi[0, :, 10:20, 30:50], roi[1, :, 40:, :7] = True, True
    for image, inside in zip(expected, roi[:, 0], strict=True):
        inside[np.unravel_index(image.argmax(), SIZE)[0]] = False  # the maximum's row lies outside, wherever that is
    with torch.inference_mode():
        whole, part, everything = model(batch), model(batch, roi), model(batch, torch.ones_like(roi))
    highest = [image[inside].max() for image, inside in zip(expected, roi[:, 0].numpy(), strict=True)]
    np.testing.assert_allclose(part.image, highest, rtol=1e-4)
    assert (part.image < whole.image).all() and torch.equal(part.map, whole.map)
    assert torch.equal(everything.image, whole.image)


def test_cosines_are_finished_in_float32(model):
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        encoded, decoded = model.restore(images(2))
        scores = model(images(2))
    assert {m.dtype for m in [*encoded, *decoded, *scores]} == {torch.float32}
    whole = model(images(2))
    assert (scores.map - whole.map).abs().max() < 0.1 * whole.map.max()


# ---- configuration ---------------------------------------------------------------------------------------------------


def test_presets_are_the_originals():
    original, paper, steps = (presets("rd4ad", name) for name in ("original", "paper224", "mvtec_steps"))
    assert original["model"] == {"input_size": 256} and original["data"] == {"resize": 256, "batch_size": 16}
    assert paper == {"data": {"batch_size": 16}, "trainer": original["trainer"]}
    assert paper["trainer"] == {"max_epochs": 200}
    assert steps == {"data": {"batch_size": 16}, "trainer": {"max_steps": 200 * -(-240 // 16)}}
    defaults = {name: option.default for name, option in signature("rd4ad").items()}
    assert defaults == dict(
        backbone="wide_resnet50_2.tv_in1k",
        backbone_weights=None,
        layers=None,
        input_size=224,
        lr=0.005,
        beta1=0.5,
        beta2=0.999,
        sigma=4.0,
        seed=111,
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"lr": 0.0}, "lr"),
        ({"sigma": 0.0}, "sigma"),
        ({"beta1": 1.0}, "beta1"),
        ({"beta2": -0.1}, "beta2"),
        ({"layers": [1, 2]}, "three --layers"),
        ({"layers": [1, 2, 4]}, r"strides \[4, 8, 32\]"),
        ({"input_size": 32}, "above 32"),
    ],
)
def test_bad_values_are_named(arguments, message):
    with pytest.raises(ZooError, match=message):
        RD4AD(**({"backbone": "tf_efficientnet_lite0"} | arguments))
