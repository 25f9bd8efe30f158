"""The demo's models: loaded once, shared by all who ask, and no failure of one is another's."""

import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from zoo import hub
from zoo.cli import main
from zoo.demo import engine as engines
from zoo.demo.engine import Engine
from zoo.errors import ZooError


@pytest.fixture(scope="module")
def home(mvtec, tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZOO_HOME", str(home))
        fit = ("fit", "padim", "--preset", "lite", "--input-size", "64", "--dims", "20", "--data", str(mvtec))
        for name in ("a", "b"):
            assert main([*fit, "--name", name]) == 0
    return home


@pytest.fixture(autouse=True)
def registry(home, monkeypatch):
    monkeypatch.setenv("ZOO_HOME", str(home))


def images(mvtec):
    return sorted((mvtec / "test").rglob("*.png"))


def test_many_at_once_get_what_each_would_get_alone(mvtec, monkeypatch):
    """Batches of up to eight, as on a GPU, of images of two sizes from eight threads."""
    monkeypatch.setitem(engines.BATCH, "cpu", 8)
    engine = Engine()
    model, files = engine.model("a"), images(mvtec)
    brought = [model.bring(file) for file in files]
    brought += [model.bring(np.asarray(Image.open(file))[:80, :72].copy()) for file in files]
    alone = [model.predict_brought([image], 1)[0] for image in brought]
    sizes, served = [], engine._get("a")
    compute = served._compute
    served._compute = lambda model, group: sizes.append(len(group)) or compute(model, group)
    with ThreadPoolExecutor(24) as pool, engine._get("a").turn:  # all of them wait for one turn
        asked = [pool.submit(engine.predict, "a", [image]) for image in brought]
        while len(engine._get("a").waiting) < len(brought):
            pass
    found = [one.result()[0] for one in asked]
    for one, other in zip(found, alone, strict=True):
        assert one.score == pytest.approx(other.score, rel=1e-4) and one.map.shape == other.map.shape
        assert np.allclose(one.map, other.map, rtol=1e-3, atol=1e-3)
    assert sum(sizes) == len(brought) and max(sizes) > 1 and len(sizes) < len(brought)


def test_an_image_that_fails_fails_alone(mvtec, monkeypatch):
    monkeypatch.setitem(engines.BATCH, "cpu", 8)
    engine = Engine()
    model = engine.model("a")
    good = [model.bring(file) for file in images(mvtec)[:3]]
    bad = good[0]._replace(image=torch.full_like(good[0].image, torch.nan))
    with ThreadPoolExecutor(8) as pool, engine._get("a").turn:
        asked = [pool.submit(engine.predict, "a", [image]) for image in (good[0], bad, *good[1:])]
        while len(engine._get("a").waiting) < 4:
            pass
    with pytest.raises(ZooError, match="no number"):
        asked[1].result()
    scores = [asked[i].result()[0].score for i in (0, 2, 3)]
    assert scores == pytest.approx([model.predict_brought([image])[0].score for image in good], rel=1e-4)
    assert not engine._get("a").waiting


def test_a_model_is_loaded_once_however_many_ask(monkeypatch):
    loaded, load = [], hub.from_pretrained
    monkeypatch.setattr(hub, "from_pretrained", lambda name: loaded.append(name) or load(name))
    engine, gate = Engine(["b"]), threading.Barrier(6)

    def ask():
        gate.wait()
        return engine.model("b")

    with ThreadPoolExecutor(6) as pool:
        models = [one.result() for one in [pool.submit(ask) for _ in range(6)]]
    assert loaded == ["b"] and all(model is models[0] for model in models)
    assert models[0].training is False


def test_few_models_are_kept_and_others_come_back(mvtec, monkeypatch):
    monkeypatch.setattr(engines, "KEPT", 1)
    engine = Engine()
    first, image = engine.model("a"), images(mvtec)[0]
    score = engine.predict("a", [first.bring(image)])[0].score
    engine.model("b")
    assert list(engine._served) == ["b"]
    assert engine.predict("a", [first.bring(image)])[0].score == score
    assert engine.model("a") is not first


def test_names(home):
    assert Engine().names() == ["a", "b"]
    named = Engine(["b"])
    assert named.names() == ["b"]
    with pytest.raises(ZooError, match="There is no model a here; choose one of b"):
        named.model("a")
    named.add("a")
    assert named.names() == ["b", "a"] and named.model("a")


def test_a_folder_is_called_by_its_last_part(home, tmp_path):
    """Two of one name are told apart; where they are is nobody's business."""
    places = [str(home / "models/a"), str(tmp_path / "a")]
    shutil.copytree(*places)
    engine = Engine([*places, "b"])
    assert engine.names() == ["a", "a (2)", "b"] and engine.source("a (2)") == places[1]
    assert engine.model("a (2)").folder == tmp_path / "a" and engine.model("a") is not engine.model("a (2)")
    with pytest.raises(ZooError, match="There is no model"):
        engine.model(places[0])


def test_a_model_that_is_damaged_leaves_the_others_alone(home, mvtec):
    damaged = home / "models/damaged"
    damaged.mkdir()
    (damaged / "config.json").write_text("{")
    try:
        engine = Engine()
        assert engine.names() == ["a", "b", "damaged"]
        with pytest.raises(ZooError):
            engine.model("damaged")
        assert engine.model("a")
    finally:
        (damaged / "config.json").unlink()
        damaged.rmdir()


def test_a_model_that_is_another_one_by_now_is_loaded_anew(mvtec):
    engine = Engine()
    first = engine.model("a")
    engine.add("a")
    assert engine.model("a") is not first


ZERO = """
import numpy as np
from zoo.demo import engine as engines
from zoo.demo.engine import Engine

engine = Engine(["a"])
model = engine.model("a")
image = model.bring(np.zeros((64, 64), np.uint8))
alone = model.predict_brought([image])[0].score
import spaces
assert spaces.calls == []
assert engine.predict("a", [image])[0].score == alone and spaces.calls == [1]
engine.add("b")  # made later: the lent process doesn't know it
engine.predict("b", [engine.model("b").bring(np.zeros((64, 64), np.uint8))])
assert spaces.calls == [1] and engine.training_device == "cpu"
"""

SPACES = """
import copy

calls = []


def GPU(duration):
    def lent(function):
        def call(*arguments):
            calls.append(1)
            return copy.deepcopy(function(*copy.deepcopy(arguments)))
        return call
    return lent
"""


def test_on_zero_gpu_a_call_is_lent_the_gpu(home, tmp_path):
    """By a stand-in for the `spaces` package, whose calls get copies, as another process does there."""
    (tmp_path / "spaces.py").write_text(SPACES)
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"ZOO_HOME": str(home), "SPACES_ZERO_GPU": "1", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", ZERO], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
