"""The demo in a real browser: what a visitor does and sees, by mouse, by keyboard, on a phone and in the dark."""

import base64
import contextlib
import csv
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import numpy as np
import pytest
from PIL import Image

import zoo
from zoo import plots
from zoo.cli import main
from zoo.data import synthetic
from zoo.demo import words

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
expect = playwright.expect
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine")

PATIENCE = 240_000  # ms
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
TABS = ["Inspect", "Compare", "Batch", "Fine-tune", "About"]
DATA, NORMALS = "synthetic:train=30,good=1,defect=1", "synthetic:train=1,good=30,defect=1,seed=1"
EVIL = "<img src=x onerror=window.evil=1>'\".tif"
SCRATCH = 1 + synthetic.KINDS.index("scratch")  # number of the example


def run(*arguments):
    assert main([str(argument) for argument in arguments]) == 0


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Models: bank (PatchCore) and gauss (PaDiM) of a stated rate, raw of none, and spoiled, which a test damages."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZOO_HOME", str(home))
        fit = ("--preset", "lite", "--input-size", 128, "--data", DATA)
        run("fit", "patchcore", *fit, "--bank-size", 300, "--name", "bank")
        run("fit", "padim", *fit, "--name", "gauss")
        shutil.copytree(home / "models/gauss", home / "models/raw")
        for name in ("bank", "gauss"):
            run("calibrate", name, "--data", NORMALS, "--false-alarm-rate", 0.2)
        shutil.copytree(home / "models/gauss", home / "models/spoiled")
    return home / "models"


@pytest.fixture(scope="module")
def bank(home):
    return zoo.from_pretrained(home / "bank")


@pytest.fixture(scope="module")
def server(home, tmp_path_factory):
    """The address of a demo in a process of its own, whose log has no traceback, and which leaves no upload behind."""
    folder = tmp_path_factory.mktemp("server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url, log = f"http://127.0.0.1:{port}/", folder / "log.txt"
    (folder / "tmp").mkdir()
    environment = os.environ | {"ZOO_HOME": str(home.parent), "TMPDIR": str(folder / "tmp")}
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        environment.pop(name, None)
    with log.open("w") as out:
        command = [sys.executable, "-m", "zoo.cli", "demo", "--port", str(port)]
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT)
        try:
            opener, end = urllib.request.build_opener(urllib.request.ProxyHandler({})), time.monotonic() + 600
            while True:
                with contextlib.suppress(OSError):
                    opener.open(url, timeout=60).close()
                    break
                assert process.poll() is None and time.monotonic() < end, log.read_text()
                time.sleep(0.2)
            yield url
            process.terminate()
            assert process.wait(300) in (0, 130), log.read_text()  # 130: stopped
        finally:
            process.kill()
            process.wait()
    assert "Traceback" not in log.read_text(), log.read_text()
    assert not list((folder / "tmp").glob("zoo-demo-*"))


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as tool:
        browser = tool.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, server):
    """Opens the page; nothing is fetched from elsewhere and nothing goes wrong in any page that it opened."""
    contexts, outside, errors = [], [], []

    def open_page(size=DESKTOP, **how):
        context = browser.new_context(viewport=size, **how)
        contexts.append(context)
        context.set_default_timeout(PATIENCE)

        def refuse(route):
            outside.append(route.request.url)
            route.abort()

        context.route(re.compile(rf"^(?!{re.escape(server)}|data:|blob:)"), refuse)
        page = context.new_page()
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.asked = []
        page.on("request", lambda request: page.asked.append(request.url) if request.url.startswith("http") else None)
        page.goto(server)
        expect(page.locator("#model input")).to_have_value("bank")
        return page

    expect.set_options(timeout=PATIENCE)
    yield open_page
    for context in contexts:
        context.close()
    assert not outside
    assert not errors


def marked(*squares):
    """A normal image with squares of a grey level: (row, column, level), uint16 (256, 256)."""
    image = synthetic.render(7_000_000, bits=16)[0].copy()
    for row, column, level in squares:
        image[row : row + 40, column : column + 40] = level
    return image


TWO = ((60, 80, 65535), (180, 180, 0))


@pytest.fixture
def defect(tmp_path):
    """A 16-bit TIFF with two defects."""
    Image.fromarray(marked(*TWO)).save(tmp_path / "defect.tif")
    return tmp_path / "defect.tif"


