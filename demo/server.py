"""What all tabs of the page share: the models, the visitors' files, and how an image is looked at."""

import html
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from huggingface_hub.constants import HF_HUB_CACHE
from PIL import Image

from zoo import checkpoint, hub
from zoo.demo.engine import Engine
from zoo.demo.examples import Example
from zoo.demo.first import PLANS, FirstModels
from zoo.demo.settings import Settings
from zoo.demo.tuning import Tuning
from zoo.demo.uploads import Uploads, check, sentence
from zoo.demo.viewer import Look, places
from zoo.demo.words import label
from zoo.errors import ZooError
from zoo.module import AnomalyModule


@dataclass
class Server:
    """A running demo.

    Attributes:
        first: the first models on their way, or None.
    """

    settings: Settings
    engine: Engine
    uploads: Uploads
    examples: list[Example]
    first: FirstModels | None = None
    _files: dict[str, set[Path]] = field(default_factory=dict)  # of each visitor
    _jobs: dict[str, list[Tuning]] = field(default_factory=dict)  # that each visitor waits for
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def look(self, path: str | Path, name: str | None, with_evidence: bool = True) -> Look:
        """Let a model look at a visitor's file.

        Raises:
            ZooError: there is no such model, or the file can't be taken.
        """
        name, path, start = self.chosen(name), Path(path), time.perf_counter()
        model = self.engine.model(name)
        check(path)
        brought = model.bring(path)
        (prediction,) = self.engine.predict(name, [brought])
        look = Look(path.name, name, model, brought, prediction)
        if with_evidence and (self.settings.show_training or _is_synthetic(model)):
            look.pairs = self.engine.evidence(name, brought, places(look))
        look.seconds = time.perf_counter() - start
        return look

    def chosen(self, name: str | None) -> str:
        """The model of this name, or the first one.

        Raises:
            ZooError: there is none yet.
        """
        names = self.engine.names()
        if not name and not names:
            if self.first and not self.first.error:
                raise ZooError(f"The first model is not ready yet: {self.first.progress()[1]}; try again then.")
            raise ZooError("There is no model here yet; fit one with zoo fit, and load the page again.")
        return name or self.preferred(names)

    def preferred(self, names: list[str]) -> str | None:
        """The model that a page begins with: the first one that is calibrated, as its verdicts state a rate."""
        good = [name for name in names if name not in self.engine.failed]
        good.sort(key=lambda name: name != PLANS[0].name)  # the better one of those that the demo makes comes first
        return next(filter(self.is_calibrated, good), next(iter(good or names), None))

    def choices(self) -> list[tuple[str, str]]:
        """Label and name of each model."""
        return [(label(name, self._config(name)), name) for name in self.engine.names()]

    def is_calibrated(self, name: str) -> bool:
        """Whether a model states a false-alarm rate."""
        known = (self._config(name) or {}).get("calibration")
        return bool(known and known["calibrated"])

    def _config(self, name: str) -> dict[str, Any] | None:
        """What a model's `config.json` says, as far as it is on this machine."""
        try:
            return checkpoint.read_config(hub.find_model(self.engine.source(name), local_files_only=True))
        except ZooError:
            return None

    def told(self, error: BaseException) -> str:
        """What a visitor is told of an error."""
        return sentence(error, self.uploads.folder, self.uploads.work, hub.registry(), HF_HUB_CACHE)

    def alert(self, error: BaseException) -> str:
        """The same as a part of the page."""
        told = self.told(error).rstrip(".")
        return f'<div class="alert" role="alert"><p>{html.escape(told)}.</p></div>'

    def picture(self, name: str, pixels: np.ndarray) -> str:
        """A PNG of uint8 pixels for an answer, at a place of its own, where it ages as uploads do."""
        path = self.uploads.folder / secrets.token_hex(16) / f"{name}.png"
        path.parent.mkdir()
        Image.fromarray(pixels).save(path, compress_level=1)  # packed more, it would take as long as the model
        return str(path)

    # ---- visitors' files ---------------------------------------------------------------------------------------------

    def took(self, request: gr.Request | None, *paths: str | Path) -> None:
        """Note whose files these are."""
        with self._lock:
            self._files.setdefault(getattr(request, "session_hash", "") or "", set()).update(map(Path, paths))

    @contextmanager
    def job(self, request: gr.Request, job: Tuning) -> Iterator[None]:
        """A fine-tuning that a visitor waits for, and may cancel."""
        with self._lock:
            self._jobs.setdefault(request.session_hash, []).append(job)
        try:
            yield
        finally:
            with self._lock:
                self._jobs.get(request.session_hash, [job]).remove(job)  # who has left has none any more

    def cancel(self, request: gr.Request) -> None:
        """End the fine-tuning that a visitor waits for, if there is one."""
        with self._lock:
            jobs = list(self._jobs.get(request.session_hash, ()))
        for job in jobs:
            job.cancel()

    def left(self, request: gr.Request) -> None:
        """A visitor has closed the page: what runs for it ends, and its files go."""
        self.cancel(request)
        with self._lock:  # the same file of two visitors lies there once
            paths = self._files.pop(request.session_hash or "", set()).difference(*self._files.values())
            self._jobs.pop(request.session_hash, None)
        self.uploads.forget(paths)

    def sweep(self) -> None:
        """Delete what is old, and forget of whom it was."""
        self.uploads.sweep()
        with self._lock:
            for session, paths in list(self._files.items()):
                self._files[session] = {path for path in paths if path.exists()}
                if not self._files[session]:
                    del self._files[session]


def _is_synthetic(model: AnomalyModule) -> bool:
    """Whether it has learned from built-in images, which are nobody's secret."""
    return str((model.record or {}).get("train_data", {}).get("name", "")).startswith("synthetic:")
