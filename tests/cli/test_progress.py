"""What a command says while it works: stages and heartbeats in a log, one line on a terminal, nothing with --quiet."""

import json
import os
import pty
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from diffdeploy.checkpoints.files import SAMPLE
from diffdeploy.cli import progress
from diffdeploy.cli.main import main
from diffdeploy.cli.progress import Activity, activity, duration
from diffdeploy.errors import InputError
from tests.support.commands import COMMAND

pytestmark = pytest.mark.usefixtures("_in_an_empty_folder")

SMALL = ["--max-sequence-length", "16", "--max-batch-size", "2", "--cases", "quick"]
STAGE = re.compile(r"[a-z -]+: \d+\.\d s")


def test_a_log_has_a_line_for_each_stage(capsys: pytest.CaptureFixture[str]) -> None:
    with activity("reading") as doing:
        doing.phase("lowering")
        doing.step("half of it")
        doing.phase("lowering")
        doing.phase("verifying")
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["reading", "lowering", "verifying"]
    assert all(STAGE.fullmatch(line) for line in lines)


def test_an_error_is_the_last_line_of_its_stage(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        with activity("reading") as doing:
            doing.phase("lowering")
            raise InputError("no")

    with pytest.raises(InputError):
        fail()
    assert [line.partition(":")[0] for line in capsys.readouterr().err.splitlines()] == ["reading"]


def test_long_work_has_a_heartbeat(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress, "HEARTBEAT_S", 0.01)
    said = ""
    with activity("verifying", stages=False) as doing:
        doing.progress(2, 9, "B1-S7")
        deadline = time.monotonic() + 60
        while said.count("\n") < 3:
            said += capsys.readouterr().err
            assert time.monotonic() < deadline
    # The first one may come before the step.
    assert said.splitlines()[1:3] == ["still verifying 3/9 B1-S7 after 1 s"] * 2


def test_time_left_follows_from_the_steps_done(monkeypatch: pytest.MonkeyPatch) -> None:
    now, shown = [0.0], list[str]()
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    doing = Activity("reading", shown.append, lambda _: None)
    now[0] = 100.0
    doing.phase("verifying")
    for second, done in ((100, 0), (101, 1), (104, 2), (160, 4), (200, 6)):
        now[0] = float(second)
        doing.progress(done, 6, f"case{done}")
    assert shown == [
        "verifying",
        "verifying 1/6 case0",
        # Too early to say.
        "verifying 2/6 case1",
        "verifying, about 8 s left: 3/6 case2",
        "verifying, about 30 s left: 5/6 case4",
        # Something that is not counted follows the last one.
        "verifying 6/6 case6",
    ]
    assert [duration(seconds) for seconds in (0.2, 59.6, 3600)] == ["1 s", "1 min 00 s", "60 min 00 s"]


def test_quiet_leaves_the_verdict(sample_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(sample_bundle), "--cases", "1", "--quiet"]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("passed: ")
    assert said.err == ""
    assert main(["verify", str(sample_bundle), "--cases", "1"]) == 0
    assert "verifying: " in capsys.readouterr().err


def test_quiet_leaves_errors(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "nowhere", "-q"]) == 2
    assert capsys.readouterr().err.startswith("error: nowhere is not a bundle")


def test_a_terminal_has_one_line_that_changes(sample_bundle: Path) -> None:
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80"}
    process = subprocess.Popen(
        [*COMMAND, "verify", sample_bundle, "--cases", "quick", "--json"],
        stdout=subprocess.DEVNULL,
        stderr=theirs,
        env=environment,
    )
    os.close(theirs)
    said = b""
    try:
        while part := os.read(ours, 4096):
            said += part
    except OSError:  # how a terminal ends whose last writer has gone
        pass
    os.close(ours)
    assert process.wait() == 0
    assert re.search(rb"verifying.* \d+/\d+ B", said)
    assert b"verifying: " not in said


def test_formats_have_their_verdict_as_it_is_known(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And keep it, when a later one is interrupted."""
    before = Activity.phase

    def phase(doing: Activity, text: str) -> None:
        if text == "onnx-ort: verifying":
            raise KeyboardInterrupt
        before(doing, text)

    monkeypatch.setattr(Activity, "phase", phase)
    arguments = ["export", str(SAMPLE), "--layer", "1", "--format", "all", *SMALL, "-o", "out"]
    assert main([*arguments, "--json"]) == 130
    said = capsys.readouterr()
    result = json.loads(said.out)
    assert result["status"] == "interrupted"
    assert [(row["name"], row["status"], row["bundle"]) for row in result["formats"]] == [
        ("onnx", "passed", "out/onnx")
    ]
    assert main(["verify", "out/onnx", "--cases", "1", "-q"]) == 0
    assert sorted(path.name for path in Path("out").iterdir()) == ["onnx"]
    lines = said.err.splitlines()
    assert lines[-1] == "error: interrupted; out/onnx is finished and kept"
    verdict = next(line for line in lines if line.startswith("onnx passed: out/onnx ("))
    assert lines.index(verdict) < len(lines) - 1


@pytest.mark.slow
def test_layers_that_were_finished_are_kept(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before, verifications = Activity.phase, []

    def phase(doing: Activity, text: str) -> None:
        verifications.extend([text] if text == "verifying" else [])
        if len(verifications) == 2:
            raise KeyboardInterrupt
        before(doing, text)

    monkeypatch.setattr(Activity, "phase", phase)
    assert main(["export", str(SAMPLE), "--layer", "all", *SMALL, "-o", "out"]) == 130
    said = capsys.readouterr()
    assert said.out.startswith("passed: out/layer0 (")
    assert said.err.splitlines()[-1] == "error: interrupted; out/layer0 is finished and kept"
    assert [path.name for path in Path("out").iterdir()] == ["layer0"]


@pytest.mark.usefixtures("_ctrl_c")
def test_an_interrupted_verification_does_not_speak_of_what_was_kept(
    sample_bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Activity, "progress", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    assert main(["verify", str(sample_bundle)]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "error: interrupted"


@pytest.mark.slow
def test_an_export_says_what_to_do_next(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["export", "--layer", "1", *SMALL, "-o", "my out", "--force"]
    assert main(arguments) == 0
    assert capsys.readouterr().err.splitlines()[-2:] == [
        "run it:   diffdeploy run 'my out' --input inputs.npz --output outputs.npz",
        "check it: diffdeploy verify 'my out', on the machine that will run it",
    ]
    for silent in ("--json", "--quiet"):
        assert main([*arguments, silent]) == 0
        assert "run it:" not in capsys.readouterr().err