def go_to(page, name):
    page.get_by_role("tab", name=name, exact=True).click()
    expect(page.get_by_role("tab", selected=True)).to_have_text(name)
    expect(page.get_by_role("tab")).to_have_text(TABS)


def give(page, files, where="#image"):
    files = files if isinstance(files, list) else [files]
    page.locator(f"{where} input[type=file]").set_input_files(files)


def result_of(page, where="#result", file=None):
    """The result once it is painted."""
    result = page.locator(f"{where} .result")
    if file:
        expect(result.locator(".facts").first).to_contain_text(file)
    expect(result.locator(".scale").first).to_have_attribute("style", re.compile("gradient"))
    return result


def fact(result, name):
    return result.locator(".facts div", has=result.page.locator("dt", has_text=re.compile(f"^{name}$"))).locator("dd")


def choose_model(page, name, where="#model"):
    page.locator(f"{where} input").click()
    page.get_by_role("option", name=name).click()


def heat(result):
    """The canvas's pixels, uint8 (H, W, 4)."""
    read = """c => [c.width, btoa(Array.from(c.getContext("2d").getImageData(0, 0, c.width, c.height).data,
      (value) => String.fromCharCode(value)).join(""))]"""
    width, values = result.locator(".heat").evaluate(read)
    return np.frombuffer(base64.b64decode(values), np.uint8).reshape(-1, width, 4)


def split(result):
    """Percent of the width that the heatmap leaves to the image."""
    return float(re.search(r"([\d.]+)%\)$", result.locator(".heat").evaluate("c => getComputedStyle(c).clipPath"))[1])


def bring(page, button):
    with page.expect_download() as waited:
        button.click()
    return waited.value.suggested_filename, waited.value.path().read_bytes()


def picture(content):
    return np.asarray(Image.open(io.BytesIO(content)))


def source(result):
    """The image as the page shows it."""
    return picture(base64.b64decode(result.locator(".image").get_attribute("src").partition("base64,")[2]))


def at_rate(home, name, path, rate):
    """What a model that was calibrated for the rate says."""
    model = zoo.from_pretrained(home / name)
    model.calibration = model.calibration.at_rate(rate)
    return model, model.predict(path)


# ---- one image -------------------------------------------------------------------------------------------------------


def test_an_upload_is_judged_as_predict_does(visit, bank, defect):
    evil = defect.rename(defect.with_name(EVIL))
    page, wanted = visit(), bank.predict(evil)
    give(page, evil)
    result = result_of(page)
    expect(fact(result, "File")).to_contain_text("onerror=window.evil=1")  # as text
    expect(fact(result, "Score")).to_have_text(f"{wanted.score:.6g}")
    expect(fact(result, "p-value")).to_have_text(f"{wanted.p_value:.3g}")
    expect(fact(result, "Image")).to_have_text("256 × 256 px, 16 bits")
    expect(result.locator(".headline:visible")).to_have_text("Anomalous")
    assert wanted.is_anomalous and len(wanted.regions) == 2
    assert source(result).shape[:2] == (256, 256) and source(result).std() > 10
    natural = result.locator(".image").evaluate("i => i.complete && i.naturalWidth")
    assert natural == 256 and not page.evaluate("window.evil")
    level = heat(result)[..., 3].astype(float) / 255  # the hotter, the more opaque
    known = bank.calibration
    scaled = (wanted.map - known.pixel_median) / (2 * (known.pixel_threshold - known.pixel_median))
    assert np.abs(level - scaled.clip(0, 1)).max() < 1.01 / 255


def test_the_slider_parts_image_and_heatmap(visit):
    page = visit()
    page.locator(f"[data-example='{SCRATCH}']").click()
    result = result_of(page)
    assert split(result) == 25
    box = result.locator(".stage").bounding_box()
    middle = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + box["width"] / 4, middle)
    page.mouse.down()
    page.mouse.move(box["x"] + 0.7 * box["width"], middle, steps=4)
    page.mouse.up()
    assert abs(split(result) - 70) < 2
    slider = result.get_by_label("Slide between image and heatmap")
    slider.focus()
    before = split(result)
    page.keyboard.press("ArrowRight")
    assert split(result) == before + 1
    page.keyboard.press("Home")
    assert split(result) == 0
    page.keyboard.press("End")
    assert split(result) == 100


