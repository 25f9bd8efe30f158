"""The first model, where there is none yet: PatchCore on built-in synthetic images, calibrated, in under a minute."""

import threading
import time
from collections.abc import Callable

from zoo.calibrate import calibrate, store_calibration
from zoo.demo.app import FIRST
from zoo.fit import fit
from zoo.run import RunOptions

NAME = "demo-patchcore"
LEARNED, SCORED = 140, 299  # normal images: so many that learning takes seconds, and a rate of 1 % can be stated
DATA = f"synthetic:train={LEARNED},good=1,defect=1"
NORMALS = f"synthetic:train=1,good={SCORED},defect=1,seed=1"
RATE = 0.01
STEPS = (  # words, and seconds that they take on two cores
    (f"Learning from {LEARNED} normal images of a built-in synthetic set", 22),
    (f"Measuring {SCORED} further normal images, for a threshold with a stated false-alarm rate", 16),
)


class FirstModel(threading.Thread):
    """Fits and calibrates the first model while the page is already there.

    Attributes:
        error: what went wrong, or None.

    Args:
        ready: called with the model's name once it is kept.
    """

    def __init__(self, ready: Callable[[str], None], device: str = "auto", say: Callable[[str], None] = print):
        super().__init__(name=FIRST, daemon=True)
        self.error: Exception | None = None
        self._ready, self._device, self._say = ready, device, say
        self._step, self._begun = 0, time.monotonic()

    def run(self) -> None:
        try:
            self._enter(0)
            run = RunOptions(device=self._device)
            model, record = fit(
                "patchcore", DATA, NAME, "lite", {"bank_size": 3000, "input_size": 320}, {"hold_out": 0}, run=run
            )
            self._enter(1)
            about, normals = calibrate(model, NORMALS, RATE, folder=model.folder, run=run)
            store_calibration(model.folder, model.calibration, about, normals, model.view)
            self._step = len(STEPS)
            self._ready(NAME)
            self._say(f"The model {NAME} is ready.")
        except Exception as error:  # the page tells it, and the server lives on
            self.error = error
            self._say(f"The first model could not be made: {error}")

    def _enter(self, step: int) -> None:
        self._step, self._begun = step, time.monotonic()
        self._say(f"Step {step + 1} of {len(STEPS)}: {STEPS[step][0]} (about {STEPS[step][1]} s).")

    def progress(self) -> tuple[float, str]:
        """Share of the way, by the seconds that it usually takes, and what is being done."""
        if self._step >= len(STEPS):
            return 1.0, "Ready"
        words, usual = STEPS[self._step]
        whole, before = sum(seconds for _, seconds in STEPS), sum(seconds for _, seconds in STEPS[: self._step])
        spent = time.monotonic() - self._begun
        within = usual * (1 - 4 ** (-spent / usual))  # three quarters of the bar when it is due, and never all of it
        left = f"about {whole - before - spent:.0f} s left" if spent < usual else "longer than usual on this machine"
        return (before + within) / whole, f"{words} (step {self._step + 1} of {len(STEPS)}, {left})"
