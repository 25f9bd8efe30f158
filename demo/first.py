"""The first models, where there is none yet: on built-in synthetic images, calibrated, the first in under a minute."""

import shutil
import tempfile
import threading
import time
from collections.abc import Callable
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
STEPS = [step for plan in PLANS for step in (plan.learning, plan.measuring)]


class FirstModels(threading.Thread):
    """Fits and calibrates the first models while the page is already there.

    Attributes:
        made: names of those that are ready.
        error: what went wrong, or None.

    Args:
        ready: called with each model's name once it is kept.
        say: told a line.
    """

    def __init__(self, ready: Callable[[str], None], device: str = "auto", say: Callable[[str], None] = print):
        super().__init__(name=FIRST, daemon=True)
        self.made: list[str] = []
        self.error: Exception | None = None
        self._ready, self._device, self._say = ready, device, say
        self._step, self._begun = -1, time.monotonic()

    def run(self) -> None:
        try:
            for plan in PLANS:
                self._make(plan)
        except Exception as error:  # the page tells it, and the server lives on
            self.error = error
            self._say(f"The first models could not be made: {error}")

    def _make(self, plan: Plan) -> None:
        run, place = RunOptions(device=self._device), hub.model_place(plan.name)
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".first-", dir=place.parent) as home:  # nobody sees it half made
            self._enter(plan.learning)
            how = {"data_options": {"hold_out": 0}, "run": run, "home": Path(home)}
            model, _ = fit(plan.method, DATA, plan.name, "lite", plan.arguments, **how)
            self._enter(plan.measuring)
            about, normals = calibrate(model, NORMALS, RATE, folder=model.folder, run=run)
            store_calibration(model.folder, model.calibration, about, normals, model.view)
            shutil.rmtree(place, ignore_errors=True)  # one that states no rate
            model.folder.rename(place)
        self.made.append(plan.name)
        self._ready(plan.name)
        self._say(f"The model {plan.name} is ready.")

    def _enter(self, step: Step) -> None:
        self._step, self._begun = self._step + 1, time.monotonic()
        self._say(f"Step {self._step + 1} of {len(STEPS)}: {step.words} (about {step.seconds} s).")

    def progress(self) -> tuple[float, str]:
        """Share of the way, by the seconds that it usually takes, and what is being done."""
        number = max(self._step, 0)
        whole, before = (sum(step.seconds for step in part) for part in (STEPS, STEPS[:number]))
        (words, usual), spent = STEPS[number], time.monotonic() - self._begun
        within = usual * (1 - 4 ** (-spent / usual))  # three quarters of the bar when it is due, and never all of it
        left = f"about {usual - spent:.0f} s left of it" if spent < usual else "longer than usual on this machine"
        return (before + within) / whole, f"{words} (step {number + 1} of {len(STEPS)}, {left})"
