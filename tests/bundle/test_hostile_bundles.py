"""Bundles that somebody made to do harm, or that a disk did: each is opened rightly or refused in one sentence.

A fixed sample runs with the other tests; ``make fuzz`` draws new ones. Manifests are signed anew, since whoever changes
one can do that, too.
"""

import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from diffdeploy import load
from diffdeploy.bundle import MANIFEST, WEIGHTS, Manifest, open_bundle, write_manifest
from diffdeploy.cli.main import main
from diffdeploy.errors import DiffDeployError, IntegrityError
from tests.support.fuzzing import fuzzed, limited_time
from tests.support.manifests import fields_of, signed, signed_again


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as opened:
        # A path in a socket's name may not be long.
        here = Path.cwd()
        os.chdir(path.parent)
        try:
            opened.bind(path.name)
        finally:
            os.chdir(here)


def replaced(name: str, make: Callable[[Path], object]) -> Callable[[Path], object]:
    def change(bundle: Path) -> None:
        (bundle / name).unlink(missing_ok=True)
        make(bundle / name)

    return change


def nested(bundle: Path) -> None:
    (bundle / MANIFEST).write_bytes(b"[" * 20_000 + b"]" * 20_000)


def large(bundle: Path) -> None:
    with (bundle / MANIFEST).open("ab") as file:
        file.truncate(2**34)


def with_weights(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def edit(bundle: Path) -> None:
        weights = load_file(bundle / WEIGHTS)
        change(weights)
        save_file(weights, bundle / WEIGHTS)
        signed(bundle)

    return edit


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "pipe": (replaced("pipe", make_pipe), "pipe in .* is neither a file nor a folder"),
    "manifest is a pipe": (replaced(MANIFEST, make_pipe), "is neither a file nor a folder"),
    "socket": (replaced("socket", make_socket), "is neither a file nor a folder"),
    "link to a folder": (replaced("link", lambda path: path.symlink_to("/")), "link in .* is a link"),
    "link to nothing": (replaced("link", lambda path: path.symlink_to("nowhere")), "link in .* is a link"),
    "manifest is a link": (replaced(MANIFEST, lambda path: path.symlink_to("model.onnx")), "is a link"),
    "weights are a link": (replaced(WEIGHTS, lambda path: path.symlink_to("model.onnx")), "is a link"),
    "empty folder": (replaced("folder", Path.mkdir), "folder in .* is an empty folder"),
    "manifest is a folder": (replaced(MANIFEST, lambda path: (path / "x").mkdir(parents=True)), "is an empty folder"),
    "list": (replaced(MANIFEST, lambda path: path.write_text("[]")), "is not a manifest"),
    "nested": (nested, "is damaged"),
    "large": (large, "more than any export writes"),
    "no weights": (lambda b: signed_again(b, {**fields_of(b), "files": {}}), "does not list"),
    "a weight more": (with_weights(lambda w: w.update(more=w["q_proj.weight"].clone())), "also holds more"),
    "a weight less": (with_weights(lambda w: w.pop("subln.weight")), "lacks subln.weight"),
    "another dtype": (with_weights(lambda w: w.update({"k_proj.weight": w["k_proj.weight"].half()})), "is F16"),
    "another shape": (with_weights(lambda w: w.update({"q_proj.weight": w["q_proj.weight"][:-1].clone()})), "is F32"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_what_is_no_bundle_is_refused_by_every_command(
    name: str,
    bundle_copy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    damage, message = DAMAGE[name]
    damage(bundle_copy)
    with limited_time(), pytest.raises(IntegrityError, match=message):
        load(bundle_copy)
    bundle = str(bundle_copy)
    for command in (
        ["inspect", bundle],
        ["verify", bundle],
        ["verify", bundle, "--golden"],
        ["run", bundle, "-i", "x.npz", "-o", "y.npz"],
        ["diff", bundle, bundle],
        ["bench", bundle],
    ):
        if command[0] == "run":
            Path("x.npz").touch()
        with limited_time():
            assert main(command) in ((2, 5) if command[0] == "run" else (5,)), command
        assert "unexpected" not in capsys.readouterr().err


# Stands for a key that is taken away.
GONE = "taken away"


def changed_leaf(fields: Any, place: int, value: Any) -> Any:
    """The same with one value in it exchanged, or one more key beside it."""
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, each in items:
            places.append((node, key))
            walk(each)

    walk(fields)
    node, key = places[place % len(places)]
    if value == GONE:
        del node[key]
    else:
        node[key] = value
    return fields


anything = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.sampled_from(
            [0, -1, 1, 2, 2**31, 2**63, 10**30, 1e300, -0.0, GONE, "", "onnx", "float16", "cached", "auto"]
        ),
        st.floats(allow_nan=False, allow_infinity=False),
        st.text(),
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def hostile(sample_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("hostile") / "bundle"
    shutil.copytree(sample_bundle, copy)
    return copy


def tried(bundle: Path) -> None:
    """Open it, load it, and describe it."""
    with limited_time():
        try:
            open_bundle(bundle)
            load(bundle).warmup()
        except DiffDeployError as error:
            said = str(error)
            assert "\n" not in said
            assert len(said) < 2000


@fuzzed
@given(st.lists(st.tuples(st.integers(0, 10**6), anything), min_size=1, max_size=3))
def test_manifests_with_anything_in_them(hostile: Path, changes: list[tuple[int, Any]]) -> None:
    good = (hostile / MANIFEST).read_bytes()
    try:
        fields = json.loads(good)
        for place, value in changes:
            fields = changed_leaf(fields, place, value)
        signed_again(hostile, fields)
        tried(hostile)
    finally:
        (hostile / MANIFEST).write_bytes(good)


@fuzzed
@given(st.sampled_from([MANIFEST, WEIGHTS, "model.onnx", "golden.safetensors"]), st.integers(0), st.binary(max_size=64))
def test_files_with_other_bytes(hostile: Path, name: str, place: int, content: bytes) -> None:
    """Signed anew, so that what reads the files has to see it."""
    good, manifest = (hostile / name).read_bytes(), (hostile / MANIFEST).read_bytes()
    try:
        start = place % (len(good) + 1)
        (hostile / name).write_bytes(good[:start] + content + good[start + len(content) :])
        if name != MANIFEST:
            write_manifest(hostile, Manifest.from_bytes(manifest))
        tried(hostile)
    finally:
        (hostile / name).write_bytes(good)
        (hostile / MANIFEST).write_bytes(manifest)
