"""The README's picture of the demo: started with an empty registry, as a newcomer would, and asked for an example.

    python tests/bench/demo_shot.py --out tests/bench/demo.jpg

It waits until the demo has made its first model by itself, clicks an example, and takes the page as it is then shown.
"""

import argparse
import io
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WIDTH = 1280


def serve(home: Path, port: int, log: Path) -> subprocess.Popen:
    """A demo with a registry of its own, once its page is there."""
    environment = os.environ | {"ZOO_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "zoo.cli", "demo", "--port", str(port)]
    with log.open("w") as out:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for _ in range(600):
        if process.poll() is not None:
            sys.exit(log.read_text())
        try:
            opener.open(f"http://127.0.0.1:{port}/", timeout=5).close()
            return process
        except OSError:
            time.sleep(0.2)
    process.kill()
    sys.exit("The demo shows no page.")


def show(page: Page, example: str, patience: float) -> None:
    """Wait for the models, and for the result of an example."""
    expect(page.locator("#model input")).not_to_have_value("", timeout=patience)
    expect(page.locator(".waiting")).to_have_count(0, timeout=patience)  # the second model is there too
    page.locator("[data-example]", has_text=example).click()
    expect(page.locator("#result .result .scale")).to_have_attribute("style", re.compile("gradient"), timeout=patience)
    page.locator("h1").click()
    page.mouse.move(1, 1)
    page.evaluate("Promise.all(document.getAnimations().map((each) => each.finished.catch(() => 0)))")


def save(shot: bytes, path: Path) -> int:
    """The picture as a JPEG; its bytes."""
    temporary = path.with_name(f".{path.name}")
    Image.open(io.BytesIO(shot)).convert("RGB").save(temporary, "jpeg", quality=90, optimize=True)
    temporary.replace(path)
    return path.stat().st_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("demo.jpg"))
    parser.add_argument("--example", default="scratch", help="its caption in the page")
    parser.add_argument("--patience", type=float, default=600, help="seconds for the models to be made")
    options = parser.parse_args()
    browser = next(filter(None, map(shutil.which, BROWSERS)), None) or sys.exit("There is no chromium here.")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as tool:
        process = serve(Path(folder) / "home", port, Path(folder) / "log.txt")
        begun = time.monotonic()
        try:
            chromium = tool.chromium.launch(executable_path=browser, args=["--no-sandbox"])
            page = chromium.new_page(viewport={"width": WIDTH, "height": 900}, device_scale_factor=1)
            page.goto(f"http://127.0.0.1:{port}/")
            show(page, options.example, 1000 * options.patience)
            print(f"Ready after {time.monotonic() - begun:.0f} s.")
            parts = [page.locator(part).bounding_box() for part in ("#result", "#examples")]
            end = max(part["y"] + part["height"] for part in parts) + page.evaluate("scrollY") + 16
            shot = page.screenshot(full_page=True, clip={"x": 0, "y": 0, "width": WIDTH, "height": end})
            print(f"{options.out}: {save(shot, options.out):,} bytes.")
            chromium.close()
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


if __name__ == "__main__":
    main()
