"""Signatures: they cover every file, and hold for the key that was named alone."""

import json
import os
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from model_signing import hashing, signing, verifying

from diffdeploy.bundle import MANIFEST, REPORT, SIGNATURE, open_bundle, sign_bundle, write_manifest
from diffdeploy.errors import InputError, IntegrityError, UnavailableError
from tests.support.keys import KeyPair, key_pair, write_keys


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> KeyPair:
    return key_pair(tmp_path_factory.mktemp("keys"))


@pytest.fixture
def signed(bundle_copy: Path, keys: KeyPair) -> Path:
    assert sign_bundle(open_bundle(bundle_copy), keys.private) == bundle_copy / SIGNATURE
    return bundle_copy


def edit_signature(bundle: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    fields = json.loads((bundle / SIGNATURE).read_text())
    edit(fields)
    (bundle / SIGNATURE).write_text(json.dumps(fields))


def test_a_signature_is_checked_with_its_key_only(signed: Path, keys: KeyPair) -> None:
    assert open_bundle(signed, keys.public).signature_checked
    assert not open_bundle(signed).signature_checked
    assert sorted(open_bundle(signed).manifest.files) == sorted(
        file.name for file in signed.iterdir() if file.name not in (MANIFEST, SIGNATURE)
    )


def test_a_bundle_may_be_copied_and_renamed(signed: Path, keys: KeyPair, tmp_path: Path) -> None:
    shutil.copytree(signed, tmp_path / "other")
    assert open_bundle(tmp_path / "other", keys.public).signature_checked


def test_an_unsigned_bundle_is_refused(bundle_copy: Path, keys: KeyPair) -> None:
    with pytest.raises(IntegrityError, match=r"has no signature: it lacks model\.sig"):
        open_bundle(bundle_copy, keys.public)


def test_the_signature_of_another_key_is_refused(signed: Path, keys: KeyPair, tmp_path: Path) -> None:
    other = key_pair(tmp_path, "other")
    with pytest.raises(IntegrityError, match=r"is not what the key .*other\.pub signed"):
        open_bundle(signed, other.public)
    # As if it were of the key that is asked for: the name of the key in the file is not signed.
    sign_bundle(open_bundle(signed), other.private, force=True)
    named = json.loads((signed / SIGNATURE).read_text())["verificationMaterial"]
    sign_bundle(open_bundle(signed), keys.private, force=True)
    edit_signature(signed, lambda fields: fields.update(verificationMaterial=named))
    with pytest.raises(IntegrityError, match="is not what the key"):
        open_bundle(signed, other.public)


def _change_weights(bundle: Path) -> None:
    data = bytearray((bundle / "weights.safetensors").read_bytes())
    data[-1] ^= 1
    (bundle / "weights.safetensors").write_bytes(data)


def _change_weights_and_digests(bundle: Path) -> None:
    manifest = open_bundle(bundle).manifest
    _change_weights(bundle)
    write_manifest(bundle, manifest)
    open_bundle(bundle)


def _change_the_manifest(bundle: Path) -> None:
    manifest = open_bundle(bundle).manifest
    (bundle / MANIFEST).write_bytes(manifest.model_copy(update={"verified": not manifest.verified}).to_bytes())
    open_bundle(bundle)


def _add(name: str) -> Callable[[Path], None]:
    def add(bundle: Path) -> None:
        (bundle / name).parent.mkdir(exist_ok=True)
        (bundle / name).write_text("added")

    return add


def _remove_the_report(bundle: Path) -> None:
    manifest = open_bundle(bundle).manifest
    (bundle / REPORT).unlink()
    write_manifest(bundle, manifest)
    open_bundle(bundle)


def _rename_a_file(bundle: Path) -> None:
    (bundle / "golden.safetensors").rename(bundle / "silver.safetensors")


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(_change_weights, id="weights"),
        pytest.param(_change_weights_and_digests, id="weights-and-digests"),
        pytest.param(_change_the_manifest, id="manifest"),
        pytest.param(_add("notes.txt"), id="added"),
        pytest.param(_add(".hidden"), id="added-hidden"),
        # model-signing leaves these out by default.
        pytest.param(_add(".gitignore"), id="added-for-git"),
        pytest.param(_add(".git/config"), id="added-in-a-folder"),
        pytest.param(_remove_the_report, id="removed"),
        pytest.param(_rename_a_file, id="renamed"),
    ],
)
def test_every_change_is_seen(change: Callable[[Path], None], signed: Path, keys: KeyPair) -> None:
    change(signed)
    with pytest.raises(IntegrityError, match="changed, added or removed") as raised:
        open_bundle(signed, keys.public)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "content",
    ["", "{}", "[]", "null", "[1", "[" * 100_000, "\x00\xff", '{"verificationMaterial": {}}'],
    ids=["empty", "object", "list", "null", "cut", "deep", "binary", "half"],
)
def test_what_is_no_signature_is_refused(content: str, signed: Path, keys: KeyPair) -> None:
    (signed / SIGNATURE).write_bytes(content.encode("latin-1"))
    assert not open_bundle(signed).signature_checked
    with pytest.raises(IntegrityError, match="is not what the key"):
        open_bundle(signed, keys.public)


