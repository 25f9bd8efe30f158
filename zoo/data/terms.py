"""Terms of use of data sets that have some: shown once at first use, carried in cards."""

import logging
import os

from zoo import hub
from zoo.errors import ZooError
from zoo.ranks import launched

# By the name of the data set. Taken from the owners' repository; the page of the deposit decides.
TERMS = {
    "miic": (
        "MIIC is for non-commercial research only, all data under their owners' copyright: do not pass it on, and cite "
        "Huang et al., ICIP 2021, pp. 3497-3501, where you use it (DR-NTU (Data), DOI 10.21979/N9/WBLTFI, whose page "
        "has the terms in full). Weights that were learned from it carry them."
    )
}


def terms_of(name: str) -> str | None:
    """The terms of use of a data set or a part of it, by its name; None where the zoo knows none."""
    return TERMS.get(_set_of(name))


def show_terms(name: str) -> None:
    """Tell the terms of use of a data set where this user has not seen them; a mark under `$ZOO_HOME` remembers.

    Raises:
        ZooError: the mark can't be written.
    """
    if launched()[0] or not (terms := terms_of(name)):  # of several processes the first one speaks
        return
    mark = hub.registry().parent / "terms" / _set_of(name)
    if mark.exists():
        return
    logging.getLogger(__name__).warning("%s", terms)
    try:
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.write_text(f"{terms}{os.linesep}", encoding="utf-8")
    except OSError as error:
        raise ZooError(f"{mark} can't be written ({error}); set ZOO_HOME to another place.") from error


def _set_of(name: str) -> str:
    return name.removesuffix("-partial")
