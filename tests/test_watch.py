"""A watch scores each image once, whatever happens to the image, the folder, the disk or the watch itself."""

import csv
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

import zoo
from zoo import arrivals as arriving
from zoo import ledger as ledgers
from zoo.arrivals import TRIES, Arrivals, images_below
from zoo.cli import main
from zoo.errors import ZooError
from zoo.image import read_image
from zoo.ledger import Ledger, Stamp
from zoo.module import AnomalyModule
from zoo.paths import locked

SETTINGS = {"weights_sha256": "0" * 64, "tile": None, "precision": "32-true"}
DATA = "synthetic:train=40,good=4,defect=2,size=64"


def run(*argv):
    return main([str(a) for a in argv])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a calibrated model, which serves as its name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZOO_HOME", str(tmp_path_factory.mktemp("home")))
        fit = ("fit", "padim", "--preset", "lite", "--input-size", 64, "--dims", 20, "--data", DATA, "--name", "m")
        assert run(*fit) == 0 and run("calibrate", "m", "--data", DATA, "--false-alarm-rate", 0.2) == 0
        return zoo.hub.model_place("m")


@pytest.fixture
def place(tmp_path):
    folder = tmp_path / "in coming"
    folder.mkdir()
    return folder


def pixels(seed):
    """16 bits, (64, 64)."""
    return np.random.default_rng(seed).integers(1, 65535, (64, 64)).astype(np.uint16)


