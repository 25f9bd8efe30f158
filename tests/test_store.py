"""A prepared data set: the pixels of the files, once, whole, and found again."""

import copy
import json
import os
import shutil
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
from zoo.data import check_data, load_data, store, store_writer
from zoo.data.datamodule import AnomalyDataModule
from zoo.errors import ZooError
from zoo.evaluation import evaluate
from zoo.fit import fit


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
    found = store_writer.resize_grey(image.numpy(), after)  # white noise; torchvision places pixels in float32
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
    for metric in ("image_auroc", "pixel_auroc"):
        assert here[metric] == pytest.approx(there[metric], abs=0.001)


def test_scores_move_as_by_noise_of_the_roundings_size(mvtec, stored):
    """Rounding is noise of +-0.5 grey levels, and nothing else tells a store from its files."""
    options = {"preset": "lite", "arguments": {"input_size": 48, "dims": 20}}
    model, _ = fit("padim", str(mvtec), **options)
    rng, by_store, by_noise = np.random.default_rng(0), [], []
    for row in [row for split in load_data(str(stored)).values() for row in split]:
        image = reference(mvtec / row["path"], 48)
        score = model.predict(image / 255).score
        by_store.append(abs(model.predict(row["image"]).score - score))
        noises = rng.uniform(-0.5, 0.5, (5, 48, 48)).astype(np.float32)
        by_noise.append(np.mean([abs(model.predict(np.clip(image + n, 0, 255) / 255).score - score) for n in noises]))
    assert 0.5 < np.mean(by_store) / np.mean(by_noise) < 1.5


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

    assert prepare(tmp_path / "data", "--size", 40, "--out", tmp_path / "s", "--skip-broken") == 0
    captured = capsys.readouterr()
    assert "Left out good/2.png" in captured.out and "prepared already" in captured.out
    assert prepare(tmp_path / "data", "--size", 40, "--out", tmp_path / "s") == 2
    captured = capsys.readouterr()
    assert "lacks good/2.png" in captured.err and "--skip-broken" in captured.err and "whole" not in captured.out


def test_a_store_without_normals_is_refused(tmp_path, capsys):
    (tmp_path / "data" / "good").mkdir(parents=True)
    (tmp_path / "data" / "good" / "a.png").write_bytes(b"no image")
    command = [tmp_path / "data", "--size", 40, "--out", tmp_path / "s", "--skip-broken"]
    assert prepare(*command) == 2
    assert "no normal image to train on" in (error := capsys.readouterr().err) and "good/a.png" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]
    Image.fromarray(np.zeros((40, 40), np.uint8)).save(tmp_path / "data" / "good" / "a.png")
    assert prepare(*command) == 0


@pytest.mark.parametrize("edited", ["good/a.bmp", "masks/b.bmp"])
def test_files_that_changed_are_noticed(edited, tmp_path, capsys):
    """Same names, same sizes, other pixels; only the files tell, so a store goes on without them."""
    data, place = tmp_path / "data", tmp_path / "store"
    for name in ("good/a.bmp", "good/c.bmp", "bad/b.bmp", "masks/b.bmp"):
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((40, 40), 255, np.uint8)).save(data / name)
    command = [data, "--size", 40, "--out", place]
    assert prepare(*command) == 0 and prepare(*command) == 0
    size = (data / edited).stat().st_size
    Image.fromarray(np.full((40, 40), 200, np.uint8)).save(data / edited)
    assert (data / edited).stat().st_size == size
    capsys.readouterr()
    assert prepare(*command) == 2
    error = capsys.readouterr().err
    assert f"have changed since {place}" in error and f"remove {place}" in error and "--out" in error
    shutil.rmtree(place)
    assert prepare(*command) == 0
    shutil.rmtree(data)
    assert len(load_data(str(place))["train"]) == 1


def test_a_store_begun_of_other_images_is_kept(tmp_path, capsys):
    """Finished blocks are not deleted by a run with another size or after an edit, nor are they mixed with others."""
    data, place, partial = tmp_path / "data", tmp_path / "store", tmp_path / ".store.partial"
    for i in range(3):
        (data / "good").mkdir(parents=True, exist_ok=True)
        (data / "bad").mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((40, 40), 60 * i, np.uint8)).save(data / "good" / f"{i}.bmp")
    (data / "bad" / "a.bmp").write_bytes(b"no image")
    assert prepare(data, "--size", 40, "--out", place) == 2  # the block of train is finished by then
    before = {path.name: path.read_bytes() for path in partial.iterdir()}
    assert "train-00000.json" in before and sorted(p.name for p in tmp_path.iterdir()) == [".store.partial", "data"]
    capsys.readouterr()
    assert prepare(data, "--size", 48, "--out", place) == 2
    error = capsys.readouterr().err
    assert "begun of other data or another size" in error and f"remove {partial}" in error
    os.utime(data / "good" / "0.bmp", ns=(0, 0))
    assert prepare(data, "--size", 40, "--out", place, "--skip-broken") == 2
    assert "have changed" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in partial.iterdir()} == before
    (partial / "source.json").write_text("{}")
    assert prepare(data, "--size", 40, "--out", place, "--skip-broken") == 2
    assert "another version" in capsys.readouterr().err
    shutil.rmtree(partial)
    assert prepare(data, "--size", 40, "--out", place, "--skip-broken") == 0


