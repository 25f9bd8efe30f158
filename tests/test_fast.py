"""The fast mode: twins compute what their networks do, distances are finished in float32, scores stay near."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from torch import nn

from zoo import callbacks, checkpoint
from zoo.cli import main
from zoo.data import load_data
from zoo.evaluation import evaluate
from zoo.fit import fit
from zoo.hub import from_pretrained
from zoo.image import read_image
from zoo.nn import fast
from zoo.nn.coreset import nearest
from zoo.nn.fast import fast_mode, forget_twins, infer
from zoo.run import RunOptions
from zoo.trainer import make_trainer

CPU = torch.device("cpu")


@pytest.fixture(params=["bfloat16", "float32"])
def half(request, monkeypatch):
    """What the device computes in."""
    has = request.param == "bfloat16"
    monkeypatch.setattr(fast, "has_bfloat16", lambda device: has)
    return getattr(torch, request.param)


def random_statistics(network):
    """BatchNorm as after a training: far from the identity."""
    generator = torch.Generator().manual_seed(0)
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for tensor, low, high in (
                (norm.weight, 0.5, 2),
                (norm.bias, -1, 1),
                (norm.running_mean, -1, 1),
                (norm.running_var, 0.5, 2),
            ):
                tensor.data = low + (high - low) * torch.rand(tensor.shape, generator=generator)
    return network.eval()


def stack():
    return random_statistics(
        nn.Sequential(
            nn.Conv2d(3, 8, 3, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.ConvTranspose2d(8, 4, 2, 2),
            nn.BatchNorm2d(4),
        )
    )


class Misleading(nn.Module):
    """Its BatchNorm stands behind the convolution and comes before it."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x):
        return self.conv(self.norm(x))


def in_fast_mode(network, *inputs):
    with torch.inference_mode(), fast_mode(CPU):
        return infer(network, *inputs)


@pytest.mark.parametrize("make", [stack, lambda: random_statistics(Misleading())])
def test_a_twin_computes_what_its_network_does(make, half):
    network, x = make(), torch.rand(2, 3, 9, 9)
    with torch.no_grad():
        exact = network(x)
    found = in_fast_mode(network, x)
    assert found.dtype == half
    within = 2e-2 if half == torch.bfloat16 else 1e-5
    assert (found.float() - exact).abs().max() <= within * exact.abs().max()
    assert all(p.dtype == torch.float32 and p.requires_grad for p in network.parameters())


def test_new_weights_are_seen(half):
    network, x = stack(), torch.rand(1, 3, 9, 9)
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    before = in_fast_mode(network, x)
    assert in_fast_mode(network, x).equal(before)
    with torch.no_grad():
        network[0].weight.mul_(2)
    changed = in_fast_mode(network, x)
    network.load_state_dict(state, assign=True)
    assert not changed.equal(before) and in_fast_mode(network, x).equal(before)


def test_what_learns_is_no_twin(half):
    network, x = stack(), torch.rand(1, 3, 9, 9)
    exact = network(x)
    assert infer(network, x).equal(exact)  # not in the fast mode
    with fast_mode(CPU):
        kept = infer(network, x)
        assert kept.requires_grad  # a gradient is wanted
        kept.float().sum().backward()
    network.train()
    with torch.no_grad(), fast_mode(CPU):
        infer(network, x)
    assert network[1].num_batches_tracked == 1


@pytest.mark.parametrize("k", [1, 3])
def test_distances_are_finished_in_float32(k):
    """They are the true ones of the vectors that are found, which are as near as rounded products can tell."""
    generator = torch.Generator().manual_seed(0)
    bank = 5 + torch.randn(5000, 64, generator=generator)
    queries = bank[:300] + 0.5 * torch.randn(300, 64, generator=generator)
    with fast_mode(CPU):
        distance, index = nearest(queries, bank, k, fast=True)
    exact = cdist(queries.double(), bank.double())
    assert np.allclose(distance, np.take_along_axis(exact, index.numpy(), 1), rtol=1e-5)
    assert np.all(np.diff(distance.numpy()) >= 0)
    assert np.all(distance.numpy() <= 1.01 * np.sort(exact)[:, :k])
    assert (np.sort(exact)[:, :k] >= distance.numpy() - 1e-4).mean() > 0.98  # nearly all are the nearest themselves


