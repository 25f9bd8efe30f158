"""A prepared data set: the pixels of the files, once, whole, and found again."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from torchvision.transforms.v2.functional import resize, to_dtype, to_image

from zoo.cli import main
from zoo.data import check_data, load_data, store
from zoo.data.datamodule import AnomalyDataModule
from zoo.errors import ZooError
from zoo.fit import evaluate, fit


def prepare(*argv):
    return main(["data", "prepare", *map(str, argv)])


def reference(path, size):
    """Grey float pixels as torchvision resizes them, independent of the store's code."""
    image = to_dtype(to_image(Image.open(path).convert("L")), scale=False, dtype=torch.float32)
    return resize(image, [size, size], antialias=True)[0].numpy()


@pytest.fixture
def stored(mvtec, tmp_path):
    assert prepare(mvtec, "--size", 48, "--out", tmp_path / "store", "--num-workers", 0) == 0
    return tmp_path / "store"


def test_pixels_are_those_of_the_files_to_half_a_grey_level(mvtec, stored):
    files, kept = load_data(str(mvtec)), load_data(str(stored))
    for split in ("train", "test"):
        assert list(files[split].with_format(None)["path"]) == list(kept[split].with_format(None)["path"])
        assert list(files[split].with_format(None)["label"]) == list(kept[split].with_format(None)["label"])
        for row in kept[split]:
            assert row["image"].dtype == np.uint8 and row["image"].shape == (48, 48)
            assert np.abs(row["image"] - reference(mvtec / row["path"], 48)).max() <= 0.5 + 1e-3
            if row["label"]:
                name = row["path"].replace("test/", "ground_truth/").replace(".png", "_mask.png")
                expected = np.asarray(Image.open(mvtec / name).resize((48, 48), Image.NEAREST)) > 127
                assert np.array_equal(row["mask"], expected)
            else:
                assert row["mask"] is None


@pytest.mark.parametrize("before", [(512, 512), (480, 640), (33, 70), (1000, 224)])
@pytest.mark.parametrize("after", [(224, 224), (96, 448), (33, 33), (7, 5)])
def test_the_faster_resize_is_that_of_the_models(before, after):
    image = torch.rand(before, generator=torch.Generator().manual_seed(0)) * 255
    expected = resize(image[None], after, antialias=True)[0]
    found = store.resize_grey(image.numpy(), after)  # white noise; torchvision places pixels in float32
    np.testing.assert_allclose(found, expected, atol=0.02, rtol=0)


def test_a_store_is_data_everywhere(mvtec, stored):
    spec = check_data(str(stored))
    assert spec.name == "tiles" and spec.counts == check_data(str(mvtec)).counts
    options = {"preset": "lite", "arguments": {"input_size": 48, "dims": 20}}
    model, record = fit("padim", str(stored), **options)
    module = AnomalyDataModule(load_data(str(stored)), num_workers=2, batch_size=4)
    assert len([name for batch in module.train_dataloader() for name in batch.name]) == 15
    here = evaluate(model, str(stored), record)["metrics"]
    there = evaluate(model, str(mvtec), record, {"resize": 48})["metrics"]
    assert here["image_auroc"] == pytest.approx(there["image_auroc"], abs=0.03)
    assert here["pixel_auroc"] == pytest.approx(there["pixel_auroc"], abs=0.005)


def test_sixteen_bits_stay(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "data" / "good").mkdir(parents=True)
    deep = rng.integers(0, 65536, (40, 40)).astype(np.uint16)
    tifffile.imwrite(tmp_path / "data" / "good" / "a.tif", deep)
    flat = rng.integers(0, 256, (40, 40)).astype(np.uint8)
    Image.fromarray(flat).save(tmp_path / "data" / "good" / "b.png")
    assert prepare(tmp_path / "data", "--size", 40, "--out", tmp_path / "store") == 0
    first, second = load_data(str(tmp_path / "store"))["train"]
    assert np.array_equal(first["image"], deep) and np.array_equal(second["image"], flat.astype(np.uint16) * 257)


def test_colour_is_averaged_and_said(tmp_path, capsys):
    (tmp_path / "data" / "good").mkdir(parents=True)
    image = np.random.default_rng(0).integers(0, 256, (40, 40, 3)).astype(np.uint8)
    Image.fromarray(image).save(tmp_path / "data" / "good" / "a.png")
    Image.fromarray(np.repeat(image[..., :1], 3, axis=2)).save(tmp_path / "data" / "good" / "b.png")
    assert prepare(tmp_path / "data", "--size", 40, "--out", tmp_path / "store") == 0
    assert "1 images are in colour" in capsys.readouterr().out
    first, second = load_data(str(tmp_path / "store"))["train"]
    assert np.abs(first["image"] - image.mean(2)).max() <= 0.5 + 1e-3
    assert np.array_equal(second["image"], image[..., 0])


