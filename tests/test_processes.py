"""What is said of a worker process that died."""

import signal
from pathlib import Path

import pytest

from diffdeploy.processes import WorkerProcess


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import sys; sys.exit('no such thing')", "ended with status 1: no such thing"),
        (
            f"import os; os.write(2, b'about to\\n'); os.kill(os.getpid(), {signal.SIGSEGV})",
            "was ended by signal 11 (SIGSEGV): about to",
        ),
        (f"import os; os.kill(os.getpid(), {signal.SIGRTMIN + 1})", f"was ended by signal {signal.SIGRTMIN + 1}"),
    ],
    ids=["status", "signal", "nameless"],
)
def test_how_a_process_ended(code: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "dies.py").write_text(code)
    with WorkerProcess("dies", [], environment={"PYTHONPATH": str(tmp_path)}) as process:
        assert process.obituary() == said
