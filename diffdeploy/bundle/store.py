"""Bundles on disk: written completely or not at all, and checked byte by byte before anything in them is used."""

import os
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from diffdeploy.bundle.consistency import require_consistent
from diffdeploy.bundle.manifest import FileDigest, Manifest
from diffdeploy.bundle.signature import SIGNATURE, require_signature
from diffdeploy.errors import InputError, IntegrityError
from diffdeploy.files import file_sha256
from diffdeploy.staging import check_directory, staged_directory

__all__ = [
    "GOLDEN",
    "MANIFEST",
    "REPORT",
    "WEIGHTS",
    "Bundle",
    "check_output",
    "default_output",
    "is_bundle",
    "open_bundle",
    "staged_bundle",
    "write_manifest",
]

MANIFEST = "manifest.json"
WEIGHTS = "weights.safetensors"
REPORT = "verification.json"
GOLDEN = "golden.safetensors"

# The manifest of a block has about 5 kB.
_LARGEST_MANIFEST = 16 * 2**20


@dataclass(frozen=True)
class Bundle:
    """A bundle whose digests have been checked.

    Attributes:
        path: directory of the bundle.
        manifest: its manifest.
        signature_checked: true if it was also signed by the key that the user named.
    """

    path: Path
    manifest: Manifest
    signature_checked: bool = False

    @property
    def verified(self) -> bool:
        """True if the bundle passed verification when it was made, and contains the report."""
        return self.manifest.verified and REPORT in self.manifest.files


def default_output(name: str, layer: int | None, format_name: str) -> Path:
    """Default path of a bundle: ``artifacts/NAME-layerN-FORMAT``, or without the layer."""
    parts = [name, *([] if layer is None else [f"layer{layer}"]), format_name]
    return Path("artifacts") / "-".join(parts)


def _files_in(directory: Path) -> list[str]:
    """Relative paths of all files, sorted.

    Raises:
        IntegrityError: the directory contains a link, a device, a pipe or an empty folder, none of which an export
            creates; a link may lead anywhere, and reading a pipe may never end.
    """
    found: list[str] = []
    pending = [directory]
    while pending:
        folder = pending.pop()
        with os.scandir(folder) as entries:
            inside = list(entries)
        if not inside and folder != directory:
            raise IntegrityError(f"{folder.relative_to(directory)} in {directory} is an empty folder")
        for entry in inside:
            path = Path(entry.path)
            if entry.is_dir(follow_symlinks=False):
                pending.append(path)
            elif entry.is_file(follow_symlinks=False):
                found.append(path.relative_to(directory).as_posix())
            else:
                kind = "a link, and links may leave the bundle" if entry.is_symlink() else "neither a file nor a folder"
                raise IntegrityError(f"{path.relative_to(directory)} in {directory} is {kind}")
    return sorted(found)


def is_bundle(directory: Path) -> bool:
    """True if a directory has a manifest, valid or not."""
    return os.path.lexists(directory / MANIFEST)


def write_manifest(directory: Path, manifest: Manifest) -> Manifest:
    """Write ``manifest.json`` with the digests of all other files now in ``directory``, except a signature."""
    digests = {
        name: FileDigest(size=(directory / name).stat().st_size, sha256=file_sha256(directory / name))
        for name in _files_in(directory)
        if name not in (MANIFEST, SIGNATURE)
    }
    complete = manifest.model_copy(update={"files": digests})
    (directory / MANIFEST).write_bytes(complete.to_bytes())
    return complete


def open_bundle(path: str | Path, public_key: str | Path | None = None) -> Bundle:
    """Read a bundle and check every file in it.

    Args:
        path: the bundle's directory.
        public_key: key that must have signed the bundle, see `require_signature`; by default signatures are ignored.

    Raises:
        InputError: there is no bundle at ``path``, or the key cannot be used.
        IntegrityError: a byte changed; a file is missing, unlisted or not a regular file; a path leads out of the
            bundle; the manifest contradicts itself or the weights; or the bundle is not signed by the key.
        UnavailableError: a key is given, but model-signing is not installed.
    """
    directory = Path(path)
    if not is_bundle(directory):
        raise InputError(
            f"{directory} is not a bundle: it has no {MANIFEST}; give a directory that diffdeploy exported"
        )
    try:
        present = set(_files_in(directory))
        # Checked before the manifest, which may be forged, is parsed.
        if public_key is not None:
            require_signature(directory, public_key)
        manifest = _read_manifest(directory)
    except OSError as error:
        raise IntegrityError(f"{directory} cannot be read ({error.strerror or error})") from error
    _require_listed_files(directory, manifest, present)
    for name, digest in manifest.files.items():
        file = directory / name
        # The size is checked first, since a digest reads the whole file.
        if file.stat().st_size != digest.size or file_sha256(file) != digest.sha256:
            raise IntegrityError(f"{name} in {directory} is not the file that was exported: its sha256 differs")
    if WEIGHTS not in manifest.files:
        raise IntegrityError(f"the manifest of {directory} lists no {WEIGHTS}, which every bundle has")
    require_consistent(manifest, directory / WEIGHTS)
    return Bundle(directory, manifest, signature_checked=public_key is not None)


def _require_listed_files(directory: Path, manifest: Manifest, present: set[str]) -> None:
    """Check the names of files, before any file outside the bundle could be opened by such a name."""
    for name in manifest.files:
        relative = PurePosixPath(name)
        if relative.is_absolute() or ".." in relative.parts:
            raise IntegrityError(f"the manifest of {directory} names {name!r}, a path that leaves the bundle")
    expected = {MANIFEST, *manifest.files}
    if missing := sorted(expected - present):
        raise IntegrityError(f"{directory} lacks {', '.join(missing)}; copy the bundle again")
    # The signature covers the manifest, so the manifest cannot contain its digest.
    if extra := sorted(present - expected - {SIGNATURE}):
        raise IntegrityError(f"{directory} holds files that its manifest does not list: {', '.join(extra)}")


def _read_manifest(directory: Path) -> Manifest:
    if not (directory / MANIFEST).is_file():
        raise IntegrityError(f"{MANIFEST} in {directory} is a folder")
    if (size := (directory / MANIFEST).stat().st_size) > _LARGEST_MANIFEST:
        raise IntegrityError(f"{MANIFEST} in {directory} has {size:,} bytes, more than any export writes")
    return Manifest.from_bytes((directory / MANIFEST).read_bytes())


def check_output(output: Path, *, force: bool = False) -> None:
    """Check that a bundle can be written to ``output``; see `check_directory`."""
    check_directory(output, marker=MANIFEST, what="bundle", force=force)


def staged_bundle(output: Path, *, force: bool = False) -> AbstractContextManager[Path]:
    """Create a temporary sibling of ``output`` that becomes the bundle there; see `staged_directory`."""
    return staged_directory(output, marker=MANIFEST, what="bundle", force=force)
