"""Visitors' files: refused by their heads, deleted and only they, and no folder of the server told to anybody."""

import io
import os
import signal
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from zoo.demo import uploads
from zoo.demo.uploads import MAX_BYTES, SORRY, Uploads, check, sentence
from zoo.errors import ZooError


@pytest.fixture
def temp(tmp_path, monkeypatch):
    """The folder for temporary files, here and in processes started here."""
    folder = tmp_path / "temporary files"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def saved(path, array, **options):
    Image.fromarray(array).save(path, **options)
    return path


# ---- check -----------------------------------------------------------------------------------------------------------


def test_check_gives_the_size(tmp_path):
    for name, array in (
        ("a.png", np.zeros((20, 30), np.uint8)),
        ("b.bmp", np.zeros((20, 30, 3), np.uint8)),
        ("c.jpg", np.zeros((20, 30), np.uint8)),
        ("d.tif", np.zeros((20, 30), np.uint16)),
    ):
        assert check(saved(tmp_path / name, array)) == (20, 30)
    assert check(str(tmp_path / "a.png")) == (20, 30)
    assert check(saved(tmp_path / "largest.png", np.zeros((4096, 4096), np.uint8))) == (4096, 4096)


@pytest.mark.parametrize(
    ("name", "match"),
    {
        "wide.png": "wide.png is 4097 x 4096 pixels, more than 16,777,216 pixels; cut",
        "long.png": "long.png is 16385 x 8 pixels, more than 16384 on a side; cut",
        "tiny.png": "tiny.png is 7 x 30 pixels; an image needs",
        "empty.png": "empty.png is empty",
        "notes.png": "notes.png is not a PNG, JPEG, BMP or TIFF image",
        "stack.tif": "stack.tif is a TIFF of 3 pages",
        "cut.png": "cut.png is damaged or truncated",
        "cut.tif": "cut.tif is ",
        "none.png": "none.png is no longer here",
        "heavy.tif": "heavy.tif is larger than 64 MB; cut",
    }.items(),
)
def test_what_check_refuses(name, match, tmp_path):
    path = tmp_path / name
    blank = np.zeros((30, 7), np.uint8)
    if name == "wide.png":
        saved(path, np.zeros((4096, 4097), np.uint8))
    elif name == "long.png":
        saved(path, np.zeros((8, 16385), np.uint8))
    elif name == "tiny.png":
        saved(path, blank)
    elif name == "stack.tif":
        tifffile.imwrite(path, np.zeros((3, 20, 30), np.uint8), photometric="minisblack")
    elif name == "heavy.tif":
        saved(path, np.zeros((20, 30), np.uint8))
        os.truncate(path, MAX_BYTES + 1)
    elif name != "none.png":
        buffer = io.BytesIO()
        Image.fromarray(blank).save(buffer, "PNG" if name == "cut.png" else "TIFF")
        path.write_bytes({"empty.png": b"", "notes.png": b"hello, world"}.get(name, buffer.getvalue()[:20]))
    with pytest.raises(ZooError, match=match) as caught:
        check(path)
    told = str(caught.value)
    assert told.startswith(name) and str(tmp_path) not in told and tmp_path.name not in told and "\n" not in told


# ---- what a visitor is told ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("/srv/my files/ab12/wafer 7.png is empty", "wafer 7.png is empty"),
        ("there is no model x in /srv/my files", "there is no model x in my files"),
        ("/srv/my files/ is full; see /srv/my files.", "my files is full; see my files."),
        ("/srv/my filesystem/a.png and /opt/x/y.txt, /etc", "my filesystem/a.png and y.txt, etc"),  # a blank ends it
        ("[Errno 2] No such file or directory: '/data/of a/b.png'", "[Errno 2] No such file or directory: 'b.png'"),
        ("fit it: zoo fit cfa --data=/data/wafers/ --name x", "fit it: zoo fit cfa --data=wafers --name x"),
        ("(/a/b/c.py:12) ~/.cache/x file:///home/me/x.png", "(c.py:12) x x.png"),
        (r"C:\Users\me\x.png and 'D:\a b\y.png'", "x.png and 'y.png'"),
        ("an 8/16-bit PNG, 3 / 4 of it, 50 nm/pixel", "an 8/16-bit PNG, 3 / 4 of it, 50 nm/pixel"),
        ("org/model is at https://huggingface.co/org/model", "org/model is at https://huggingface.co/org/model"),
        ("two\nlines", "two lines"),
    ],
)
def test_no_folder_is_told(text, told):
    assert sentence(ZooError(text), "/srv/my files/", Path("/srv/other")) == told


