"""What every test of a trainer runs under."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest

# what torch, transformers and accelerate say when calls come in the wrong order or twice
ORDER = ("before `optimizer.step()`", "lr_scheduler.step", "optimizer.step()", "was assigned to group")


@pytest.fixture(scope="module", autouse=True)
def quickly(quick: None) -> None:
    """Many tiny runs."""


@pytest.fixture(autouse=True)
def no_complaints() -> Iterator[None]:
    """No warning about the order of calls or a second scheduler, from anybody."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    said = [str(warning.message) for warning in caught]
    assert not [text for text in said if any(part in text for part in ORDER)]