def test_a_damaged_block_of_a_begun_store_is_made_again(tmp_path):
    data, place, partial = tmp_path / "data", tmp_path / "store", tmp_path / ".store.partial"
    for folder in ("good", "bad"):
        (data / folder).mkdir(parents=True)
        for i in range(3):
            Image.fromarray(np.full((40, 40), 60 * i, np.uint8)).save(data / folder / f"{i}.bmp")
    (data / "bad" / "2.bmp").write_bytes(b"no image")
    assert prepare(data, "--size", 40, "--out", place) == 2
    block = partial / "train-00000.npy"
    content = bytearray(block.read_bytes())
    content[-1] ^= 1
    block.write_bytes(content)
    assert prepare(data, "--size", 40, "--out", place, "--skip-broken") == 0
    content[-1] ^= 1
    assert (place / "train-00000.npy").read_bytes() == content
    assert prepare(data, "--size", 40, "--out", place, "--skip-broken") == 0


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


def _relabelled(index):
    index["blocks"]["train"][0]["labels"][0] = 1


def _renamed(index):
    index["blocks"]["test"][0]["paths"][0] = "test/good/other.png"


@pytest.mark.parametrize(
    "damage",
    [
        lambda index: index.clear(),
        lambda index: index.update(blocks={}),
        lambda index: index.update(format_version=1),
        _relabelled,
        _renamed,
    ],
)
def test_a_damaged_index_is_found_and_its_remedy_helps(damage, stored, mvtec, capsys):
    path = stored / store.INDEX
    index = json.loads(path.read_text())
    damage(index)
    path.write_text(json.dumps(index))
    with pytest.raises(ZooError, match=f"remove {stored}, then zoo data prepare DATA"):
        check_data(str(stored))
    capsys.readouterr()
    assert prepare(mvtec, "--size", 48, "--out", stored) == 2
    assert f"remove {stored}, then" in capsys.readouterr().err
    shutil.rmtree(stored)
    assert prepare(mvtec, "--size", 48, "--out", stored) == 0 and check_data(str(stored)).name == "tiles"


def test_labels_and_names_are_part_of_the_fingerprint(tmp_path):
    prints = []
    for name in ("a", "b"):
        data = tmp_path / name / "data"
        (data / "good").mkdir(parents=True)
        Image.fromarray(np.zeros((40, 40), np.uint8)).save(data / "good" / f"{name}.png")
        assert prepare(data, "--size", 40, "--out", tmp_path / name / "store") == 0
        prints.append(check_data(str(tmp_path / name / "store")).fingerprint)
    shutil.copytree(tmp_path / "b" / "data", tmp_path / "c" / "data", copy_function=shutil.copyfile)  # other times
    assert prepare(tmp_path / "c" / "data", "--size", 40, "--out", tmp_path / "c" / "store") == 0
    assert prints[0] != prints[1] == check_data(str(tmp_path / "c" / "store")).fingerprint


def test_what_the_system_refuses_is_told_as_such(stored):
    (stored / "train-00000.npy").unlink()
    (stored / "train-00000.npy").mkdir()
    with pytest.raises(ZooError, match="could not be read .*Is a directory"):
        load_data(str(stored))["train"][0]


def test_few_blocks_are_open_at_once_and_each_is_hashed_once(mvtec, tmp_path, monkeypatch):
    """Whatever the process, its workers and the epoch."""
    monkeypatch.setattr(store_writer, "BLOCK_BYTES", 2 * 48 * 48 * 4)  # four images
    monkeypatch.setattr(store, "OPEN", 2)
    assert prepare(mvtec, "--size", 48, "--out", tmp_path / "store") == 0
    assert len(list((tmp_path / "store").glob("train-*.npy"))) == 8
    hashed, plain = tmp_path / "hashed", store.file_hash

    def told(path):
        with open(hashed, "a") as file:
            file.write(f"{path}\n")
        return plain(path)

    monkeypatch.setattr(store, "file_hash", told)
    files, kept = load_data(str(mvtec))["train"], load_data(str(tmp_path / "store"))["train"]
    for i in np.random.default_rng(0).permutation(30).tolist():
        assert np.abs(kept[i]["image"] - reference(mvtec / files[i]["path"], 48)).max() <= 0.5 + 1e-3
    assert len(kept._format_kwargs["transform"].stacks["image"].maps) == 2
    assert len(hashed.read_text().splitlines()) == 8
    hashed.unlink()
    kept = load_data(str(tmp_path / "store"))["train"]
    for _ in range(3):
        list(torch.utils.data.DataLoader(kept, 2, num_workers=1, collate_fn=len, multiprocessing_context="fork"))
    assert len(hashed.read_text().splitlines()) == 8
    again = copy.deepcopy(kept._format_kwargs["transform"])  # as another process gets it
    assert np.array_equal(again({"image": [29]})["image"][0], kept[29]["image"])
    assert len(hashed.read_text().splitlines()) == 8


