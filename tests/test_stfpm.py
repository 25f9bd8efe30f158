"""STFPM against loops, counts and autograd of an independent formula."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from zoo.data import load_data
from zoo.errors import ZooError
from zoo.fit import evaluate, fit
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


def test_loss_is_the_sum_over_layers_of_mean_squared_distances(tiny):
    model, teacher, student = tiny
    loss = model.training_step(Batch(torch.rand(2, 1, 32, 32), ["a", "b"]), 0)
    assert float(loss.detach()) == pytest.approx(sum(d.mean() for d in squared_distances(teacher, student)), rel=1e-5)


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


def test_student_starts_at_random_by_the_seed():
    first, same, other = (STFPM(backbone=LITE0, input_size=32, seed=seed).student.state_dict() for seed in (0, 0, 1))
    teacher = STFPM(backbone=LITE0, input_size=32).features.trunk.state_dict()
    assert first.keys() == {f"trunk.{name}" for name in teacher}
    weights = [name for name in first if name.endswith("conv_pw.weight")]
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
    assert PRESETS["original"]["model"]["input_size"] == 256 and "crop" not in PRESETS["original"]["data"]
    assert PRESETS["mvtec_steps"]["trainer"]["max_steps"] == 100 * 8  # 240 images, batches of 32


@pytest.mark.parametrize("wrong", [{"lr": 0.0}, {"momentum": 1.0}, {"weight_decay": -1.0}])
def test_mistakes_get_a_sentence(wrong):
    with pytest.raises(ZooError, match=f"--{next(iter(wrong)).replace('_', '-')}"):
        STFPM(backbone=LITE0, **wrong)


def test_trained_beats_untrained(mvtec):
    options = dict(preset="lite", arguments={"input_size": 64})
    figures = []
    for steps in (1, 40):
        model, record = fit("stfpm", str(mvtec), trainer_options={"max_steps": steps}, **options)
        figures.append(evaluate(model, str(mvtec), record)["metrics"])
    first, last = record["training"]["losses"][0], record["training"]["losses"][-1]
    assert all(last[part] < 0.8 * first[part] for part in ("loss_layer1", "loss_layer2", "loss_layer3"))
    assert figures[1]["image_auroc"] > 0.9 and figures[1]["pixel_ap"] > figures[0]["pixel_ap"] + 0.05
    assert load_data(str(mvtec))["test"].num_rows == 12
