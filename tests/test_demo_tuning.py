"""A visitor's fine-tuning gives a calibrated model or one sentence, and leaves nothing else, whatever happens to it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from zoo import checkpoint, hub
from zoo.calibrate import calibrate
from zoo.calibration import supported_rate
from zoo.data import load_data
from zoo.demo import tuning, tuning_job
from zoo.demo.tuning import Cancelled, Meter, Tuning, offer, split, sweep
from zoo.errors import ZooError
from zoo.evidence import TrainingImages, pairs
from zoo.fit import fit
from zoo.image import read_image

SIZE = 64
LONG = 10**6  # steps
BASES = {"bank": "patchcore", "steps": "ganomaly"}


def drawn(folder, count, style="fine", size=SIZE):
    """Normal images of the built-in set, as files."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = load_data(f"synthetic:train={count},good=1,defect=1,size={size},style={style}")["train"]
    paths = [folder / f"{i:03d}.png" for i in range(count)]
    for path, row in zip(paths, rows, strict=True):
        Image.fromarray(read_image(row["image"])).save(path)
    return paths


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A registry of two small models, of another style than the visitors' images."""
    root = tmp_path_factory.mktemp("tuning")
    drawn(root / "first", 16, "metal")
    fit("patchcore", str(root / "first"), "bank", "lite", {"input_size": SIZE, "bank_size": 60}, home=root)
    fit(
        "ganomaly",
        str(root / "first"),
        "steps",
        "lite",
        {"input_size": SIZE, "width": 2},
        {},
        {"max_steps": 4},
        home=root,
    )
    return root


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return drawn(tmp_path_factory.mktemp("visitor"), 24)


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(autouse=True)
def registry(home, zoo_home, tmp_path, monkeypatch):
    """The registry of the module. After each test there are the same models, unchanged, and no work under way."""
    monkeypatch.setenv("ZOO_HOME", str(home))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    before = contents(home)
    yield home / "models"
    left, after, models = list((home / "models").glob(".tuning/*")), contents(home), set(hub.list_models())
    for path in (home / "models").iterdir():
        if path.name not in BASES:  # what one test leaves is no failure of the next
            shutil.rmtree(path)
    assert not left and after == before and models == set(BASES)
    assert not list((tmp_path / "temporary").iterdir())
    assert not tuning._taken and tuning._turn.acquire(blocking=False)
    tuning._turn.release()


def until(job, stage, steps=False):
    """Start a job and follow it up to a stage, and its first step."""
    run = job.run()
    for progress in run:
        if progress.stage == stage and (not steps or ": step " in progress.line):
            return run
    raise AssertionError(f"no {stage}")


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def comes(holds):
    """Whether a condition comes to hold, on however busy a machine."""
    end = time.monotonic() + 300
    while not holds() and time.monotonic() < end:
        time.sleep(0.05)
    return holds()


def ends(pid):
    return comes(lambda: not alive(pid))


def refused(job):
    """The sentence of a job that is refused, without a place of this machine."""
    with pytest.raises(ZooError) as found:
        list(job.run())
    text = str(found.value)
    assert text.endswith(".") and text.count(". ") == 0 and "\n" not in text
    assert "/" not in text and str(job._work) not in text and "--" not in text
    assert job.summary is None
    return text


# ---- a model ---------------------------------------------------------------------------------------------------------


