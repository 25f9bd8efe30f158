"""The first models of a demo that has none, and what its page tells meanwhile."""

import os

import pytest

import zoo
from zoo import hub
from zoo.demo import first, page
from zoo.demo.first import FirstModels, Plan, Step
from zoo.errors import ZooError


@pytest.fixture
def small(monkeypatch):
    """The same work on a few small images."""
    monkeypatch.setattr(first, "DATA", "synthetic:train=8,good=1,defect=1,size=64")
    monkeypatch.setattr(first, "NORMALS", "synthetic:train=1,good=29,defect=1,size=64,seed=1")
    monkeypatch.setattr(first, "RATE", 0.1)
    plans = [
        Plan("demo-a", "patchcore", {"bank_size": 50, "input_size": 64}, Step("learning", 4), Step("measuring", 2)),
        Plan("demo-b", "padim", {"dims": 10, "input_size": 64}, Step("learning again", 4), Step("measuring again", 2)),
    ]
    monkeypatch.setattr(first, "PLANS", plans)


def test_they_are_seen_when_they_are_calibrated(small, zoo_home):
    ready, seen, shares = [], [], []

    def say(line):
        seen.append(list(hub.list_models()))
        shares.append(models.progress()[0])

    models = FirstModels(ready.append, "cpu", say)
    models.run()
    assert models.error is None and ready == models.made == ["demo-a", "demo-b"]
    assert seen == [[], [], ["demo-a"], ["demo-a"], ["demo-a"], ["demo-a", "demo-b"]]
    assert shares == sorted(shares) and 0 <= shares[0] and shares[-1] < 1
    assert sorted(path.name for path in hub.registry().iterdir()) == ["demo-a", "demo-b"]  # nothing is left beside
    for name in ready:
        known = zoo.from_pretrained(name).calibration
        assert known.calibrated and known.false_alarm_rate == 0.1 and len(known.scores) == 30


def test_a_model_of_the_same_name_is_left_as_it_is(small):
    place = hub.model_place("demo-a")
    place.mkdir(parents=True)
    (place / "config.json").write_text("{")
    old = place.parent / f"{first.PREFIX}killed"
    old.mkdir()
    os.utime(old, (1, 1))
    ready = []
    FirstModels(ready.append, "cpu", lambda line: None, first.PLANS[:1]).run()
    assert ready == ["demo-a-2"] and zoo.from_pretrained("demo-a-2").calibration.calibrated
    assert (place / "config.json").read_text() == "{" and not old.exists()


def test_a_failure_is_told_and_leaves_nothing(small, monkeypatch):
    def fail(*arguments, **how):
        raise ZooError("The disk is full; free some.")

    monkeypatch.setattr(first, "calibrate", fail)
    said = []
    models = FirstModels(lambda name: pytest.fail("nothing is ready"), "cpu", said.append)
    models.run()
    assert "disk is full" in str(models.error) and "disk is full" in said[-1]
    assert list(hub.registry().iterdir()) == []


def test_progress_goes_on_and_never_arrives_by_itself(monkeypatch):
    """However long a step takes, by its clock."""
    now = [0.0]
    monkeypatch.setattr(first.time, "monotonic", lambda: now[0])
    models = FirstModels(lambda name: None, "cpu", lambda line: None)
    shares = []
    for plan in first.PLANS:
        for step in (plan.learning, plan.measuring):
            models._enter(step)
            for _ in range(40):
                shares.append(models.progress()[0])
                now[0] += step.seconds / 10
    assert all(a < b for a, b in zip(shares, shares[1:], strict=False)) and shares[-1] < 1
    assert "longer than usual" in models.progress()[1]


def test_the_plan_is_under_a_minute():
    """By the seconds that the page states, of the model that a visitor waits for."""
    assert first.PLANS[0].learning.seconds + first.PLANS[0].measuring.seconds <= 45


def test_the_page_has_all_its_files():
    for name in ("page.css", "page.js", "icon.svg", "viewer.html.j2"):
        text = page.text_of(name)
        assert text and not [word for word in text.split() if "//" in word and "http" in word and "w3.org" not in word]