def test_broken_images(tmp_path, capsys):
    (tmp_path / "data" / "good").mkdir(parents=True)
    for i in range(4):
        Image.fromarray(np.full((40, 40), 60 * i, np.uint8)).save(tmp_path / "data" / "good" / f"{i}.png")
    (tmp_path / "data" / "good" / "2.png").write_bytes(b"no image")
    for workers in (0, 2):
        assert prepare(tmp_path / "data", "--size", 40, "--out", tmp_path / "s", "--num-workers", workers) == 2
        assert "2.png" in capsys.readouterr().err and not (tmp_path / "s").exists()
    assert prepare(tmp_path / "data", "--size", 40, "--out", tmp_path / "s", "--skip-broken") == 0
    assert "Left out good/2.png" in capsys.readouterr().out
    rows = load_data(str(tmp_path / "s"))["train"]
    assert [row["image"][0, 0] for row in rows] == [0, 60, 180] and len(rows["path"]) == 3


def test_preparing_starts_without_torch_and_a_second_run_finds_it_whole(mvtec, tmp_path):
    code = (
        "import sys\nfrom zoo.cli import main\n"
        f"assert main(['data', 'prepare', {str(mvtec)!r}, '--out', {str(tmp_path / 's')!r}]) == 0\n"
        "assert 'torch' not in sys.modules"
    )
    outputs = [subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout for _ in "12"]
    assert b"Stored" in outputs[0] and b"prepared already, and whole" in outputs[1]


def test_damage_is_found(stored, capsys, mvtec):
    path = stored / "train-00000.npy"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    with pytest.raises(ZooError, match="train-00000.npy is missing or damaged"):
        load_data(str(stored))["train"][0]
    assert load_data(str(stored))["test"][0]["image"].shape == (48, 48)
    assert prepare(mvtec, "--size", 48, "--out", stored) == 2 and "damaged" in capsys.readouterr().err
    (stored / store.INDEX).write_text("{")
    with pytest.raises(ZooError, match="prepare the data anew"):
        check_data(str(stored))


def test_mistakes(stored, mvtec, tmp_path, capsys):
    Image.fromarray(np.zeros((40, 40), np.uint8)).save(tmp_path / "a.png")
    for argv, words in [
        ([mvtec, "--size", 48, "--out", tmp_path], "is no store"),
        ([mvtec, "--size", 49, "--out", stored], "other data or another size"),
        ([stored], "prepared already; use it"),
        ([mvtec, "--size", 8], "--size"),
        ([mvtec, "--num-workers", -1], "--num-workers"),
        (["synthetic:trian=3"], "train"),
    ]:
        assert prepare(*argv) == 2, argv
        captured = capsys.readouterr()
        assert words in captured.err and captured.err.count("\n") == 1
    assert main(["data", "prepair", "x"]) == 2 and "zoo data prepare" in capsys.readouterr().err


def test_killed_and_resumed(tmp_path, zoo_home):
    data = "synthetic:train=1400,good=9,defect=9,size=32"
    command = [sys.executable, "-m", "zoo.cli", "data", "prepare", data, "--size", "32", "--num-workers", "0", "--out"]
    subprocess.run([*command, tmp_path / "whole"], check=True, stdout=subprocess.DEVNULL)
    job = subprocess.Popen([*command, tmp_path / "killed"], stdout=subprocess.DEVNULL)
    first = tmp_path / ".killed.partial" / "train-00000.json"
    while not first.exists() and job.poll() is None:
        time.sleep(0.005)
    job.send_signal(signal.SIGKILL)
    job.wait()
    assert first.exists() and not (tmp_path / "killed").exists()
    written = os.stat(first.with_suffix(".npy")).st_mtime_ns
    subprocess.run([*command, tmp_path / "killed"], check=True, stdout=subprocess.DEVNULL)
    assert os.stat(tmp_path / "killed" / "train-00000.npy").st_mtime_ns == written  # not done again
    files = [{p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("whole", "killed")]
    assert files[0] == files[1] and not (tmp_path / ".killed.partial").exists()
    blocks = json.loads((tmp_path / "killed" / store.INDEX).read_text())["blocks"]
    assert [len(block["paths"]) for block in blocks["train"]] == [512, 512, 376]


def test_two_at_once(tmp_path, capsys):
    """The second one is told, whether the first one lives; nothing of the lock is left behind."""
    from zoo.cli import main

    command = ["data", "prepare", "synthetic:train=9,size=32", "--size", "32", "--out", str(tmp_path / "store")]
    held = f"lock = FileLock({str(tmp_path / '.store.lock')!r}); lock.acquire(); print('held', flush=True)"
    holder = f"from filelock import FileLock; import time; {held}; time.sleep(99)"
    job = subprocess.Popen([sys.executable, "-c", holder], stdout=subprocess.PIPE, text=True)
    assert job.stdout.readline() == "held\n"
    assert main(command) == 2 and "Another process prepares" in capsys.readouterr().err
    job.kill()
    job.wait()
    assert main(command) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
