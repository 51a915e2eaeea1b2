"""``diffdeploy sign``, and ``--public-key`` of the commands that open a bundle, as a user meets them."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffdeploy.bundle import SIGNATURE, open_bundle
from diffdeploy.cli.main import main
from tests.support.commands import refused
from tests.support.keys import key_pair


@pytest.fixture(autouse=True)
def _beside_a_bundle(bundle_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``bundle`` and two key pairs in the current folder."""
    monkeypatch.chdir(bundle_copy.parent)
    key_pair(Path(), "key")
    key_pair(Path(), "other")


def json_of(arguments: list[str], capsys: pytest.CaptureFixture[str], code: int = 0) -> dict[str, Any]:
    assert main([*arguments, "--json"]) == code
    fields: dict[str, Any] = json.loads(capsys.readouterr().out)
    return fields


SIGN = ["sign", "bundle", "--private-key", "key.pem"]
GOLDEN = ["verify", "bundle", "--golden"]


def test_sign_and_verify(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(SIGN) == 0
    said = capsys.readouterr()
    assert said.out == "signed bundle: bundle/model.sig covers its 5 other files\n"
    assert said.err == "check it with diffdeploy verify bundle --public-key KEY, with the public half of key.pem\n"
    report = json_of([*GOLDEN, "--public-key", "key.pub"], capsys)["verification"]
    assert report["contract"][-1] == {
        "name": "signature",
        "passed": True,
        "detail": "every file is signed by the key key.pub",
    }
    assert all(check["name"] != "signature" for check in json_of(GOLDEN, capsys)["verification"]["contract"])


def test_json_of_sign(capsys: pytest.CaptureFixture[str]) -> None:
    assert json_of(SIGN, capsys) == {
        "status": "signed",
        "bundle": "bundle",
        "signature": "bundle/model.sig",
        "files": [
            "golden.safetensors",
            "manifest.json",
            "model.onnx",
            "verification.json",
            "weights.safetensors",
        ],
    }
    fields = json_of(SIGN, capsys, code=2)
    assert (fields["status"], fields["exit_code"]) == ("failed", 2)


def test_a_signature_is_kept_without_force(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(SIGN) == 0
    capsys.readouterr()
    other = ["sign", "bundle", "--private-key", "other.pem"]
    assert refused(other, capsys) == ("error: bundle is already signed; give --force to replace its model.sig")
    assert main([*other, "--force"]) == 0
    assert open_bundle("bundle", "other.pub").signature_checked


def test_a_damaged_bundle_is_not_signed(capsys: pytest.CaptureFixture[str]) -> None:
    (Path("bundle") / "weights.safetensors").write_bytes(b"")
    assert "its sha256 differs" in refused(SIGN, capsys, code=5)
    shutil.rmtree("bundle")
    assert "is not a bundle" in refused(SIGN, capsys)


def test_keys_that_cannot_sign(capsys: pytest.CaptureFixture[str]) -> None:
    key_pair(Path(), "locked", password=b"secret")
    for key, message in (
        ("nowhere.pem", "nowhere.pem cannot be read (No such file or directory)"),
        ("key.pub", "key.pub is not a usable private key"),
        ("locked.pem", "locked.pem is protected by a password"),
    ):
        assert message in refused([*SIGN[:-1], key], capsys)
    assert "Missing option '--private-key'" in refused(SIGN[:2], capsys)


def test_without_the_library(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "model_signing", None)
    for arguments in (SIGN, [*GOLDEN, "--public-key", "key.pub"]):
        said = refused(arguments, capsys, code=3)
        assert said == "error: signatures need model_signing, which is not installed; pip install 'diffdeploy[sign]'"


def test_commands_refuse_what_the_key_did_not_sign(capsys: pytest.CaptureFixture[str]) -> None:
    np.savez("x.npz", hidden_states=np.zeros((1, 2, 128), np.float32))
    commands = (
        GOLDEN,
        ["verify", "bundle"],
        ["verify", "bundle", "--self-test"],
        ["run", "bundle", "-i", "x.npz", "-o", "y.npz"],
        ["bench", "bundle", "--impl", "none", "--seq", "8"],
    )
    for command in commands:
        assert "bundle has no signature" in refused([*command, "--public-key", "key.pub"], capsys, code=5)
    assert main(SIGN) == 0
    capsys.readouterr()
    for command in commands:
        said = refused([*command, "--public-key", "other.pub"], capsys, code=5)
        assert "bundle is not what the key other.pub signed" in said
        assert "key.pem is not a usable public key" in refused([*command, "--public-key", "key.pem"], capsys)


def test_the_artifact_runs_in_a_process_that_checks_too(capsys: pytest.CaptureFixture[str]) -> None:
    """The key goes to that process as well, with the folder that its path refers to."""
    assert main(SIGN) == 0
    capsys.readouterr()
    report = json_of(["verify", "bundle", "--cases", "1", "--public-key", "key.pub"], capsys)["verification"]
    assert (report["passed"], report["num_cases"]) == (True, 1)


def test_the_key_is_for_what_is_run(capsys: pytest.CaptureFixture[str]) -> None:
    report = ["verify", "--from-report", "bundle/verification.json", "--public-key", "key.pub"]
    assert "runs nothing, so it cannot be combined with --public-key" in refused(report, capsys)
    bench = ["bench", "--impl", "naive", "--format", "none", "--seq", "8", "--public-key", "key.pub"]
    assert "--public-key is for checking bundles, but no bundle is given" in refused(bench, capsys)


def test_inspect_says_whether_there_is_a_signature(capsys: pytest.CaptureFixture[str]) -> None:
    assert json_of(["inspect", "bundle"], capsys)["signature"] is None
    assert main(["inspect", "bundle"]) == 0
    assert "signature    none\n" in capsys.readouterr().out
    assert main(SIGN) == 0
    capsys.readouterr()
    assert json_of(["inspect", "bundle"], capsys)["signature"] == "model.sig"
    assert main(["inspect", "bundle"]) == 0
    assert "signature    signed; checked only with verify --public-key\n" in capsys.readouterr().out


def test_a_signed_bundle_is_a_bundle_as_any_other(capsys: pytest.CaptureFixture[str], sample_bundle: Path) -> None:
    assert main(SIGN) == 0
    assert main(GOLDEN) == 0
    assert main(["verify", "bundle", "--from-report", "bundle/verification.json"]) == 0
    capsys.readouterr()
    assert json_of(["diff", "bundle", str(sample_bundle)], capsys)["same"] is True
    assert main(["export", "--layer", "1", "--cases", "1", "-o", "bundle", "--force"]) == 0
    # An export is another bundle, which nobody has signed.
    assert not (Path("bundle") / SIGNATURE).exists()


def test_signing_needs_no_torch() -> None:
    code = (
        "import sys\n"
        "for name in ('torch', 'onnx', 'onnxscript'): sys.modules[name] = None\n"
        "from diffdeploy.cli.main import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    for arguments in (SIGN, [*GOLDEN, "--public-key", "key.pub"]):
        command = [sys.executable, "-c", code, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
