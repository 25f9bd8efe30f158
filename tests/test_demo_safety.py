"""The running demo against visitors who mean harm or only err: files, addresses, passwords, what is left behind."""

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
import tifffile
from PIL import Image

from zoo.demo.strangers import UPLOAD
from zoo.demo.uploads import MAX_BYTES, SORRY

USER, PASSWORD = "fab", "seven wafers"
WATCH = """import os, socket
def note(self, address, real):
    host = str(address[0]) if isinstance(address, tuple) else ""
    if host and not host.startswith("127.") and host not in ("::1", "localhost", "0.0.0.0"):
        with open(os.environ["WATCH"], "a") as file:
            file.write(host + chr(10))
    return real(self, address)
for name in ("connect", "connect_ex"):
    real = getattr(socket.socket, name)
    setattr(socket.socket, name, lambda self, address, real=real: note(self, address, real))
look_up = socket.getaddrinfo
def asked(host, *rest, **more):
    if str(host or "127.0.0.1") not in ("127.0.0.1", "::1", "localhost", "0.0.0.0"):
        with open(os.environ["WATCH"], "a") as file:
            file.write("look-up of " + str(host) + chr(10))
    return look_up(host, *rest, **more)
socket.getaddrinfo = asked
"""


class Demo:
    """A demo in a process of its own, and a client of it."""

    def __init__(self, root, home, *options, **environment):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.root, self.temp, self.home = root, root / "temporary", home
        self.temp.mkdir(parents=True)
        (root / "site").mkdir()
        (root / "site/sitecustomize.py").write_text(WATCH)
        path = os.pathsep.join([str(root / "site"), *filter(None, sys.path)])
        kept = {
            name: value for name, value in os.environ.items() if "GRADIO" not in name and "PROXY" not in name.upper()
        }
        more = {"PYTHONPATH": path, "TMPDIR": str(self.temp), "ZOO_HOME": str(home), "WATCH": str(root / "outside")}
        command = [sys.executable, "-m", "zoo", "demo", "--port", str(self.port), *options]
        code = "import sys; from zoo.cli import main; sys.exit(main())"
        command[1:3] = ["-c", code]
        with open(root / "said", "w") as out, open(root / "errors", "w") as errors:
            self.process = subprocess.Popen(command, env=kept | more | environment, stdout=out, stderr=errors, cwd=root)
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=300, trust_env=False)
        end = time.monotonic() + 600
        while "is at http" not in (root / "said").read_text():
            assert self.process.poll() is None and time.monotonic() < end, self.errors()
            time.sleep(0.2)

    def errors(self):
        return (self.root / "errors").read_text()

    def uploaded(self):
        """What lies in the server's folder of visitors' files."""
        return [path for path in self.temp.glob("zoo-demo-*/files/**/*") if path.is_file()]

    def upload(self, name, data):
        answer = self.http.post("/gradio_api/upload", files={"files": (name, data)})
        assert answer.status_code == 200
        return answer.json()[0]

    def call(self, api, *data):
        """What an endpoint answers: "complete" or "error", and its data."""
        answer = self.http.post(f"/gradio_api/call/{api}", json={"data": list(data)})
        if answer.status_code != 200:
            return "error", answer.text
        told = self.http.get(f"/gradio_api/call/{api}/{answer.json()['event_id']}").text
        event, _, rest = told.rpartition("event: ")[2].partition("\n")
        return event, rest.removeprefix("data: ").strip()

    def predict(self, path, model="", rate=None):
        return self.call("predict", {"path": path, "meta": {"_type": "gradio.FileData"}}, model, rate)

    def end(self):
        self.http.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(300)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


def png(array=None, **options):
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(60, 160, (96, 96), dtype=np.uint8) if array is None else array
    Image.fromarray(noise).save(buffer, "PNG", **options)
    return buffer.getvalue()