def test_images_become_a_calibrated_model(images, registry, tmp_path):
    """Of two sizes, under any names, and with copies, which count once."""
    place, names = tmp_path / "up loads", ["ok-1.png", "A.png", "a.PNG", "Süd wafer;x.png", "..png", "--remove.png"]
    place.mkdir()
    for i, source in enumerate(images[:12]):
        name = names[i] if i < len(names) else f"{i}.png"
        (place / str(i)).mkdir()
        image = Image.open(source)
        (image.crop((0, 0, SIZE, 60)) if i % 2 else image).save(place / str(i) / name, format="png")
    files = sorted(place.rglob("*.*"))
    Image.open(files[0]).save(place / "copy.tif")
    shutil.copy(files[0], place / "again.dat")
    job = Tuning([*files, place / "copy.tif", place / "again.dat"], "bank", "mine_1", "cpu")
    seen = list(job.run())
    stages = list(dict.fromkeys(progress.stage for progress in seen))
    assert stages == ["checking", "learning", "calibrating", "done"]
    shares = [progress.share for progress in seen]
    assert shares == sorted(shares) and shares[0] < 0.05 and shares[-1] == 1.0 and len(set(shares)) > 8
    assert list(job._work.parent.iterdir()) == []
    found = job.summary
    assert (found.name, found.base, found.method) == ("mine-1", "bank", "patchcore")
    assert (found.learned, found.chosen, found.apart, found.unchanged) == (6, 0, 6, False)
    assert (1 - found.rate) ** 6 <= 0.05 < (1 - found.rate + 0.001) ** 6
    assert "6 images" in seen[-1].line and f"at most {100 * found.rate:.4g} %" in seen[-1].line

    folder = registry / "mine-1"
    try:
        model = hub.from_pretrained("mine_1")
        known = model.calibration
        assert known.calibrated and known.false_alarm_rate == found.rate and len(known.scores) == 6
        assert sorted(map(tuple, known.sizes)) == [(60, SIZE), (SIZE, SIZE)]
        defect = np.array(Image.open(images[20]))
        defect[20:40, 20:40] = 255
        judged = model.predict(defect)
        assert judged.p_value == pytest.approx(1 / 7) and judged.is_anomalous
        texts = b"".join(data for path, data in contents(folder).items() if path.suffix != ".safetensors")
        places = [job._work, place, Path(tempfile.gettempdir())]
        assert not [path for path in places if str(path).encode() in texts]
        assert checkpoint.read_record(folder)["parent"]["name"] == "bank"
        # What it has learned from is gone, and known again by its content; what it was calibrated on had no say.
        evidence = pairs(model, TrainingImages(model), model.bring(defect), [(30, 30)])
        assert evidence[0].found.pixels.size
        own = [image for image, *_ in model.origin if image and "@" not in image]
        assert own and all(TrainingImages(model).read(name) is None for name in own)
        with pytest.raises(ZooError, match="6 of these normal images had a say"):
            calibrate(model, str(_flat(files, tmp_path / "all")), 0.4, folder=folder)
        fresh = _flat(images[12:], tmp_path / "fresh")
        assert calibrate(model, str(fresh), 0.3, folder=folder)[0]["normals"] == 12
    finally:
        shutil.rmtree(folder)


def _flat(files, folder):
    folder.mkdir()
    for i, file in enumerate(files):
        shutil.copy(file, folder / f"{i}.png")
    return folder


def prepared(work, files, base, name="mine", **more):
    """The folder of a job as its process finds it; the job."""
    (work / "images").mkdir(parents=True)
    for file in files:
        shutil.copy(file, work / "images" / file.name)
    job = {"base": str(hub.model_place(base)), "name": name, "device": "cpu", "max_steps": None}
    return job | {"files": [file.name for file in files], "least": tuning.LEAST, "most": tuning.MOST} | more


def test_a_method_of_steps_chooses_by_images_that_set_no_threshold(images, tmp_path):
    told, meter, shares = [], Meter(20), []
    job = prepared(tmp_path, images[:20], "steps", max_steps=20)
    found = tuning_job._do(tmp_path, job, lambda **said: told.append(json.dumps(said).encode()))
    assert (found["learned"], found["chosen"], found["apart"]) == (8, 2, 10)
    folder = tmp_path / "home" / "models" / "mine"
    model = hub.from_pretrained(folder)
    assert model.calibration.calibrated and len(model.calibration.scores) == 10
    assert model.calibration.false_alarm_rate == found["rate"] == supported_rate(10)
    record = checkpoint.read_record(folder)
    assert record["training"]["steps"] <= 20 and record["calibration"]["normals"] == 10
    assert found["unchanged"] == (record["training"]["selection"]["step"] == 0)
    learned = {path.name for path in (tmp_path / tuning_job.LEARNED / "good").iterdir()}
    apart = {path.name for path in (tmp_path / tuning_job.APART / "good").iterdir()}
    assert len(learned) == len(apart) == 10 and learned | apart == {file.name for file in images[:20]}
    for line in [b"some library speaks", b"7", *told]:
        meter.hear(line)
        shares.append(meter.progress().share)
    assert shares == sorted(shares) and len(set(shares)) > 3
    assert meter.stage == "calibrating" and not meter.error


