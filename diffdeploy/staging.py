"""Directories that appear complete or not at all: written to a temporary sibling, and renamed once."""

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
from pathlib import Path

from diffdeploy.errors import InputError, UnavailableError

__all__ = ["check_directory", "staged_directory"]

# The suffix that `tempfile.mkdtemp` adds to a prefix; a user's folder `.out.old-notes` does not match.
_RANDOM = re.compile(r"[a-z0-9_]{8}")
# Age in seconds by which the creator of a temporary folder has locked it.
_YOUNG_S = 60


def check_directory(output: Path, *, marker: str, what: str, force: bool) -> None:
    """Check that a directory can be written or replaced, before starting the work whose result it will hold.

    Args:
        output: the directory.
        marker: see `staged_directory`.
        what: see `staged_directory`.
        force: true to replace an existing directory.

    Raises:
        InputError: the path holds something that must not be replaced, or a parent is a file or is not writable.
    """
    if not output.exists():
        parent = next(path for path in output.absolute().parents if path.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            reason = "is not writable" if parent.is_dir() else "is a file"
            raise InputError(f"{output} cannot be written, since {parent} {reason}; give another --output")
        return
    if not output.is_dir():
        raise InputError(f"{output} is a file; give a directory that does not exist yet")
    if not any(output.iterdir()):
        return
    if not force:
        raise InputError(f"{output} is not empty; give another --output, or --force to replace a {what}")
    if not (output / marker).is_file():
        raise InputError(
            f"{output} is not empty and not a {what}, so --force will not replace it; give another --output"
        )


def _replace(staging: Path, output: Path) -> None:
    """Move ``staging`` to ``output`` in one rename; an old directory is kept aside until the new one is in place."""
    # A rename can replace a directory only if it is empty.
    if not output.exists() or not any(output.iterdir()):
        staging.replace(output)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{output.name}.old-", dir=output.parent))
    output.replace(aside)
    try:
        staging.replace(output)
    except BaseException:  # an interrupt between the two renames must not lose the old directory
        aside.replace(output)
        raise
    shutil.rmtree(aside)


# The disk is full, the quota is exhausted, or the limit on file size is reached.
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _no_space(output: Path) -> UnavailableError:
    return UnavailableError(f"no space left to write {output}; nothing was kept: free some space and try again")


def _clear_remains(output: Path, marker: str) -> None:
    """Remove what writers to the same output left when they were killed, and restore a directory that one set aside."""
    alive = False
    for staging in _siblings(output, "new"):
        # A folder that was just created is not locked yet.
        young = staging.is_symlink() or time.time() - staging.lstat().st_mtime < _YOUNG_S
        lock = None if young else _locked(staging)
        if lock is None:
            alive = True
        else:
            shutil.rmtree(staging, ignore_errors=True)
            os.close(lock)
    if alive:  # a running writer may itself have set a directory aside
        return
    for aside in _siblings(output, "old"):
        if not output.exists() and (aside / marker).is_file():
            aside.replace(output)
        else:
            shutil.rmtree(aside, ignore_errors=True)


def _siblings(output: Path, kind: str) -> list[Path]:
    """Temporary folders of one kind that writers to ``output`` create next to it."""
    prefix = f".{output.name}.{kind}-"
    found = output.parent.glob(f"{glob.escape(prefix)}*")
    return [path for path in found if _RANDOM.fullmatch(path.name.removeprefix(prefix))]


def _locked(directory: Path) -> int | None:
    """File descriptor that locks a directory until it is closed or its process ends; ``None`` if already locked."""
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
        # A sibling, since a folder can be renamed only within one file system.
        return Path(tempfile.mkdtemp(prefix=f".{output.name}.new-", dir=output.parent))
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise _no_space(output) from error
        raise InputError(f"{output} cannot be written ({error.strerror}); give another --output") from error


@contextmanager
def staged_directory(output: Path, *, marker: str, what: str, force: bool = False) -> Iterator[Path]:
    """Yield a temporary sibling of ``output`` that is renamed to ``output`` on success, and removed otherwise.

    Siblings left behind by writers that were killed are removed, too; those of running writers are locked.

    Args:
        output: the directory to create, along with its parents.
        marker: file that identifies a directory of this kind; ``force`` replaces no other directory.
        what: name of such a directory in error messages.
        force: true to replace an existing directory.

    Raises:
        InputError: ``output`` exists or cannot be written.
        UnavailableError: the disk is full.
    """
    # First, since it may restore a directory that would then be in the way.
    _clear_remains(output, marker)
    check_directory(output, marker=marker, what=what, force=force)
    staging: Path | None = None
    # If the writer fails, parents that it created are removed again.
    made = [p for p in (output.parent, *output.parent.parents) if not p.exists()]
    finished, lock = False, None
    try:
        staging = _staging_beside(output)
        lock = _locked(staging)
        yield staging
        # Only the owner can read a temporary folder; the result gets the user's usual permissions.
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
        # Outside an except clause, so that files are also cleaned up after an interrupt.
        if not finished:
            if staging is not None:
                # The first error is the one that the user must see.
                shutil.rmtree(staging, ignore_errors=True)
            for directory in made:
                if directory.is_dir() and not any(directory.iterdir()):
                    directory.rmdir()


def _umask() -> int:
    # The umask can be read only by setting it.
    mask = os.umask(0)
    os.umask(mask)
    return mask
