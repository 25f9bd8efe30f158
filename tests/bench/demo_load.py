"""The demo under load: 20 clients at once, 200 different images, against the model alone on the same machine.

    python tests/bench/demo_load.py --out tests/bench/demo_load.json

A lite PatchCore is fitted on synthetic images and calibrated, and scores all images one after another in this process,
from files, as `model.predict` does: that is the bare model. Then `zoo demo` is started as a process of its own with the
same threads. Each client (`gradio_client`, a thread here, on the same cores) asks `/predict` for the next image that
nobody has asked for as soon as its last answer has come, heatmap and mask downloaded, so 20 are always in flight: where
nothing is lost between them, an answer takes 20 times as long as the bare model. Afterwards all ask for one and the
same file, of which the server keeps one copy. Told: requests without an answer, answers whose score is not the bare
model's, latencies, what an answer costs the server and the clients in CPU seconds, the server's resident memory every
half second, and how much its folder of temporary files holds in the end.
"""

import argparse
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

import numpy as np
import tifffile
import torch
from gradio_client import Client, handle_file
from PIL import Image

import zoo
from zoo.cli import main as command
from zoo.data import synthetic

MOST = {"lost": 0, "wrong": 0, "lost_of_one_file": 0, "growth_mb": 64}  # latencies are told, without a limit
SIZES = (256, 320, 448, 512, 640)
KINDS = (None, *synthetic.KINDS)
SAME = 1e-5  # of a score: what another order of float32 sums may change


