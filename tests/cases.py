"""Which cases of a test run with every change, and which are run by hand (`-m slow`)."""

from collections.abc import Iterable
from typing import Any

import pytest


def slow(*values: Any):
    """A case, of one argument or several, that is run by hand: what it shows, another one shows too."""
    return pytest.param(*values, marks=pytest.mark.slow)


def some(cases: Iterable, always: Iterable) -> list:
    """All cases, of which only those of `always` run with every change."""
    cases, always = list(cases), list(always)
    assert all(case in cases for case in always), "no such case"
    return [case if case in always else slow(*(case if isinstance(case, tuple) else (case,))) for case in cases]
