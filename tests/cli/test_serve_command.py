"""``diffdeploy serve``, as far as it goes where no server is installed; `tests/engines` starts them."""

import socket
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from diffdeploy.cli.main import main
from diffdeploy.engines.oip import serving
from tests.support.commands import refused

pytestmark = pytest.mark.usefixtures("_in_an_empty_folder")


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """A server that is installed and returns at once; what it was started with."""
    calls: list[tuple[Any, ...]] = []
    module = ModuleType("toy_server")
    module.run_server = lambda *given: calls.append(given)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "toy_server", module)
    # A distribution that is here, so that it counts as installed.
    monkeypatch.setattr(serving, "_SERVERS", {"numpy": serving._Server("serve", "toy_server")})
    return calls


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_no_server_is_exit_code_3(sample_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["serve", str(sample_bundle)]
    message = refused(command, capsys, 3)
    assert message == "error: neither kserve nor mlserver is installed; pip install 'diffdeploy[serve]'"
    message = refused([*command, "--server", "mlserver"], capsys, 3)
    assert message == "error: mlserver is not installed; pip install 'diffdeploy[mlserver]'"
    assert "server is 'triton'; accepted: kserve, mlserver" in refused([*command, "--server", "triton"], capsys)


def test_the_server_gets_the_bundle_and_the_address(
    sample_bundle: Path, started: list[tuple[Any, ...]], capsys: pytest.CaptureFixture[str]
) -> None:
    port = free_port()
    assert main(["serve", str(sample_bundle), "--port", str(port)]) == 0
    ((served, name, host, given_port),) = started
    assert served.path == sample_bundle
    assert (name, host, given_port) == ("bundle", "127.0.0.1", port)
    said = capsys.readouterr()
    assert said.out == ""
    assert f"numpy serves {sample_bundle} at http://127.0.0.1:{port}/v2/models/bundle" in said.err


@pytest.mark.usefixtures("started")
def test_an_address_that_cannot_be_had(sample_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        message = refused(["serve", str(sample_bundle), "--port", str(port)], capsys)
    assert message == f"error: port {port} on 127.0.0.1 is in use; give another --port"
    message = refused(["serve", str(sample_bundle), "--host", "203.0.113.7"], capsys)
    assert message.startswith("error: cannot listen on host 203.0.113.7 and port 8080 (Cannot assign")
    assert "Invalid value for '--port'" in refused(["serve", str(sample_bundle), "--port", "0"], capsys)


@pytest.mark.usefixtures("started")
def test_a_bundle_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(["serve", str(tmp_path), "--port", str(free_port())], capsys)
    assert "manifest.json" in message


def test_a_server_that_ends_at_its_start(
    sample_bundle: Path,
    started: list[tuple[Any, ...]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def ends(*_: object) -> None:
        raise SystemExit(1)  # as uvicorn where it cannot listen

    monkeypatch.setattr(sys.modules["toy_server"], "run_server", ends)
    assert main(["serve", str(sample_bundle), "--port", str(free_port())]) == 4
    assert capsys.readouterr().err.endswith("error: numpy did not start; its log says why\n")