def test_progress_moves_on_between_two_words(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    meter = Meter(30)

    def after(seconds):
        now[0] += seconds
        return meter.progress()

    meter.enter("checking", "Checking")
    assert after(0).share == 0 < after(3).share < after(30).share < 0.15
    meter.hear(b'{"stage": "learning", "words": "Learning", "by_steps": true}')
    assert 0.15 <= after(1).share < after(50).share < 0.15 + 0.07
    meter.hear(b'{"line": "Step 20 of 200: loss 0.3 (a 0.1, b 0.2), 4 steps/s, 45 s left."}')
    assert after(0).share == pytest.approx(0.15 + 0.07)
    assert after(2.5).line == "Learning: step 20 of 200, about 42 s left."
    assert meter.progress().share == pytest.approx(0.15 + 0.7 * 30 / 200)
    assert after(1000).share == pytest.approx(0.15 + 0.7 * 40 / 200)  # until it says so
    meter.hear(b'{"line": "Step 30 of 200: loss 0.3, 1e-05 steps/s, 9 h left."}')
    assert after(0).share == pytest.approx(0.15 + 0.7 * 40 / 200) and " h left" in meter.progress().line
    meter.hear(b'{"stage": "calibrating", "words": "Measuring"}')
    assert after(0).share == pytest.approx(0.85) and after(1e6).share == pytest.approx(0.99)


@pytest.mark.parametrize("count", [10, 11, 30, 100])
def test_what_is_offered_can_be_promised(count):
    learned, apart = split(count)
    assert learned + apart == count and 0 <= apart - learned <= 1
    rate = float(offer(count).split()[-2]) / 100
    assert (1 - rate) ** apart <= 0.05 < (1 - rate + 0.001) ** apart


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["", "  ", "../x", "a/b", "a\\b", "/etc/x", ".hidden", "-x", "naïve", "a b", "x" * 97, "a\0b"]
)
def test_names_that_are_no_names(images, name):
    assert refused(Tuning(images, "bank", name, "cpu")).startswith("The name of a model has up to 96 letters")


@pytest.mark.parametrize("base", ["", "nosuch", "../models/bank", "org/model", "/"])
def test_a_model_that_is_not_offered_is_no_base(images, base, registry):
    assert "choose one of them" in refused(Tuning(images, base, "mine", "cpu"))
    assert "choose one of them" in refused(Tuning(images, "bank", "mine", "cpu", bases=["steps"]))


def test_a_model_is_never_replaced(images, registry):
    for name in ("bank", "steps"):
        assert refused(Tuning(images, "bank", name, "cpu")) == f"There is a model {name} already; choose another name."
    (registry / "other").mkdir()
    (registry / "other/notes.txt").write_text("mine")
    try:
        assert refused(Tuning(images, "bank", "other", "cpu")) == "There is a model other already; choose another name."
    finally:
        shutil.rmtree(registry / "other")


def test_of_two_visitors_with_one_name_the_second_is_refused_and_the_next_waits(images, tmp_path):
    first, second, third = (Tuning(images, "bank", name, "cpu") for name in ("my_model", "my-model", "another"))
    run = until(first, "checking")
    assert refused(second) == "There is a model my-model already; choose another name."
    waiting = third.run()
    assert [next(waiting).stage for _ in range(3)] == ["waiting"] * 3 and third.pid is None
    run.close()
    assert next(waiting).stage == "checking"
    third.cancel()
    with pytest.raises(Cancelled):
        list(waiting)


def test_a_name_that_is_taken_meanwhile_stays_its_owners(images, registry):
    job = Tuning(images, "bank", "late", "cpu")
    place, _ = job._begin()
    job._work = registry / ".tuning" / "work"
    (job._work / "home/models/late").mkdir(parents=True)
    (registry / "late").mkdir()
    (registry / "late/config.json").write_text("{}")
    try:
        with pytest.raises(ZooError, match="^There is a model late already; choose another name.$"):
            job._keep(place, {})
        assert [path.name for path in (registry / "late").iterdir()] == ["config.json"] and job.summary is None
    finally:
        job._close()
        shutil.rmtree(registry / "late")


def test_too_few_and_too_many_files(images):
    assert "at least 10 normal images, and there are 9" in refused(Tuning(images[:9], "bank", "mine", "cpu"))
    assert "at most 100 normal images, and there are 201" in refused(Tuning(images[:1] * 201, "bank", "mine", "cpu"))


