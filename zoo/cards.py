"""A model card out of a configuration and a result record; every figure in it comes from the record."""

from functools import cache
from importlib.resources import files
from typing import Any

import jinja2

from zoo.naming import FURTHER, METRICS


def render_card(config: dict[str, Any], record: dict[str, Any] | None) -> str:
    """The card's Markdown text.

    Args:
        config: as in `config.json`.
        record: as in `results.json`; without one the card says that nothing was measured.
    """
    about = {"config": config, "record": record or {}, "seen": _seen(config["preprocessing"])}
    return _template().render(about, metric_names=METRICS | FURTHER)


def _seen(view: dict[str, Any]) -> list[str]:
    """What is said of how images are seen, where that isn't whole and at full scale; models of before have no view."""
    found = []
    for height, width, rows in view.get("bars", ()):
        found += [f"without the info bar, the last {rows} rows of {width} x {height}"] if rows else []
    if view.get("low") is not None:
        unit = "" if view["floats"] else " of the full scale"
        found.append(f"from {view['low']:.4g} (black) to {view['high']:.4g} (white){unit}")
    if view.get("tile"):
        found.append(f"in tiles of {view['tile']} pixels, where they are larger")
    return found


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string((files("zoo.hub_cards") / "card.md.j2").read_text(encoding="utf-8"))