def test_colours_and_opacity_change_at_once(visit):
    page = visit()
    page.locator(f"[data-example='{SCRATCH}']").click()
    result = result_of(page)
    page.asked.clear()
    before = heat(result)
    result.get_by_label("Colours").select_option("viridis")
    after = heat(result)
    assert np.array_equal(before[..., 3], after[..., 3]) and (before != after).any(-1).mean() > 0.01
    bar = result.locator(".scale").get_attribute("style")
    assert "rgb(253, 231, 37)" in bar  # where viridis ends
    result.get_by_label("Heatmap opacity").fill("30")
    assert result.locator(".heat").evaluate("c => getComputedStyle(c).opacity") == "0.3"
    expect(result.locator(".opacity-out")).to_have_text("30 %")
    assert page.asked == []


def test_another_rate_changes_the_answer_at_once(visit, home, tmp_path):
    """By keyboard, and without asking the server; an image is sought whose regions depend on the rate."""
    path = tmp_path / "between.png"
    for level in (0, 10_000, 50_000, 65_535):
        for size in (1, 2):
            Image.fromarray(marked(*[(60, 80, level), (180, 180, 65_535 - level)][:size])).save(path)
            told = [at_rate(home, "gauss", path, rate)[1] for rate in (0.1, 0.2)]
            if len(told[0].regions) != len(told[1].regions):
                break
        else:
            continue
        break
    assert len(told[0].regions) != len(told[1].regions)
    page = visit()
    choose_model(page, "gauss")
    give(page, path)
    result = result_of(page)
    slider = result.get_by_label("False-alarm rate")
    page.asked.clear()
    slider.focus()
    for rate, key in ((0.2, "End"), (0.1, "ArrowLeft"), (0.2, "ArrowRight")):
        page.keyboard.press(key)
        model, wanted = at_rate(home, "gauss", path, rate)
        assert slider.get_attribute("aria-valuetext") == f"{100 * rate:g} %"
        assert result.locator(".rate-out").inner_text() == f"{100 * rate:g} %"
        assert result.locator(".headline:visible").inner_text() == words.headline(wanted)
        assert f"{100 * rate:g} %" in result.locator(".meaning:visible").inner_text()
        assert result.locator(".regions:visible tbody tr").count() == len(wanted.regions)
        assert result.locator(".lines:visible path").count() == len(wanted.regions)
        assert page.asked == []
        _, mask = bring(page, result.get_by_role("link", name="Mask (PNG)"))
        assert np.array_equal(picture(mask), plots.mask(wanted.map, model.calibration))
        told = json.loads(bring(page, result.get_by_role("link", name="Figures (JSON)"))[1])
        assert told["false_alarm_rate"] == rate and told["is_anomalous"] == wanted.is_anomalous
        assert [one["area"] for one in told["regions"]] == [one.area for one in wanted.regions]
        slider.focus()
    assert page.asked == []


def test_a_row_marks_its_outline(visit, bank, defect):
    page = visit()
    give(page, defect)
    result = result_of(page)
    rows, lines = result.locator(".regions:visible tbody tr"), result.locator(".lines:visible g")
    expect(rows).to_have_count(len(bank.predict(defect).regions))
    expect(lines).to_have_count(rows.count())
    for show in (rows.nth(1).hover, rows.nth(0).focus):
        show()
        number = 1 if show == rows.nth(1).hover else 0
        marks = [line.get_attribute("class") for line in lines.all()]
        assert "marked" in (marks[1] or "") or "marked" in (marks[number] or "")
        page.mouse.move(1, 1)
    expect(result.locator(".lines g.marked")).to_have_count(1)  # that of the row with the focus
    expect(lines.nth(0)).to_have_class("marked")
    result.get_by_label("Outlines").uncheck()
    expect(lines).to_have_count(0)
    result.get_by_label("Outlines").check()
    expect(lines).to_have_count(rows.count())