def reached(demo, path):
    """The answer for a path that is sent as it stands: httpx alone would tidy it."""
    with socket.create_connection(("127.0.0.1", demo.port), timeout=300) as line:
        line.sendall(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{demo.port}\r\nConnection: close\r\n\r\n".encode())
        data = b""
        while part := line.recv(1 << 16):
            data += part
    head, _, body = data.partition(b"\r\n\r\n")
    return int(head.split()[1]), body


@pytest.fixture(scope="module")
def home(mvtec, tmp_path_factory):
    """A registry with one small model."""
    from zoo.cli import main

    home = tmp_path_factory.mktemp("safety") / "zoo-home"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZOO_HOME", str(home))
        command = f"fit padim --preset lite --data {mvtec} --name small"
        assert main(command.split()) == 0
        assert main(f"calibrate small --data {mvtec} --false-alarm-rate 0.2".split()) == 0
    return home


@pytest.fixture(scope="module")
def demo(home, tmp_path_factory):
    demo = Demo(tmp_path_factory.mktemp("demo"), home)
    yield demo
    demo.end()


@pytest.fixture(scope="module")
def locked(home, tmp_path_factory):
    demo = Demo(tmp_path_factory.mktemp("locked"), home, "--user", USER, ZOO_DEMO_PASSWORD=PASSWORD)
    yield demo
    demo.end()


def test_no_file_of_the_server_is_served(demo, home):
    secret = next(home.rglob("model.safetensors"))
    places = [secret, secret.with_name("config.json"), Path("/etc/passwd"), Path(demo.root / "errors")]
    places += [Path(sys.modules["zoo"].__file__), *demo.temp.glob("zoo-demo-*/lock")]
    assert len(places) == 6
    for place in places:
        up = "../" * 12 + str(place).lstrip("/")
        encoded = up.replace("../", "%2e%2e%2f")
        for path in (str(place), up, encoded, "/" + str(place), str(place).replace("/", "%2f"), "file://" + str(place)):
            for route in ("file=", "file/", "stream/"):
                code, body = reached(demo, f"/gradio_api/{route}{path}")
                assert code >= 400, path
                assert place.read_bytes()[:40] not in body or not place.stat().st_size
    for path in ("/static/../../../../../../etc/passwd", "/assets/%2e%2e/%2e%2e/%2e%2e/%2e%2e/etc/passwd"):
        assert b"root:" not in reached(demo, path)[1]
    assert reached(demo, f"/gradio_api/file={demo.uploaded()[0].parent if demo.uploaded() else demo.temp}")[0] >= 400


def test_forged_files_and_addresses_are_not_read(demo, home):
    secret = next(home.rglob("config.json"))
    seen = []

    class Trap:
        """A server in this machine's own network, which nobody outside may make the demo ask."""

        def __enter__(self):
            self.line = socket.create_server(("127.0.0.1", 0))
            self.line.settimeout(0.5)
            return f"http://127.0.0.1:{self.line.getsockname()[1]}/x.png"

        def __exit__(self, *_):
            try:
                self.line.accept()
                seen.append("asked")
            except TimeoutError:
                pass
            self.line.close()

    for path in (str(secret), "/etc/passwd", str(demo.temp / "zoo-demo-x/files/y.png"), "../../etc/passwd"):
        event, told = demo.predict(path)
        assert event == "error" and json.loads(told)["error"] == UPLOAD
    with Trap() as address:
        for path in (address, address.replace("127.0.0.1", "localhost"), "http://example.com/x.png"):
            asked = {"path": path, "meta": {"_type": "gradio.FileData"}}
            for data in ([asked, "", None], [None, asked, None], [asked | {"path": "x.png", "url": path}, "", None]):
                event, told = demo.call("predict", *data)
                assert event == "error" and json.loads(told)["error"] == UPLOAD
            assert reached(demo, f"/gradio_api/file={path}")[0] == 403
    assert not seen
    for path in ("http://169.254.169.254/latest/meta-data", "ftp://127.0.0.1/x.png", "file:///etc/passwd"):
        assert demo.predict(path)[0] == "error"


def test_too_large_an_upload_is_cut_off(demo):
    def body():
        yield b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
        for _ in range((MAX_BYTES >> 20) + 2):
            yield bytes(1 << 20)
        yield b"\r\n--x--\r\n"

    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    assert demo.http.post("/gradio_api/upload", content=body(), headers=kind).status_code == 413
    assert sum(path.stat().st_size for path in demo.temp.rglob("*") if path.is_file()) < 8 << 20


def test_broken_files_are_explained_and_a_good_one_works(demo):
    stack = io.BytesIO()
    tifffile.imwrite(stack, np.zeros((3, 64, 64), np.uint8), photometric="minisblack")
    broken = {
        "empty.png": (b"", "empty.png is empty"),
        "notes.png": (b"hello, world", "notes.png is not a PNG, JPEG, BMP or TIFF"),
        "cut.png": (png()[:3000], "cut.png is damaged or truncated"),
        "stack.tif": (stack.getvalue(), "stack.tif is a TIFF of 3 pages"),
        "wide.png": (png(np.zeros((16, 16385), np.uint8)), "wide.png is 16385 x 16"),
    }
    for name, (data, words) in broken.items():
        event, told = demo.predict(demo.upload(name, data))
        assert event == "error" and words in told and "/" not in json.loads(told)["error"].replace("8/16", "")
    event, told = demo.predict(demo.upload("good.png", png()))
    assert event == "complete" and str(demo.temp) not in json.dumps(json.loads(told)[0])
    event, told = demo.predict(demo.upload("good.png", png()), "../../etc")
    assert event == "error" and SORRY not in told and str(demo.home) not in told
    for rate in ("much", 7, -1, [0.1]):
        event, told = demo.predict(demo.upload("good.png", png()), "small", rate)
        assert event == "error" and SORRY not in told
    assert demo.predict(demo.upload("good.png", png()), "small", 0.2)[0] == "complete"


def test_uploads_of_others_are_not_to_be_guessed(demo):
    path = Path(demo.upload("mine.png", png()))
    assert path.exists() and path.is_relative_to(demo.temp) and len(path.parent.name) == 64
    again = Path(demo.upload("mine.png", png(np.zeros((64, 64), np.uint8))))
    assert again.parent != path.parent
    for guess in (path.parent, path.parent.parent, path.parent.with_name("0" * 64) / path.name):
        assert reached(demo, f"/gradio_api/file={guess}")[0] >= 400


def test_what_is_uploaded_never_acts_in_a_browser(demo):
    active = {
        "x.svg": b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>',
        "x.html": b"<script>alert(1)</script>",
        "x.xml": b'<?xml version="1.0"?><html xmlns="http://www.w3.org/1999/xhtml"><script>alert(1)</script></html>',
        "x.png": b"<script>alert(1)</script>",
    }
    for name, data in active.items():
        answer = demo.http.get(f"/gradio_api/file={demo.upload(name, data)}")
        kind, shown = answer.headers.get("content-type", ""), answer.headers.get("content-disposition", "")
        harmless = shown.startswith("attachment") or kind.startswith(("image/png", "application/octet", "text/plain"))
        assert answer.status_code >= 400 or harmless, (name, kind, shown)
        event, told = demo.predict(demo.upload(name, data))
        assert event == "error" and "<script>" not in told


def test_without_the_password_there_is_nothing(locked):
    stranger = httpx.Client(base_url=str(locked.http.base_url), timeout=300, trust_env=False)
    for path in ("config", "gradio_api/info", "gradio_api/file=/etc/passwd", "gradio_api/info?all_endpoints=true"):
        with stranger.stream("GET", f"/{path}") as answer:
            assert answer.status_code in (401, 403, 404), path
    assert stranger.post("/gradio_api/upload", files={"files": ("a.png", png())}).status_code == 401
    assert stranger.post("/gradio_api/call/models", json={"data": []}).status_code == 401
    assert (
        stranger.post("/gradio_api/queue/join", json={"data": [], "fn_index": 0, "session_hash": "x"}).status_code
        == 401
    )
    assert "small" not in stranger.get("/").text and not locked.uploaded()
    assert stranger.post("/login", data={"username": USER, "password": "six wafers"}).status_code == 400
    assert stranger.get("/config").status_code == 401
    assert locked.http.post("/login", data={"username": USER, "password": PASSWORD}).status_code == 200
    path = locked.upload("mine.png", png())
    assert stranger.get(f"/gradio_api/file={path}").status_code == 401
    assert locked.predict(path)[0] == "complete"


# The last ones, as they look at what all of the above has left behind.


def test_a_mistake_of_a_visitor_is_no_error_of_the_server(demo, locked):
    for one in (demo, locked):
        assert "Traceback" not in one.errors(), one.errors()


def test_nothing_outside_is_asked(demo, locked):
    for one in (demo, locked):
        outside = one.root / "outside"
        assert not outside.exists() or not outside.read_text(), outside.read_text()
    page = demo.http.get("/")
    assert page.status_code == 200 and not re.findall(
        r"""(?:src|href)=["']https?://(?!127\.0\.0\.1)[^"']*""", page.text
    )


def test_nothing_is_left_when_it_ends(demo, locked):
    for one in (demo, locked):
        one.upload("left.png", png())
        assert one.uploaded()
        one.end()
        assert one.process.returncode in (0, 130, 143)
        assert not list(one.temp.glob("zoo-demo-*")), list(one.temp.rglob("*"))
        assert not list(one.temp.rglob("*.png"))
