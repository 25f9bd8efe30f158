"""Which methods a test runs over: in the gate those that stand for their kind, the others by hand (pytest -m slow)."""

import pytest

from zoo.methods import list_methods


def over(*gate: str, among: list[str] | None = None) -> pytest.MarkDecorator:
    """`method` is each one of `among`, by default all that are registered; those that are not named here are slow.

    What one method alone does is tested in its own file, and what each must do in test_registry.py.
    """
    among = list_methods() if among is None else among
    assert set(gate) <= set(among)
    each = [method if method in gate else pytest.param(method, marks=pytest.mark.slow) for method in among]
    return pytest.mark.parametrize("method", each)