def test_folders_of_this_machine_are_known(temp, tmp_path, monkeypatch):
    work = tmp_path / "at work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("HOME", str(tmp_path / "the home"))
    for folder in (temp, work, tmp_path / "the home", Path(sys.prefix), Path(os.path.realpath(sys.prefix))):
        told = sentence(ZooError(f"{folder}/deep/down/x y.png is broken; look into {folder}"))
        assert told == f"x y.png is broken; look into {folder.name}"


def test_other_errors_are_noted_and_not_told(caplog):
    try:
        raise RuntimeError("secret of /srv/x")
    except RuntimeError as error:
        told = sentence(error)
    assert told == SORRY and "secret" not in told
    assert "RuntimeError: secret of /srv/x" in caplog.text and "Traceback" in caplog.text
    caplog.clear()
    sentence(ZooError("a mistake"))
    assert not caplog.text


def test_a_note_goes_to_stderr_without_any_setup():
    code = "from zoo.demo.uploads import sentence\ntry: 1 / 0\nexcept Exception as error: print(sentence(error))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == SORRY
    assert "Traceback" in done.stderr and "ZeroDivisionError" in done.stderr


SERVER = """import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and nohup this
import time
from zoo.demo.uploads import Uploads
with Uploads() as files:
    print(files.folder, flush=True)
    time.sleep(300)
"""


# ---- the folder ------------------------------------------------------------------------------------------------------


def test_the_folder_is_private_and_goes(temp):
    with Uploads() as files:
        assert files.folder.is_relative_to(temp) and files.folder.is_dir()
        for folder in (files.folder, files.folder.parent):
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        (files.folder / "a").mkdir()
        (files.folder / "a/x.png").write_bytes(b"x")
    assert not list(temp.iterdir())
    with pytest.raises(ZeroDivisionError), Uploads():
        1 / 0  # noqa: B018
    assert not list(temp.iterdir())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_removes_the_folder(number, temp):
    with subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        folder = Path(process.stdout.readline().decode().strip())
        assert folder.is_dir()
        process.send_signal(number)
        process.wait(300)
    assert process.returncode != 0 and not list(temp.iterdir())
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_leftovers_of_a_killed_server_go_a_day_later(temp):
    elsewhere = temp / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "kept").touch()
    (temp / "zoo-demo-link").symlink_to(elsewhere)
    (temp / "other").mkdir()
    old = time.time() - 25 * 3600
    with subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE) as process:
        top = Path(process.stdout.readline().decode().strip()).parent
        (top / "files/x.png").touch()
        for path in (top, temp / "other", elsewhere):
            os.utime(path, (old, old))
        with Uploads():
            assert top.is_dir()  # its server lives
        os.utime(top, (old, old))
        process.kill()
        process.wait()
    os.utime(top)
    with Uploads():
        assert top.is_dir()  # not a day ago
    os.utime(top, (old, old))
    with Uploads():
        assert not top.exists()
    assert sorted(path.name for path in temp.iterdir()) == ["elsewhere", "other", "zoo-demo-link"]
    assert (elsewhere / "kept").exists()


def test_forget_deletes_files_of_its_own_only(temp):
    outside = temp / "precious.png"
    outside.touch()
    (temp / "folder").mkdir()
    (temp / "folder/also.png").touch()
    with Uploads() as files:
        one, two = files.folder / "ab12/x.png", files.folder / "ab12/y.png"
        one.parent.mkdir()
        one.touch(), two.touch()
        link, through = files.folder / "link.png", files.folder / "through"
        link.symlink_to(outside)
        through.symlink_to(temp / "folder")
        files.forget([one, files.folder / "gone.png", outside, files.folder / ".." / ".." / "precious.png", link])
        files.forget([str(through / "also.png"), files.folder / "ab12", files.folder, "", "/etc/hostname"])
        assert not one.exists() and two.exists() and not link.is_symlink() and through.is_symlink()
        files.forget(iter([str(two)]))
        assert not two.parent.exists() and files.folder.is_dir()  # gradio's folder of one file went with it
        assert outside.exists() and (temp / "folder/also.png").exists()


def test_the_module_needs_no_gradio():
    code = "import sys, zoo.demo.uploads; sys.exit('gradio' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    assert "16.8 megapixels and 64 MB" in uploads.MAX_SIDE_WORDS
