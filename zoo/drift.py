"""Whether a calibrated threshold can still be trusted: recent normal images against those of the calibration.

Two questions are asked. Are more of the recent images called anomalous, or shown with a region, than the stated rate
allows? (Exact binomial tests; of no more than the rate, as the threshold promises at most that.) Are the images others
than those that the rate was stated for, by their scores, their features or the facts of the picture? (Two-sample tests;
see `zoo.findings`, `zoo.looks`.) Each question is given half of `LEVEL`, shared among its tests by Holm's method.

All tests take images that are drawn independently. Neighbouring fields of one wafer are alike in what has nothing to do
with the tool's drift: of few wafers many images find a "shift" between wafers, so draw images over lots and days, in
the calibration as well as later. And the more images there are, the smaller is the shift that is found. How often a
check errs, and what it finds, is measured in `tests/bench/drift.py`.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from zoo import checkpoint, ranks, record
from zoo.calibrate import Normals, score_unseen
from zoo.calibration import CONFIDENCE, Calibration, check_stated, normals_needed
from zoo.data import check_data, load_data, load_ignore
from zoo.evaluation import described
from zoo.findings import LEVEL, Exceedance, Shift, exceedances_of, shifts_of
from zoo.module import AnomalyModule
from zoo.reference import Reference, read_reference
from zoo.run import DataOptions, RunOptions, device_of
from zoo.trainer import ending, first_speaks
from zoo.unseen import unseen_normals

LEAST = 20  # images of which a check says "trusted": of fewer, more than 14 % might be called anomalous and none is

Verdict = Literal["trusted", "doubtful", "not trusted", "too few"]


@dataclass(frozen=True)
class Drift:
    """What a check has found.

    Attributes:
        verdict: "trusted"; "doubtful": as many are called anomalous as may be, but the images are others; "not
            trusted": more are, or the rate was never stated for images of their size; "too few": nothing was found in
            so few that it says nothing.
        sentence: the verdict in words, with the remedy.
        notes: what limits it, a sentence each.
        images: how many recent images were compared.
        calibrated: how many they were compared with.
        exceedances: of the image threshold and of the map's.
        shifts: of scores, facts and features, as far as these were kept.
        false_alarm_rate: the stated one.
        rows: name, score and level (`zoo.regions.region_level`) of each recent image.
        about: data, what was left out, versions and hardware, SHA-256 of the weights.
    """

    verdict: Verdict
    sentence: str
    notes: list[str]
    images: int
    calibrated: int
    exceedances: list[Exceedance]
    shifts: list[Shift]
    false_alarm_rate: float
    rows: list[tuple[str, float, float]]
    about: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        found = asdict(self) | self.about
        del found["about"]
        for key in ("exceedances", "shifts"):
            found[key] = [one._asdict() | {"found": one.found} for one in getattr(self, key)]
        rows = [dict(zip(("image", "score", "level"), row, strict=True)) for row in self.rows]
        return found | {"rows": rows, "level": LEVEL, "confidence": CONFIDENCE}


def drift(
    model: AnomalyModule,
    data: str,
    folder: Path | None = None,
    data_options: dict[str, Any] | None = None,
    run: RunOptions | None = None,
    name: str = "NAME",
) -> Drift:
    """Compare recent normal images with those that a model was calibrated on.

    Taken are the distinct normal images of the data, of all its splits, without those that the fit, the selection or
    the calibration has seen, and scored as `zoo.calibrate.calibrate` does.

    Args:
        model: calibrated.
        data: DATA specification.
        folder: the model's own, with what is private; None: that which it was loaded from.
        data_options: `batch_size`, `num_workers`, `skip_broken` and `ignore` of `DataOptions`.
        run: its precision is that of the calibration.
        name: of the model, in the command that calibrates it anew.

    Raises:
        ZooError: no stated rate; another precision; no normal image that is new; one that can't be read.
    """
    known, folder, start = model.calibration, folder or model.folder, time.perf_counter()
    run = first_speaks(run or RunOptions(precision=model.precision))
    check_stated(known, run.precision, name)
    ranks.connect()
    spec, options = check_data(data), DataOptions(**(data_options or {}))
    reference = read_reference(folder, known)
    digests = reference.digests if reference else set()
    unseen = unseen_normals(load_data(spec), spec, folder, model.view, options.num_workers or 0, run, digests)
    model.to(device_of(run.device)).eval()
    model.precision = run.precision
    ignore = load_ignore(spec, options.ignore, run.say)
    with ending("check"):
        normals, broken = score_unseen(model, unseen, spec, ignore, options, run, known.min_area)
    result = checkpoint.read_record(folder).get("calibration", {}) if folder else {}
    notes = _notes(reference, ignore is not None, "ignored" in result if result else None, name, known)
    left_out = {"seen": unseen.seen, "calibrated": unseen.known, "copies": unseen.repeated, "broken": broken}
    about = {"data": described(spec), "left_out": left_out, "precision": run.precision}
    about |= {"seconds": round(time.perf_counter() - start, 2)}
    if folder:
        about["weights_sha256"] = checkpoint.read_config(folder)["weights_sha256"]
    return compare(known, reference, normals, name, notes, about | record.environment(model.device))


def compare(
    known: Calibration,
    reference: Reference | None,
    normals: Normals,
    name: str = "NAME",
    notes: Sequence[str] = (),
    about: dict[str, Any] | None = None,
) -> Drift:
    """The verdict on recent images that were scored and looked at; the arguments are those of `drift` and `Drift`."""
    fits = [not known.sizes or tuple(size) in set(map(tuple, known.sizes)) for size in normals.shapes]
    rows = [row for row, fit in zip(normals.rows, fits, strict=True) if fit]
    scores, levels = ([row[column] for row in rows] for column in (1, 2))
    exceedances = exceedances_of(known, scores, levels) if rows else []
    shifts = shifts_of(known, reference, scores, normals.looks[fits]) if rows else []
    others = sorted({size for size, fit in zip(normals.shapes, fits, strict=True) if not fit})
    verdict, sentence = _judged(known, exceedances, shifts, len(rows), fits.count(False), others, name)
    tests, rate = (exceedances, shifts), known.false_alarm_rate
    return Drift(verdict, sentence, list(notes), len(rows), len(known.scores), *tests, rate, normals.rows, about or {})


# ---- words -----------------------------------------------------------------------------------------------------------


def _judged(
    known: Calibration,
    exceedances: Sequence[Exceedance],
    shifts: Sequence[Shift],
    images: int,
    unlike: int,
    sizes: Sequence[tuple[int, int]],
    name: str,
) -> tuple[Verdict, str]:
    rate, needed = f"{100 * known.false_alarm_rate:.4g} %", normals_needed(known.false_alarm_rate)
    remedy = (
        f"calibrate anew with at least {needed:,} recent images: zoo calibrate {name} --data DATA "
        f"--false-alarm-rate {known.false_alarm_rate:g}"
    )
    shifted = [shift.in_words() for shift in shifts if shift.found]
    if unlike:
        stated = ", ".join(f"{width} x {height}" for height, width in known.sizes)
        found = ", ".join(f"{width} x {height}" for height, width in sizes[:3]) + ", ..." * (len(sizes) > 3)
        count = f"all {unlike:,}" if not images else f"{unlike:,} of {images + unlike:,}"
        shifted.append(f"{count} images are of {found} pixels, unlike the calibrated ones ({stated})")
    if not images:
        return "not trusted", f"The threshold can't be trusted for these images: {shifted[-1]}; {remedy}."
    if over := [one for one in exceedances if one.found]:
        counts = " and ".join(f"{one.in_words()} (p = {one.p_value:.2g})" for one in over)
        cause = f"; {_listed(shifted)}" if shifted else ""
        return "not trusted", (
            f"The threshold can no longer be trusted: {counts}, where at most {rate} may be{cause}; {remedy}."
        )
    image = exceedances[0]
    if shifted:
        return "doubtful", (
            f"The threshold is doubtful: {image.in_words()}, which agrees with the stated {rate}, but "
            f"{_listed(shifted)}: these are other images than the rate was stated for; {remedy}."
        )
    bound = f"with {100 * CONFIDENCE:.4g} % confidence at most {100 * image.upper:.3g} % of such images are"
    if images < LEAST:
        return "too few", (
            f"Too few images to tell: {image.in_words()}, and {bound}; "
            f"give at least {LEAST}, or better {max(needed, LEAST):,}."
        )
    few = "" if images >= needed else ", as far as so few images tell"
    return "trusted", (
        f"The threshold can be trusted{few}: {image.in_words()}, where at most {rate} may be, and no shift was "
        f"found; {bound}."
    )


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _notes(reference: Reference | None, masks: bool, stated: bool | None, name: str, known: Calibration) -> list[str]:
    notes = []
    if reference is None:
        notes.append(
            "Only scores were compared: the model keeps no reference of its calibrated images, of which some may be "
            f"among these; zoo calibrate {name} --data DATA --false-alarm-rate {known.false_alarm_rate:g} keeps one."
        )
    if stated is not None and stated != masks:
        how = "with ignore masks, and none are given here" if stated else "without the ignore masks that are given here"
        notes.append(f"The rate was stated {how}; a shift may come of that.")
    return notes
