"""SuperSimpleNet's parts against direct computations."""

import math
from collections import Counter
from itertools import product

import lightning as L
import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter, uniform_filter
from sklearn.metrics import roc_auc_score
from torch.utils.data import DataLoader

from zoo.errors import ZooError
from zoo.methods import create_model, presets
from zoo.methods.supersimplenet import SuperSimpleNet, focal_loss
from zoo.module import Batch
from zoo.nn.features import architecture_only
from zoo.nn.perlin import perlin_noise

SIZE = 48  # pixels; the feature grid has 12 positions a side


def build(**arguments):
    """With the small backbone; but for the noise, which its features ask for, as the original."""
    given = {"feature_scale": 1.0, "margin": 0.5, "noise_std": 3.0, "segmentation_lr": 1e-3, "classification_lr": 1e-3}
    return create_model("supersimplenet", "lite", **given | {"input_size": SIZE} | arguments)


def images(n, seed=0, size=SIZE):
    return torch.rand(n, 1, size, size, generator=torch.Generator().manual_seed(seed))


def batch_of(images, label=None, mask=None):
    return Batch(images, [str(i) for i in range(len(images))], label, mask)


def optimizer_of(model):
    model._trainer = L.Trainer(max_epochs=300, logger=False, accelerator="cpu", enable_checkpointing=False)
    optimizer = model.configure_optimizers()["optimizer"]
    model._trainer = None  # steps of its own make no logs
    return optimizer


class Watched:
    """One training step: the parts of its loss, and what went into and came out of the heads."""

    def __init__(self, model, batch, masks=None, seed=0):
        hooks = [
            model.adaptor.register_forward_hook(lambda *a: setattr(self, "adapted", a[2])),
            model.segmentation.register_forward_hook(self.see_segmentation),
            model.classification.last.register_forward_hook(lambda *a: setattr(self, "score", a[2][:, 0])),
        ]
        model.total_loss = lambda **parts: parts
        if masks is not None:
            model.draw_masks = lambda adapted: masks
        torch.manual_seed(seed)
        self.parts = model.training_step(batch, 0)
        for hook in hooks:
            hook.remove()
        for name in {"total_loss", "draw_masks"} & vars(model).keys():
            delattr(model, name)
        self.noise = self.noisy - torch.cat([self.adapted, self.adapted])  # (2B, D, h, w)

    def see_segmentation(self, module, inputs, logits):
        (self.noisy,), self.logits = inputs, logits


def tiles(n, seed, defect=None):
    """Noisy stripes (n, 1, SIZE, SIZE), in every second image a square where they are faded or foreign, and masks."""
    rng = np.random.default_rng(seed)
    stripes = np.tile(np.where(np.arange(SIZE) % 12 < 6, 0.6, 0.3), (SIZE, 1))
    found, masks = [], np.zeros((n, 1, SIZE, SIZE), bool)
    for i in range(n):
        image = np.roll(stripes, rng.integers(12), 1)
        if i % 2 and defect:
            y, x = rng.integers(2, SIZE - 18, 2)
            masks[i, 0, y : y + 16, x : x + 16] = True
            other = 0.27 + 0.4 * image if defect == "faded" else rng.normal(0.85, 0.1, image.shape)
            image = np.where(masks[i, 0], other, image)
        found.append(image + rng.normal(0, 0.03, (SIZE, SIZE)))
    return torch.from_numpy(np.stack(found)[:, None]).float().clamp(0, 1), torch.from_numpy(masks)