def test_what_is_downloaded_is_what_is_shown(visit, bank, defect):
    page = visit()
    give(page, defect)
    result = result_of(page)
    button = result.get_by_role("button", name="Overlay (PNG)")
    name, content = bring(page, button)
    over, plain = picture(content)[..., :3].astype(int), source(result)
    plain = (plain if plain.ndim == 3 else np.repeat(plain[..., None], 3, 2)).astype(int)
    assert name == "defect-overlay.png" and over.shape == plain.shape
    differs = (np.abs(over - plain) > 3).any(-1)
    wanted = bank.predict(defect)
    mask = plots.mask(wanted.map, bank.calibration)
    assert differs[mask].mean() > 0.9
    result.get_by_label("Heatmap opacity").fill("0")
    result.get_by_label("Outlines").uncheck()
    bare = picture(bring(page, button)[1])[..., :3]
    assert np.abs(bare.astype(int) - plain).max() <= 1
    name, content = bring(page, result.get_by_role("link", name="Mask (PNG)"))
    assert name == "defect-mask.png" and mask.any() and np.array_equal(picture(content), mask)
    name, content = bring(page, result.get_by_role("link", name="Figures (JSON)"))
    told = json.loads(content)
    assert name == "defect.json" and told["score"] == pytest.approx(wanted.score, rel=1e-5)
    assert told["image"] == "defect.tif" and told["p_value"] == wanted.p_value


def test_an_image_can_be_pasted(visit):
    content = io.BytesIO()
    Image.fromarray((marked(*TWO) >> 8).astype(np.uint8)).save(content, "png")
    page = visit()
    page.evaluate(
        """text => {
          const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0)), data = new DataTransfer();
          data.items.add(new File([bytes], "pasted.png", { type: "image/png" }));
          document.body.dispatchEvent(new ClipboardEvent("paste", { clipboardData: data, bubbles: true }));
        }""",
        base64.b64encode(content.getvalue()).decode(),
    )
    result = result_of(page, file="pasted.png")
    expect(result.locator(".headline:visible")).to_have_text("Anomalous")


def test_examples_by_mouse_and_by_keyboard(visit):
    page = visit()
    page.locator("[data-example='0']").click()
    result_of(page, file="normal.tif")
    for _ in range(SCRATCH):
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    result = result_of(page, file="scratch.tif")
    expect(fact(result, "Model")).to_have_text("bank")
    choose_model(page, "gauss")  # looks at the same example
    expect(fact(result, "Model")).to_have_text("gauss")
    expect(fact(result, "File")).to_have_text("scratch.tif")


def test_a_model_without_a_rate_gives_a_provisional_verdict(visit):
    page = visit()
    choose_model(page, "raw (not calibrated)")
    page.locator(f"[data-example='{SCRATCH}']").click()
    result = result_of(page)
    expect(result.locator(".headline")).to_contain_text("provisionally")
    expect(fact(result, "p-value")).to_have_text("none stated")
    expect(result.get_by_label("False-alarm rate")).to_have_count(0)


# ---- what goes wrong -------------------------------------------------------------------------------------------------


def refused(page, words, where="#result"):
    """One sentence, with no path of the server in it."""
    alert = page.locator(where).get_by_role("alert")
    expect(alert).to_contain_text(words)
    text = alert.inner_text().strip()
    assert not re.search(r"(^|\s)/\w|zoo-demo-|gradio|Traceback|Error\b", text), text
    assert "\n" not in text and len(text) < 300


def clear(page, where="#image"):
    page.locator(where).get_by_label("Clear").click()
    expect(page.locator(f"{where} input[type=file]")).to_have_count(1)


def test_a_broken_file_is_told_and_the_next_one_is_taken(visit, tmp_path, defect):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    Image.fromarray(np.zeros((5000, 5000), bool)).save(tmp_path / "large.png")
    page = visit()
    give(page, tmp_path / "broken.png")
    refused(page, "broken.png")
    clear(page)
    expect(page.locator("#result .empty")).to_be_visible()
    give(page, tmp_path / "large.png")
    refused(page, "5000 x 5000 pixels")
    clear(page)
    give(page, defect)
    result_of(page, file="defect.tif")


def test_a_file_that_is_no_image_is_refused(visit, tmp_path):
    (tmp_path / "notes.txt").write_text("nothing to see")
    page = visit()
    give(page, tmp_path / "notes.txt")
    expect(page.get_by_text(re.compile("invalid file type", re.I)).first).to_be_visible()
    page.locator("[data-example='0']").click()
    result_of(page, file="normal.tif")


