"""Bundles on disk: written whole or not at all, and checked byte for byte before anything in them is used."""

import errno
import fcntl
import glob
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from diffdeploy.bundle.consistency import require_consistent
from diffdeploy.bundle.manifest import FileDigest, Manifest
from diffdeploy.bundle.signature import SIGNATURE, require_signature
from diffdeploy.errors import InputError, IntegrityError, UnavailableError
from diffdeploy.files import file_sha256

__all__ = [
    "GOLDEN",
    "MANIFEST",
    "REPORT",
    "WEIGHTS",
    "Bundle",
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

# Of a block it has about 5 kB.
_LARGEST_MANIFEST = 16 * 2**20
# What `tempfile.mkdtemp` puts behind a prefix; a folder that a user calls `.out.old-notes` is none of ours.
_RANDOM = re.compile(r"[a-z0-9_]{8}")
# Seconds, within which an export has locked the folder that it made.
_YOUNG_S = 60


@dataclass(frozen=True)
class Bundle:
    """A bundle whose digests have been checked.

    Attributes:
        path: its directory.
        manifest: what it says about itself.
        signature_checked: whether it is also signed by the key that its user named.
    """

    path: Path
    manifest: Manifest
    signature_checked: bool = False

    @property
    def verified(self) -> bool:
        """Whether verification accepted it when it was made, and its report is there."""
        return self.manifest.verified and REPORT in self.manifest.files


def default_output(name: str, layer: int | None, format_name: str) -> Path:
    """Where a bundle goes when the user does not say: ``artifacts/NAME-layerN-FORMAT``, or without the layer."""
    parts = [name, *([] if layer is None else [f"layer{layer}"]), format_name]
    return Path("artifacts") / "-".join(parts)


def _files_in(directory: Path) -> list[str]:
    """Relative paths of all files, in order.

    Raises:
        IntegrityError: a link, a device, a pipe or the like, or a folder with nothing in it, none of which an export
            makes; what a link leads to may lie anywhere, and a pipe never ends.
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
    """Whether a directory calls itself a bundle, whatever its manifest is."""
    return os.path.lexists(directory / MANIFEST)


def write_manifest(directory: Path, manifest: Manifest) -> Manifest:
    """Write ``manifest.json`` with the digests of all other files that are in ``directory`` now, except a signature."""
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
        public_key: key that must have signed it, see `require_signature`; by default a signature is not looked at.

    Raises:
        InputError: there is no bundle at ``path``, or the key cannot be used.
        IntegrityError: a byte changed, a file is missing, extra or no plain file, a path leads out of the bundle, the
            manifest contradicts itself or the weights, or the bundle is not signed by the key.
        UnavailableError: a key is given, and model-signing is not installed.
    """
    directory = Path(path)
    if not is_bundle(directory):
        raise InputError(
            f"{directory} is not a bundle: it has no {MANIFEST}; give a directory that diffdeploy exported"
        )
    try:
        present = set(_files_in(directory))
        # Before the manifest is parsed, which may be anybody's.
        if public_key is not None:
            require_signature(directory, public_key)
        manifest = _read_manifest(directory)
    except OSError as error:
        raise IntegrityError(f"{directory} cannot be read ({error.strerror or error})") from error
    _require_listed_files(directory, manifest, present)
    for name, digest in manifest.files.items():
        file = directory / name
        # The size first, since a digest reads the whole file.
        if file.stat().st_size != digest.size or file_sha256(file) != digest.sha256:
            raise IntegrityError(f"{name} in {directory} is not the file that was exported: its sha256 differs")
    if WEIGHTS not in manifest.files:
        raise IntegrityError(f"the manifest of {directory} lists no {WEIGHTS}, which every bundle has")
    require_consistent(manifest, directory / WEIGHTS)
    return Bundle(directory, manifest, signature_checked=public_key is not None)


def _require_listed_files(directory: Path, manifest: Manifest, present: set[str]) -> None:
    """Check names, before any file is looked at that a name leads to from outside."""
    for name in manifest.files:
        relative = PurePosixPath(name)
        if relative.is_absolute() or ".." in relative.parts:
            raise IntegrityError(f"the manifest of {directory} names {name!r}, a path that leaves the bundle")
    expected = {MANIFEST, *manifest.files}
    if missing := sorted(expected - present):
        raise IntegrityError(f"{directory} lacks {', '.join(missing)}; copy the bundle again")
    # The signature covers the manifest, which cannot hold its digest.
    if extra := sorted(present - expected - {SIGNATURE}):
        raise IntegrityError(f"{directory} holds files that its manifest does not list: {', '.join(extra)}")


def _read_manifest(directory: Path) -> Manifest:
    if not (directory / MANIFEST).is_file():
        raise IntegrityError(f"{MANIFEST} in {directory} is a folder")
    if (size := (directory / MANIFEST).stat().st_size) > _LARGEST_MANIFEST:
        raise IntegrityError(f"{MANIFEST} in {directory} has {size:,} bytes, more than any export writes")
    return Manifest.from_bytes((directory / MANIFEST).read_bytes())


def _check_output(output: Path, force: bool) -> None:
    if not output.exists():
        return
    if not output.is_dir():
        raise InputError(f"{output} is a file; give a directory that does not exist yet")
    if not any(output.iterdir()):
        return
    if not force:
        raise InputError(f"{output} is not empty; give another --output, or --force to replace a bundle")
    if not (output / MANIFEST).is_file():
        raise InputError(
            f"{output} is not empty and not a bundle, so --force will not replace it; give another --output"
        )


def _replace(staging: Path, output: Path) -> None:
    """Move ``staging`` to ``output`` in one rename; an old bundle is kept aside until the new one is in place."""
    # A rename may replace an empty folder, and no other.
    if not output.exists() or not any(output.iterdir()):
        staging.replace(output)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{output.name}.old-", dir=output.parent))
    output.replace(aside)
    try:
        staging.replace(output)
    except BaseException:  # an interrupt between the two renames must not lose the old bundle either
        aside.replace(output)
        raise
    shutil.rmtree(aside)


# The disk is full, a quota is, or files may not grow any more.
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _no_space(output: Path) -> UnavailableError:
    return UnavailableError(f"no space left to write {output}; nothing was kept: free some and try again")


def _clear_remains(output: Path) -> None:
    """Remove what exports to the same place left that were killed, and put back a bundle that one had set aside."""
    alive = False
    for staging in _siblings(output, "new"):
        # One that was just made is not locked yet.
        young = staging.is_symlink() or time.time() - staging.lstat().st_mtime < _YOUNG_S
        lock = None if young else _locked(staging)
        if lock is None:
            alive = True
        else:
            shutil.rmtree(staging, ignore_errors=True)
            os.close(lock)
    if alive:  # an export that is at work may have set a bundle aside itself
        return
    for aside in _siblings(output, "old"):
        if not output.exists() and (aside / MANIFEST).is_file():
            aside.replace(output)
        else:
            shutil.rmtree(aside, ignore_errors=True)


def _siblings(output: Path, kind: str) -> list[Path]:
    """The temporary folders of one kind that exports to ``output`` make beside it."""
    prefix = f".{output.name}.{kind}-"
    found = output.parent.glob(f"{glob.escape(prefix)}*")
    return [path for path in found if _RANDOM.fullmatch(path.name.removeprefix(prefix))]


def _locked(directory: Path) -> int | None:
    """A descriptor that holds the lock of a directory until it is closed, or its process ends; ``None`` if taken."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _staging_beside(output: Path) -> Path:
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        # A sibling, since a folder is renamed within one file system alone.
        return Path(tempfile.mkdtemp(prefix=f".{output.name}.new-", dir=output.parent))
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise _no_space(output) from error
        raise InputError(f"{output} cannot be written ({error.strerror}); give another --output") from error


@contextmanager
def staged_bundle(output: Path, *, force: bool = False) -> Iterator[Path]:
    """A temporary sibling of ``output`` that becomes ``output`` when the block ends well, and is removed otherwise.

    Siblings that killed exports left are removed, too; those of exports that run are locked.

    Raises:
        InputError: ``output`` is taken or cannot be written.
        UnavailableError: the disk is full.
    """
    # First, since it may put back a bundle that would then be in the way.
    _clear_remains(output)
    _check_output(output, force)
    staging: Path | None = None
    # Parents that do not exist yet go again with an export that fails.
    made = [p for p in (output.parent, *output.parent.parents) if not p.exists()]
    finished, lock = False, None
    try:
        staging = _staging_beside(output)
        lock = _locked(staging)
        yield staging
        # A temporary folder is for its owner alone; a bundle is as open as other files of the user.
        staging.chmod(0o777 & ~_umask())
        _replace(staging, output)
        finished = True
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise _no_space(output) from error
        raise
    finally:
        if lock is not None:
            os.close(lock)
        # Not in an except clause: an interrupt cleans up as well.
        if not finished:
            if staging is not None:
                # What went wrong first is what the user must hear of.
                shutil.rmtree(staging, ignore_errors=True)
            for directory in made:
                if directory.is_dir() and not any(directory.iterdir()):
                    directory.rmdir()


def _umask() -> int:
    # It can be read only by setting another.
    mask = os.umask(0)
    os.umask(mask)
    return mask
