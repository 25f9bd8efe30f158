"""STFPM against loops, counts and autograd of an independent formula."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from zoo.data import load_data
from zoo.data.datamodule import AnomalyDataModule
from zoo.errors import ZooError
from zoo.evaluation import evaluate
from zoo.fit import fit
from zoo.hub import from_pretrained
from zoo.methods import create_model
from zoo.methods.stfpm import PRESETS, STFPM
from zoo.module import Batch
from zoo.nn.features import architecture_only

LITE0 = "tf_efficientnet_lite0"


class Fixed(nn.Module):
    """Stands for a network: gives the same maps for whatever images."""

    def __init__(self, maps):
        super().__init__()
        self.maps = [nn.Parameter(m) for m in maps]

    def forward(self, images):
        return self.maps


@pytest.fixture
def tiny():
    """A model whose teacher and student give known maps of 4, 2 and 1 positions a side."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 3, 4, 4), (2, 5, 2, 2), (2, 7, 1, 1)]
    teacher, student = ([torch.randn(s, generator=generator) for s in shapes] for _ in range(2))
    model = STFPM(backbone=LITE0, input_size=32)
    model.features, model.student = Fixed(teacher), Fixed(student)
    return model, [m.numpy() for m in teacher], [m.numpy() for m in student]


def squared_distances(teacher, student):
    """By loops: (B, h, w) a layer."""
    found = []
    for t, s in zip(teacher, student, strict=True):
        b, _, h, w = t.shape
        d = np.zeros((b, h, w))
        for i, y, x in np.ndindex(b, h, w):
            one, other = t[i, :, y, x].astype(float), s[i, :, y, x].astype(float)
            d[i, y, x] = np.sum((one / np.linalg.norm(one) - other / np.linalg.norm(other)) ** 2)
        found.append(d)
    return found


def loss_parts(model, images):
    """The parts of the loss of a batch, by name, in the model's mode."""
    model.total_loss = lambda **parts: {name: float(part) for name, part in parts.items()}
    with torch.no_grad():
        parts = model.training_step(Batch(images, []), 0)
    del model.total_loss
    return parts


def test_loss_is_the_sum_over_layers_of_mean_squared_distances(tiny):
    model, teacher, student = tiny
    loss = model.training_step(Batch(torch.rand(2, 1, 32, 32), ["a", "b"]), 0)
    means = [d.mean() for d in squared_distances(teacher, student)]
    assert float(loss.detach()) == pytest.approx(sum(means), rel=1e-5)
    parts = loss_parts(model, torch.rand(2, 1, 32, 32))
    assert parts == pytest.approx(dict(zip(("layer1", "layer2", "layer3"), means, strict=True)), rel=1e-5)


def test_map_is_the_product_over_layers_and_the_score_its_maximum(tiny):
    model, teacher, student = tiny
    with torch.no_grad():
        scores = model(torch.rand(2, 1, 32, 32))
    layers = [torch.tensor(d)[:, None] for d in squared_distances(teacher, student)]
    first, second, third = (F.interpolate(d, (4, 4), mode="bilinear", align_corners=False) for d in layers)
    expected = F.interpolate(first * second * third, (32, 32), mode="bilinear", align_corners=False)
    torch.testing.assert_close(scores.map.double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scores.image.double(), expected.amax((1, 2, 3)), rtol=1e-4, atol=1e-5)


def test_distances_lie_in_0_to_4(tiny):
    model, teacher, _ = tiny
    model.student = Fixed([-torch.tensor(m) for m in teacher])
    assert all(torch.allclose(d, torch.tensor(4.0), atol=1e-5) for d in model.distances(torch.rand(2, 1, 32, 32)))
    model.student = Fixed([3 * torch.tensor(m) for m in teacher])
    assert all(d.abs().max() < 1e-6 for d in model.distances(torch.rand(2, 1, 32, 32)))


