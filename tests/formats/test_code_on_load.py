"""Bundles from elsewhere: files that would run code when torch loads them do not, and formats that must are asked for.

Each fault is one that runs here on torch's own loader, which is shown once; the loader of this package refuses it.
"""

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffdeploy import load
from diffdeploy.bundle import SIGNATURE, is_own_export, open_bundle, sign_bundle, write_manifest
from diffdeploy.bundle.trust import _MOST, remember_export
from diffdeploy.cli.main import main
from diffdeploy.errors import IntegrityError
from diffdeploy.formats.pt2.archive import checked_archive
from diffdeploy.formats.pt2.expressions import is_expression, is_guard
from diffdeploy.verify import verify_bundle
from tests.support.bundles import FormatBundle
from tests.support.keys import key_pair
from tests.support.manifests import signed
from tests.support.pairwise import rest_is_slow

MARKER = "MARKER"


class Exploit:
    """Makes a file when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, (f"touch {MARKER}",)


def changed(archive: Path, ending: str, edit: Callable[[bytes], bytes]) -> None:
    """Change one entry of an archive."""
    with zipfile.ZipFile(archive) as old:
        entries = [(name, old.read(name)) for name in old.namelist()]
    assert any(name.endswith(ending) for name, _ in entries)
    with zipfile.ZipFile(archive, "w") as new:
        for name, content in entries:
            new.writestr(name, edit(content) if name.endswith(ending) else content)


def of_graph(edit: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def inject(archive: Path) -> None:
        def edited(content: bytes) -> bytes:
            model = json.loads(content)
            edit(model)
            return json.dumps(model).encode()

        changed(archive, "models/model.json", edited)

    return inject


def sample_inputs(archive: Path) -> None:
    changed(archive, "sample_inputs/model.pt", lambda _: pickled())


def pickled() -> bytes:
    buffer = io.BytesIO()
    torch.save(({"a": Exploit()},), buffer)
    return buffer.getvalue()


def pickled_weight(archive: Path) -> None:
    def edited(content: bytes) -> bytes:
        config = json.loads(content)
        next(iter(config["config"].values()))["use_pickle"] = True
        return json.dumps(config).encode()

    changed(archive, "model_weights_config.json", edited)
    changed(archive, "weights/weight_0", lambda _: pickled())


def first_expression(value: Any) -> dict[str, Any] | None:
    if isinstance(value, dict):
        if "expr_str" in value:
            return value
        value = list(value.values())
    if isinstance(value, list):
        return next((found for each in value if (found := first_expression(each)) is not None), None)
    return None


CODE = f"__import__('os').system('touch {MARKER}')"


def in_expression(model: dict[str, Any]) -> None:
    found = first_expression(model)
    assert found is not None
    found["expr_str"] = CODE


def in_precision(model: dict[str, Any]) -> None:
    found = first_expression(model)
    assert found is not None
    found["expr_str"] = f"Float('1', precision={CODE})"


def in_exponent(model: dict[str, Any]) -> None:
    found = first_expression(model)
    assert found is not None
    found["expr_str"] = f"Pow(Integer(2), ({CODE}, Integer)[1](2))"


def in_guard(model: dict[str, Any]) -> None:
    model["guards_code"].append(f"({CODE}, True)[1]")


def in_operator(model: dict[str, Any]) -> None:
    node = model["graph_module"]["graph"]["nodes"][0]
    node["target"] = "torch.os.system"
    node["inputs"] = [{"name": "command", "arg": {"as_string": f"touch {MARKER}"}, "kind": 1}]


# What torch's own loader runs, in `load` or when the module that it makes is called.
RUN_BY_TORCH = {
    "sample inputs": sample_inputs,
    "expression": of_graph(in_expression),
    "exponent": of_graph(in_exponent),
    "weight": pickled_weight,
}
# Names of operators and guards run nothing with the torch of today, and are refused all the same; behind a precision
# torch runs the code, and then computes for minutes.
EXPLOITS = {
    **RUN_BY_TORCH,
    "precision": of_graph(in_precision),
    "operator": of_graph(in_operator),
    "guard": of_graph(in_guard),
}


@pytest.fixture
def pt2(format_bundle: FormatBundle, tmp_path: Path) -> Path:
    shutil.copytree(format_bundle("pt2"), tmp_path / "bundle")
    return tmp_path / "bundle"


@pytest.mark.slow
@pytest.mark.parametrize("name", RUN_BY_TORCH)
def test_torch_itself_runs_the_code(name: str, pt2: Path, tmp_path: Path) -> None:
    RUN_BY_TORCH[name](pt2 / "model.pt2")
    code = "import sys, torch; torch.export.load(sys.argv[1]).module()(torch.zeros(1, 2, 128))"
    subprocess.run(
        [sys.executable, "-c", code, str(pt2 / "model.pt2")],
        cwd=tmp_path,
        capture_output=True,
        check=False,
        timeout=120,
    )
    assert (tmp_path / MARKER).exists()


@pytest.mark.parametrize("name", EXPLOITS)
def test_no_command_runs_the_code(
    name: str, pt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    EXPLOITS[name](pt2 / "model.pt2")
    signed(pt2)
    np.savez("x.npz", hidden_states=np.zeros((1, 2, 128), np.float32))
    # Sample inputs are left out before torch sees them, so that bundles of earlier versions open; the rest is refused.
    refused = name != "sample inputs"
    for command in (
        ["inspect", "bundle"],
        ["verify", "bundle", "--cases", "1"],
        ["run", "bundle", "-i", "x.npz", "-o", "y.npz"],
        ["diff", "bundle", "bundle"],
    ):
        status = main(command)
        said = capsys.readouterr().err
        assert not Path(MARKER).exists()
        if command[0] == "run":
            assert status == (5 if refused else 0), said
            assert not refused or "could run code" in said
    if refused:
        with pytest.raises(IntegrityError, match="could run code"):
            load("bundle")
    assert not Path(MARKER).exists()


def to_target(model: dict[str, Any], *, target: str) -> None:
    model["graph_module"]["graph"]["nodes"][0]["target"] = target


def raw(archive: Path, name: str, content: bytes, **settings: Any) -> None:
    with zipfile.ZipFile(archive, "a") as opened, pytest.MonkeyPatch.context():
        opened.writestr(name, content, **settings)


@pytest.mark.parametrize(
    ("inject", "message"),
    [
        (lambda path: raw(path, "model/extra/x.py", b""), "it holds model/extra/x.py"),
        (lambda path: raw(path, "other/models/model.json", b"{}"), "it has two folders"),
        (lambda path: raw(path, "model/data/weights/weight_99", b"x" * 99, compress_type=8), "is compressed"),
        (of_graph(lambda model: model["graph_module"]["graph"]["nodes"][0].update(name="a; b")), "has name 'a; b'"),
        (
            of_graph(
                lambda model: model["graph_module"]["graph"]["nodes"][0].update(
                    target="torch.ops.aten.from_file.default"
                )
            ),
            "target 'torch.ops.aten.from_file.default'",
        ),
        *(
            (of_graph(partial(to_target, target=f"torch.ops.aten.{name}")), f"target 'torch.ops.aten.{name}'")
            for name in ("add.__class__", "add.overloads", "add.op", "add.Tensor.__call__", "__class__.__base__", "add")
        ),
        *(
            (of_graph(partial(to_target, target=name)), f"target '{name}'")
            for name in ("torch.ops.higher_order.cond", "torch.ops.higher_order.while_loop", "_operator.attrgetter")
        ),
        (of_graph(lambda model: model.update(guards_code="x")), "its guards_code is str"),
        (
            of_graph(lambda model: model["range_constraints"].update({CODE: {"min_val": 1}})),
            "its range_constraints has",
        ),
        (lambda path: changed(path, "models/model.json", lambda _: b"[" * 100_000), "not readable JSON"),
        (lambda path: changed(path, "models/model.json", lambda _: b"[]"), "not a JSON object"),
        (lambda path: changed(path, "model_weights_config.json", lambda _: b"{}"), "how its tensors are stored"),
        (lambda path: path.write_bytes(b"no archive"), "is not an archive of torch.export"),
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "is not an archive of torch.export"),
    ],
    ids=[
        *("entry", "folders", "compressed", "name", "operator", "class", "overloads", "op", "call", "base", "packet"),
        *("cond", "while", "attrgetter", "guards", "ranges", "nested", "list", "weights", "text", "cut"),
    ],
)
def test_other_archives_are_refused_in_one_sentence(inject: Callable[[Path], None], message: str, pt2: Path) -> None:
    inject(pt2 / "model.pt2")
    with pytest.raises(IntegrityError, match=message):
        checked_archive(pt2 / "model.pt2")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_entries_of_one_name_are_refused(pt2: Path) -> None:
    """Two readers of such an archive may each take another one."""
    raw(pt2 / "model.pt2", "model/models/model.json", b"{}")
    with pytest.raises(IntegrityError, match="two entries with the same name"):
        checked_archive(pt2 / "model.pt2")


@pytest.mark.parametrize(
    "text",
    [
        *("s0", "2*s0 + 24", "Mul(Integer(2), Symbol('s85', positive=True, integer=True))", "Max(1, u0)", "s0//2"),
        *("Pow(Symbol('s1', positive=True, integer=True), Integer(2))", "FloorDiv(s0, 2)", "s0**2", "-s0 < 3"),
        *("Float('0.5', precision=53)", "Mul(Pow(s0, Integer(2)), Pow(s1, Integer(2)))"),
    ],
)
def test_sizes_are_expressions(text: str) -> None:
    assert is_expression(text)


@pytest.mark.parametrize(
    "text",
    [
        *(CODE, "open('x')", "s0.x", "[s0 for s0 in s1]", "lambda: 0", "print(s0)", "Symbol('x')", "Symbol(s0)", "f()"),
        # What stands beside a number is evaluated, too.
        *(f"Float('1', precision={CODE})", f"Float('1', dps={CODE})", f"Pow(Integer(2), ({CODE}, Integer)[1](2))"),
        *(f"Pow(Integer(2), Integer(2, x={CODE}))", f"Pow(Integer(2), Integer(2), evaluate={CODE})"),
        # What sympy computes for longer than anybody waits.
        *("Pow(Pow(Integer(9), Integer(64)), Integer(64))", "(9**64)**64", "(Pow(9, 64) + s0)**64"),
        *("Float('1', precision=1000000000)", "Float('1e9999999999', precision=53)"),
        "Max(" + ", ".join(f"s{index}" for index in range(40)) + ")",
        *("9**9**9", "Pow(9, Pow(9, 9))", "2**1000", "Mul(*s0)", "Symbol('s0', positive=f())", "'text'", "s0; s1", ""),
        *(
            "(" * 500 + "s0" + ")" * 500,
            "s0 + " * 5000 + "s0",
            "L['x'].size()[0]",
            None,
            3,
            "eval",
            "x0x",
            "s0 if s1 else s2",
        ),
    ],
)
def test_other_texts_are_not(text: object) -> None:
    assert not is_expression(text)


def test_guards_compare_sizes_of_inputs() -> None:
    assert is_guard("L['tensors'][1].size()[1] == (L['tensors'][2].size()[2] + L['tensors'][0].size()[1])")
    assert is_guard("min(L['x'].size()[0], 2*L['x'].size()[1]) == 3")
    assert not is_guard("L['x'].save('y')")
    assert not is_guard("M['x'].size()[0] == 1")
    assert not is_guard("L[f()].size()[0] == 1")


@pytest.mark.xdist_group("compile")  # whose bundle a second worker would wait for
@pytest.mark.parametrize("name", ["aoti", "compile"])
def test_formats_that_run_code_ask_for_trust(
    name: str, format_bundle: FormatBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(format_bundle(name), "bundle")
    assert is_own_export(Path("bundle"))
    load("bundle").close()
    # On another machine, or by another user, nothing remembers it.
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    with pytest.raises(IntegrityError, match=f"of format {name}, whose machine code.* give --trust"):
        load("bundle")
    with pytest.raises(IntegrityError, match="give --trust"):
        verify_bundle("bundle")
    np.savez("x.npz", hidden_states=np.zeros((1, 2, 128), np.float32))
    run = ["run", "bundle", "-i", "x.npz", "-o", "y.npz"]
    assert main(run) == 5
    assert "not one of your own exports on this machine" in capsys.readouterr().err
    assert main(["bench", "bundle", "--impl", "naive", "--seq", "8"]) == 5
    assert main(["verify", "bundle", "--golden"]) == 5
    assert main(["verify", "bundle", "--self-test"]) == 5
    assert main([*run, "--trust"]) == 0
    assert main(["verify", "bundle", "--golden", "--trust"]) == 0
    # Reading it runs nothing.
    assert main(["inspect", "bundle"]) == 0
    load("bundle", trust=True).close()


@pytest.mark.xdist_group("compile")
@pytest.mark.parametrize("name", rest_is_slow(["compile", "aoti"]))
def test_the_key_of_its_signer_is_trust(
    name: str, format_bundle: FormatBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    shutil.copytree(format_bundle(name), "bundle")
    keys, other = key_pair(Path(), "key"), key_pair(Path(), "other")
    sign_bundle(open_bundle("bundle"), keys.private)
    np.savez("x.npz", hidden_states=np.zeros((1, 2, 128), np.float32))
    commands = [
        ["run", "bundle", "-i", "x.npz", "-o", "y.npz", "--force"],
        ["verify", "bundle", "--golden"],
        ["verify", "bundle", "--cases", "1"],
        ["bench", "bundle", "--impl", "none", "--seq", "8", "--rounds", "1"],
    ]
    for command in commands:
        # A signature that nobody asked about is no trust, whoever made it.
        assert main(command) == 5
        assert main([*command, "--public-key", "other.pub"]) == 5
        assert main([*command, "--public-key", "key.pub"]) == 0
    load("bundle", public_key=keys.public).close()
    with pytest.raises(IntegrityError, match="give --trust"):
        load("bundle")
    # Trust is no reason to overlook the key.
    with pytest.raises(IntegrityError, match="is not what the key"):
        load("bundle", public_key=str(other.public), trust=True)
    (Path("bundle") / SIGNATURE).unlink()
    with pytest.raises(IntegrityError, match="has no signature"):
        load("bundle", public_key=keys.public)


def test_what_was_changed_is_not_an_export_of_ours(format_bundle: FormatBundle, tmp_path: Path) -> None:
    shutil.copytree(format_bundle("aoti"), tmp_path / "bundle")
    manifest = open_bundle(tmp_path / "bundle").manifest
    write_manifest(tmp_path / "bundle", manifest.model_copy(update={"verified": False}))
    with pytest.raises(IntegrityError, match="give --trust"):
        load(tmp_path / "bundle")


def test_the_record_survives_what_may_happen_to_it(
    sample_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert not is_own_export(sample_bundle)
    remember_export(sample_bundle)
    assert is_own_export(sample_bundle)
    record = tmp_path / "diffdeploy" / "own-exports"
    record.write_bytes(b"\xff\xfe torn li\nne\n" + record.read_bytes())
    assert is_own_export(sample_bundle)
    record.write_text("\n".join(f"{i:064x}" for i in range(3 * _MOST)) + "\n")
    remember_export(sample_bundle)
    assert is_own_export(sample_bundle)
    assert len(record.read_text().splitlines()) == _MOST + 1
    # Where nothing can be written, an export ends well all the same.
    shutil.rmtree(record.parent)
    record.parent.write_text("a file")
    remember_export(sample_bundle)
    assert not is_own_export(sample_bundle)


def test_exploits_are_what_they_seem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(Exploit()))
    assert Path(MARKER).exists()
