"""Signatures of bundles with a key pair, in the file format of OpenSSF model-signing, without network access.

The digests in a manifest reveal damage, but anybody can recompute them. A signature shows that the holder of a private
key signed exactly these files: all files of the bundle except the signature, which the manifest therefore does not
list.
"""

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

from diffdeploy.errors import InputError, IntegrityError, UnavailableError

if TYPE_CHECKING:
    from model_signing import hashing

    from diffdeploy.bundle.store import Bundle

__all__ = ["SIGNATURE", "require_signature", "sign_bundle"]

# The file name that the command line of model-signing uses.
SIGNATURE = "model.sig"
# A signature takes about 200 bytes per file of a bundle.
_LARGEST_SIGNATURE = 16 * 2**20


def sign_bundle(bundle: "Bundle", private_key: str | Path, *, force: bool = False) -> Path:
    """Sign a bundle.

    Args:
        bundle: an opened bundle, whose digests have therefore been checked.
        private_key: PEM file of an elliptic-curve key without a password.
        force: true to replace an existing signature.

    Returns:
        Path of the signature file.

    Raises:
        InputError: the bundle is already signed, or the key cannot be used.
        UnavailableError: model-signing is not installed, or the signature cannot be written.
    """
    _require_library()
    from model_signing import signing

    target = bundle.path / SIGNATURE
    if target.exists() and not force:
        raise InputError(f"{bundle.path} is already signed; give --force to replace its {SIGNATURE}")
    try:
        signer = signing.Config().use_elliptic_key_signer(private_key=private_key)
    except TypeError as error:  # raised by cryptography if a password is needed
        raise InputError(
            f"{private_key} is protected by a password, which diffdeploy does not ask for; give an unlocked key, which "
            "openssl pkey -in KEY -out UNLOCKED makes"
        ) from error
    except Exception as error:  # cryptography raises various errors for other files
        raise _unusable(private_key, "private key", error) from error
    # Written inside the bundle, since a rename is atomic only within one file system.
    temporary = target.with_name(f".{SIGNATURE}.part")
    try:
        signer.set_hashing_config(_every_file()).sign(bundle.path, temporary)
        temporary.replace(target)
    except OSError as error:
        raise UnavailableError(f"{target} cannot be written ({error.strerror})") from error
    finally:
        temporary.unlink(missing_ok=True)
    return target


def require_signature(directory: Path, public_key: str | Path) -> None:
    """Check that the holder of a key signed every file that is now in a directory.

    Args:
        directory: directory of a bundle, which must contain only files and folders.
        public_key: PEM file of the signer's elliptic-curve key.

    Raises:
        InputError: the key cannot be used.
        IntegrityError: there is no signature, or none by this key for these files.
        UnavailableError: model-signing is not installed.
    """
    _require_library()
    from model_signing import verifying

    try:
        verifier = verifying.Config().use_elliptic_key_verifier(public_key=public_key)
    except Exception as error:  # cryptography raises various errors for files that are not keys
        raise _unusable(public_key, "public key", error) from error
    signature = directory / SIGNATURE
    if not signature.is_file():
        raise IntegrityError(f"{directory} has no signature: it lacks {SIGNATURE}; ask its maker to sign it")
    if (size := signature.stat().st_size) > _LARGEST_SIGNATURE:
        raise IntegrityError(f"{SIGNATURE} in {directory} has {size:,} bytes, more than any signature has")
    try:
        # The library prints warnings, which would be mixed with results on standard output.
        with redirect_stdout(sys.stderr):
            verifier.set_hashing_config(_every_file()).verify(directory, signature)
    except Exception as error:  # the file may be forged, and the library's parsers raise various errors
        raise IntegrityError(
            f"{directory} is not what the key {public_key} signed: its {SIGNATURE} is damaged or made by another key, "
            "or files were changed, added or removed since; get the bundle again from its signer"
        ) from error


def _every_file() -> "hashing.Config":
    """Config that hashes all files except the signature, even those of git, which the library ignores by default."""
    from model_signing import hashing

    class EveryFile(hashing.Config):
        # By default, the library ignores files that the signature tells it to ignore, which nobody would have signed.
        def add_ignored_paths(self, **_: object) -> None:
            pass

    config = EveryFile()  # type: ignore[no-untyped-call]  # the library does not annotate its constructors
    return config.set_ignored_paths(paths=[SIGNATURE], ignore_git_paths=False)


def _require_library() -> None:
    try:
        import model_signing  # noqa: F401 - finding a spec would not show that the import succeeds
    except ModuleNotFoundError as error:
        raise UnavailableError(
            f"signatures need {error.name}, which is not installed; pip install 'diffdeploy[sign]'"
        ) from error


def _unusable(key: str | Path, kind: str, error: Exception) -> InputError:
    if isinstance(error, OSError):
        return InputError(f"{key} cannot be read ({error.strerror}); give the file of a {kind}")
    return InputError(
        f"{key} is not a usable {kind}; accepted: elliptic-curve keys in PEM format, of P-256, P-384 or P-521"
    )