def test_forged_envelopes_are_refused(signed: Path, keys: KeyPair) -> None:
    def of_nobody(fields: dict[str, Any]) -> None:
        fields["dsseEnvelope"]["signatures"] = []

    def of_other_text(fields: dict[str, Any]) -> None:
        payload = fields["dsseEnvelope"]["payload"]
        fields["dsseEnvelope"]["payload"] = payload[:40] + ("A" if payload[40] != "A" else "B") + payload[41:]

    whole = (signed / SIGNATURE).read_bytes()
    for edit in (of_nobody, of_other_text):
        (signed / SIGNATURE).write_bytes(whole)
        edit_signature(signed, edit)
        with pytest.raises(IntegrityError, match="is not what the key"):
            open_bundle(signed, keys.public)


def test_a_signature_of_any_size_is_not_read(signed: Path, keys: KeyPair) -> None:
    os.truncate(signed / SIGNATURE, 2**40)  # a hole in the file, which takes no space
    with pytest.raises(IntegrityError, match="more than any signature has"):
        open_bundle(signed, keys.public)


def test_the_signature_is_a_plain_file(signed: Path, keys: KeyPair, tmp_path: Path) -> None:
    (signed / SIGNATURE).rename(tmp_path / "elsewhere")
    (signed / SIGNATURE).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(IntegrityError, match="is a link"):
        open_bundle(signed, keys.public)
    (signed / SIGNATURE).unlink()
    _add(f"{SIGNATURE}/inside")(signed)
    for key in (None, keys.public):
        with pytest.raises(IntegrityError):
            open_bundle(signed, key)


def test_a_signature_that_leaves_files_out_is_refused(bundle_copy: Path, keys: KeyPair) -> None:
    """The library takes from a signature what to ignore, so a signature of other files might be put into a bundle."""
    ignoring = hashing.Config().set_ignored_paths(paths=[SIGNATURE, "weights.safetensors"])
    signer = signing.Config().use_elliptic_key_signer(private_key=keys.private).set_hashing_config(ignoring)
    signer.sign(bundle_copy, bundle_copy / SIGNATURE)
    verifying.Config().use_elliptic_key_verifier(public_key=keys.public).verify(bundle_copy, bundle_copy / SIGNATURE)
    with pytest.raises(IntegrityError, match="is not what the key"):
        open_bundle(bundle_copy, keys.public)


def test_the_tools_of_model_signing_understand_each_other(signed: Path, keys: KeyPair) -> None:
    verifier = verifying.Config().use_elliptic_key_verifier(public_key=keys.public)
    verifier.verify(signed, signed / SIGNATURE)
    (signed / SIGNATURE).unlink()
    signing.Config().use_elliptic_key_signer(private_key=keys.private).sign(signed, signed / SIGNATURE)
    assert open_bundle(signed, keys.public).signature_checked