def test_only_different_images_count(images, home, tmp_path):
    known = sorted((home / "first").iterdir())
    config = checkpoint.read_config(hub.model_place("bank"))

    def distinct(name, files, **more):
        job = prepared(tmp_path / name, files, "bank", **more)
        return tuning_job._distinct(tmp_path / name / "images", hub.model_place("bank"), config, job)

    copies = []
    for i, file in enumerate(images[:9]):
        copies.append(tmp_path / f"copy{i}.tif")  # other bytes, the same pixels
        Image.open(file).save(copies[-1])
    with pytest.raises(
        ZooError, match="at least 10 different normal images, and there are 9, 9 of the files being cop"
    ):
        distinct("few", [*images[:9], *copies])
    renamed = [shutil.copy(file, tmp_path / f"known{i}.png") for i, file in enumerate(known)]
    noted = checkpoint.file_sha256(hub.model_place("bank") / "private/seen.csv")
    with pytest.raises(ZooError, match="there are 9, 8 being of those that the model has learned from already"):
        distinct("known", [*images[:1], *map(Path, renamed)])  # 8 of the 16 were held out by its fit
    assert checkpoint.file_sha256(hub.model_place("bank") / "private/seen.csv") == noted
    with pytest.raises(ZooError, match="at most 12 different normal images, and there are 13; leave some out"):
        distinct("many", images[:13], most=12)
    found, largest = distinct("fine", [*images[:10], *copies])
    again, _ = distinct("turned", [*copies, *reversed(images[:10])])
    pixels = [[np.array(Image.open(path)).tobytes() for path in paths] for paths in (found, again)]
    assert len(found) == 10 and pixels[0] == pixels[1] and largest == SIZE**2  # whatever the order and the names


def test_large_images_come_in_small_batches():
    config = {"method": "stfpm", "preset": "lite"}  # batches of 8
    found = [tuning_job._batch_size(config, side**2) for side in (64, 2048, 4096, 16384)]
    assert found == [8, 8, 4, 1]


def test_a_broken_file_is_named_as_its_visitor_named_it(images, home, tmp_path):
    base, names = hub.model_place("bank"), {"wafer.png": "geheim <b>ätzung; v2.png", "notes.png": "notes"}
    (tmp_path / "wafer.png").write_bytes(images[0].read_bytes()[:200])
    (tmp_path / "notes.png").write_text("no image")
    work = tmp_path / "work"
    job = prepared(work, [*images[:12], *(tmp_path / name for name in names)], "bank")
    with pytest.raises(ZooError) as found:
        tuning_job._distinct(work / "images", base, checkpoint.read_config(base), job)
    visitors = Tuning(images, "bank", "mine", "cpu")
    visitors._work, visitors._names = work, names
    said = visitors._told(str(found.value))
    assert said.startswith("geheim <b>ätzung; v2.png is damaged or truncated; ")
    assert said.endswith("; 1 more can't be read either.") and "/" not in said


def test_what_the_process_says_last_is_told(images, tmp_path, monkeypatch):
    process = tmp_path / "python"
    line = json.dumps({"error": "/srv/x/000.png is empty (0 bytes); copy it again, or --skip-broken leaves it out"})
    process.write_text(f"#!/bin/sh\necho 'some library speaks'\necho '{line}'\nexit 2\n")
    process.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(process))
    assert refused(Tuning(images, "bank", "mine", "cpu")) == "000.png is empty (0 bytes)."


def test_progress_comes_while_the_process_says_nothing(images, tmp_path, monkeypatch):
    process = tmp_path / "python"
    process.write_text("#!/bin/sh\nexec sleep 1000\n")
    process.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(process))
    job = Tuning(images, "bank", "mine", "cpu")
    run = _with_process(job)
    assert [next(run).stage for _ in range(5)] == ["checking"] * 5 and tuning.TICK <= 0.5
    job.cancel()
    with pytest.raises(Cancelled):
        next(run)


def test_a_file_that_has_gone_is_told(images, tmp_path):
    assert "gone.png can't be read any more" in refused(Tuning([*images, tmp_path / "gone.png"], "bank", "mine", "cpu"))