def test_memory_does_not_grow_with_the_size(tmp_path):
    """Blocks and what is decoded ahead are bounded by bytes; 16 bits at 1024 are 2 MB an image."""
    (tmp_path / "data" / "good").mkdir(parents=True)
    tifffile.imwrite(tmp_path / "data" / "good" / "000.tif", np.zeros((64, 64), np.uint16))
    for i in range(1, 300):
        os.link(tmp_path / "data" / "good" / "000.tif", tmp_path / "data" / "good" / f"{i:03d}.tif")
    code = (
        "import resource, sys\nfrom zoo.cli import main\n"
        f"assert main(['data', 'prepare', {str(tmp_path / 'data')!r}, '--size', sys.argv[1], '--num-workers', '2', "
        "'--out', sys.argv[2]]) == 0\nprint(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)"
    )
    peaks = []
    for size in ("64", "1024"):
        command = [sys.executable, "-c", code, size, str(tmp_path / size)]
        peaks.append(int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1]))
    assert peaks[1] - peaks[0] < 250  # MB, of 630 that the images take
    index = store.read_index(tmp_path / "1024")
    assert [len(block["paths"]) for block in index["blocks"]["train"]] == [32] * 9 + [12]


def test_places_that_are_links_or_mount_points(mvtec, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "to_empty").symlink_to("empty")
    (tmp_path / "dangling").symlink_to("deep/er")
    (tmp_path / "loop").symlink_to("loop")
    for link, target in ("to_empty", "empty"), ("dangling", "deep/er"):
        assert prepare(mvtec, "--size", 48, "--out", tmp_path / link) == 0
        assert (tmp_path / link).is_symlink() and (tmp_path / target / store.INDEX).is_file()
        assert prepare(mvtec, "--size", 48, "--out", tmp_path / link) == 0
        assert "prepared already" in capsys.readouterr().out
    for place, words in ("/", "name a folder inside it"), (tmp_path / "loop", "name another folder by --out"):
        assert prepare(mvtec, "--size", 48, "--out", place) == 2
        captured = capsys.readouterr()
        assert words in captured.err and "Preparing" not in captured.out


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


def test_one_that_comes_just_too_late_takes_what_is_there(mvtec, tmp_path, monkeypatch, capsys):
    """The first one is done after the second one has looked for the store and before it has the lock."""
    place, alone = tmp_path / "store", store_writer._alone

    def late(where):
        monkeypatch.setattr(store_writer, "_alone", alone)
        assert prepare(mvtec, "--size", 48, "--out", place) == 0
        monkeypatch.setattr(store_writer, "_decoded", None)  # nothing is decoded again
        return alone(where)

    monkeypatch.setattr(store_writer, "_alone", late)
    assert prepare(mvtec, "--size", 48, "--out", place) == 0
    assert capsys.readouterr().out.count("Stored 42 images") == 2
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_defects_that_vanish_are_counted_and_stay(tmp_path, capsys):
    """Of 96 pixels 32 are looked at, those in the middle of three."""
    data = tmp_path / "data"
    for folder in ("good", "bad", "masks"):
        (data / folder).mkdir(parents=True)
    for name in ("good/a.png", "good/b.png", "bad/c.png", "bad/d.png"):
        Image.fromarray(np.zeros((96, 96), np.uint8)).save(data / name)
    for name, at in (("c", 48), ("d", 49)):
        mask = np.zeros((96, 96), np.uint8)
        mask[at, 49] = 255
        Image.fromarray(mask).save(data / "masks" / f"{name}.png")
    assert prepare(data, "--size", 32, "--out", tmp_path / "store") == 0
    assert "1 defects are too small" in capsys.readouterr().out
    rows = {row["path"]: row for row in load_data(str(tmp_path / "store"))["test"]}
    assert rows["bad/c.png"]["label"] == rows["bad/d.png"]["label"] == 1
    assert not rows["bad/c.png"]["mask"].any() and rows["bad/d.png"]["mask"].sum() == 1
