"""Signatures of bundles by a key pair, in the file format of OpenSSF model-signing; nothing goes online.

The digests in a manifest show damage, and anybody can write them again. A signature shows that the holder of a private
key signed these very files: all of the bundle but the signature itself, which the manifest therefore does not list.
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

# As the command of model-signing calls it.
SIGNATURE = "model.sig"
# A signature has about 200 bytes for each file of a bundle.
_LARGEST_SIGNATURE = 16 * 2**20


def sign_bundle(bundle: "Bundle", private_key: str | Path, *, force: bool = False) -> Path:
    """Sign a bundle as it is.

    Args:
        bundle: an opened bundle, whose digests have therefore been checked.
        private_key: PEM file of an elliptic-curve key without a password.
        force: replace a signature that is there.

    Returns:
        The file of the signature.

    Raises:
        InputError: the bundle is signed already, or the key cannot be used.
        UnavailableError: model-signing is not installed, or the signature cannot be written.
    """
    _require_library()
    from model_signing import signing

    target = bundle.path / SIGNATURE
    if target.exists() and not force:
        raise InputError(f"{bundle.path} is signed already; give --force to replace its {SIGNATURE}")
    try:
        signer = signing.Config().use_elliptic_key_signer(private_key=private_key)
    except TypeError as error:  # what cryptography raises where a password is needed
        raise InputError(
            f"{private_key} is locked by a password, which is never asked for; give an unlocked key, such as openssl "
            "pkey -in KEY -out UNLOCKED makes"
        ) from error
    except Exception as error:  # whatever cryptography raises at other files
        raise _unusable(private_key, "private key", error) from error
    # In the bundle, since a rename is atomic within one file system alone.
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
    """See that the holder of a key signed every file that is in a directory now.

    Args:
        directory: of a bundle, with nothing in it but files and folders.
        public_key: PEM file of the signer's elliptic-curve key.

    Raises:
        InputError: the key cannot be used.
        IntegrityError: there is no signature, or not one of this key over these files.
        UnavailableError: model-signing is not installed.
    """
    _require_library()
    from model_signing import verifying

    try:
        verifier = verifying.Config().use_elliptic_key_verifier(public_key=public_key)
    except Exception as error:  # whatever cryptography raises at what is no key
        raise _unusable(public_key, "public key", error) from error
    signature = directory / SIGNATURE
    if not signature.is_file():
        raise IntegrityError(f"{directory} has no signature: it lacks {SIGNATURE}; ask its maker to sign it")
    if (size := signature.stat().st_size) > _LARGEST_SIGNATURE:
        raise IntegrityError(f"{SIGNATURE} in {directory} has {size:,} bytes, more than any signature has")
    try:
        # Its warnings are printed, and results go to standard output.
        with redirect_stdout(sys.stderr):
            verifier.set_hashing_config(_every_file()).verify(directory, signature)
    except Exception as error:  # the file may be anybody's, and parsers below the library raise what they like
        raise IntegrityError(
            f"{directory} is not what the key {public_key} signed: its {SIGNATURE} is damaged or of another key, or "
            "files were changed, added or removed since; get the bundle again from its signer"
        ) from error


def _every_file() -> "hashing.Config":
    """What is hashed: all files but the signature, those for git included, which the library leaves out by itself."""
    from model_signing import hashing

    class EveryFile(hashing.Config):
        # The library ignores what a signature says to ignore, and nobody would have signed that.
        def add_ignored_paths(self, **_: object) -> None:
            pass

    config = EveryFile()  # type: ignore[no-untyped-call]  # the library does not annotate its constructors
    return config.set_ignored_paths(paths=[SIGNATURE], ignore_git_paths=False)


def _require_library() -> None:
    try:
        import model_signing  # noqa: F401 - a spec that is found does not say that it can be imported
    except ModuleNotFoundError as error:
        raise UnavailableError(
            f"signatures need {error.name}, which is not installed; pip install 'diffdeploy[sign]'"
        ) from error


def _unusable(key: str | Path, kind: str, error: Exception) -> InputError:
    if isinstance(error, OSError):
        return InputError(f"{key} cannot be read ({error.strerror}); give the file of a {kind}")
    return InputError(
        f"{key} is no {kind} that signatures take; accepted are elliptic-curve keys in PEM, of P-256, P-384 or P-521"
    )