def test_warnings_of_the_library_stay_out_of_results(
    signed: Path, keys: KeyPair, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_signature(signed, lambda fields: fields["verificationMaterial"]["publicKey"].pop("hint"))
    assert open_bundle(signed, keys.public).signature_checked
    said = capsys.readouterr()
    assert said.out == ""
    assert "older verification material format" in said.err


def test_digests_do_not_cover_the_signature(signed: Path, keys: KeyPair) -> None:
    assert SIGNATURE not in write_manifest(signed, open_bundle(signed).manifest).files
    assert open_bundle(signed, keys.public).signature_checked


def test_a_signature_is_replaced_by_force_only(signed: Path, tmp_path: Path) -> None:
    other, before = key_pair(tmp_path, "other"), (signed / SIGNATURE).read_bytes()
    with pytest.raises(InputError, match="is already signed; give --force"):
        sign_bundle(open_bundle(signed), other.private)
    assert (signed / SIGNATURE).read_bytes() == before
    sign_bundle(open_bundle(signed), other.private, force=True)
    assert open_bundle(signed, other.public).signature_checked


@pytest.mark.parametrize("force", [False, True], ids=["first", "again"])
def test_a_signature_appears_whole_or_not_at_all(
    force: bool, bundle_copy: Path, keys: KeyPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    if force:
        sign_bundle(open_bundle(bundle_copy), keys.private)
    before = {file.name: file.read_bytes() for file in bundle_copy.iterdir()}

    def full(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        with pytest.raises(UnavailableError, match=r"model\.sig cannot be written \(No space left on device\)"):
            sign_bundle(open_bundle(bundle_copy), keys.private, force=force)
    assert {file.name: file.read_bytes() for file in bundle_copy.iterdir()} == before


def _no_key(folder: Path) -> KeyPair:
    return KeyPair(folder / "nowhere.pem", folder / "nowhere.pub")


def _folder(folder: Path) -> KeyPair:
    return KeyPair(folder, folder)


def _text(folder: Path) -> KeyPair:
    (folder / "text").write_text("no key")
    return KeyPair(folder / "text", folder / "text")


def _other_half(folder: Path) -> KeyPair:
    private, public = key_pair(folder)
    return KeyPair(public, private)


def _other_curve(folder: Path) -> KeyPair:
    return write_keys(ec.generate_private_key(ec.SECP256K1()), folder, "bitcoin")


def _edwards(folder: Path) -> KeyPair:
    return write_keys(ed25519.Ed25519PrivateKey.generate(), folder, "edwards")  # type: ignore[arg-type]


def _rsa(folder: Path) -> KeyPair:
    return write_keys(rsa.generate_private_key(65537, 2048), folder, "rsa")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_no_key, r"cannot be read \(No such file or directory\); give"),
        (_folder, r"cannot be read \(Is a directory\); give"),
        (_text, "not a usable .* key; accepted: elliptic-curve keys in PEM"),
        (_other_half, "not a usable .* key"),
        (_other_curve, "not a usable .* key"),
        (_edwards, "not a usable .* key"),
        (_rsa, "not a usable .* key"),
    ],
)
def test_what_is_no_key_is_bad_input(
    make: Callable[[Path], KeyPair], message: str, signed: Path, tmp_path: Path
) -> None:
    before = (signed / SIGNATURE).read_bytes()
    bad = make(tmp_path)
    with pytest.raises(InputError, match=message) as raised:
        sign_bundle(open_bundle(signed), bad.private, force=True)
    assert "private key" in str(raised.value)
    assert (signed / SIGNATURE).read_bytes() == before
    with pytest.raises(InputError, match=message) as raised:
        open_bundle(signed, bad.public)
    assert "public key" in str(raised.value)


def test_a_key_with_a_password_is_bad_input(bundle_copy: Path, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match="is protected by a password, which diffdeploy does not ask for; give an unlocked key"
    ):
        sign_bundle(open_bundle(bundle_copy), key_pair(tmp_path, password=b"secret").private)


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()], ids=lambda curve: curve.name)
def test_every_curve_of_the_library(curve: ec.EllipticCurve, bundle_copy: Path, tmp_path: Path) -> None:
    keys = write_keys(ec.generate_private_key(curve), tmp_path, "key")
    sign_bundle(open_bundle(bundle_copy), keys.private)
    assert open_bundle(bundle_copy, str(keys.public)).signature_checked


def test_nothing_goes_online(bundle_copy: Path, keys: KeyPair, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a connection was made")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    sign_bundle(open_bundle(bundle_copy), keys.private)
    assert open_bundle(bundle_copy, keys.public).signature_checked


@pytest.mark.parametrize("missing", ["model_signing", "OpenSSL"])
def test_without_the_library(missing: str, signed: Path, keys: KeyPair, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "model_signing"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(UnavailableError, match=r"pip install 'diffdeploy\[sign\]'"):
        open_bundle(signed, keys.public)
    with pytest.raises(UnavailableError, match=r"pip install 'diffdeploy\[sign\]'"):
        sign_bundle(open_bundle(signed), keys.private, force=True)
    assert not open_bundle(signed).signature_checked
