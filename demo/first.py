"""The first models, where there is none yet: on built-in synthetic images, calibrated, the first in under a minute."""

import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from zoo import hub
from zoo.calibrate import calibrate, store_calibration
from zoo.demo.app import FIRST
from zoo.fit import fit
from zoo.run import RunOptions

LEARNED, SCORED = 140, 299  # normal images: so many that learning takes seconds, and a rate of 1 % can be stated
DATA = f"synthetic:train={LEARNED},good=1,defect=1"
NORMALS = f"synthetic:train=1,good={SCORED},defect=1,seed=1"
RATE = 0.01
PREFIX = ".first-"  # of folders in the registry where they are made


class Step(NamedTuple):
    """A part of the work: its words, and the seconds that it takes on two cores."""

    words: str
    seconds: int


class Plan(NamedTuple):
    """A model to be made."""

    name: str
    method: str
    arguments: dict[str, Any]
    learning: Step
    measuring: Step


PLANS = (
    Plan(
        "demo-patchcore",
        "patchcore",
        {"bank_size": 3000, "input_size": 320},
        Step(f"Learning from {LEARNED} normal images of a built-in synthetic set", 22),
        Step(f"Measuring {SCORED} further normal images, for a threshold with a stated false-alarm rate", 16),
    ),
    Plan(
        "demo-padim",
        "padim",
        {},
        Step("Learning by a second method, to compare with", 10),
        Step("Measuring its threshold", 10),
    ),
)


class FirstModels(threading.Thread):
    """Fits and calibrates the first models while the page is already there.

    Attributes:
        made: names of those that are ready.
        error: what went wrong, or None.

    Args:
        ready: called with each model's name once it is kept.
        say: told a line.
        plans: what is to be made; None: `PLANS`.
    """

    def __init__(
        self,
        ready: Callable[[str], None],
        device: str = "auto",
        say: Callable[[str], None] = print,
        plans: Sequence[Plan] | None = None,
    ):
        super().__init__(name=FIRST, daemon=True)
        self.made: list[str] = []
        self.error: Exception | None = None
        self._ready, self._device, self._say, self._plans = ready, device, say, PLANS if plans is None else plans
        self._steps = [step for plan in self._plans for step in (plan.learning, plan.measuring)]
        self._step, self._begun = -1, time.monotonic()

    def run(self) -> None:
        try:
            for plan in self._plans:
                self._make(plan)
        except Exception as error:  # the page tells it, and the server lives on
            self.error = error
            self._say(f"The first models could not be made: {error}")

    def _make(self, plan: Plan) -> None:
        run, place = RunOptions(device=self._device), _free_place(plan.name)
        place.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(place.parent)
        with tempfile.TemporaryDirectory(prefix=PREFIX, dir=place.parent) as home:  # nobody sees it half made
            self._enter(plan.learning)
            how = {"data_options": {"hold_out": 0}, "run": run, "home": Path(home)}
            model, _ = fit(plan.method, DATA, place.name, "lite", plan.arguments, **how)
            self._enter(plan.measuring)
            about, normals = calibrate(model, NORMALS, RATE, folder=model.folder, run=run)
            store_calibration(model.folder, model.calibration, about, normals, model.view)
            model.folder.rename(place)
        self.made.append(place.name)
        self._ready(place.name)
        self._say(f"The model {place.name} is ready.")

    def _enter(self, step: Step) -> None:
        self._step, self._begun = self._step + 1, time.monotonic()
        self._say(f"Step {self._step + 1} of {len(self._steps)}: {step.words} (about {step.seconds} s).")

    def progress(self) -> tuple[float, str]:
        """Share of the way, by the seconds that it usually takes, and what is being done."""
        number = max(self._step, 0)
        whole, before = (sum(step.seconds for step in part) for part in (self._steps, self._steps[:number]))
        (words, usual), spent = self._steps[number], time.monotonic() - self._begun
        within = usual * (1 - 4 ** (-spent / usual))  # three quarters of the bar when it is due, and never all of it
        left = f"about {usual - spent:.0f} s left of it" if spent < usual else "longer than usual on this machine"
        return (before + within) / whole, f"{words} (step {number + 1} of {len(self._steps)}, {left})"


def _free_place(name: str) -> Path:
    """Of this name, or of one with a number where somebody has a model of this name."""
    tried = (hub.model_place(name if number == 1 else f"{name}-{number}") for number in count(1))
    return next(place for place in tried if not place.exists())


def _remove_leftovers(registry: Path) -> None:
    """Of demos that were killed an hour ago or more."""
    for folder in registry.glob(f"{PREFIX}*"):
        with suppress(OSError):
            if time.time() - folder.stat().st_mtime > 3600:
                shutil.rmtree(folder)