def learn(batch, steps=25, **arguments):
    """A model after some steps on random halves of a batch, and its loss of the whole batch before and after."""
    easy = {"noise_std": 4.0, "perlin_threshold": 0.2, "adaptor_lr": 1e-3, "classification_lr": 2e-4}  # for few steps
    model, losses = build(**easy, **arguments), []
    optimizer = optimizer_of(model)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps + 1):
        if step in (0, steps):
            losses.append({k: float(v.detach()) for k, v in Watched(model.train(), batch, seed=99).parts.items()})
        half = torch.randperm(len(batch.image), generator=generator)[: len(batch.image) // 2]
        part = batch._replace(**{k: v[half] for k, v in batch._asdict().items() if isinstance(v, torch.Tensor)})
        torch.manual_seed(step)
        optimizer.zero_grad()
        model.training_step(part, step).backward()
        optimizer.step()
    return model.eval(), losses


@pytest.fixture(scope="module")
def trained():
    """Models and losses of three fits: on normals, and with defects known by their masks or by their labels."""
    normals, defects, masks = tiles(12, 0)[0], *(t[1::2] for t in tiles(8, 1, "faded"))
    both, label = torch.cat([normals, defects]), torch.tensor([0] * 12 + [1] * 4)
    mask = torch.cat([torch.zeros(12, 1, SIZE, SIZE, dtype=torch.bool), masks])
    return {
        "normals": learn(batch_of(normals)),
        "masks": learn(batch_of(both, label, mask), supervised=True),
        "labels": learn(batch_of(both, label), supervised=True),
    }


@pytest.fixture(scope="module")
def model(trained):
    return trained["normals"][0]


def test_features_are_scaled_before_the_adaptor():
    """Which is linear."""
    whole, small = build().eval(), build(feature_scale=0.02).eval()
    with torch.inference_mode():
        one, other = (m.adapt(images(2)) - m.adaptor.bias.view(-1, 1, 1) for m in (whole, small))
    torch.testing.assert_close(other, 0.02 * one, rtol=1e-4, atol=1e-5)
    assert SuperSimpleNet.__init__.__kwdefaults__["feature_scale"] == 1


# ---- Perlin noise ----------------------------------------------------------------------------------------------------


def test_perlin_noise_by_its_definition():
    torch.manual_seed(3)
    angle = 2 * math.pi * torch.rand(3, 9, 9).double().numpy()
    torch.manual_seed(3)
    cells, size = [(1, 4), (8, 2), (4, 4)], (16, 24)
    found = perlin_noise(torch.tensor(cells), size).numpy()
    assert found.shape == (3, *size)
    for image, (i, j) in product(range(3), np.ndindex(size)):
        y, x = i * cells[image][0] / size[0], j * cells[image][1] / size[1]
        row, column = math.floor(y), math.floor(x)
        corner = {}
        for down, across in product((0, 1), (0, 1)):
            a = angle[image, row + down, column + across]
            corner[down, across] = math.cos(a) * (y - row - down) + math.sin(a) * (x - column - across)
        u, v = (6 * t**5 - 15 * t**4 + 10 * t**3 for t in (y - row, x - column))
        upper = (1 - v) * corner[0, 0] + v * corner[0, 1]
        lower = (1 - v) * corner[1, 0] + v * corner[1, 1]
        assert found[image, i, j] == pytest.approx(math.sqrt(2) * ((1 - u) * upper + u * lower), abs=1e-5)


def test_perlin_noise_is_bounded_smooth_and_zero_on_the_lattice():
    torch.manual_seed(0)
    points, cells = 256, 4
    noise = perlin_noise(torch.full((60, 2), cells), (points, points))
    assert noise.abs().max() <= 1 and noise.min() < -0.6 and noise.max() > 0.6
    assert (noise[:, :: points // cells, :: points // cells] == 0).all()
    step = cells / points
    for first in (noise.diff(dim=1), noise.diff(dim=2)):
        assert first.abs().max() < 4 * step  # no jumps
    second = noise.diff(n=2, dim=2)
    assert second.abs().max() < 40 * step**2  # nor kinks at the cells' borders, which would be of order step
    # Var at a cell's centre: four corners of weight 1/4, each a random unit vector times an offset of length sqrt(1/2).
    centre = noise[:, points // cells // 2 :: points // cells, points // cells // 2 :: points // cells]
    assert float(centre.mean()) == pytest.approx(0, abs=4 * math.sqrt(0.125 / centre.numel()))
    assert float(centre.var()) == pytest.approx(2 * 4 * (1 / 16) * (1 / 2) / 2, rel=0.1)


def test_share_of_noisy_positions():
    """Against a simulation of single points: those of a grid of 64, in lattices of 1, 2, ... 32 cells a side."""
    rng = np.random.default_rng(0)
    shares = []
    for down, across in product(2 ** np.arange(6), 2 ** np.arange(6)):
        y, x = (rng.integers(64, size=4000) * c / 64 % 1 for c in (down, across))
        total = np.zeros(4000)
        for i, j in product((0, 1), (0, 1)):
            a = rng.uniform(0, 2 * np.pi, 4000)
            weight = [6 * t**5 - 15 * t**4 + 10 * t**3 for t in (y if i else 1 - y, x if j else 1 - x)]
            total += weight[0] * weight[1] * (np.cos(a) * (y - i) + np.sin(a) * (x - j))
        shares.append((math.sqrt(2) * total > 0.2).mean())
    torch.manual_seed(1)
    masks = build(empty_share=0.0, perlin_threshold=0.2).draw_masks(torch.zeros(1000, 1, 64, 64))
    assert masks.shape == (1000, 1, 64, 64) and masks.dtype == torch.bool
    assert float(masks.float().mean()) == pytest.approx(np.mean(shares), abs=0.015)
    assert 0.1 < np.mean(shares) < 0.3


def test_half_of_the_masks_is_emptied():
    kept = []
    for share in (0.0, 0.5):
        torch.manual_seed(2)
        kept.append(build(empty_share=share).draw_masks(torch.zeros(1000, 1, 12, 20)))
    everything, half = kept
    survives = (everything == half).flatten(1).all(1)
    assert not half[~survives].any() and everything.shape == (1000, 1, 12, 20)
    filled = everything.flatten(1).any(1)
    assert float(survives[filled].float().mean()) == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(int(filled.sum())))
    assert "empty_share" not in presets("supersimplenet", "lite")["model"]


# ---- network ---------------------------------------------------------------------------------------------------------


def test_trainable_parameters_of_the_original():
    with architecture_only():
        model = SuperSimpleNet()
    adaptor = 1536 * 1536 + 1536
    segmentation = 1536 * 1024 + 1024 + 2 * 1024 + 1024
    classification = 1537 * 128 * 25 + 128 + 2 * 128 + 258 + 1
    assert sum(p.numel() for p in model.learned_parameters()) == adaptor + segmentation + classification == 8_856_835
    assert model.features.strides == [8, 16] and model.features.channels == [512, 1024]
    weights = [p for p in model.learned_parameters() if p.ndim > 1]
    assert len(weights) == 5
    for weight in weights:  # Xavier normal
        fan = (weight.shape[0] + weight.shape[1]) * weight[0, 0].numel()
        assert float(weight.detach().std()) == pytest.approx(math.sqrt(2 / fan), rel=0.15)


def test_features_are_twice_as_fine_as_stride_8():
    model = build(input_size=[64, 96])
    with torch.no_grad():
        assert model.adapt(images(2)).shape == (2, 152, 16, 24)
    with architecture_only():
        model = create_model("supersimplenet", backbone="resnet18.tv_in1k", layers=[1], input_size=64)
    with torch.no_grad():
        assert model.adapt(images(1)).shape == (1, 64, 32, 32)


def upsample(x, size):
    """Bilinear between the centres of corner positions, (C, h, w) -> (C, *size), by interpolation of rows, columns."""
    for axis, n in ((1, size[0]), (2, size[1])):
        at, grid = np.linspace(0, x.shape[axis] - 1, n), np.arange(x.shape[axis])
        x = np.apply_along_axis(lambda line, at=at, grid=grid: np.interp(at, grid, line), axis, x)
    return x


def batch_norm(x, norm):
    mean, var, weight, bias = (
        t.detach().double().numpy()[:, None, None]
        for t in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    )
    return (x - mean) / np.sqrt(var + norm.eps) * weight + bias


def conv(x, module):
    weight = module.weight.detach().double().numpy()
    kernel = weight.shape[2:]
    x = np.pad(x, [(0, 0), *((k // 2, k // 2) for k in kernel)])
    windows = np.lib.stride_tricks.sliding_window_view(x, kernel, (1, 2))  # (C, h, w, k, k)
    bias = 0 if module.bias is None else module.bias.detach().double().numpy()[:, None, None]
    return np.tensordot(weight, windows, ((1, 2, 3), (0, 3, 4))) + bias


def by_hand(model, image):
    """Logits (h, w) and pooled features of the classification head of one image, in numpy."""
    maps = [m[0].double().numpy() for m in model.features(model.prepare(image[None]))]
    size = [2 * side for side in maps[0].shape[1:]]
    joined = np.concatenate([upsample(m, size) for m in maps])
    pooled = np.stack([uniform_filter(channel, 3, mode="constant") for channel in joined])
    adapted = conv(pooled, model.adaptor)
    hidden = batch_norm(conv(adapted, model.segmentation.hidden[0]), model.segmentation.hidden[1])
    logits = conv(np.where(hidden > 0, hidden, 0.2 * hidden), model.segmentation.last)
    head = model.classification
    found = np.maximum(batch_norm(conv(np.concatenate([adapted, logits]), head.conv[0]), head.conv[1]), 0)
    return logits[0], found


def image_logit(model, logits, found, where=slice(None)):
    logits, found = logits.reshape(-1)[where], found.reshape(len(found), -1)[:, where]
    pooled = np.concatenate([found.max(1), found.mean(1), [logits.max(), logits.mean()]])
    last = model.classification.last
    return float(last.weight.detach().double().numpy()[0] @ pooled + last.bias.item())


def test_scores_and_map_by_hand(model):
    image = images(1, seed=5)
    with torch.inference_mode():
        scores = model(image)
    logits, found = by_hand(model, image[0])
    assert float(scores.image[0]) == pytest.approx(image_logit(model, logits, found), rel=1e-3, abs=1e-3)
    enlarged = torch.nn.functional.interpolate(torch.from_numpy(logits)[None, None], (SIZE, SIZE), mode="bilinear")
    expected = gaussian_filter(enlarged[0, 0].numpy(), 4)
    np.testing.assert_allclose(scores.map[0, 0].numpy(), expected, rtol=1e-3, atol=1e-3)


def test_region_of_interest(model):
    """The region's own logit, but never more than the whole image's; -inf where there is no region."""
    batch = images(6, seed=7)
    roi = torch.zeros(6, 1, SIZE, SIZE, dtype=torch.bool)
    roi[..., : SIZE // 4] = True
    roi[5] = False
    with torch.inference_mode():
        whole, part = model(batch), model(batch, roi)
        everything = model(batch, torch.ones_like(roi))
    assert torch.equal(everything.image, whole.image) and torch.equal(part.map, whole.map)
    inside = np.zeros((12, 12), bool)
    inside[:, :3] = True
    for i in range(5):
        logits, found = by_hand(model, batch[i])
        region = image_logit(model, logits, found, inside.ravel())
        assert float(part.image[i]) == pytest.approx(min(region, float(whole.image[i])), rel=1e-3, abs=1e-3)
    assert (part.image[:5] < whole.image[:5]).any() and float(part.image[5]) == -math.inf


def test_logits_keep_their_order_in_mixed_precision(model):
    """What bfloat16 can hold is too coarse to rank by; the last layers are finished in float32."""
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        scores = model(images(4))
        logits, _ = model.judge(model.adapt(images(4)))
    for values in (scores.image, scores.map, logits):
        assert values.dtype == torch.float32
        assert (values != values.bfloat16().float()).float().mean() > 0.7
    with torch.inference_mode():
        exact = model(images(4)).map
    assert float((scores.map - exact).square().mean()) < 0.01 * float(exact.var())


def test_weights_follow_the_seed():
    models = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(models))  # global state must not matter
        models.append(build(seed=seed))
    first, again, other = (torch.cat([p.flatten() for p in m.learned_parameters() if p.ndim > 1]) for m in models)
    assert torch.equal(first, again) and (first != other).all()
    assert all(torch.equal(a, b) for a, b in zip(*(m.state_dict().values() for m in models[:2]), strict=True))


@pytest.mark.parametrize(
    "wrong",
    [
        {"noise_std": 0.0},
        {"feature_scale": 0.0},
        {"adaptor_lr": 0.0},
        {"margin": -1.0},
        {"perlin_threshold": 1.0},
        {"milestones": [80.0]},
    ],
)
def test_bad_values_are_refused(wrong):
    with pytest.raises(ZooError):
        build(**wrong)


def test_presets():
    original, paper, steps = (presets("supersimplenet", name) for name in ("original", "paper224", "mvtec_steps"))
    assert original == {
        "model": {"input_size": 256},
        "data": {"resize": 256, "batch_size": 32},
        "trainer": {"max_epochs": 300},
    }
    assert paper == {"data": {"batch_size": 32}, "trainer": {"max_epochs": 300}}
    assert steps["trainer"] == {"max_steps": 300 * math.ceil(240 / 32)} and steps["data"] == paper["data"]
    with architecture_only():
        model = create_model("supersimplenet", "original")
    given = {
        "noise_std": 0.015,
        "perlin_threshold": 0.2,
        "empty_share": 0.5,
        "margin": 0.5,
        "focal_gamma": 4.0,
        "sigma": 4.0,
        "supervised": False,
    }
    assert given.items() <= model.hparams.items() and model.size == (256, 256)


# ---- the training step -----------------------------------------------------------------------------------------------


def explicit_focal(logits, target, gamma=4):
    """With probabilities, in float64."""
    p = torch.sigmoid(logits.double())
    p = torch.where(target, p, 1 - p)
    return -((1 - p) ** gamma) * p.log()


def test_focal_loss():
    logits = torch.randn(500, generator=torch.Generator().manual_seed(0)) * 5
    target = torch.arange(500) % 3 == 0
    for gamma in (0.0, 2.0, 4.0):
        torch.testing.assert_close(
            focal_loss(logits, target, gamma).double(), explicit_focal(logits, target, gamma), rtol=1e-4, atol=1e-6
        )
    extreme = torch.tensor([-200.0, 200.0, -200.0, 200.0], requires_grad=True)
    loss = focal_loss(extreme, torch.tensor([True, True, False, False]), 4.0)
    torch.testing.assert_close(loss, torch.tensor([200.0, 0.0, 0.0, 200.0]))
    loss.sum().backward()
    torch.testing.assert_close(extreme.grad, torch.tensor([-1.0, 0.0, 0.0, 1.0]))


def explicit_hinge(logits, target, margin=0.5):
    normal = [max(0.0, x + margin) for x in logits[~target].double().tolist()]
    anomalous = [max(0.0, margin - x) for x in logits[target].double().tolist()]
    return sum(sum(group) / len(group) for group in (normal, anomalous) if group)


@pytest.mark.parametrize("noisy", ["some", "none", "all"])
@pytest.mark.parametrize("count", [1, 3])
def test_loss_by_hand(noisy, count):
    masks = torch.full((2 * count, 1, 12, 12), noisy == "all")
    if noisy == "some":
        masks[1:, :, 3:7, 2:9] = True
    model = build().train()
    seen = Watched(model, batch_of(images(count)), masks)
    assert seen.logits.shape == masks.shape and seen.score.shape == (2 * count,)
    label = masks.flatten(1).any(1)
    expected = {
        "focal": explicit_focal(seen.logits, masks).mean(),
        "hinge": explicit_hinge(seen.logits, masks),
        "classification": explicit_focal(seen.score, label).mean(),
    }
    for name, part in seen.parts.items():
        assert float(part.detach()) == pytest.approx(float(expected.pop(name)))
    assert not expected
    sum(seen.parts.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.learned_parameters())  # DDP's demand


def test_noise_lies_within_the_masks_of_both_copies():
    model = build(noise_std=0.015).train()
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(8, 1, 12, 12, generator=generator) > 0.5
    noise = Watched(model, batch_of(images(4)), masks).noise.detach()
    assert noise.shape == (8, 152, 12, 12)
    inside = masks.expand_as(noise)
    assert not noise[~inside].any()
    values = noise[inside]  # up to the rounding of features of size 10
    assert len(values) > 80_000
    assert float(values.mean()) == pytest.approx(0, abs=4 * 0.015 / math.sqrt(len(values)))
    assert float(values.std()) == pytest.approx(0.015, rel=0.01)
    assert float((values.abs() < 0.015).float().mean()) == pytest.approx(0.6827, abs=0.01)  # a Gaussian
    pair = inside[:4] & inside[4:]
    assert abs(np.corrcoef(noise[:4][pair], noise[4:][pair])[0, 1]) < 0.02  # the copies' noise is not the same


def test_each_copy_has_a_mask_of_its_own():
    drawn = [Watched(build(empty_share=0.0).train(), batch_of(images(6)), seed=s).noise.detach() for s in (1, 1, 2)]
    masks = (drawn[0] != 0).any(1)
    assert any((masks[i] != masks[i + 6]).any() for i in range(6))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_no_gradient_flows_from_the_score_through_the_map():
    masks = torch.zeros(4, 1, 12, 12, dtype=torch.bool)
    masks[2:, :, :6] = True

    def touched(*names):
        model = build().train()
        parts = Watched(model, batch_of(images(2)), masks).parts
        sum(parts[name] for name in names).backward()
        heads = {"adaptor": model.adaptor, "segmentation": model.segmentation, "classification": model.classification}
        return {k for k, m in heads.items() if any(p.grad is not None and p.grad.any() for p in m.parameters())}

    assert touched("classification") == {"adaptor", "classification"}
    assert touched("focal", "hinge") == {"adaptor", "segmentation"}


def test_frozen_and_learned_parts():
    model = build().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = optimizer_of(model)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.learned_parameters()}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(held)
    for i in range(2):
        optimizer.zero_grad()
        model.training_step(batch_of(images(2, seed=i)), i).backward()
        optimizer.step()
    assert not any(m.training for m in model.features.modules())
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d) and m.training]
    assert len(norms) == 2 and all(int(norm.num_batches_tracked) == 2 for norm in norms)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith("features."), name


# ---- optimiser -------------------------------------------------------------------------------------------------------


class Rates(L.Callback):
    def __init__(self):
        self.by_step = []

    def on_train_batch_start(self, trainer, module, batch, index):
        self.by_step.append([group["lr"] for group in trainer.optimizers[0].param_groups])


class Light(SuperSimpleNet):
    """Steps of no cost, under a real Trainer."""

    def training_step(self, batch, index):
        return sum(p.sum() for p in self.learned_parameters())


def rates(**limits):
    with architecture_only():
        model = Light(backbone="tf_efficientnet_lite0", input_size=32)
    watch = Rates()
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[watch],
        **limits,
    )
    loader = DataLoader(list(images(6, size=32)), batch_size=2, collate_fn=lambda items: batch_of(torch.stack(items)))
    trainer.fit(model, loader)
    return trainer, np.array(watch.by_step)


def test_three_groups_and_a_schedule_over_epochs():
    trainer, seen = rates(max_epochs=10)  # of 3 steps
    groups = trainer.optimizers[0].param_groups
    assert isinstance(trainer.optimizers[0], torch.optim.AdamW)
    assert [group["weight_decay"] for group in groups] == [0.01, 1e-5, 1e-5]
    assert [group["initial_lr"] for group in groups] == [1e-4, 2e-4, 2e-4]
    module = trainer.lightning_module
    parts = (module.adaptor, module.segmentation, module.classification)
    for group, part in zip(groups, parts, strict=True):
        assert {id(p) for p in group["params"]} == {id(p) for p in part.parameters()}
    factor = np.repeat([1, 0.4, 0.16], [8 * 3, 3, 3])
    np.testing.assert_allclose(seen, factor[:, None] * [[1e-4, 2e-4, 2e-4]], rtol=1e-6)


def test_without_planned_epochs_the_schedule_counts_steps():
    _, seen = rates(max_epochs=-1, max_steps=20)
    factor = np.repeat([1, 0.4, 0.16], [16, 2, 2])
    np.testing.assert_allclose(seen, factor[:, None] * [[1e-4, 2e-4, 2e-4]], rtol=1e-6)


def test_planned_steps_are_what_the_schedule_counts():
    """`fit` turns planned steps into whole epochs, which would be too coarse a measure."""
    model = build(milestones=[0.8, 0.9])
    model.plan = {"max_steps": 40}
    model._trainer = L.Trainer(max_epochs=4, logger=False, accelerator="cpu", enable_checkpointing=False)
    schedule = model.configure_optimizers()["lr_scheduler"]
    assert schedule["scheduler"].milestones == Counter([32, 36]) and schedule["interval"] == "step"


def test_milestones_of_the_original():
    with architecture_only():
        model = create_model("supersimplenet", "paper224")
    model._trainer = L.Trainer(max_epochs=300, logger=False, accelerator="cpu", enable_checkpointing=False)
    schedule = model.configure_optimizers()["lr_scheduler"]
    assert schedule["scheduler"].milestones == Counter([240, 270]) and schedule["scheduler"].gamma == 0.4
    assert schedule["interval"] == "epoch"


# ---- labelled defects ------------------------------------------------------------------------------------------------


def test_without_supervision_labels_and_masks_count_for_nothing():
    batch, mask = images(3), torch.ones(3, 1, SIZE, SIZE, dtype=torch.bool)
    plain = Watched(build().train(), batch_of(batch)).parts
    given = Watched(build().train(), batch_of(batch, torch.ones(3, dtype=torch.long), mask)).parts
    normals = Watched(build(supervised=True).train(), batch_of(batch, torch.zeros(3, dtype=torch.long), mask)).parts
    unlabelled = Watched(build(supervised=True).train(), batch_of(batch)).parts
    assert plain == given == normals == unlabelled
    assert not build().uses_defects and build(supervised=True).uses_defects


@pytest.mark.parametrize("masks", ["all", "some", "none"])
def test_targets_of_labelled_defects(masks):
    """Images: normal, a defect of one pixel, a large one, one known by its label (its mask is empty)."""
    label = torch.tensor([0, 1, 1, 1])
    mask = torch.zeros(4, 1, SIZE, SIZE, dtype=torch.bool)
    if masks == "all":
        mask[1, 0, 21, 6] = True  # of positions of 4 pixels: (5, 1)
        mask[2, 0, 8:16, 20:28] = True  # (2..3, 5..6)
        mask[3, 0, :, 47] = True  # (all, 11)
    elif masks == "some":
        mask[1, 0, 21, 6] = True
        mask[2, 0, 8:16, 20:28] = True
    defects = torch.zeros(4, 1, 12, 12, dtype=torch.bool)
    if masks != "none":
        defects[1, 0, 5, 1] = True
        defects[2, 0, 2:4, 5:7] = True
    if masks == "all":
        defects[3, 0, :, 11] = True
    unlocated = label.bool() & ~defects.flatten(1).any(1)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.rand(8, 1, 12, 12, generator=generator) > 0.6
    model = build(supervised=True, noise_std=1.0).train()
    seen = Watched(model, batch_of(images(4), label, None if masks == "none" else mask), drawn)

    twice, nowhere = torch.cat([defects, defects]), torch.cat([unlocated, unlocated])
    noisy = (seen.noise.detach() != 0).any(1, keepdim=True)
    allowed = drawn & ~twice & ~nowhere[:, None, None, None]
    assert torch.equal(noisy, allowed)
    target = twice | noisy
    assert float(seen.parts["focal"]) == pytest.approx(
        float(explicit_focal(seen.logits[~nowhere], target[~nowhere]).mean())
    )
    assert float(seen.parts["hinge"]) == pytest.approx(explicit_hinge(seen.logits[~nowhere], target[~nowhere]))
    anomalous = torch.tensor([bool(target[i].any()) or i % 4 > 0 for i in range(8)])
    assert float(seen.parts["classification"]) == pytest.approx(float(explicit_focal(seen.score, anomalous).mean()))


def test_a_step_of_labels_alone_leaves_no_parameter_out():
    model = build(supervised=True).train()
    seen = Watched(model, batch_of(images(2), torch.tensor([1, 1])))
    assert float(seen.parts["focal"]) == float(seen.parts["hinge"]) == 0 and not seen.noise.any()
    sum(seen.parts.values()).backward()
    assert all(p.grad is not None for p in model.learned_parameters())
    assert not any(p.grad.any() for p in model.segmentation.parameters())
    assert model.classification.last.weight.grad.any()


# ---- learning --------------------------------------------------------------------------------------------------------


def auroc(model, defect):
    """Of new images and of their pixels."""
    images, masks = tiles(40, 5, defect)
    with torch.inference_mode():
        scores = model(images)
    pixels = roc_auc_score(masks.numpy().ravel(), scores.map.numpy().ravel())
    return roc_auc_score(np.arange(40) % 2, scores.image.numpy()), pixels


def test_learns_from_normals(trained):
    model, (before, after) = trained["normals"]
    assert before.keys() == {"focal", "hinge", "classification"}
    assert all(after[name] < 0.5 * before[name] for name in before)
    fresh, learned = auroc(build().eval(), "foreign"), auroc(model, "foreign")
    assert min(learned) > 0.9 and min(np.subtract(learned, fresh)) > 0.1


def test_learns_more_from_defects_of_the_kind_to_come(trained):
    image, pixel = auroc(trained["normals"][0], "faded")
    with_masks, with_labels = auroc(trained["masks"][0], "faded"), auroc(trained["labels"][0], "faded")
    assert with_masks[0] > max(image + 0.1, 0.9) and with_masks[1] > pixel + 0.02
    assert with_labels[0] > max(image + 0.1, 0.9)