def put(path, seed):
    """A 16-bit TIFF or PNG, whole at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.parent / f".{path.name}"
    if path.suffix == ".tif":
        tifffile.imwrite(part, pixels(seed))
    else:
        Image.fromarray(pixels(seed)).save(part, format="png")
    return part.rename(path)


def once(place, out, model, *more):
    return run("watch", place, "--name", model, "--out", out, "--once", "--settle", 0.05, "--interval", 0.02, *more)


def lines(out):
    return [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]


def table(out):
    with open(out / "predictions.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def images(out):
    return [Path(row["image"]).name for row in lines(out)]


class Background:
    """`zoo watch` here, signalled as soon as `done()`: signals reach the main thread, which runs it."""

    def __init__(self, done, number=signal.SIGTERM, seconds=600):
        self.done, self.number, self.end = done, number, time.monotonic() + seconds
        self.late = False
        self.thread = threading.Thread(target=self._wait)

    def _wait(self):
        while not self.done() and not self.late:
            time.sleep(0.02)
            self.late = time.monotonic() > self.end
        os.kill(os.getpid(), self.number)

    def run(self, place, out, model, *more):
        self.thread.start()
        code = run("watch", model, place, "--out", out, "--settle", 0.2, "--interval", 0.02, *more)
        self.thread.join()
        assert not self.late
        return code


def wrote(out, count):
    return lambda: (out / "predictions.jsonl").exists() and len(lines(out)) >= count


# ---- what is scored --------------------------------------------------------------------------------------------------


def test_scores_are_those_of_predict_and_each_image_is_scored_once(place, tmp_path, model, capsys):
    names = ["a.tif", "ü mlaut ß.png", "two\nlines.tif", "deep/er/a.png", "<b>&amp;.PNG", "tab\t.png", "a.png"]
    for i, name in enumerate(names):
        put(place / name, i)
    for left_out in (".hidden.png", "~temp.png", ".folder/a.png", "ignore.txt", "a.png.part"):
        (place / left_out).parent.mkdir(exist_ok=True)
        (place / left_out).write_bytes((place / "a.png").read_bytes())
    assert once(place, place / "results", model) == 0
    out = place / "results"
    said = [line for line in capsys.readouterr().out.splitlines() if "\t" in line]
    rows = lines(out)
    assert sorted(row["image"] for row in rows) == sorted(str(place / name) for name in names)
    loaded = zoo.from_pretrained(model)
    for row, line in zip(rows, said, strict=True):
        expected = loaded.predict(row["image"])
        assert row["score"] == expected.score and row["verdict"] == expected.verdict
        assert (row["p_value"], row["is_anomalous"]) == (expected.p_value, expected.is_anomalous)
        assert len(row["regions"]) == row["num_regions"] == len(expected.regions)
        assert row["threshold"] == loaded.calibration.image_threshold
        file = Path(row["image"])
        assert Stamp(row["num_bytes"], row["mtime_ns"]) == Stamp.of(file.stat())
        name, score, verdict = line.split("\t")
        assert float(score) == pytest.approx(row["score"], rel=1e-5) and verdict == row["verdict"]
    assert r"two\nlines.tif" in {line.split("\t")[0] for line in said}
    assert [row["image"] for row in table(out)] == [row["image"] for row in rows]
    before = (out / "predictions.jsonl").read_bytes()
    assert once(place, out, model) == 0 and once(place, out, model, "--batch-size", 4) == 0
    assert (out / "predictions.jsonl").read_bytes() == before


def test_pictures_and_columns_are_those_of_zoo_predict(place, tmp_path, model, capsys):
    for i in range(3):
        put(place / "lot" / f"{i}.tif", i)
    mask = np.zeros((64, 64), np.uint8)
    mask[:20] = 255
    (place / "ignore/lot").mkdir(parents=True)
    Image.fromarray(mask).save(place / "ignore/lot/0.png")
    for more in ((), ("--ignore", place / "ignore/lot/0.png")):
        mine, other = tmp_path / f"mine{len(more)}", tmp_path / f"other{len(more)}"
        assert once(place, mine, model, "--batch-size", 8, *more) == 0
        assert run("predict", model, place, "--out", other, *more) == 0
        assert (mine / "predictions.csv").read_text() == (other / "predictions.csv").read_text()
        for picture in other.rglob("*.png"):
            assert (mine / picture.relative_to(other)).read_bytes() == picture.read_bytes()
        expected = json.loads((other / "predictions.json").read_text())["images"]
        assert [{key: row[key] for key in expected[0]} for row in lines(mine)] == expected
    one, all_ = ([row["score"] for row in lines(tmp_path / name)] for name in ("mine0", "mine2"))
    files, loaded = [place / f"lot/{i}.tif" for i in range(3)], zoo.from_pretrained(model)  # as a batch: bit for bit
    assert one == [found.score for found in loaded.predict(files, ignore=[mask > 0, None, None])]
    assert all_ == [found.score for found in loaded.predict(files, ignore=mask > 0)]
    assert one[1:] != all_[1:] and capsys.readouterr().out.count("1.tif has no ignore mask") == 1
    assert once(place, tmp_path / "other0", model) == 2  # lists of zoo predict


def test_masks_of_a_set_and_results_of_another_watch_are_no_images(place, tmp_path, model):
    for name in ("good/a.png", "masks/a.png", "ground_truth/x/a.png", "ignore/a.png", "good/masks/b.png"):
        put(place / name, 1)
    expected = sorted(map(str, zoo.inference.find_images([place], place / "out").values()))
    assert expected == [str(place / "good/a.png"), str(place / "good/masks/b.png")]
    for out in (place / "good/first", place / "second"):
        assert once(place, out, model) == 0 and once(place, out, model) == 0
        assert sorted(row["image"] for row in lines(out)) == expected


def test_files_that_are_known_are_not_read(place, tmp_path, model, monkeypatch):
    for i in range(3):
        put(place / f"{i}.png", i)
    assert once(place, tmp_path / "out", model) == 0
    opened = []
    monkeypatch.setattr(Arrivals, "read", lambda self, path: opened.append(path))
    assert once(place, tmp_path / "out", model) == 0 and not opened


def test_what_its_verdicts_are_worth_is_said_once(place, tmp_path, model, capsys):
    for i in range(2):
        Image.fromarray(pixels(i)[:, :40]).save(place / f"{i}.png")
    assert once(place, tmp_path / "out", model) == 0
    assert capsys.readouterr().out.count("the rate was stated for images of 64 x 64 pixels") == 1
    assert all("uncalibrated" in row["verdict"] for row in lines(tmp_path / "out"))
    other = shutil.copytree(model, tmp_path / "other")
    config = json.loads((other / "config.json").read_text()) | {"calibration": None}
    (other / "config.json").write_text(json.dumps(config))
    assert once(place, tmp_path / "none", other) == 0
    assert capsys.readouterr().out.count("The model has no threshold") == 1
    for row in lines(tmp_path / "none"):
        assert row["verdict"] == "no threshold" and row["mask"] is None and row["threshold"] is None
        assert (tmp_path / "none" / row["heatmap"]).is_file()


# ---- files that change -----------------------------------------------------------------------------------------------


def test_a_file_that_grows_is_scored_when_it_is_whole(place, tmp_path, model):
    source = tmp_path / "whole.tif"
    tifffile.imwrite(source, pixels(5))
    data, out = source.read_bytes(), tmp_path / "out"

    def copy():
        for start in range(0, len(data), len(data) // 8):
            with open(place / "slow.tif", "ab") as file:
                file.write(data[start : start + len(data) // 8])
            time.sleep(0.15)

    writer = threading.Thread(target=copy)
    writer.start()
    assert Background(wrote(out, 1)).run(place, out, model, "--settle", 2) == 0
    writer.join()
    (row,) = lines(out)
    assert row["score"] == zoo.from_pretrained(model).predict(source).score and row["num_bytes"] == len(data)


def test_other_bytes_under_a_name_are_another_image(place, tmp_path, model):
    out = tmp_path / "out"
    put(place / "a.png", 1)
    assert once(place, out, model) == 0
    put(place / "a.png", 2)
    assert once(place, out, model) == 0
    first, second = lines(out)
    assert first["image"] == second["image"] and first["sha256"] != second["sha256"]
    loaded = zoo.from_pretrained(model)
    assert second["score"] == loaded.predict(place / "a.png").score != first["score"]
    assert first["heatmap"] != second["heatmap"] and all((out / row["heatmap"]).is_file() for row in (first, second))


def test_a_file_that_is_touched_is_read_once_more_and_not_scored(place, tmp_path, model, monkeypatch):
    put(place / "a.png", 1)
    put(place / "b.png", 1)  # the same bytes under another name are another image
    assert once(place, tmp_path / "out", model) == 0
    os.utime(place / "a.png", (2**31, 2**31))  # in the future, too
    (place / "b.png").write_bytes((place / "b.png").read_bytes())
    read, opened = Arrivals.read, []
    monkeypatch.setattr(Arrivals, "read", lambda self, path: opened.append(path) or read(self, path))
    assert once(place, tmp_path / "out", model) == 0 and len(opened) == 2
    assert once(place, tmp_path / "out", model) == 0 and len(opened) == 2
    assert sorted(images(tmp_path / "out")) == ["a.png", "b.png"]


def test_a_broken_file_is_noted_once_and_scored_when_it_is_repaired(place, tmp_path, model, capsys):
    out, whole = tmp_path / "out", put(place / "good.png", 1)
    for name, data in (("cut.png", whole.read_bytes()[:-500]), ("empty.tif", b""), ("text.jpg", b"no image")):
        (place / name).write_bytes(data)
    assert once(place, out, model, "--batch-size", 4) == 0
    rows = {Path(row["image"]).name: row for row in lines(out)}
    assert len(rows) == 4 and rows["good.png"]["score"] is not None
    for name, words in (("cut.png", "truncated"), ("empty.tif", "empty"), ("text.jpg", "not a PNG")):
        assert rows[name]["score"] is None and rows[name]["heatmap"] is None
        assert rows[name]["verdict"].startswith("broken (") and words in rows[name]["verdict"]
    assert once(place, out, model) == 0 and len(lines(out)) == 4
    put(place / "cut.png", 1)
    assert once(place, out, model) == 0
    assert images(out)[4:] == ["cut.png"] and lines(out)[4]["score"] == rows["good.png"]["score"]
    assert len(table(out)) == 5 and table(out)[1]["score"] == ""


def test_what_can_not_be_decoded_is_tried_before_it_is_broken(place, tmp_path, model, monkeypatch):
    """A copy that stalls for longer than a file takes to settle."""
    whole = put(tmp_path / "whole.tif", 1).read_bytes()
    (place / "a.tif").write_bytes(whole[:4000])
    read, reads = Arrivals.read, []

    def goes_on(self, path):
        reads.append(path)
        if len(reads) == TRIES - 1:
            (place / "a.tif").write_bytes(whole)
        return read(self, path)

    monkeypatch.setattr(Arrivals, "read", goes_on)
    assert once(place, tmp_path / "out", model) == 0
    (row,) = lines(tmp_path / "out")
    assert row["num_bytes"] == len(whole) and row["score"] is not None


def test_a_file_that_is_laid_out_in_full_first_is_waited_for(place):
    """A copy of Windows: full size, zeros where no bytes have come yet, which a TIFF shows as black."""
    data = put(place / "a.tif", 1).read_bytes()
    for seed in range(3):
        Image.fromarray(np.full((64, 64), seed, np.uint8)).save(place / f"{seed}.bmp")
    (place / "a.tif").write_bytes(data[:-4096] + bytes(4096))
    found = Arrivals(place, 0, lambda path, stamp: False, print)
    tries = [found.read(str(place / "a.tif")) for _ in range(TRIES) if found.look()]
    assert tries[:-1] == [None] * (TRIES - 1) and tries[-1] is not None
    assert all(found.read(str(place / f"{seed}.bmp")) for seed in (1, 2))
    (place / "a.tif").write_bytes(data)
    found.look()
    assert found.read(str(place / "a.tif")).data == data


def test_a_file_is_not_read_before_it_has_settled_nor_taken_while_it_changes(place, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(arriving.time, "monotonic", lambda: clock[0])
    path = str(put(place / "a.png", 1))
    found = Arrivals(place, 2.0, lambda path, stamp: False, print)
    assert found.look() == []
    clock[0] += 1.9
    assert found.look() == []
    put(place / "a.png", 2)
    clock[0] += 1.9
    assert found.look() == []
    clock[0] += 2.1
    assert found.look() == [path]
    put(place / "a.png", 3)  # between the look and the read
    assert found.read(path) is None and found.look() == []
    clock[0] += 2.1
    assert found.look() == [path] and found.read(path).data == (place / "a.png").read_bytes()


def test_once_leaves_what_does_not_come_to_rest(place, tmp_path, model, monkeypatch, capsys):
    put(place / "a.png", 1)
    below, count = images_below, iter(range(10**6))

    def growing(folder, unreadable):
        yield from below(folder, unreadable)
        yield str(place / "b.png"), Stamp(next(count), 0)

    monkeypatch.setattr(arriving, "images_below", growing)
    assert once(place, tmp_path / "out", model) == 0
    assert "b.png still changes or can't be read: left for later" in capsys.readouterr().out
    assert images(tmp_path / "out") == ["a.png"]


def test_what_vanishes_is_no_error(place, tmp_path, model, capsys):
    put(place / "a.png", 1)
    put(place / "b.png", 2)
    read = Arrivals.read

    def vanishing(self, path):
        Path(path).unlink() if path.endswith("a.png") else None
        return read(self, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Arrivals, "read", vanishing)
        assert once(place, tmp_path / "out", model) == 0
    assert images(tmp_path / "out") == ["b.png"] and not capsys.readouterr().err


def test_a_folder_that_is_away_for_a_while_is_waited_for(place):
    said = []
    found = Arrivals(place, 0, lambda path, stamp: False, said.append)
    path = str(put(place / "a.png", 1))
    assert found.look() == [path]
    away = place.rename(place.with_name("away"))
    assert found.look() == found.look() == [] and len(said) == 1 and "waiting for it" in said[0]
    away.rename(place)
    assert found.look() == [path] and len(said) == 2 and "there again" in said[1]
    away = place.rename(place.with_name("away"))
    with pytest.raises(ZooError, match="can't be read"):
        found.look(once=True)


@pytest.mark.parametrize("kind", ["png", "jpeg", "bmp", "tiff", "deflate", "lzw"])
def test_no_part_of_a_file_passes_for_all_of_it(kind, tmp_path):
    grey = np.random.default_rng(1).integers(1, 255, (16, 24)).astype(np.uint8)
    path = tmp_path / "whole"
    if kind in ("tiff", "deflate"):
        tifffile.imwrite(path, grey, compression="zlib" if kind == "deflate" else None)
    else:
        more = {"compression": "tiff_lzw"} if kind == "lzw" else {}
        Image.fromarray(grey).save(path, format="tiff" if kind == "lzw" else kind, **more)
    data = path.read_bytes()
    whole = read_image(data)
    for length in range(len(data)):
        try:
            assert np.array_equal(read_image(data[:length]), whole)  # a PNG without its closing words, say
        except ZooError:
            pass


# ---- stops -----------------------------------------------------------------------------------------------------------


def test_a_watch_that_is_killed_goes_on(place, tmp_path, model):
    out = tmp_path / "out"
    for i in range(40):
        put(place / f"{i:02d}.tif", i)
    command = [sys.executable, "-m", "zoo.cli", "watch", place, "--name", model, "--out", out, "--settle", "0"]
    with subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, text=True) as process:
        scored = 0
        while scored < 4:
            scored += "\t" in process.stdout.readline()
        process.kill()
    before = len(lines(out))
    assert 4 <= before < 40
    assert once(place, out, model) == 0
    assert Counter(images(out)) == {f"{i:02d}.tif": 1 for i in range(40)}
    assert [row["image"] for row in table(out)] == [row["image"] for row in lines(out)]
    assert len({row["heatmap"] for row in lines(out)}) == len(list(out.glob("heatmaps/*.png"))) == 40


def row_of(image, **more):
    row = dict.fromkeys((*zoo.inference.COLUMNS, "pixel_nm", "regions")) | {"verdict": "normal", "score": 1.0}
    return row | {"image": image, "num_bytes": 3, "mtime_ns": 4, "sha256": "ab" * 32} | more


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError])
def test_an_image_that_memory_does_not_hold_is_broken_and_the_others_are_scored(
    error, place, tmp_path, model, monkeypatch
):
    for i in range(3):
        put(place / f"{i}.tif", i)
    usual = AnomalyModule.predict_brought

    def full(self, images, batch_size=8):
        images = list(images)
        if any((one.array == pixels(1)).all() for one in images):
            raise error("no room for so many pixels\nof all")
        return usual(self, images, batch_size)

    monkeypatch.setattr(AnomalyModule, "predict_brought", full)
    assert once(place, tmp_path / "out", model, "--batch-size", 3) == 0
    found = {Path(row["image"]).name: row["verdict"] for row in lines(tmp_path / "out")}
    assert found.pop("1.tif") == "broken (no room for so many pixels)"
    assert found.keys() == {"0.tif", "2.tif"} and not any("broken" in verdict for verdict in found.values())


def test_zoo_predict_leaves_a_watchs_table_alone(place, tmp_path, model, capsys):
    put(place / "0.tif", 0)
    assert once(place, tmp_path / "out", model) == 0
    before = (tmp_path / "out/predictions.csv").read_bytes()
    assert run("predict", model, place, "--out", tmp_path / "out") == 2
    assert "holds the results of zoo watch" in capsys.readouterr().err
    assert (tmp_path / "out/predictions.csv").read_bytes() == before


def test_a_line_that_was_cut_anywhere_is_dropped_and_its_image_done_again(tmp_path):
    written = Ledger(tmp_path, SETTINGS, print)
    for name in ("a", "ü\n", "\udc80c"):
        written.append(row_of(name))
    path = tmp_path / "predictions.jsonl"
    whole = path.read_bytes()
    two = len(b"".join(whole.splitlines(keepends=True)[:2]))
    for rest in [*(whole[two:end] for end in range(two, len(whole), 7)), bytes(100), bytes(100) + b"\n"]:
        path.write_bytes(whole[:two] + rest)
        said = []
        ledger = Ledger(tmp_path, SETTINGS, said.append)
        assert list(ledger.known) == ["a", "ü\n"] and len(said) == bool(rest)
        assert not rest or "cut short" in said[0]
        assert path.read_bytes() == whole[:two]
        ledger.append(row_of("\udc80c"))
        assert path.read_bytes() == whole
    for damaged in (whole[1:], b"\0" + whole, whole[:two] + b"[1]\n", whole[:two] + b"{}\n"):
        path.write_bytes(damaged)
        with pytest.raises(ZooError, match="line [13]"):
            Ledger(tmp_path, SETTINGS, print)
        assert path.read_bytes() == damaged  # it is left to its owner


def test_pictures_without_a_line_are_made_again(place, tmp_path, model):
    out = tmp_path / "out"
    for i in range(2):
        put(place / f"{i}.png", i)
    assert once(place, out, model) == 0
    path = out / "predictions.jsonl"
    whole, expected = lines(out), path.read_bytes()
    path.write_bytes(expected[: len(expected) - 30])
    (out / "heatmaps/1.png").write_bytes(b"half")
    assert once(place, out, model) == 0
    assert [row | {"time": 0} for row in lines(out)] == [row | {"time": 0} for row in whole]
    assert Image.open(out / "heatmaps/1.png").size == (64, 64)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_ends_it_after_the_image_in_work(place, tmp_path, model, number, code, capsys):
    out = tmp_path / "out"
    for i in range(30):
        put(place / f"{i:02d}.png", i)
    before = signal.getsignal(number)
    assert Background(wrote(out, 2), number).run(place, out, model, "--batch-size", 4) == code
    assert signal.getsignal(number) is before
    said = capsys.readouterr()
    assert said.err == ("zoo: stopped.\n" if code else "")
    done = lines(out)
    assert len(done) == len(table(out)) == said.out.count("\t") // 2 >= 2
    assert once(place, out, model) == 0
    assert Counter(images(out)) == {f"{i:02d}.png": 1 for i in range(30)}


@pytest.mark.parametrize("call", ["fsync", "save_png"])
def test_a_disk_that_is_full_loses_nothing(place, tmp_path, model, monkeypatch, capsys, call):
    from zoo import plots

    out, calls = tmp_path / "out", iter(range(10**6))
    for i in range(4):
        put(place / f"{i}.png", i)

    def full(function):
        def refusing(*arguments):
            if next(calls) >= 9:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return function(*arguments)

        return refusing

    with pytest.MonkeyPatch.context() as patch:
        module = ledgers.os if call == "fsync" else plots
        patch.setattr(module, call, full(getattr(module, call)))
        calls = iter(range(10**6)) if call == "fsync" else iter(range(6, 10**6))
        assert once(place, out, model) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "No space left" in error and str(out) in error
    assert 1 <= len(lines(out)) < 4
    assert once(place, out, model) == 0
    assert sorted(images(out)) == [f"{i}.png" for i in range(4)]


def test_a_table_that_is_held_by_another_program_is_written_later(place, tmp_path, model, capsys):
    out = tmp_path / "out"
    put(place / "a.png", 1)
    (out / "predictions.csv").mkdir(parents=True)
    assert once(place, out, model) == 0
    assert capsys.readouterr().out.count("predictions.csv can't be written now") == 1 and images(out) == ["a.png"]
    (out / "predictions.csv").rmdir()
    assert once(place, out, model) == 0 and len(table(out)) == 1


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_a_second_watch_is_refused(place, tmp_path, model, capsys):
    out = tmp_path / "out"
    out.mkdir()
    with locked(out / ".lock", 0, "free"):
        assert once(place, out, model) == 2
    error = capsys.readouterr().err
    assert "Another zoo watch" in error and "--out" in error and error.count("\n") == 1


def test_another_model_tile_or_precision_is_refused(place, tmp_path, model, capsys):
    out = tmp_path / "out"
    put(place / "a.png", 1)
    assert once(place, out, model) == 0
    before = (out / "predictions.jsonl").read_bytes()
    assert once(place, out, model, "--tile", 32) == 2 and once(place, out, model, "--precision", "bf16-mixed") == 2
    weights = json.loads((model / "config.json").read_text())["weights_sha256"].encode()
    (out / "predictions.jsonl").write_bytes(before.replace(weights, b"0" * 64))
    capsys.readouterr()
    assert once(place, out, model) == 2
    assert "another model" in (error := capsys.readouterr().err) and "another folder by --out" in error
    (out / "predictions.jsonl").write_bytes(before)
    assert run("calibrate", model, "--false-alarm-rate", 0.3) == 0  # the same weights and scores
    put(place / "b.png", 2)
    assert once(place, out, model) == 0 and len({row["threshold"] for row in lines(out)}) == 2


MISTAKES = [
    ("{folder}", "--name NAME --out OUT"),
    ("{folder} --name m", "--name NAME --out OUT"),
    ("a m {folder} --out {out}", "--name NAME --out OUT"),
    ("m {folder} --name m --out {out}", "--name NAME --out OUT"),
    ("{folder}/nowhere --name m --out {out}", "There is no folder"),
    ("{file} --name m --out {out}", "There is no folder"),
    ("{folder} --name m --out {file}", "is a file"),
    ("{folder} --name m --out {folder}", "lies in it"),
    ("{folder}/sub --name m --out {folder}", "lies in it"),
    ("{folder} --name nobody --out {out}", "zoo fit METHOD"),
    ("{folder} --name m --out {out} --interval -1", "--interval"),
    ("{folder} --name m --out {out} --settle .nan", "--settle"),
    ("{folder} --name m --out {out} --settle soon", "--settle"),
    ("{folder} --name m --out {out} --batch-size 0", "--batch-size"),
    ("{folder} --name m --out {out} --tile 3", "--tile"),
    ("{folder} --name {model} --out {out} --ignore nowhere", "--ignore"),
    ("{folder} --name {model} --out {file}/out", "can't be written"),
]


def test_mistakes_are_one_sentence_before_torch_is_imported(tmp_path, model):
    (tmp_path / "in/sub").mkdir(parents=True)
    (tmp_path / "file").touch()
    places = {"folder": tmp_path / "in", "out": tmp_path / "out", "file": tmp_path / "file", "model": model}
    code = (
        "import json, sys\nfrom zoo.cli import main\n"
        "assert [main(argv) for argv in json.loads(sys.argv[1])].count(2) == int(sys.argv[2])\n"
        "assert not {'torch', 'lightning', 'datasets', 'timm'} & sys.modules.keys()"
    )
    tried = json.dumps([["watch", *argv.format(**places).split()] for argv, _ in MISTAKES])
    command = [sys.executable, "-c", code, tried, str(len(MISTAKES))]
    said = subprocess.run(command, check=True, stderr=subprocess.PIPE, text=True).stderr.splitlines()
    for (argv, words), line in zip(MISTAKES, said, strict=True):
        assert line.startswith("zoo: ") and words in line, argv
    assert not list((tmp_path / "in").rglob("*.jsonl")) and not (tmp_path / "out/predictions.jsonl").exists()