def test_features_in_bfloat16_are_compared_in_float32(tiny):
    """Of two networks that nearly agree: bfloat16 has no digits left for what they differ by."""
    model, teacher, _ = tiny
    generator = torch.Generator().manual_seed(1)
    teacher = [torch.tensor(m).bfloat16() for m in teacher]
    student = [(m + 0.05 * torch.randn(m.shape, generator=generator)).bfloat16() for m in teacher]
    model.features, model.student = Fixed(teacher), Fixed(student)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = model.distances(torch.rand(2, 1, 32, 32))
    expected = squared_distances([m.float().numpy() for m in teacher], [m.float().numpy() for m in student])
    for d, by_hand in zip(found, expected, strict=True):
        assert d.dtype == torch.float32
        np.testing.assert_allclose(d[:, 0].numpy(), by_hand, rtol=1e-3, atol=1e-7)


def test_input_need_not_be_square():
    """Nor of the images' shape; rows stay rows."""
    model = STFPM(backbone=LITE0, input_size=[64, 128]).eval()
    images = torch.rand(2, 3, 80, 60, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert [tuple(d.shape) for d in model.distances(images)] == [(2, 1, 16, 32), (2, 1, 8, 16), (2, 1, 4, 8)]
        scores = model(images)
    assert scores.map.shape == (2, 1, 80, 60) and scores.map.isfinite().all()


def test_roi_is_where_the_image_score_looks(tiny):
    model, *_ = tiny
    roi = torch.zeros(2, 1, 32, 32, dtype=torch.bool)
    roi[0, :, 4:9, 20:] = True
    roi[1, :, 30:, :2] = True
    with torch.no_grad():
        scores, whole = model(torch.rand(2, 1, 32, 32), roi), model(torch.rand(2, 1, 32, 32), torch.ones_like(roi))
    expected = [float(scores.map[0, :, 4:9, 20:].max()), float(scores.map[1, :, 30:, :2].max())]
    assert scores.image.tolist() == expected and (scores.image < whole.image).all()


def test_gradient_is_that_of_the_formula():
    model = STFPM(backbone=LITE0, input_size=64).train()
    images = torch.rand(3, 1, 64, 64, generator=torch.Generator().manual_seed(1))
    model.training_step(Batch(images, list("abc")), 0).backward()
    got = [p.grad.clone() for p in model.student.parameters()]
    model.zero_grad()
    x = model.prepare(images)
    loss = 0
    for t, s in zip(model.features(x), model.student(x), strict=True):
        loss = loss + (2 - 2 * F.cosine_similarity(t, s, dim=1)).mean()  # |a - b|^2 of unit vectors
    loss.backward()
    for one, p in zip(got, model.student.parameters(), strict=True):
        torch.testing.assert_close(one, p.grad, rtol=1e-3, atol=1e-5 * float(p.grad.abs().max() + 1))


def test_resnet18_has_2_782_784_parameters_to_learn():
    with architecture_only():
        model = STFPM()
    assert sum(p.numel() for p in model.learned_parameters()) == 2_782_784
    assert {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad} == {"student"}


def test_student_starts_as_a_new_network_of_torchvision():
    """Which the original took: every BatchNorm at 1, where timm lets residual branches start at 0."""
    with architecture_only():
        student = STFPM().student.trunk.state_dict()
    reference = torchvision.models.resnet18(weights=None).state_dict()
    assert {name.split(".")[0] for name in student} == {"conv1", "bn1", "layer1", "layer2", "layer3"}
    for name, value in student.items():
        if value.ndim == 4:  # a convolution: He's normal distribution by its outputs, at least 8192 values
            assert float(value.std()) == pytest.approx((2 / (len(value) * value[0, 0].numel())) ** 0.5, rel=0.05), name
        else:
            assert torch.equal(value, reference[name]), name


def test_student_starts_at_random_by_the_seed():
    first, same, other = (STFPM(backbone=LITE0, input_size=32, seed=seed).student.state_dict() for seed in (0, 0, 1))
    teacher = STFPM(backbone=LITE0, input_size=32).features.trunk.state_dict()
    assert first.keys() == {f"trunk.{name}" for name in teacher}
    weights = [name for name, value in first.items() if value.ndim == 4]
    assert len(weights) == 1 + 2 + 10 * 3  # stem, first block, and the others up to stride 16
    for name in weights:
        assert torch.equal(first[name], same[name]) and not torch.equal(first[name], other[name])
        assert not torch.equal(first[name], teacher[name.removeprefix("trunk.")])


def test_the_student_learns_and_the_teacher_does_not():
    model = STFPM(backbone=LITE0, input_size=64).train()
    norm = next(m for m in model.student.modules() if isinstance(m, nn.BatchNorm2d))
    assert norm.training and not any(m.training for m in model.features.modules())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = model.configure_optimizers()
    (group,) = optimizer.param_groups
    assert (group["lr"], group["momentum"], group["weight_decay"], group["nesterov"]) == (0.4, 0.9, 1e-4, False)
    assert {id(p) for p in group["params"]} == {id(p) for p in model.student.parameters()}
    model.training_step(Batch(torch.rand(4, 1, 64, 64), list("abcd")), 0).backward()
    optimizer.step()
    for name, value in model.state_dict().items():
        moved = not torch.equal(value, before[name])
        assert moved == name.startswith("student."), name


def test_presets():
    assert PRESETS["original"]["data"]["batch_size"] == PRESETS["paper224"]["data"]["batch_size"] == 32
    assert PRESETS["original"]["trainer"]["max_epochs"] == PRESETS["paper224"]["trainer"]["max_epochs"] == 100
    assert PRESETS["original"]["model"]["input_size"] == PRESETS["original"]["data"]["resize"] == 256
    assert "crop" not in PRESETS["original"]["data"] and PRESETS["original"]["trainer"]["select"] == "normal"
    assert PRESETS["mvtec_steps"]["trainer"]["max_steps"] == 100 * 8  # 240 images, batches of 32


@pytest.mark.parametrize("wrong", [{"lr": 0.0}, {"momentum": 1.0}, {"weight_decay": -1.0}])
def test_mistakes_get_a_sentence(wrong):
    with pytest.raises(ZooError, match=f"--{next(iter(wrong)).replace('_', '-')}"):
        STFPM(backbone=LITE0, **wrong)


def test_training_teaches_each_layer_and_finds_defects(mvtec):
    untrained = create_model("stfpm", "lite", input_size=64).eval()
    options = dict(arguments={"input_size": 64}, trainer_options={"max_steps": 40})
    trained, _ = fit("stfpm", str(mvtec), preset="lite", **options)
    held_out = AnomalyDataModule(load_data(str(mvtec)), input_size=(64, 64)).holdout_dataloader()
    images = next(iter(held_out))[0].image  # normal, and not seen by the fit
    before, after = loss_parts(untrained, images), loss_parts(trained, images)
    assert all(after[layer] < 0.5 * before[layer] for layer in ("layer1", "layer2", "layer3")), (before, after)
    first, last = (evaluate(model, str(mvtec))["metrics"] for model in (untrained, trained))
    assert last["image_auroc"] > 0.9 and last["pixel_ap"] > first["pixel_ap"] + 0.3


def test_only_what_the_layers_need_is_learned():
    """A branched backbone has parts that no wanted layer depends on; two processes would wait for their gradients."""
    with architecture_only():
        model = STFPM(backbone="hrnet_w18_small", input_size=64)
    model.training_step(Batch(torch.rand(2, 1, 64, 64), ["a", "b"]), 0).backward()
    assert all(p.grad is not None for p in model.learned_parameters())
    assert len(model.learned_parameters()) < len(list(model.student.parameters()))
    assert all(p.requires_grad for p in STFPM(backbone=LITE0, input_size=64).student.parameters())


def test_sizes_that_can_not_be_learned_from_are_told():
    with architecture_only():
        with pytest.raises(ZooError, match="--input-size is above 32"):
            STFPM(backbone=LITE0, layers=[4], input_size=32)
        with pytest.raises(ZooError, match="--input-size 224"):
            STFPM(backbone="vit_tiny_patch16_224", layers=[3, 6, 9], input_size=64)


def test_a_model_is_loaded_where_nothing_has_gradients(tmp_path):
    """The student tries itself out while it is built."""
    model = STFPM(backbone=LITE0, input_size=64).eval()
    place = model.save_pretrained(tmp_path / "model")
    with torch.inference_mode():
        again = from_pretrained(place)
    assert all(own.equal(other) for own, other in zip(model.parameters(), again.parameters(), strict=True))
