"""Chunks small enough for formulas in loops."""

import pytest


@pytest.fixture
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two queries each, and three heads, so that sizes small enough for the formula's loops have several chunks."""
    monkeypatch.setattr("diffdeploy.ops.naive._ROWS", 2)
    monkeypatch.setattr("diffdeploy.ops.naive._SCORES", 3 * 2 * 2 * 2 * 5)