def test_a_model_that_cannot_be_loaded_is_told(visit, home):
    config = home / "spoiled/config.json"
    text = config.read_text()
    page = visit()
    try:
        config.write_text("{")
        choose_model(page, "spoiled")
        page.locator("[data-example='0']").click()
        refused(page, "damaged")
        choose_model(page, "bank")
        page.locator("[data-example='0']").click()
        result_of(page, file="normal.tif")
    finally:
        config.write_text(text)


# ---- the other tabs --------------------------------------------------------------------------------------------------


def compare(page, path):
    go_to(page, "Compare")
    give(page, path, "#compare-image")
    results = page.locator("#comparison .result")
    expect(results).to_have_count(2)
    for result in results.all():
        expect(result.locator(".scale")).to_have_attribute("style", re.compile("gradient"))
    return results


def test_two_models_are_compared(visit, home, defect):
    page = visit()
    results = compare(page, defect)
    for name, result in zip(("bank", "gauss"), results.all(), strict=True):
        expect(fact(result, "Model")).to_have_text(name)
        wanted = zoo.from_pretrained(home / name).predict(defect)
        expect(fact(result, "Score")).to_have_text(f"{wanted.score:.6g}")
    page.asked.clear()
    results.nth(0).get_by_label("Heatmap opacity").fill("20")
    results.nth(1).get_by_label("Outlines").uncheck()
    for result in results.all():  # both look alike, so that they can be compared
        assert result.locator(".heat").evaluate("c => getComputedStyle(c).opacity") == "0.2"
        expect(result.get_by_label("Heatmap opacity")).to_have_value("20")
        expect(result.get_by_label("Outlines")).not_to_be_checked()
    assert page.asked == []


def write_batch(folder, count):
    folder.mkdir()
    for number in range(count):
        image = marked(*TWO) if number == 3 else synthetic.render(8_000_000 + number, bits=16)[0]
        Image.fromarray(image).save(folder / f"wafer-{number}.png")
    return sorted(folder.iterdir())


def inspect_all(page, files):
    go_to(page, "Batch")
    give(page, files, "#batch-images")
    expect(page.locator("#batch-images")).to_contain_text(files[-1].stem[:3])
    page.locator("#batch-button").click()


