"""Directories that appear whole or not at all: written beside their place, and renamed once."""

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

# What `tempfile.mkdtemp` puts behind a prefix; a folder that a user calls `.out.old-notes` is none of ours.
_RANDOM = re.compile(r"[a-z0-9_]{8}")
# Seconds, within which whoever makes such a folder has locked it.
_YOUNG_S = 60


def check_directory(output: Path, *, marker: str, what: str, force: bool) -> None:
    """Check that a directory can be written or replaced, before the work whose result it takes.

    Args:
        output: the directory.
        marker: see `staged_directory`.
        what: see `staged_directory`.
        force: replace one that is there.

    Raises:
        InputError: something else is in the place, or a file in that of a parent.
    """
    if not output.exists():
        parent = next(path for path in output.absolute().parents if path.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            reason = "may not be written to" if parent.is_dir() else "is a file"
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
    # A rename may replace an empty folder, and no other.
    if not output.exists() or not any(output.iterdir()):
        staging.replace(output)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{output.name}.old-", dir=output.parent))
    output.replace(aside)
    try:
        staging.replace(output)
    except BaseException:  # an interrupt between the two renames must not lose the old one either
        aside.replace(output)
        raise
    shutil.rmtree(aside)


# The disk is full, a quota is, or files may not grow any more.
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _no_space(output: Path) -> UnavailableError:
    return UnavailableError(f"no space left to write {output}; nothing was kept: free some and try again")


def _clear_remains(output: Path, marker: str) -> None:
    """Remove what killed writers to the same place left, and put back a directory that one had set aside."""
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
    if alive:  # a writer that is at work may have set a directory aside itself
        return
    for aside in _siblings(output, "old"):
        if not output.exists() and (aside / marker).is_file():
            aside.replace(output)
        else:
            shutil.rmtree(aside, ignore_errors=True)


def _siblings(output: Path, kind: str) -> list[Path]:
    """The temporary folders of one kind that writers to ``output`` make beside it."""
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
def staged_directory(output: Path, *, marker: str, what: str, force: bool = False) -> Iterator[Path]:
    """A temporary sibling of ``output`` that becomes ``output`` when the block ends well, and is removed otherwise.

    Siblings that killed writers left are removed, too; those of writers that run are locked.

    Args:
        output: the directory; made with its parents.
        marker: file by which a directory of this kind is known; ``force`` replaces no other.
        what: what such a directory is called in errors.
        force: replace one that is there.

    Raises:
        InputError: ``output`` is taken or cannot be written.
        UnavailableError: the disk is full.
    """
    # First, since it may put back a directory that would then be in the way.
    _clear_remains(output, marker)
    check_directory(output, marker=marker, what=what, force=force)
    staging: Path | None = None
    # Parents that do not exist yet go again with a writer that fails.
    made = [p for p in (output.parent, *output.parent.parents) if not p.exists()]
    finished, lock = False, None
    try:
        staging = _staging_beside(output)
        lock = _locked(staging)
        yield staging
        # A temporary folder is for its owner alone; what is kept is as open as other files of the user.
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