def test_a_bank_that_changes_is_seen():
    bank = torch.eye(4)
    with fast_mode(CPU):
        assert nearest(bank[:1], bank, 1, fast=True)[1].tolist() == [[0]]
        bank[[0, 1]] = bank[[1, 0]]
        assert nearest(bank[1:2], bank, 1, fast=True)[1].tolist() == [[1]]
        assert nearest(torch.eye(4)[:1], bank, 4, fast=True)[1].tolist()[0][0] == 1


def test_a_model_is_calibrated_and_scores_in_the_fast_mode(zoo_home):
    """Its record says so, a Trainer and `predict` give the same, and float32 is told to hold no rate."""
    data = "synthetic:train=30,good=25,defect=10,size=96"
    arguments = {"input_size": 96, "bank_size": 300}
    fit("patchcore", data, "quick", "lite", arguments, home=zoo_home)
    assert make_trainer(RunOptions(precision="fast")).precision == "fast"
    rate = ["--false-alarm-rate", "0.1", "--precision", "fast"]
    assert main(["calibrate", "quick", "--data", data, *rate]) == 0
    assert checkpoint.read_config(zoo_home / "models/quick")["precision"] == "fast"
    model = from_pretrained("quick")
    assert known_rate(model) == 0.1
    evaluate(model, data)
    rows = load_data(data)["test"]
    scored = {name: score for name, _, score in model.scored}
    for row in (rows[0], rows[30]):
        image = read_image(row["image"])
        judged = model.predict(image)
        assert judged.score == pytest.approx(scored[row["path"]], rel=1e-3) and judged.is_anomalous is not None
        model.precision = "32-true"
        plain = model.predict(image)
        model.precision = "fast"
        assert plain.is_anomalous is None and plain.score == pytest.approx(judged.score, rel=0.05)
        assert plain.score != judged.score


def known_rate(model):
    known = model.thresholds()
    return known.false_alarm_rate if known.calibrated else None


@pytest.mark.parametrize("method", ["cfa", "fastflow", "supersimplenet"])
def test_a_fit_sees_what_it_has_learned(method, zoo_home, monkeypatch):
    """A fused optimiser changes weights without torch counting it: each step is measured by twins of its own."""
    measured = []

    def surprise(module, batches):
        value = real(module, batches)
        forget_twins(module)
        measured.append((value, real(module, batches)))
        return value

    real = callbacks._surprise
    monkeypatch.setattr(callbacks, "_surprise", surprise)
    data, steps = "synthetic:train=30,good=1,defect=1,size=64", {"max_steps": 4, "select": "normal"}
    run = RunOptions(precision="fast")
    model, _ = fit(method, data, method, "lite", {"input_size": 64}, {"batch_size": 4}, steps, run, home=zoo_home)
    image = torch.rand(1, 64, 64)
    loaded = from_pretrained(method)
    assert model.predict(image).score == pytest.approx(loaded.predict(image).score, rel=1e-5)
    assert len(measured) == 4 and len({value for value, _ in measured}) == 4
    assert [value for value, _ in measured] == pytest.approx([again for _, again in measured], rel=1e-6)


def test_what_is_not_finite_makes_no_difference(half):
    """The first inputs of a twin may be anything; a network whose weights are ruined says so by its outputs."""
    network, x = random_statistics(Misleading()), torch.rand(1, 3, 4, 4)
    in_fast_mode(network, torch.full_like(x, torch.inf))
    with torch.no_grad():
        exact = network(x)
    assert (in_fast_mode(network, x).float() - exact).abs().max() <= 2e-2 * exact.abs().max()
    with torch.no_grad():
        network.conv.weight.fill_(torch.nan)
    assert in_fast_mode(network, x).isnan().all()


def test_precision_is_one_of_those_there_are(zoo_home):
    assert main(["fit", "padim", "--data", "synthetic", "--name", "x", "--precision", "quick"]) == 2
