"""MIIC's layout on replicas of it: every trap is met, alone and with the others, and nothing is taken on trust."""

import hashlib
import json
import logging
import os
import shutil
import stat
import subprocess
import sys
import zlib
from pathlib import Path

import datasets
import numpy as np
import pytest
from miic_replica import TRAPS, make
from PIL import Image
from scipy.io import savemat

from zoo.cli import main
from zoo.data import SOURCE, archives, check_data, load_data, miic_layout
from zoo.data.datamodule import AnomalyDataModule
from zoo.data.halves import halves, part_of_test, validation_half
from zoo.data.miic import MIIC, load_miic
from zoo.data.rows import read_row
from zoo.data.store import digest
from zoo.errors import ZooError
from zoo.fit import fit
from zoo.hub import model_place
from zoo.pairs import abnormal_and_clean
from zoo.run import RunOptions


def run(*argv):
    return main([str(a) for a in argv])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("miic") / "all"
    return root, make(root)


@pytest.fixture
def replica(made, tmp_path):
    """One that a test may change."""
    shutil.copytree(made[0], tmp_path / "miic")
    return tmp_path / "miic", made[1]


def unmarked(root):
    """What says that it is an imitation is taken away."""
    (root / "REPLICA").unlink()
    segment = b"\xff\xfe" + (len(miic_layout.MARK) + 2).to_bytes(2, "big") + miic_layout.MARK
    for path in root.rglob("*.jpg"):
        assert (data := path.read_bytes()).count(segment) == 1
        path.write_bytes(data.replace(segment, b""))
    return root


def owners_counts(monkeypatch, root):
    """As if MIIC had as many images as this replica."""
    counts = [len(list((root / folder).glob(pattern))) for folder, pattern in COUNTED]
    monkeypatch.setattr(miic_layout, "COUNTS", dict(zip(miic_layout.COUNTS, counts, strict=True)))


COUNTED = [
    ("Anomaly_train", "train_normal_*"),
    ("Anomaly_test/normal_img", "*"),
    ("Anomaly_test/abnormal_img", "*"),
]


def sealed(index):
    """With its own hash, as one who knows the format could write it."""
    return json.dumps(index | {"sha256": digest({k: v for k, v in index.items() if k != "sha256"})})


def names(rows, label=None):
    plain = rows.with_format(None)
    return [p for p, one in zip(plain["path"], plain["label"], strict=True) if label is None or one == label]


def decoded(data):
    """Everything of a data set, by split and name."""
    return {s: {row["path"]: (row["label"], *read_row(row)[:2]) for row in rows} for s, rows in data.items()}


def same(a, b):
    assert {s: list(rows) for s, rows in a.items()} == {s: list(rows) for s, rows in b.items()}
    for split in a:
        for name, (label, image, mask) in a[split].items():
            other = b[split][name]
            assert label == other[0] and image.dtype == other[1].dtype and np.array_equal(image, other[1])
            assert (mask is None) == (other[2] is None) and (mask is None or np.array_equal(mask, other[2]))


def test_a_replica_is_made_by_its_script(tmp_path):
    script = Path(__file__).with_name("miic_replica.py")
    counts = ["--train", "5", "--normal", "2", "--abnormal", "3", "--size", "32", "--pairs", "0", "--traps"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, script, tmp_path / "r", *counts], check=True, env=environment)
    assert not any((tmp_path / "r/Inpainting_train").iterdir())
    assert len(list((tmp_path / "r/Inpainting_test").iterdir())) == 2
    spec = check_data(f"miic:{tmp_path / 'r'}")
    assert spec.counts == {"train": [5, 0], "test": [2, 3]} and spec.pairs == ()


# ---- who is trained on -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("traps", [[], *([trap] for trap in TRAPS), list(TRAPS)], ids=lambda t: "+".join(t) or "clean")
def test_train_and_test_are_as_written(tmp_path, traps):
    root = tmp_path / "r"
    truth = make(root, train=12, normal=4, abnormal=4, size=64, traps=traps)
    data = load_data(f"miic:{root}")
    assert names(data["train"]) == truth.train
    assert names(data["test"], 0) == truth.normal and names(data["test"], 1) == sorted(truth.masks)
    assert set(names(data["train"], 0)) == set(truth.train)
    spec = check_data(f"miic:{root}")
    assert spec.counts == {"train": [len(truth.train), 0], "test": [4, 4]} and spec.name == "miic-replica"
    tested = {hashlib.sha256((root / name).read_bytes()).digest() for name in names(data["test"])}
    assert not tested & {hashlib.sha256((root / name).read_bytes()).digest() for name in truth.train}
    for row in data["test"]:
        if row["label"]:
            drawn, mask = truth.masks[row["path"]], read_row(row)[1]
            jpeg = np.asarray(Image.open(root / f"Anomaly_test/abnormal_mask/{Path(row['path']).stem}_mask.jpg"))
            assert np.array_equal(mask, jpeg > 127)
            assert (mask & drawn).sum() >= 0.8 * (mask | drawn).sum()


def test_a_name_of_the_test_set_is_left_out_whatever_is_in_it(replica):
    root, truth = replica
    left_out = truth.train[-1]
    shutil.copyfile(root / truth.train[0], root / "Anomaly_test/normal_img" / Path(left_out).name)
    (root / truth.train[0]).unlink()
    assert names(load_data(f"miic:{root}")["train"]) == truth.train[1:-1]


def test_the_halves_have_the_same_share_of_each_class(made):
    data = load_data(f"miic:{made[0]}")
    for half in (validation_half(data, "image_ap"), part_of_test(data, "held_out")):
        assert sorted(half["test"].with_format(None)["label"]) == [0] * 5 + [1] * 4


def test_copies_are_named(made, caplog):
    root, truth = made
    load_data(f"miic:{root}")
    told = next(message for message in caplog.messages if "copies of test images" in message)
    assert len(truth.copies) == 2 and all(f"{copy} of {of}" in told for copy, of in truth.copies.items())


def test_few_files_are_read_to_find_copies(replica, monkeypatch):
    """Those alone whose size a test image has."""
    root, _ = replica
    sizes = {
        path.stat().st_size
        for kind in ("normal_img", "abnormal_img")
        for path in (root / "Anomaly_test" / kind).iterdir()
    }
    seen, read = [], hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, kind: seen.append(Path(file.name)) or read(file, kind))
    check_data(f"miic:{root}")
    assert seen and all(path.stat().st_size in sizes for path in seen)
    seen.clear()
    check_data(f"miic:{root}")
    assert not seen  # in one process they are read once


