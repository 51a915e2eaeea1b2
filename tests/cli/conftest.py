"""What tests of commands have in common."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from diffdeploy.cli import progress


@pytest.fixture
def _ctrl_c() -> Iterator[None]:
    """Ctrl-C as in a terminal, also where the tests are run by a shell that ignores it for what runs behind."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def _no_heartbeat(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine that is busy any stage may last long enough for one."""
    monkeypatch.setattr(progress, "HEARTBEAT_S", 1e6)


@pytest.fixture
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