def test_a_batch_is_sorted_and_can_be_kept(visit, browser, server, bank, tmp_path):
    files = write_batch(tmp_path / "batch", 5)
    (tmp_path / "batch/broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    page = visit()
    inspect_all(page, [*files, tmp_path / "batch/broken.png"])
    told = page.locator("#batch-told .done")
    expect(told).to_contain_text("5 images inspected")
    expect(told).to_contain_text("broken.png")
    scores = {path.name: bank.predict(path) for path in files}
    order = sorted(scores, key=lambda name: (scores[name].p_value, -scores[name].score))
    captions = page.locator("#batch-gallery .caption-label")
    expect(captions).to_have_count(5)
    assert [text.partition(":")[0].strip() for text in captions.all_inner_texts()] == order
    assert order[0] == "wafer-3.png" and "anomalous" in captions.first.inner_text()
    expect(page.locator("#batch-table")).to_contain_text("wafer-3.png")
    links = page.locator("#batch-files a[href]")
    hrefs = {re.search(r"\w+$", href)[0]: href for href in [one.get_attribute("href") for one in links.all()]}
    assert set(hrefs) == {"html", "csv", "zip"}
    content = {kind: page.request.get(href).body() for kind, href in hrefs.items()}
    rows = list(csv.DictReader(io.StringIO(content["csv"].decode())))
    assert [row["image"] for row in rows] == order
    assert [float(row["score"]) for row in rows] == pytest.approx([scores[name].score for name in order], rel=1e-5)
    report = tmp_path / "report.html"
    report.write_bytes(content["html"])
    context = browser.new_context()
    opened = context.new_page()
    opened.goto(report.as_uri())
    expect(opened.locator("body")).to_contain_text("wafer-3.png")
    assert opened.evaluate("[...document.images].every((i) => i.complete && i.naturalWidth)")
    context.close()


def test_a_batch_can_be_cancelled(visit, tmp_path):
    page = visit()
    files = write_batch(tmp_path / "batch", 40)
    inspect_all(page, files)
    expect(page.locator("#batch-told .waiting")).to_be_visible()
    page.locator("#batch-cancel").click()
    expect(page.locator("#batch-told .empty")).to_be_visible()
    go_to(page, "Inspect")
    page.locator("[data-example='0']").click()
    result_of(page, file="normal.tif")
    go_to(page, "Batch")  # and nothing of it comes later
    expect(page.locator("#batch-told .empty")).to_be_visible()


def begin_tuning(page, files, name):
    go_to(page, "Fine-tune")
    give(page, files, "#normals")
    expect(page.locator("#normals")).to_contain_text(files[-1].stem[:3])
    page.get_by_label("Name of the new model").fill(name)
    page.locator("#finetune-button").click()


def test_too_few_images_to_learn_from(visit, tmp_path):
    page = visit()
    begin_tuning(page, write_batch(tmp_path / "few", 3), "few")
    refused(page, "at least 10", "#finetuned")
    expect(page.locator("#finetune-button")).to_be_enabled()


def test_fine_tuning_can_be_cancelled(visit, home, tmp_path):
    page = visit()
    begin_tuning(page, write_batch(tmp_path / "normals", 12), "given-up")
    expect(page.locator("#finetuned .waiting")).to_be_visible()
    page.locator("#finetune-cancel").click()
    refused(page, "ancelled", "#finetuned")
    expect(page.locator("#finetune-button")).to_be_enabled()
    assert not (home / "given-up").exists()


@pytest.mark.slow
def test_a_model_is_fine_tuned_and_used(visit, home, tmp_path):
    page = visit()
    begin_tuning(page, write_batch(tmp_path / "normals", 12), "lot-17")
    bar = page.locator("#finetuned progress")
    expect(bar).to_be_visible()
    page.wait_for_function("() => document.querySelector('#finetuned progress')?.value > 0.1", timeout=2 * PATIENCE)
    expect(page.locator("#finetuned .done")).to_contain_text("lot-17 is ready", timeout=2 * PATIENCE)
    try:
        go_to(page, "Inspect")
        choose_model(page, "lot-17")
        page.locator("[data-example='0']").click()
        expect(fact(result_of(page), "Model")).to_have_text("lot-17")
    finally:
        shutil.rmtree(home / "lot-17")


def test_about_shows_the_card(visit):
    page = visit()
    go_to(page, "About")
    expect(page.locator("#card")).to_contain_text("Threshold and false alarms")


# ---- for everybody ---------------------------------------------------------------------------------------------------

LOOKS = """e => { const found = []; for (let i = 0; e && i < 4; i++, e = e.parentElement) { 
  const s = getComputedStyle(e); found.push([s.outlineStyle, s.outlineWidth, s.outlineColor, s.boxShadow,
  s.borderColor, s.backgroundColor].join()); }
  return found; }"""


def test_all_is_reached_by_tab_and_the_focus_is_seen(visit, defect):
    page = visit()
    page.locator(f"[data-example='{SCRATCH}']").click()
    result = result_of(page)
    wanted = {
        "model": page.locator("#model input"),
        "upload": page.locator("#image button"),
        "example": page.locator("[data-example='0']"),
        "slider": result.locator(".split"),
        "rate": result.locator(".rate"),
        "opacity": result.locator(".opacity"),
        "colours": result.locator(".colours"),
        "outlines": result.locator(".outlines"),
        "row": result.locator(".regions:visible tbody tr").first,
        "overlay": result.locator(".save-overlay"),
        "mask": result.get_by_role("link", name="Mask (PNG)"),
        "figures": result.get_by_role("link", name="Figures (JSON)"),
    }
    page.locator("h1").click()
    page.mouse.move(1, 1)
    still = "() => Promise.all(document.getAnimations().map((each) => each.finished.catch(() => 0)))"
    page.evaluate(still)
    before = {name: place.evaluate(LOOKS) for name, place in wanted.items()}
    order = []
    for _ in range(60):
        page.keyboard.press("Tab")
        for name in set(wanted) - set(order):
            if wanted[name].evaluate("e => e === document.activeElement"):
                order.append(name)
                page.evaluate(still)
                assert wanted[name].evaluate(LOOKS) != before[name], f"the focus of {name} is not seen"
        if len(order) == len(wanted):
            break
    assert order == list(wanted)
    expect(result).to_have_count(1)


def test_a_phone_needs_no_sideways_scrolling(visit, defect, tmp_path):
    page = visit(PHONE, has_touch=True, is_mobile=True)

    def fits():
        width = page.evaluate("document.scrollingElement.scrollWidth")
        assert width <= PHONE["width"], width

    expect(page.get_by_role("tab")).to_have_text(TABS)
    tops = {tab.bounding_box()["y"] for tab in page.get_by_role("tab").all()}
    assert len(tops) == 1  # in one line
    give(page, defect)
    result_of(page)
    fits()
    compare(page, defect)
    fits()
    inspect_all(page, write_batch(tmp_path / "batch", 2))
    expect(page.locator("#batch-told .done")).to_be_visible()
    expect(page.locator("#batch-gallery .caption-label")).to_have_count(2)
    fits()
    begin_tuning(page, [tmp_path / "batch/wafer-0.png"], "x")
    refused(page, "at least 10", "#finetuned")
    fits()
    go_to(page, "About")
    expect(page.locator("#card")).to_contain_text("Threshold and false alarms")
    fits()


CONTRAST = """e => {
  const colour = (text) => { const c = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
    c.fillStyle = text; c.fillRect(0, 0, 1, 1); const d = c.getImageData(0, 0, 1, 1).data; return [...d]; };
  const layers = []; let shown = 1;
  for (let up = e; up; up = up.parentElement) { layers.push(colour(getComputedStyle(up).backgroundColor)); }
  let back = [255, 255, 255];
  const over = (top, low) => low.map((v, i) => top[i] * top[3] / 255 + v * (1 - top[3] / 255));
  for (const layer of layers.reverse()) back = over(layer, back);
  const front = over(colour(getComputedStyle(e).color), back);
  const light = (c) => { const [r, g, b] = c.map((v) => v / 255)
    .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const [a, b] = [light(front), light(back)].sort((x, y) => y - x);
  return (a + 0.05) / (b + 0.05);
}"""
TEXTS = (
    ".headline:visible, .rarity:visible, .meaning:visible, .facts dt, .facts dd, .note, .legend span, .controls label, "
    ".controls .value, h3:visible, .result th:visible, .result td:visible, figcaption, .downloads a:visible, "
    ".downloads button"
)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground(visit, tmp_path, scheme, defect):
    """WCAG 2.1, 1.4.3: 4.5 to 1."""
    page = visit(color_scheme=scheme)
    is_dark = page.evaluate("document.body.classList.contains('dark')")
    assert is_dark == (scheme == "dark")

    def check(texts):
        found = {one.inner_text()[:30] or one.inner_html()[:50]: one.evaluate(CONTRAST) for one in texts.all()}
        assert found and min(found.values()) >= 4.5, {text: ratio for text, ratio in found.items() if ratio < 4.5}

    check(page.locator(".head h1, .head p, .empty:visible p, #examples .note, #examples h2, .examples span"))
    for number in (0, SCRATCH):
        page.locator(f"[data-example='{number}']").click()
        result = result_of(page, file="scratch.tif" if number else "normal.tif")
        check(result.locator(TEXTS))
    choose_model(page, "raw (not calibrated)")
    expect(fact(result, "Model")).to_have_text("raw")
    check(result.locator(TEXTS))
    (tmp_path / "broken.png").write_bytes(b"")
    give(page, tmp_path / "broken.png")
    refused(page, "broken.png")
    check(page.locator("#result .alert p"))


def test_controls_have_names_and_pictures_have_words(visit, defect):
    page = visit()
    give(page, defect)
    result = result_of(page)
    named = """e => (e.getAttribute("aria-label") || [...(e.labels || [])].map((label) => label.innerText).join()
      || e.innerText).trim()"""
    controls = result.locator("input, select, button, a")
    assert controls.count() >= 8 and all(control.evaluate(named) for control in controls.all())
    pictures = result.locator("img")
    assert pictures.count() >= 3 and all(one.get_attribute("alt") for one in pictures.all())
    assert all(one.get_attribute("aria-label") for one in result.locator("canvas").all())
    assert all(one.get_attribute("alt") is not None for one in page.locator("img").all())
    expect(page.locator("h1:visible")).to_have_count(1)
    expect(page.locator(".said[role=status]")).to_contain_text(result.locator(".headline:visible").inner_text())