def test_foreign_names_are_left_out_and_named(replica, caplog):
    root, truth = replica
    for name in ("train_abnormal_00001.jpg", "abnormal_00001.jpg", "xtrain_normal_00001.jpg"):
        shutil.copyfile(root / truth.train[0], root / "Anomaly_train" / name)
    assert names(load_data(f"miic:{root}")["train"]) == truth.train
    assert any(m.startswith("3 files are left out") and "train_abnormal_00001.jpg" in m for m in caplog.messages)


def test_counts_are_compared_with_the_owners(made, caplog, monkeypatch):
    root, truth = made
    load_data(f"miic:{root}")
    assert f"There are {len(truth.train)} training images, {23_888 - len(truth.train):,} fewer than MIIC's 23,888." in (
        caplog.messages
    )
    assert "There are 10 normal test images, 1,262 fewer than MIIC's 1,272." in caplog.messages
    assert "There are 8 abnormal test images, 108 fewer than MIIC's 116." in caplog.messages
    caplog.clear()
    monkeypatch.setattr(miic_layout, "COUNTS", {"training": len(truth.train), "normal test": 9, "abnormal test": 8})
    load_data(f"miic:{root}")
    counted = [message for message in caplog.messages if "MIIC's" in message]
    assert counted == ["There are 10 normal test images, 1 more than MIIC's 9."]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: (r / "Anomaly_test/normal_img/test_abnormal_00099.jpg").write_bytes(b""), "among normal images"),
        (lambda r: (r / "Anomaly_test/abnormal_img/test_normal_00099.jpg").write_bytes(b""), "among abnormal images"),
        (lambda r: (r / "Anomaly_test/normal_img/test_Abnormal_1_copy.jpg").write_bytes(b""), "called abnormal among"),
        (lambda r: (r / "Anomaly_test/abnormal_img/copy of normal.jpg").write_bytes(b""), "called normal among"),
        (lambda r: (r / "Anomaly_test/abnormal_mask/test_abnormal_00001_mask.png").write_bytes(b""), "to one image"),
        (lambda r: (r / "Anomaly_test/abnormal_mask/test_abnormal_00001.jpg").write_bytes(b""), "00001_mask.jpg"),
        (lambda r: (r / "Anomaly_test/abnormal_mask/test_abnormal_00002_mask.jpg").unlink(), "00002.jpg has no mask"),
        (lambda r: (r / "Anomaly_test/abnormal_mask/test_abnormal_00099_mask.jpg").write_bytes(b""), "no image"),
        (lambda r: shutil.rmtree(r / "Anomaly_test/abnormal_img"), "abnormal_img does not exist"),
        (lambda r: [p.unlink() for p in (r / "Anomaly_test/normal_img").iterdir()], "holds no images"),
        (lambda r: [p.unlink() for p in (r / "Anomaly_train").glob("train_*")], "no train_normal_"),
    ],
)
def test_what_is_amiss_is_one_sentence(replica, change, words, capsys):
    change(replica[0])
    assert run("fit", "padim", "--preset", "lite", "--data", f"miic:{replica[0]}", "--name", "x") == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_the_right_folder_is_suggested(made, tmp_path):
    root, _ = made
    for wrong in (root.parent, root / "Anomaly_train"):
        with pytest.raises(ZooError, match=f"did you mean miic:{root}"):
            check_data(f"miic:{wrong}")
    for wrong in (root, root / "Anomaly_train"):
        with pytest.raises(ZooError, match=f"use miic:{root}"):
            check_data(str(wrong))
    with pytest.raises(ZooError, match="write miic:DIR"):
        check_data("miic:")