def test_sentences_of_others_lose_places_and_options(images, tmp_path):
    job = Tuning(images, "bank", "mine", "cpu")
    job._work, job._names = tmp_path / "a b" / ".tuning" / "0f", {"a--b.png": "a; /b.png"}
    job._base = "bank"
    for text, told in (
        (f"{job._work}/images/a--b.png is empty; copy it again", "a; /b.png is empty; copy it again."),
        (f"{job._work}/uploaded-images/good/a--b.png is empty.", "a; /b.png is empty."),
        ("The device's memory is full; lower --batch-size.", "The device's memory is full."),
        ("bank has learned from all 5 of these images; give it others.", None),
        (
            "--device cuda: there is none; take --device cpu.",
            "The fine-tuning failed; try other images or another model.",
        ),
    ):
        assert job._told(text) == (told or text)
    assert "/srv" not in job._told("/srv/zoo/models/x/config.json is damaged") and "x" not in job._told("/srv/zoo/x")


# ---- ends ------------------------------------------------------------------------------------------------------------


def test_a_cancel_ends_all(images):
    job = Tuning(images, "steps", "mine", "cpu", max_steps=LONG)
    run = until(job, "learning")
    pid = job.pid
    assert alive(pid)
    job.cancel()
    assert not alive(pid) and not job._work.exists()
    with pytest.raises(Cancelled, match="nothing of it is left"):
        list(run)
    job.cancel()


def test_a_job_that_is_cancelled_before_it_begins(images):
    job = Tuning(images, "bank", "mine", "cpu")
    job.cancel()
    with pytest.raises(Cancelled):
        list(job.run())
    assert job.pid is None


def test_a_job_that_is_left_alone_ends(images, monkeypatch):
    """Its iterator closed, or never asked again."""
    job = Tuning(images, "bank", "mine", "cpu")
    run = _with_process(job)
    run.close()
    assert not alive(job.pid)
    job = Tuning(images, "bank", "mine", "cpu")
    run = _with_process(job)
    monkeypatch.setattr(tuning, "PATIENCE", 1.0)
    assert ends(job.pid)
    assert job._over.wait(300)
    with pytest.raises(Cancelled):
        next(run)


def _with_process(job):
    run = job.run()
    while job.pid is None:
        next(run)
    return run


def test_a_process_that_is_killed_is_told(images):
    job = Tuning(images, "bank", "mine", "cpu")
    run = _with_process(job)
    os.kill(job.pid, signal.SIGKILL)
    with pytest.raises(
        ZooError, match="^The fine-tuning was ended by the machine, most likely for want of memory; try"
    ):
        list(run)


def test_a_mistake_of_ours_is_told_to_the_log_alone(images, monkeypatch, caplog):
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    assert refused(Tuning(images, "bank", "mine", "cpu")).startswith(
        "The fine-tuning failed for a reason of the server"
    )
    assert "ended with code 1" in caplog.text
    monkeypatch.setattr(sys, "executable", str(images[0]))
    assert refused(Tuning(images, "bank", "mine", "cpu")).startswith(
        "The fine-tuning failed for a reason of the server"
    )


SERVER = """
import sys
from pathlib import Path
from zoo.demo.tuning import Tuning
job = Tuning(sorted(Path(sys.argv[1]).iterdir()), "steps", "mine", "cpu", max_steps=10**6)
told = False
for progress in job.run():
    if progress.stage == "learning" and not told:
        told = True
        print(job.pid, flush=True)
"""


def test_the_process_ends_with_its_server(images, registry):
    server = subprocess.Popen([sys.executable, "-c", SERVER, images[0].parent], stdout=subprocess.PIPE)
    pid = int(server.stdout.readline())
    assert alive(pid)
    server.kill()
    server.communicate()
    assert ends(pid)
    assert comes(lambda: [path.suffix for path in (registry / ".tuning").iterdir()] == [".lock"])  # the images are gone
    sweep()


def test_what_a_dead_server_left_is_swept_and_a_living_one_s_is_not(images, registry):
    job = Tuning(images, "bank", "mine", "cpu")
    run = _with_process(job)
    (registry / ".tuning/dead/images").mkdir(parents=True)
    (registry / ".tuning/dead.lock").touch()
    sweep()
    assert {path.stem for path in (registry / ".tuning").iterdir()} == {job._work.name} and alive(job.pid)
    run.close()
