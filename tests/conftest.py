"""Every test runs offline, with a registry of its own."""

import contextlib
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before any import of the hub's client
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before any import of torch: two workers share the cores

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(autouse=True)
def zoo_home(tmp_path, monkeypatch):
    monkeypatch.setenv("ZOO_HOME", str(tmp_path / "zoo-home"))
    return tmp_path / "zoo-home"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub of the test's own, which the client here and in processes started here uses, with a token that writes."""
    from hub_server import HubServer, use
    from huggingface_hub.utils import close_session

    with HubServer(tmp_path / "hub-server") as server:
        use(server, tmp_path / "hf-home", monkeypatch)
        yield server
    close_session()


@pytest.fixture(scope="module")
def runs_here():
    """Runs of a benchmark in this process, to save the time that another one takes to start."""
    from zoo import trial
    from zoo.errors import ZooError
    from zoo.launch import Launcher
    from zoo.reasons import SENTENCE

    def run(launcher, job, log):
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "w") as said, contextlib.redirect_stdout(said):
            try:
                trial.run(job)
                return 0, False
            except ZooError as error:
                print(f"{SENTENCE}{error}")
                return 2, False

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Launcher, "run", run)
        yield


@pytest.fixture(scope="session")
def mvtec(tmp_path_factory):
    """A small MVTec-style folder: 30 + 6 textured normals, 6 with a bright square and its mask, 96 x 96, grey."""
    root = tmp_path_factory.mktemp("data") / "tiles"
    rng = np.random.default_rng(0)
    stripes = np.tile(np.where(np.arange(96) % 16 < 8, 150, 70), (96, 1))

    def write(folder, i, defect=False):
        image = np.clip(np.roll(stripes, rng.integers(16), axis=1) + rng.normal(0, 6, (96, 96)), 0, 255)
        if defect:
            y, x = rng.integers(10, 66, 2)
            image[y : y + 18, x : x + 18] = rng.normal(220, 25, (18, 18)).clip(0, 255)
            mask = np.zeros((96, 96), np.uint8)
            mask[y : y + 18, x : x + 18] = 255
            (root / "ground_truth/square").mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask).save(root / f"ground_truth/square/{i:03d}_mask.png")
        (root / folder).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.astype(np.uint8)).save(root / folder / f"{i:03d}.png")

    for i in range(30):
        write("train/good", i)
    for i in range(6):
        write("test/good", i)
        write("test/square", i, defect=True)
    return root