def test_the_check_is_light(made):
    code = (
        "import sys\nfrom zoo.data import check_data\nimport zoo.data.export, zoo.data.prepare\n"
        f"check_data({f'miic:{made[0]}'!r})\nassert not {{'torch', 'datasets'}} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_fingerprint_is_that_of_the_content(made, tmp_path):
    shutil.copytree(made[0], tmp_path / "elsewhere", copy_function=shutil.copyfile)  # new times
    before = check_data(f"miic:{made[0]}").fingerprint
    assert check_data(f"miic:{tmp_path / 'elsewhere'}").fingerprint == before
    (tmp_path / "elsewhere/Anomaly_train/train_normal_00005.jpg").write_bytes(b"x")
    assert check_data(f"miic:{tmp_path / 'elsewhere'}").fingerprint != before


def test_no_other_folder_passes_for_it(mvtec, tmp_path):
    for name in ("miic", "miic-partial", "miic-replica", "MIIC"):
        (tmp_path / name).symlink_to(mvtec)
        assert check_data(str(tmp_path / name)).name == "tiles"  # a link's own name is not published
        shutil.copytree(mvtec, tmp_path / "x" / name)
        assert check_data(str(tmp_path / "x" / name)).name == f"folder {name}"


def test_only_the_owners_numbers_make_it_miic(replica, monkeypatch):
    """Copies of test images in training don't change what it is; an image more or less does."""
    root, truth = replica
    unmarked(root)
    assert check_data(f"miic:{root}").name == "miic-partial"
    owners_counts(monkeypatch, root)
    assert len(truth.train) == miic_layout.COUNTS["training"] - 2 and check_data(f"miic:{root}").name == "miic"
    for name in ("Anomaly_train/train_normal_00009.jpg", "Anomaly_test/normal_img/test_normal_00009.jpg"):
        kept = (root / name).read_bytes()
        (root / name).unlink()
        assert check_data(f"miic:{root}").name == "miic-partial"
        (root / name).write_bytes(kept)
    assert check_data(f"miic:{root}").name == "miic"


@pytest.mark.parametrize("folder", ["Anomaly_train", "Anomaly_test/normal_img", "Anomaly_test/abnormal_img"])
def test_a_replica_is_known_by_its_images(replica, monkeypatch, folder):
    """Without its file REPLICA, by those of one folder alone."""
    root = replica[0]
    marked = {path: path.read_bytes() for path in (root / folder).iterdir()}
    assert all(Image.open(path).info["comment"] == miic_layout.MARK for path in marked)
    owners_counts(monkeypatch, unmarked(root))
    assert check_data(f"miic:{root}").name == "miic"
    for path, data in marked.items():
        path.write_bytes(data)
    assert check_data(f"miic:{root}").name == "miic-replica"


# ---- where the defects are -------------------------------------------------------------------------------------------


def write_mask(root, number, levels):
    path = root / f"Anomaly_test/abnormal_mask/test_abnormal_{number:05d}_mask.jpg"
    Image.fromarray(levels.astype(np.uint8)).save(path, quality=100)
    return path


def mask_of(root, number):
    name = f"Anomaly_test/abnormal_img/test_abnormal_{number:05d}.jpg"
    (row,) = (row for row in load_data(f"miic:{root}")["test"] if row["path"] == name)
    return row["label"], read_row(row)[1]


def test_only_what_is_above_127_is_a_defect(replica, caplog):
    root, _ = replica
    levels = np.zeros((96, 96))
    levels[8:32, 8:32], levels[48:72, 48:72] = 120, 136
    write_mask(root, 1, levels)
    label, mask = mask_of(root, 1)
    assert label == 1 and mask.sum() == 24 * 24 and mask[48:72, 48:72].all()
    write_mask(root, 1, np.minimum(levels, 120))  # nothing is above it, not even by the brightest pixel
    label, mask = mask_of(root, 1)
    assert label == 1 and not mask.any()
    assert any("empty" in message and "test_abnormal_00001.jpg" in message for message in caplog.messages)


def test_black_defects_are_inverted_if_all_are_black(replica, caplog):
    root, truth = replica
    for number, drawn in enumerate(truth.masks.values(), 1):
        write_mask(root, number, 255 * ~drawn)
    for number, drawn in enumerate(truth.masks.values(), 1):
        label, mask = mask_of(root, number)
        assert label == 1 and np.array_equal(mask, drawn)
    assert any("were inverted" in message for message in caplog.messages)


def test_most_masks_decide_on_their_polarity(replica, caplog):
    root, truth = replica
    write_mask(root, 2, np.full((96, 96), 255))
    assert mask_of(root, 2)[1].all() and np.mean(mask_of(root, 1)[1]) < 0.5
    assert any("more than half" in message and "test_abnormal_00002.jpg" in message for message in caplog.messages)
    for number, drawn in enumerate(truth.masks.values(), 1):
        if number != 5:
            write_mask(root, number, 255 * ~drawn)
    caplog.clear()
    drawn = list(truth.masks.values())
    assert np.array_equal(mask_of(root, 1)[1], drawn[0])
    assert any("7 of 8 masks are mostly white: all were inverted" in message for message in caplog.messages)
    assert any("more than half" in message and "test_abnormal_00005.jpg" in message for message in caplog.messages)


def test_masks_of_other_kinds_follow_the_same_rule(replica):
    """16 bits, and labels 0 and 1; inverted with the others."""
    root, truth = replica
    drawn = list(truth.masks.values())
    folder = root / "Anomaly_test/abnormal_mask"

    def write(invert):
        for number, mask in enumerate(drawn, 1):
            (folder / f"test_abnormal_{number:05d}_mask.jpg").unlink(missing_ok=True)
            kind, top = {1: (np.uint16, 65535), 2: (np.uint8, 1)}.get(number, (np.uint8, 255))
            levels = (mask ^ invert).astype(kind) * kind(top)
            Image.fromarray(levels).save(folder / f"test_abnormal_{number:05d}_mask.png")

    for invert in (False, True):
        write(invert)
        assert all(np.array_equal(mask_of(root, number)[1], mask) for number, mask in enumerate(drawn, 1))


def test_a_mask_that_cannot_be_read_is_named_when_its_row_is(replica):
    root, truth = replica
    (root / "Anomaly_test/abnormal_mask/test_abnormal_00004_mask.jpg").write_bytes(b"no image")
    module = AnomalyDataModule(load_data(f"miic:{root}"), skip_broken=True)
    assert "test_abnormal_00004_mask.jpg" in dict(module.broken)["Anomaly_test/abnormal_img/test_abnormal_00004.jpg"]


def boxes_of(root):
    rows = load_miic(root, boxes=True)["test"]
    return {row["path"]: row["boxes"] for row in rows if row["label"]}


@pytest.mark.parametrize("base", [0, 1])
def test_boxes_are_counted_from_0_whatever_matlab_does(tmp_path, base, caplog):
    truth = make(tmp_path / "r", train=5, normal=2, abnormal=7, base=base, traps=["empty_mask"])
    assert boxes_of(tmp_path / "r") == {name: [box] for name, box in truth.boxes.items()}
    assert any(f"counted from {base}" in message for message in caplog.messages)


def test_boxes_of_other_forms_of_the_matlab_file(replica):
    root, truth = replica
    place, wanted = root / "Anomaly_test/anomalyPosition.mat", {name: [box] for name, box in truth.boxes.items()}
    rows = [[c + 1, r + 1, w, h] for c, r, w, h in truth.boxes.values()]
    cells = np.empty(len(rows), object)
    cells[:] = [np.array([row], float) for row in rows]
    numbered = np.array([[number, *row] for number, row in enumerate(rows, 1)], float)[::-1]  # in any order
    fields = np.array([tuple(row) for row in rows], [(name, float) for name in ("col", "row", "width", "height")])
    for value in (cells, numbered, fields):
        savemat(place, {"p": value})
        assert boxes_of(root) == wanted


def test_boxes_that_do_not_agree_are_not_believed(replica, caplog):
    root, truth = replica
    place = root / "Anomaly_test/anomalyPosition.mat"
    boxes = np.array(list(truth.boxes.values()), float)
    drawn = {name: [box] for name, box in truth.boxes.items()}
    savemat(place, {"p": np.roll(boxes, 1, axis=0)})  # of other images
    assert boxes_of(root) == drawn
    savemat(place, {"p": boxes[:, [1, 0, 3, 2]]})  # rows first
    assert boxes_of(root) == drawn
    assert sum("does not agree" in message for message in caplog.messages) == 2
    place.unlink()
    assert boxes_of(root) == drawn
    assert any("can't be read" in message for message in caplog.messages)


def test_boxes_without_file_and_pictures_are_those_of_the_masks(replica, caplog):
    root, truth = replica
    (root / "Anomaly_test/anomalyPosition.mat").write_bytes(b"no MATLAB file")
    for path in (root / "Anomaly_test/abnormal_bbox").iterdir():  # drawn over the image: can't be told from it
        shutil.copyfile(root / "Anomaly_test/abnormal_img" / path.name.replace("_bbox", ""), path)
    levels = np.zeros((96, 96))
    levels[8:24, 16:48], levels[56:64, 72:80] = 255, 255
    write_mask(root, 1, levels)
    found = boxes_of(root)
    assert found["Anomaly_test/abnormal_img/test_abnormal_00001.jpg"] == [[16, 8, 32, 16], [72, 56, 8, 8]]
    assert found["Anomaly_test/abnormal_img/test_abnormal_00003.jpg"] == []  # its mask is empty
    assert any("regions of the masks" in message for message in caplog.messages)


# ---- archives --------------------------------------------------------------------------------------------------------


FOLDERS = ("Anomaly_train", "Anomaly_test", "Inpainting_train", "Inpainting_test")


def rar(files):
    """A RAR 5 archive of files by name, stored as they are: signature, main header, files, end."""

    def number(n):  # 7 bits a byte, lowest first
        return bytes([n & 127 | 128]) + number(n >> 7) if n > 127 else bytes([n])

    def block(fields, data=b""):
        head = b"".join(field if isinstance(field, bytes) else number(field) for field in fields)
        head = number(len(head)) + head
        return zlib.crc32(head).to_bytes(4, "little") + head + data

    blocks = [block([1, 0, 0])]
    for name, data in files.items():
        about = [2, 2, len(data), 4, len(data), 0o100644, zlib.crc32(data).to_bytes(4, "little"), 0, 1]
        blocks.append(block([*about, len(name), name.encode()], data))
    return b"Rar!\x1a\x07\x01\x00" + b"".join(blocks) + block([5, 0, 0])


@pytest.fixture
def archived(made, tmp_path):
    """A folder of archives; two hold their folder, one of them beside a text, and two what is in it."""
    root = tmp_path / "archives"
    root.mkdir()
    for name in FOLDERS:
        top = made[0] if "train" in name else made[0] / name
        files = [path for path in sorted((made[0] / name).rglob("*")) if path.is_file()]
        content = {str(path.relative_to(top)): path.read_bytes() for path in files}
        beside = {"readme.txt": b"read me"} if name == "Anomaly_train" else {}
        (root / f"{name}.rar").write_bytes(rar(beside | content))
    shutil.copy(made[0] / "REPLICA", root)
    return root


def tool(folder, name, script):
    """A program of the test's own."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!{sys.executable}\nimport shutil, sys\nfrom pathlib import Path\n{script}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def unrar(source):
    """Stands for unrar, called as `unrar x -idq -y -p- ARCHIVE PLACE/`."""
    return (
        "command, *switches, archive, place = sys.argv[1:]\n"
        "assert command == 'x' and all(s.startswith('-') for s in switches) and place.endswith('/')\n"
        "assert Path(archive).read_bytes().startswith(b'Rar!')\n"
        f"shutil.copytree(Path({str(source)!r}) / Path(archive).stem, Path(place) / Path(archive).stem)\n"
    )


@pytest.mark.parametrize("name", ["7z", "7zz", "bsdtar", "unrar"])
def test_archives_are_unpacked_with_what_is_there(archived, made, tmp_path, name, monkeypatch, capsys):
    if name == "unrar":
        tool(tmp_path / "bin", name, unrar(made[0]))
    elif shutil.which(name):
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin" / name).symlink_to(shutil.which(name))
    else:
        pytest.skip(f"{name} is not here")
    monkeypatch.setenv("PATH", str(tmp_path / "bin") + (os.pathsep + "/bin" if name == "7z" else ""))  # 7z is a script
    monkeypatch.setattr(archives, "TOOLS", {name: archives.TOOLS[name]})
    with pytest.raises(ZooError, match=f"zoo data prepare miic:{archived}"):
        check_data(f"miic:{archived}")
    with pytest.raises(ZooError, match=f"zoo data prepare miic:{archived}"):
        check_data(str(archived))
    assert run("data", "prepare", f"miic:{archived}", "--size", 32, "--skip-broken") == 0
    assert capsys.readouterr().out.count("Unpacking") == 4
    assert check_data(f"miic:{archived}").fingerprint == check_data(f"miic:{made[0]}").fingerprint
    assert [str(a.relative_to(archived)) for a, _ in check_data(f"miic:{archived}").pairs] == [
        a for a, _ in made[1].pairs if "train" in a
    ]
    assert not [path for path in archived.iterdir() if path.name.endswith(".partial")]
    assert run("data", "prepare", f"miic:{archived}", "--size", 32, "--skip-broken") == 0
    assert "Unpacking" not in capsys.readouterr().out


def test_unpacking_goes_on_after_a_kill_and_after_a_tool_that_fails(archived, made, tmp_path, monkeypatch):
    tool(tmp_path / "bin", "unrar", "sys.exit('RAR 5 is unknown')")
    place = "next(a[2:] for a in sys.argv if a.startswith('-o')) + '/'"
    tool(tmp_path / "bin", "7zz", f"sys.argv = ['', 'x', sys.argv[-1], {place}]\n{unrar(made[0])}")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    (archived / ".Anomaly_train.partial").mkdir()
    (archived / ".Anomaly_train.partial" / "half.jpg").write_bytes(b"x")
    (archived / "Inpainting_test").mkdir()  # done by an earlier run
    told = []
    archives.unpack(archived, FOLDERS, told.append)
    assert len(told) == 3 and not (archived / "Anomaly_train/half.jpg").exists()
    assert (archived / "Anomaly_train/train_normal_00001.jpg").is_file()
    assert (archived / "Anomaly_test/anomalyPosition.mat").is_file() and not any(
        (archived / "Inpainting_test").iterdir()
    )


def test_no_tool_no_room_or_a_damaged_archive_is_one_sentence(archived, tmp_path, monkeypatch, capsys):
    prepare = ("data", "prepare", f"miic:{archived}")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert run(*prepare) == 2
    assert "install unrar, 7-Zip (7zz) or libarchive's bsdtar" in capsys.readouterr().err
    tool(tmp_path / "bin", "unrar", "sys.exit('checksum error')")
    assert run(*prepare) == 2
    error = capsys.readouterr().err
    assert "checksum error" in error and "Anomaly_train.rar" in error and error.count("\n") == 1
    assert not list(archived.glob(".*.partial")) and not (archived / "Anomaly_train").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    assert run(*prepare) == 2
    assert "0 MB free" in capsys.readouterr().err


# ---- the builder -----------------------------------------------------------------------------------------------------


@pytest.fixture
def built(tmp_path):
    datasets.disable_progress_bars()

    def build(root, **options):
        builder = MIIC(data_dir=root, cache_dir=str(tmp_path / "cache"), **options)
        builder.download_and_prepare()
        return builder.as_dataset()

    yield build
    datasets.enable_progress_bars()


def test_the_builder_gives_what_the_zoo_reads(made, built):
    root, truth = made
    data = built(root)
    assert list(data["train"].features) == ["image", "mask", "label", "path", "boxes"]
    ours = decoded({"test": load_data(f"miic:{root}")["test"]})["test"]
    assert names(data["train"]) == truth.train and names(data["test"]) == list(ours)
    for row in data["test"]:
        label, image, mask = ours[row["path"]]
        assert row["label"] == label and np.array_equal(np.asarray(row["image"]), image)
        assert (row["mask"] is None) == (label == 0)
        if label:
            assert row["mask"].mode == "L" and np.array_equal(np.asarray(row["mask"]), mask * np.uint8(255))
            assert row["boxes"] == [truth.boxes[row["path"]]]


def test_the_builder_notices_a_changed_folder(replica, built):
    root, truth = replica
    assert len(built(root)["train"]) == len(truth.train)
    Image.fromarray(np.zeros((96, 96), np.uint8)).save(root / "Anomaly_train/train_normal_99999.jpg")
    assert len(built(root)["train"]) == len(truth.train) + 1


def test_the_builder_sees_behind_links_and_its_configurations(made, tmp_path, built):
    root, truth = made
    (tmp_path / "linked").mkdir()
    shutil.copytree(root, tmp_path / "real")
    for path in (tmp_path / "real").iterdir():
        (tmp_path / "linked" / path.name).symlink_to(path)
    assert len(built(tmp_path / "linked")["train"]) == len(truth.train)
    Image.fromarray(np.zeros((96, 96), np.uint8)).save(tmp_path / "real/Anomaly_train/train_normal_99999.jpg")
    assert len(built(tmp_path / "linked")["train"]) == len(truth.train) + 1
    assert len(built(tmp_path / "linked", config_name="inpainting")["train"]) == 3
    for kind in ("abnormal", "normal"):
        shutil.copyfile(root / truth.train[4], tmp_path / f"real/Inpainting_train/train_{kind}_77777.jpg")
    assert len(built(tmp_path / "linked", config_name="inpainting")["train"]) == 4


def test_the_builder_names_what_is_broken_and_gives_terms_to_miic_alone(replica, tmp_path, caplog):
    root, truth = replica

    def make_one():
        builder = MIIC(data_dir=root, cache_dir=str(tmp_path / "cache"))
        builder.download_and_prepare()
        return builder.info

    info = make_one()
    assert [m for m in caplog.messages if "truncated" in m and truth.broken[0] in m]
    assert not info.license and not info.homepage and "imitation" in info.description
    unmarked(root)
    assert "non-commercial" in make_one().license


def test_pairs_are_a_configuration(made, built):
    root, truth = made
    data = built(root, config_name="inpainting")
    assert [row["path"] for split in ("train", "test") for row in data[split]] == [a for a, _ in truth.pairs]
    for row, (abnormal, normal) in zip([*data["train"], *data["test"]], truth.pairs, strict=True):
        assert np.array_equal(row["abnormal"], Image.open(root / abnormal))
        assert np.array_equal(row["normal"], Image.open(root / normal))


# ---- commands --------------------------------------------------------------------------------------------------------


def test_fit_evaluate_predict_and_prepare(made, tmp_path, capsys):
    root, truth = made
    data = ("--data", f"miic:{root}")
    small = ("--preset", "lite", "--input-size", 64, "--dims", 20)
    assert run("fit", "padim", *small, *data, "--name", "m") == 2
    error = capsys.readouterr().err
    assert Path(truth.broken[0]).name in error and "truncated" in error
    assert run("fit", "padim", *small, *data, "--name", "m", "--skip-broken") == 0
    assert f"Left out {truth.broken[0]}" in capsys.readouterr().out
    assert run("evaluate", "m", *data) == 0
    record = json.loads((model_place("m") / "results.json").read_text())
    assert record["train_data"]["name"] == record["test_data"]["name"] == "miic-replica"
    assert record["train_data"]["broken"] == 1 and "terms" not in record["train_data"]
    assert record["train_data"]["images"] + record["train_data"]["held_out"] == len(truth.train) - 1
    assert record["test_data"]["normal"] == 10 and record["test_data"]["anomalous"] == 8
    assert str(root) not in (model_place("m") / "results.json").read_text()
    assert run("predict", "m", root / "Anomaly_test/abnormal_img", "--out", tmp_path / "out") == 0

    assert run("data", "prepare", f"miic:{root}", "--size", 64, "--out", tmp_path / "store") == 2
    assert run("data", "prepare", f"miic:{root}", "--size", 64, "--out", tmp_path / "store", "--skip-broken") == 0
    stored = load_data(str(tmp_path / "store"))
    assert names(stored["train"]) == [name for name in truth.train if name not in truth.broken]
    assert check_data(str(tmp_path / "store")).name == "miic-replica"
    assert check_data(str(tmp_path / "store")).origin == check_data(f"miic:{root}").fingerprint


def test_inpainting_learns_from_the_sets_own_pairs(made, tmp_path):
    root, _ = made
    options = {"arguments": {"input_size": 64, "width": 2}, "data_options": {"skip_broken": True}}
    _, record = fit("iad_inpainting", f"miic:{root}", None, "lite", trainer_options={"max_steps": 4}, **options)
    assert record["train_data"]["inpainting_pairs"] == 3 and record["train_data"]["pairs_of"] == "miic-replica"
    others = tmp_path / "pairs"
    others.mkdir()
    for path in (root / "Inpainting_train").glob("train_*_0000[12].jpg"):
        shutil.copy(path, others)
    options["arguments"]["inpainting_pairs"] = str(others)
    _, record = fit("iad_inpainting", f"miic:{root}", None, "lite", trainer_options={"max_steps": 4}, **options)
    assert record["train_data"]["inpainting_pairs"] == 2 and "pairs_of" not in record["train_data"]


def test_no_test_image_is_in_a_pair_that_is_learned_from(replica, built, tmp_path, caplog):
    """By content on either side, nor by name: in a fit, in the builder and in the export."""
    root, truth = replica
    wanted = [pair for pair in truth.pairs if pair[0].startswith("Inpainting_train")]
    assert len(wanted) == 3 and len(truth.leaking) == 3
    assert len(abnormal_and_clean(root / "Inpainting_train")) == 6
    for kind in ("abnormal", "normal"):  # what macOS leaves beside a file
        shutil.copyfile(root / truth.train[0], root / f"Inpainting_train/._train_{kind}_00001.jpg")
    assert [tuple(str(p.relative_to(root)) for p in pair) for pair in check_data(f"miic:{root}").pairs] == wanted
    load_data(f"miic:{root}")
    assert any(m.startswith("3 pairs are left out of Inpainting_train, with test images") for m in caplog.messages)
    assert [row["path"] for row in built(root, config_name="inpainting")["train"]] == [a for a, _ in wanted]
    assert run("data", "export", f"miic:{root}", "--out", tmp_path / "set") == 0
    pairs = datasets.load_dataset(str(tmp_path / "set"), "inpainting", cache_dir=str(tmp_path / "cache"))
    assert list(pairs["train"]["path"]) == [a for a, _ in wanted]
    small = {"arguments": {"input_size": 64, "width": 2}, "data_options": {"skip_broken": True}}
    model, record = fit("iad_inpainting", f"miic:{root}", None, "lite", trainer_options={"max_steps": 4}, **small)
    assert record["train_data"]["inpainting_pairs"] == 3
    tested = {(root / name).read_bytes() for name in (*truth.normal, *truth.masks)}
    assert not tested & {path.read_bytes() for pair in model.pairs for path in pair}


def test_pairs_of_held_out_images_are_left_out_of_a_fit(replica, capsys):
    root, truth = replica
    for kind in ("abnormal", "normal"):
        for path in (root / "Inpainting_train").glob(f"*_{kind}_0*.jpg"):
            path.unlink()
    good = [name for name in truth.train if name not in truth.broken]
    for name in good:  # a clean version of each training image
        number = Path(name).stem.rsplit("_", 1)[-1]
        shutil.copyfile(root / name, root / f"Inpainting_train/train_normal_{number}.jpg")
        Image.open(root / name).transpose(0).save(root / f"Inpainting_train/train_abnormal_{number}.jpg")
    options = {"arguments": {"input_size": 64, "width": 2}, "data_options": {"skip_broken": True}}
    run_options = RunOptions(say=print)
    _, record = fit(
        "iad_inpainting", f"miic:{root}", None, "lite", trainer_options={"max_steps": 4}, run=run_options, **options
    )
    about = record["train_data"]
    assert about["images"] + about["held_out"] == len(good) and about["held_out"] >= 10
    assert about["inpainting_pairs"] == about["images"]
    assert f"{about['held_out']} more are left out" in capsys.readouterr().out
    store = root.with_name("store")  # of smaller images: told by the files
    assert run("data", "prepare", f"miic:{root}", "--size", 64, "--out", store, "--skip-broken") == 0
    _, record = fit("iad_inpainting", str(store), None, "lite", trainer_options={"max_steps": 4}, **options)
    assert record["train_data"]["inpainting_pairs"] == record["train_data"]["images"]


def test_pairs_of_a_copy_are_learned_from_where_it_has_them(made, exported, cached, tmp_path, capsys):
    options = {"arguments": {"input_size": 64, "width": 2}, "data_options": {"skip_broken": True}}
    options |= {"trainer_options": {"max_steps": 4}, "run": RunOptions(say=print)}
    scores = []
    for data in (f"miic:{made[0]}", str(exported), "hub:me/miic"):
        model, record = fit("iad_inpainting", data, None, "lite", **options)
        assert record["train_data"]["inpainting_pairs"] == 3 and record["train_data"]["pairs_of"] == "miic-replica"
        scores.append(model.predict(made[0] / made[1].normal[0]).score)
    assert scores[0] == scores[1] == scores[2]  # the same pairs in the same order
    store = tmp_path / "store"
    assert run("data", "prepare", f"miic:{made[0]}", "--size", 64, "--out", store, "--skip-broken") == 0
    _, record = fit("iad_inpainting", str(store), None, "lite", **options)
    assert record["train_data"]["inpainting_pairs"] == 3 and str(made[0]) not in json.dumps(record)
    (store / SOURCE).write_text(f"miic:{tmp_path / 'gone'}")
    capsys.readouterr()
    _, record = fit("iad_inpainting", str(store), None, "lite", **options)
    assert "inpainting_pairs" not in record["train_data"]
    assert "This copy of miic-replica has no pairs to learn from at hand" in capsys.readouterr().out


def test_pairs_of_unknown_names_are_told(replica, caplog):
    root, _ = replica
    for i, path in enumerate(sorted((root / "Inpainting_train").iterdir())):
        path.rename(path.with_name(f"{i}.jpg"))
    assert check_data(f"miic:{root}").pairs == ()
    load_data(f"miic:{root}")
    assert any("no pairs by name" in message for message in caplog.messages)


def test_terms_are_shown_once(replica, caplog, zoo_home, monkeypatch):
    root, _ = replica
    load_data(f"miic:{root}")
    assert "non-commercial" not in caplog.text  # nothing of it is MIIC's
    unmarked(root)
    caplog.set_level(logging.WARNING)
    for name in ("miic-partial", "miic", "miic"):  # a part of it has its terms
        assert check_data(f"miic:{root}").name == name
        load_data(f"miic:{root}")
        owners_counts(monkeypatch, root)
    assert caplog.text.count("non-commercial research only") == 1 and "10.21979/N9/WBLTFI" in caplog.text
    assert check_data(f"miic:{root}").name == "miic" and (zoo_home / "terms/miic").is_file()
    small = ("--preset", "lite", "--input-size", 64, "--dims", 20)
    assert run("fit", "padim", *small, "--data", f"miic:{root}", "--name", "m", "--skip-broken") == 0
    assert "non-commercial research only" in (model_place("m") / "README.md").read_text()


# ---- parquet and the hub ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(made, tmp_path_factory):
    place = tmp_path_factory.mktemp("parquet") / "set"
    os.environ["ZOO_HOME"] = str(place.parent / "home")
    try:
        assert run("data", "export", f"miic:{made[0]}", "--out", place) == 0
    finally:
        del os.environ["ZOO_HOME"]
    return place


def without_broken(data, truth):
    return datasets.DatasetDict(
        {s: rows.select([i for i, p in enumerate(rows["path"]) if p not in truth.broken]) for s, rows in data.items()}
    )


def test_parquet_loads_equal_to_the_folder(made, exported):
    root, truth = made
    folder, parquet = load_data(f"miic:{root}"), load_data(str(exported))
    for split in ("train", "test"):
        assert names(folder[split]) == names(parquet[split])
    same(decoded(without_broken(folder, truth)), decoded(without_broken(parquet, truth)))
    (broken,) = (row for row in parquet["train"] if row["path"] in truth.broken)
    with pytest.raises(ZooError, match=Path(truth.broken[0]).name):
        read_row(broken)
    one, other = check_data(f"miic:{root}"), check_data(str(exported))
    assert other.name == one.name and other.counts == one.counts and other.origin == one.fingerprint
    text = "".join(path.read_text() for path in exported.iterdir() if path.is_file())
    assert (
        str(root) not in text
        and str(root).encode() not in (exported / "data").joinpath("train-00000-of-00001.parquet").read_bytes()
    )


def test_parquet_is_a_data_set_of_the_library(made, exported, tmp_path):
    """Without the zoo, by the card alone."""
    root, truth = made
    data = datasets.load_dataset(str(exported), cache_dir=str(tmp_path / "cache"))
    assert list(data["test"].features) == ["image", "mask", "label", "path", "boxes"]
    assert data["test"].features["label"].names == ["normal", "anomalous"]
    row = data["test"][0]
    assert np.array_equal(row["image"], Image.open(root / row["path"])) and row["boxes"] == [truth.boxes[row["path"]]]
    pairs = datasets.load_dataset(str(exported), "inpainting", cache_dir=str(tmp_path / "cache"))
    for row, (abnormal, normal) in zip([*pairs["train"], *pairs["test"]], truth.pairs, strict=True):
        assert np.array_equal(row["abnormal"], Image.open(root / abnormal))
        assert np.array_equal(row["normal"], Image.open(root / normal))
    split = json.loads((exported / "halves.json").read_text())
    plain = load_data(f"miic:{root}")["test"].with_format(None)
    validation, reported = halves(list(plain["label"]), list(plain["path"]), split["seed"])
    assert split["val"] == [plain["path"][i] for i in validation]
    assert split["held_out"] == [plain["path"][i] for i in reported]
    card = (exported / "README.md").read_text()
    assert "imitation" in card and "non-commercial" not in card


def test_the_card_carries_the_terms(replica, tmp_path):
    unmarked(replica[0])
    assert run("data", "export", f"miic:{replica[0]}", "--out", tmp_path / "set") == 0
    card = (tmp_path / "set/README.md").read_text()
    assert "# miic-partial" in card and "no figure on this set is one on MIIC" in card
    assert "license: other" in card and "non-commercial research only" in card and "ICIP 2021" in card


def test_a_store_of_parquet_is_that_of_the_folder(made, exported, tmp_path):
    stores = [tmp_path / "a", tmp_path / "b"]
    for data, place in zip((f"miic:{made[0]}", exported), stores, strict=True):
        assert run("data", "prepare", data, "--size", 32, "--out", place, "--skip-broken") == 0
    same(*(decoded(load_data(str(place))) for place in stores))
    assert check_data(str(stores[0])).fingerprint == check_data(str(stores[1])).fingerprint


def test_any_set_is_exported(mvtec, tmp_path):
    for data in ("synthetic:train=3,good=2,defect=2,size=64", "synthetic:train=3,size=64,bits=16", str(mvtec)):
        place = tmp_path / hashlib.md5(data.encode()).hexdigest()
        assert run("data", "export", data, "--out", place) == 0
        same(decoded(load_data(data)), decoded(load_data(str(place))))
    flat = mvtec / "train/good"
    assert run("data", "export", flat, "--out", tmp_path / "flat") == 0
    data = load_data(str(tmp_path / "flat"))
    assert len(data["train"]) == 30 and len(data["test"]) == 0 and not (tmp_path / "flat/halves.json").exists()


def test_an_export_names_what_is_no_image_and_keeps_it(mvtec, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(mvtec, data)
    whole = next((data / "train/good").iterdir())
    whole.write_bytes(whole.read_bytes()[:-100])
    assert run("data", "export", data, "--out", tmp_path / "out") == 0
    told = capsys.readouterr().out
    assert told.count("Exported as it is") == 1 and whole.name in told and "--skip-broken" in told
    rows = load_data(str(tmp_path / "out"))["train"]
    kept = {Path(row["path"]).name: row["image"]["bytes"] for row in rows.with_format(None)}
    assert kept[whole.name] == whole.read_bytes()


def test_an_export_is_not_written_over_and_not_read_when_damaged(exported, mvtec, tmp_path, capsys):
    assert run("data", "export", mvtec, "--out", exported) == 2
    assert f"of something else, or of files that have changed since; remove {exported}" in capsys.readouterr().err
    assert run("data", "export", mvtec, "--out", mvtec) == 2
    assert "exists and is something else" in capsys.readouterr().err
    copy = tmp_path / "copy"
    shutil.copytree(exported, copy)
    file = copy / "data/test-00000-of-00001.parquet"
    file.write_bytes(file.read_bytes()[:-9] + b"123456789")
    with pytest.raises(ZooError, match="test-00000-of-00001.parquet is missing or damaged"):
        load_data(str(copy))
    index = json.loads((copy / "zoo.json").read_text())
    (copy / "zoo.json").write_text(json.dumps(index | {"name": "miic"}))
    with pytest.raises(ZooError, match="zoo.json is damaged"):
        check_data(str(copy))


def grey(path):
    Image.fromarray(np.full((96, 96), 77, np.uint8)).save(path)


def same_size(path):
    """Other pixels, the same number of bytes."""
    data = bytearray(path.read_bytes())
    data[-60] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "change",
    [
        lambda r, out: same_size(r / "Anomaly_train/train_normal_00010.jpg"),
        lambda r, out: [grey(r / f"Inpainting_train/train_{kind}_00050.jpg") for kind in ("normal", "abnormal")],
        lambda r, out: savemat(r / "Anomaly_test/anomalyPosition.mat", {"p": np.ones((8, 4))}),
        lambda r, out: same_size(r / "Anomaly_test/abnormal_bbox/test_abnormal_00001_bbox.jpg"),
        lambda r, out: same_size(out / "data/train-00000-of-00001.parquet"),
        lambda r, out: (out / "inpainting/train-00000-of-00001.parquet").unlink(),
        lambda r, out: (out / "zoo.json").write_text("{}"),
    ],
    ids=["pixels", "pairs", "positions", "boxes", "damaged", "gone", "index"],
)
def test_an_export_is_there_only_if_all_of_it_is(replica, tmp_path, capsys, change):
    export = ("data", "export", f"miic:{replica[0]}", "--out", tmp_path / "set")
    assert run(*export) == 0 and run(*export) == 0
    assert "is exported already, and whole" in capsys.readouterr().out
    change(replica[0], tmp_path / "set")
    assert run(*export) == 2
    error = capsys.readouterr().err
    assert f"remove {tmp_path / 'set'} or name another folder" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "change",
    [
        {"files": {"../x.parquet": "0"}},
        {"files": {"/x/data/train-00000-of-00001.parquet": "0"}},
        {"files": ["data/train-00000-of-00001.parquet"]},
        {"files": {"data/train-00000-of-00001.parquet": None}},
        {"counts": {"train": [1, 0]}},
        {"counts": {"train": [1, 0, 0], "test": [1]}},
        {"counts": {"train": [1, 0], "test": ["1", 0]}},
        {"counts": None},
        {"name": None},
        {"fingerprint": 1},
        {"name": ...},
    ],
)
def test_an_index_that_no_export_writes_is_one_sentence(exported, tmp_path, change, capsys):
    index = json.loads((exported / "zoo.json").read_text())
    (tmp_path / "set").mkdir()
    (tmp_path / "set/zoo.json").write_text(sealed(index))
    assert check_data(str(tmp_path / "set")).name == "miic-replica"  # the seal is right
    (tmp_path / "set/zoo.json").write_text(sealed({k: v for k, v in (index | change).items() if v is not ...}))
    assert run("fit", "padim", "--preset", "lite", "--data", tmp_path / "set", "--name", "x") == 2
    error = capsys.readouterr().err
    assert "zoo.json is damaged" in error and error.count("\n") == 1


def test_a_user_who_is_not_there_is_one_sentence(tmp_path, capsys):
    nobody = "~nobody-of-that-name/x"
    for command in (
        ("data", "prepare", nobody),
        ("data", "prepare", f"miic:{nobody}"),
        ("data", "prepare", "synthetic:train=2,size=32", "--out", nobody),
        ("data", "export", nobody, "--out", tmp_path / "x"),
        ("data", "export", "synthetic:train=2,size=32", "--out", nobody),
        ("fit", "padim", "--preset", "lite", "--data", f"miic:{nobody}", "--name", "x"),
        ("evaluate", nobody, "--data", "synthetic"),
    ):
        assert run(*command) == 2
        error = capsys.readouterr().err
        assert "write the path in full" in error and error.count("\n") == 1


def test_archives_of_the_current_folder_are_left_alone(archived, monkeypatch, capsys):
    monkeypatch.chdir(archived)
    assert run("data", "prepare", "miic:") == 2
    assert "write miic:DIR" in capsys.readouterr().err and not (archived / "Anomaly_train").exists()


class Hub:
    """What the upload asks of the client, and nothing else."""

    calls: list = []
    public = False

    def create_repo(self, repo, **options):
        self.calls.append(("create", repo, options))

    def repo_info(self, repo, repo_type):
        return type("Info", (), {"private": not self.public})

    def upload_folder(self, **options):
        self.calls.append(("upload", options["repo_id"], options))


def test_nothing_is_uploaded_without_a_word_about_the_right_to(replica, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setattr(Hub, "calls", [])
    export = ("data", "export", f"miic:{replica[0]}", "--out", tmp_path / "set", "--push", "me/miic")
    assert run(*export) == 2
    assert "--i-have-the-right-to-share" in capsys.readouterr().err and not (tmp_path / "set").exists()
    monkeypatch.setattr(Hub, "public", True)
    assert run(*export, "--i-have-the-right-to-share") == 2
    assert "is public" in capsys.readouterr().err and [call[0] for call in Hub.calls] == ["create"]
    monkeypatch.setattr(Hub, "public", False)
    assert run(*export, "--i-have-the-right-to-share") == 0
    assert Hub.calls[1][2]["private"] is True
    assert Hub.calls[2][1:] == ("me/miic", Hub.calls[2][2]) and Hub.calls[2][2]["repo_type"] == "dataset"
    assert "me/miic, which is private" in capsys.readouterr().out
    place = tmp_path / "set"
    (place / "notes.txt").write_text("not of the export")
    written = {str(path.relative_to(place)) for path in place.rglob("*") if path.is_file()} - {"notes.txt"}
    assert set(Hub.calls[2][2]["allow_patterns"]) == written and len(written) == 7
    monkeypatch.setattr(Hub, "public", True)  # as it was before, whatever was asked for
    assert run(*export, "--i-have-the-right-to-share", "--private", "false") == 0
    assert "me/miic, which is public" in capsys.readouterr().out


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cached(exported, tmp_path, monkeypatch):
    """The hub's cache as the client fills it, which is all that is asked with HF_HUB_OFFLINE=1."""
    repo = tmp_path / "hub/datasets--me--miic"
    shutil.copytree(exported, repo / "snapshots" / COMMIT)
    (repo / "refs").mkdir()
    for name in ("main", "v1"):
        (repo / "refs" / name).write_text(COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return repo


def test_hub_loads_the_parquet_form(made, exported, cached):
    root, truth = made
    for data in ("hub:me/miic", "hub:me/miic@v1", f"hub:me/miic@{COMMIT}"):
        assert check_data(data).fingerprint == check_data(str(exported)).fingerprint
    data = load_data("hub:me/miic@v1")
    same(decoded(without_broken(data, truth)), decoded(without_broken(load_data(f"miic:{root}"), truth)))


def test_mistakes_about_the_hub_are_one_sentence(cached, capsys):
    for data, words in (
        ("hub:me", "hub:ORG/NAME@REVISION"),
        ("hub:me/other", "not in the cache"),
        ("hub:me/miic@v2", "not in the cache"),
    ):
        assert run("fit", "padim", "--preset", "lite", "--data", data, "--name", "x") == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1
    (cached / "snapshots" / COMMIT / "zoo.json").unlink()
    with pytest.raises(ZooError, match="zoo.json|not in the cache"):
        check_data("hub:me/miic")


def test_help_of_data(capsys):
    assert run("data", "--help") == 0
    out = capsys.readouterr().out
    assert "zoo data prepare" in out and "zoo data export" in out
    assert run("data", "exprt") == 2
    assert "zoo data export" in capsys.readouterr().err