def write_images(folder, count):
    """PNG of 8 and 16 bits, TIFF of 16, JPEG and BMP, normal and defective, of five sizes, cropped to be no squares."""
    folder.mkdir()
    for i in range(count):
        image, _ = synthetic.render(50_000 + i, size=SIZES[i // 5 % len(SIZES)], kind=KINDS[i % len(KINDS)])
        image = image[: len(image) - 8 * (i % 3)]
        deep = image.astype(np.uint16) * 257 + np.random.default_rng(i).integers(0, 200, image.shape, np.uint16)
        place = folder / f"{i:03d}"
        if i % 5 == 0:
            Image.fromarray(image).save(place.with_suffix(".png"))
        elif i % 5 == 1:
            Image.fromarray(np.minimum(deep, 65535)).save(place.with_suffix(".png"))
        elif i % 5 == 2:
            tifffile.imwrite(place.with_suffix(".tif"), deep)
        elif i % 5 == 3:
            Image.fromarray(image).save(place.with_suffix(".jpg"), quality=92)
        else:
            Image.fromarray(image).save(place.with_suffix(".bmp"))
    return sorted(folder.iterdir())


def fit(images):
    """A calibrated model in the registry of `$ZOO_HOME`."""
    for argv in (
        ["fit", "patchcore", "--preset", "lite", "--bank-size", "3000", "--data", f"synthetic:train={images}"],
        ["calibrate", "load", "--data", "synthetic:train=1,good=80,seed=1", "--false-alarm-rate", "0.05"],
    ):
        if command([*argv, *(["--name", "load"] if argv[0] == "fit" else [])]):
            sys.exit("The model could not be made.")


def bare(files):
    """Scores and seconds of the model alone, once it is warm."""
    model = zoo.from_pretrained("load")
    for path in files[:5]:
        model.predict(path)
    scores, seconds = [], []
    for path in files:
        begin = time.perf_counter()
        scores.append(model.predict(path).score)
        seconds.append(time.perf_counter() - begin)
    return scores, seconds


class Server:
    """`zoo demo` as a process, with how much memory it holds every half second while it is watched."""

    def __init__(self, folder, patience=120):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url, self.temporary = f"http://127.0.0.1:{self.port}", folder / "tmp"
        self.temporary.mkdir()
        self.log, self.samples, self._over = open(folder / "log", "w+"), [], threading.Event()
        argv = [sys.executable, "-m", "zoo.cli", "demo", "--name", "load", "--port", str(self.port)]
        environment = os.environ | {"TMPDIR": str(self.temporary)}
        begin = time.perf_counter()
        self.process = subprocess.Popen(argv, stdout=self.log, stderr=subprocess.STDOUT, env=environment)
        while not self._answers():
            if self.process.poll() is not None or time.perf_counter() - begin > patience:
                self.end()
                sys.exit(f"zoo demo shows no page:\n{Path(self.log.name).read_text()}")
            time.sleep(0.2)
        self.seconds_to_page = time.perf_counter() - begin

    def _answers(self):
        try:
            return urllib.request.build_opener(urllib.request.ProxyHandler({})).open(self.url, timeout=5).status == 200
        except OSError:
            return False

    def mb(self):
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(text.split("VmRSS:")[1].split()[0]) / 1024

    def cpu_s(self):
        ticks = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")

    def watch(self, answered):
        """Note (seconds, answers so far, MiB) until `watched_enough`."""
        begin = time.perf_counter()

        def look():
            while not self._over.wait(0.5) and self.process.poll() is None:
                self.samples.append((round(time.perf_counter() - begin, 1), answered(), round(self.mb(), 1)))

        self._watcher = threading.Thread(target=look, daemon=True)
        self._watcher.start()

    def watched_enough(self):
        self._over.set()
        self._watcher.join()

    def disk_mb(self):
        return sum(path.stat().st_size for path in self.temporary.rglob("*") if path.is_file()) / 2**20

    def end(self):
        """Its exit code, after SIGTERM."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        return self.process.returncode


def ask(server, files, clients, folder, seconds, answers):
    """Fill in answer (figures, seconds) or (error, None) of each file; the seconds of all together."""
    todo, begun = queue.SimpleQueue(), threading.Barrier(clients + 1)
    for i in range(len(files)):
        todo.put(i)
    until = time.monotonic() + seconds

    def visit(number):
        kept = folder / str(number)
        client = Client(server.url, verbose=False, download_files=kept, ssl_verify=False)  # no certificates to load
        begun.wait(120)
        while True:
            try:
                i = todo.get_nowait()
            except queue.Empty:
                return
            begin = time.perf_counter()
            try:
                job = client.submit(handle_file(files[i]), "load", None, api_name="/predict")
                told, *_ = job.result(timeout=max(until - time.monotonic(), 0.1))
                answers[i] = (told, time.perf_counter() - begin)
            except Exception as error:
                answers[i] = (f"{type(error).__name__}: {error}", None)

    threads = [threading.Thread(target=visit, args=(n,), daemon=True) for n in range(clients)]
    for thread in threads:
        thread.start()
    begun.wait(120)
    begin = time.perf_counter()
    for thread in threads:
        thread.join(max(until + 5 - time.monotonic(), 0))
    return time.perf_counter() - begin


def told_of(answers, whole, scores, alone, server, clients):
    """The report's figures."""
    seconds = [took for _, took in answers.values() if took is not None]
    errors = [told for told, took in answers.values() if took is None]
    figures = {i: told for i, (told, took) in answers.items() if took is not None}
    off = {i: abs(told["score"] - scores[i]) / abs(scores[i]) for i, told in figures.items()}
    p50, p95 = (float(np.percentile(seconds, q)) for q in (50, 95)) if seconds else (None, None)
    usual = float(np.mean(alone))
    memory = server.samples or [(0.0, 0, server.mb())]
    after_50 = next((mb for _, done, mb in memory if done >= 50), memory[-1][2])
    at_end = float(np.median([mb for *_, mb in memory[-4:]]))
    return {
        "lost": len(scores) - len(seconds),
        "errors": sorted(set(errors))[:5],
        "wrong": sum(not share <= SAME for share in off.values()),
        "largest_score_difference": max(off.values(), default=None),
        "seconds": whole,
        "latency_s": {"p50": p50, "p95": p95, "max": max(seconds, default=None)},
        "bare_s": {"mean": usual, "p50": float(np.median(alone)), "p95": float(np.percentile(alone, 95))},
        "p95_over_clients_times_bare": p95 and p95 / (clients * usual),
        "p50_over_clients_times_bare": p50 and p50 / (clients * usual),
        "images_per_s_over_bare": len(seconds) / whole * usual,
        "memory_mb": {"start": memory[0][2], "after_50": after_50, "end": at_end, "most": max(mb for *_, mb in memory)},
        "growth_mb": round(at_end - after_50, 1),
        "disk_mb_at_end": round(server.disk_mb(), 1),
        "samples": memory,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--train", type=int, default=120, help="images that the model is fitted on")
    parser.add_argument("--seconds", type=float, default=600, help="after which the rest counts as lost")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        os.environ["ZOO_HOME"] = str(folder / "home")
        files = write_images(folder / "images", options.requests)
        fit(options.train)
        scores, alone = bare(files)
        server = Server(folder)
        try:
            idle = round(server.mb(), 1)
            answers, of_one = {}, {}
            server.watch(lambda: len(answers))
            ours, its = time.process_time(), server.cpu_s()
            whole = ask(server, files, options.clients, folder, options.seconds, answers)
            server.watched_enough()
            ours, its = (time.process_time() - ours) / len(files), (server.cpu_s() - its) / len(files)
            told = told_of(dict(answers), whole, scores, alone, server, options.clients)
            ask(server, files[:1] * 2 * options.clients, options.clients, folder, options.seconds, of_one)
            missing = 2 * options.clients - sum(took is not None for _, took in of_one.values())
            report = {"at_most": MOST, "clients": options.clients, "requests": options.requests}
            report |= {"cores": len(os.sched_getaffinity(0)), "threads": torch.get_num_threads()}
            report |= {"seconds_to_page": server.seconds_to_page, "idle_mb": idle}
            report |= told | {"cpu_s_an_answer": {"server": its, "clients": ours}, "lost_of_one_file": missing}
            report["errors_of_one_file"] = sorted({told for told, took in of_one.values() if took is None})[:3]
        finally:
            code = server.end()
        report["exit_code"] = code
    failed = [key for key, most in MOST.items() if report[key] is None or report[key] > most]
    report |= {"passed": not failed, "failed": failed}
    print(json.dumps({key: value for key, value in report.items() if key != "samples"}, indent=1))
    if options.out:
        part = options.out.with_suffix(".part")
        part.write_text(json.dumps(report, indent=1) + "\n")
        part.replace(options.out)
    sys.stdout.flush()
    os._exit(bool(failed))  # the clients' own threads would be waited for


if __name__ == "__main__":
    main()
